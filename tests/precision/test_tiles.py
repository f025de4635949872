"""Tables of the kernel's tiles: read, refused, looked up, used, and said to be used."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams  # exported nowhere as of jax 0.10

from altgrad_jax.precision import dot
from altgrad_jax.precision.audit import Audit, Finding, Gemm
from altgrad_jax.precision.kernels import fp8_matmul as kernel
from altgrad_jax.precision.kernels.tiles import BY_SIZE, CANDIDATES, Product, TileTable, choose_tiles, load_tiles
from altgrad_jax.precision.kernels.tiles_used import tiles_used
from altgrad_jax.precision.policy import resolve
from tests.precision.layers import normal, prepare, run

SMALL = CANDIDATES[-1]  # which the rule chooses for no product: of two equally small ones it takes the first
ROW = {"type": "e5m2", "m": 128, "n": 256, "k": 128, "tiles": vars(SMALL)}
TABLE = TileTable(((Product("e5m2", 128, 256, 128), SMALL),), "tiles.json", "NVIDIA H100")


def written(tmp_path, content) -> str:
    file = tmp_path / "tiles.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(file)


def table_of(*rows) -> dict:
    return {"results": {"gpu": "NVIDIA H100", "products": list(rows)}}


def test_a_table_is_read_and_looked_up(tmp_path):
    file = written(tmp_path, table_of(ROW, ROW | {"type": "e4m3fn", "milliseconds": 1.0}))
    table = load_tiles(file)
    assert (table.source, table.gpu, len(table.entries)) == (file, "NVIDIA H100", 2)
    assert table.tiles(Product("e5m2", 128, 256, 128)) == SMALL != choose_tiles(128, 256, 128)
    other = Product("e5m2", 256, 256, 128)
    assert table.find(other) is None and table.tiles(other) == choose_tiles(256, 256, 128)
    assert hash(table) == hash(load_tiles(file)), "it is part of what compiled programs are known by"
    assert load_tiles(written(tmp_path, table_of())).entries == ()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "cannot be read as JSON: Expecting property name"),
        ("[1]", "is no table of tiles: it has no results.gpu or results.products"),
        ({"results": {"products": []}}, "it has no results.gpu"),
        (table_of(7), "product 1: it is no object with an object `tiles`"),
        (table_of(ROW, {"type": "e5m2"}), "product 2: tiles is missing"),
        (table_of(ROW | {"m": 128.0}), "m is 128.0, which is no count"),
        (table_of(ROW | {"m": True}), "m is True, which is no count"),
        (table_of(ROW | {"k": 0}), "k is 0, which is no count"),
        (table_of(ROW | {"type": "bf16"}), "the type 'bf16' is not one of e5m2, e4m3fn"),
        (table_of(ROW | {"type": ["e5m2"]}), "the type ['e5m2'] is not one of"),
        (table_of(ROW | {"n": 100}), "do not divide e5m2 128x100x128"),
        (table_of(ROW | {"tiles": {"m": 64, "n": 64, "k": 128}}), "product 1: stages is missing"),
        (table_of(ROW | {"tiles": vars(replace(SMALL, stages=9))}), "none of the kernel's candidates; measure again"),
        (table_of(ROW, ROW | {"tiles": vars(CANDIDATES[0])}), "product 2: e5m2 128x256x128 has two different tilings"),
    ],
)
def test_malformed_tables(tmp_path, content, says):
    file = written(tmp_path, content)
    with pytest.raises(ValueError) as caught:
        load_tiles(file)
    assert says in str(caught.value) and str(caught.value).startswith(file) and "\n" not in str(caught.value)


def test_no_such_file(tmp_path):
    with pytest.raises(ValueError, match=r"none\.json cannot be read as JSON: .*No such file"):
        load_tiles(str(tmp_path / "none.json"))


def test_the_three_products_of_a_layer_are_looked_up(monkeypatch):
    """Of 100 tokens, 130 inputs and 250 outputs, padded. Only the first two are of one size."""
    both, dw = Product("e5m2", 128, 256, 256), Product("e5m2", 256, 256, 128)
    table = TileTable(((both, SMALL),), "tiles.json", "NVIDIA H100")
    used = []

    def recorded(a_MK, b_NK, tiles):
        used.append((kernel.product_of(a_MK, b_NK), tiles))
        return kernel.reference(a_MK, b_NK)

    monkeypatch.setattr(kernel, "fp8_matmul", recorded)
    x, w, g = (jnp.asarray(normal(i, *shape)) for i, shape in enumerate(((100, 130), (130, 250), (100, 250))))
    prepared = replace(prepare(w, "e5m2", native=True), kernel=table)
    y, x_operand, _ = dot.product_forward(x, prepared)
    dx, dw_IO, _ = dot.product_backward(g, x_operand, prepared)
    assert used == [(both, SMALL), (both, SMALL), (dw, choose_tiles(*dw[1:]))]
    expected = run(x, w, None, g, "e5m2", native=True)
    for one, other in zip((y, dx, dw_IO), (expected.y, expected.dx, expected.dw), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5 * np.abs(other).max())


@pytest.mark.slow
def test_the_kernel_multiplies_in_the_table_s_tiles():
    """On Pallas's interpreter, in tiles that the rule would not take. Sums of small whole numbers are exact."""
    a, b = (jnp.asarray(np.random.default_rng(i).integers(-3, 4, (100, 90)), jnp.float8_e5m2) for i in (0, 1))
    table = TileTable(((kernel.product_of(a, b), SMALL),), "tiles.json", "NVIDIA H100")
    found = kernel.fp8_matmul(a, b, table.tiles(kernel.product_of(a, b)), InterpretGPUParams())
    np.testing.assert_array_equal(found, np.asarray(a, np.float64) @ np.asarray(b, np.float64).T)


def test_the_policy_hands_it_on(monkeypatch):
    monkeypatch.setattr("altgrad_jax.precision.policy.fp8_hardware", lambda: "H100")
    monkeypatch.setattr("altgrad_jax.precision.policy.has_wgmma", lambda: True)
    shapes = {"lm_head": (64, 96)}
    for options, expected in (
        ({"kernel": "pallas", "tiles": TABLE}, TABLE),
        ({"kernel": "pallas"}, BY_SIZE),
        ({}, None),
    ):
        policy = resolve([("lm_head", "e5m2")], shapes, **options)
        prepared, _ = policy.prepare({"lm_head": jnp.ones((64, 96))}, policy.init())
        assert prepared["lm_head"].kernel is expected


def finding(product: str, engine: str, shape: tuple[int, int, int]) -> Finding:
    met = ("e5m2", "e5m2")
    gemm = Gemm("lm_head", product, (1, *shape), met, engine, 1, True, "", 0, "call")
    return Finding("lm_head", product, met, True, (gemm,))


def test_what_a_run_says_of_it():
    small, large = (128, 256, 128), (256, 256, 128)
    step = Audit((finding("forward", "Pallas", small), finding("dx", "Pallas", large), finding("dw", "XLA", small)), ())
    used = tiles_used(step, TABLE)
    assert used.line() == (
        "kernel tiles: 1 of 2 from tiles.json, measured on NVIDIA H100; by size, for it does not have them: e5m2"
        " 256x256x128"
    )
    assert used.as_json() == {
        "table": {"file": "tiles.json", "gpu": "NVIDIA H100"},
        "measured": {"e5m2 128x256x128": "64x64x128x6"},
        "by_size": {"e5m2 256x256x128": "64x64x128x4"},
    }
    only = Audit(step.findings[:1], ())
    assert tiles_used(only, TABLE).line() == "kernel tiles: 1 of 1 from tiles.json, measured on NVIDIA H100"
    assert tiles_used(only, BY_SIZE).line().startswith("kernel tiles: all 1 by size, none measured")
    nothing = Audit(step.findings[2:], ())
    assert tiles_used(nothing, BY_SIZE).line() == ""
    assert "tiles.json is not used" in tiles_used(nothing, TABLE).line()


def test_sizes_are_those_of_the_padded_operands():
    a, b = (jax.ShapeDtypeStruct(shape, jnp.float8_e4m3fn) for shape in ((130, 50), (128, 50)))
    assert kernel.product_of(a, b) == Product("e4m3fn", 256, 128, 128)
    assert str(Product("e4m3fn", 256, 128, 128)) == "e4m3fn 256x128x128"
