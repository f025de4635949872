"""Rules on layer paths: which layer they give which recipe, what they refuse, and one program for many formats."""

import dataclasses
import re

import jax
import ml_dtypes
import numpy as np
import pytest

from altgrad_jax.layers import layer_shapes, layer_weights
from altgrad_jax.model import GPTConfig
from altgrad_jax.precision import policy as policies
from altgrad_jax.precision.formats import get_format
from altgrad_jax.precision.policy import Policy, parse_rule, resolve
from altgrad_jax.state import init_params, model_structure
from altgrad_jax.step import window_loss
from tests import numpy_gpt

MODEL = GPTConfig(
    n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=13, tie_embeddings=False, compute_dtype="float32"
)
SHAPES = layer_shapes(MODEL)
DENSE = ("attn.qkv", "attn.proj", "mlp.up", "mlp.down")
LAYERS = [*(f"blocks.{i}.{name}" for i in range(2) for name in DENSE), "lm_head", "wte", "wpe"]
TOKENS = np.random.default_rng(0).integers(0, MODEL.vocab_size, (1, 4, MODEL.block_size + 1)).astype(np.int32)


def recipes(*rules: tuple[str, str], **options) -> dict[str, str]:
    """Layer -> recipe, of the layers that the rules quantise."""
    return {plan.path: plan.recipe.name for plan in resolve(rules, SHAPES, **options).plans}


def test_layers_are_named_in_the_networks_order():
    assert list(SHAPES) == LAYERS
    expected = {"attn.qkv": (16, 48), "attn.proj": (16, 16), "mlp.up": (16, 64), "mlp.down": (64, 16)}
    assert {name: SHAPES[f"blocks.1.{name}"] for name in DENSE} == expected
    assert [SHAPES[name] for name in ("lm_head", "wte", "wpe")] == [(16, 13), (13, 16), (8, 16)]
    tied = layer_shapes(dataclasses.replace(MODEL, tie_embeddings=True))
    assert tied == SHAPES, "a tied head is a product of its own, with the shape of one"
    many = layer_shapes(dataclasses.replace(MODEL, n_layer=11))
    assert [name for name in many if "qkv" in name] == [f"blocks.{i}.attn.qkv" for i in range(11)]


def test_the_first_match_decides():
    rules = (r"blocks\.0\..*", "e4m3"), (r"blocks\..*\.attn\..*", "e5m2"), (r".*", "hybrid")
    expected = dict.fromkeys(LAYERS, "hybrid")
    expected |= {name: "e5m2" for name in LAYERS if ".attn." in name}
    expected |= {name: "e4m3" for name in LAYERS if name.startswith("blocks.0.")}
    assert recipes(*rules) == expected and list(recipes(*rules)) == LAYERS
    assert recipes(rules[1], rules[0], rules[2])["blocks.0.attn.qkv"] == "e5m2"


def test_a_rule_of_bf16_keeps_layers_from_later_rules():
    assert set(recipes((r"lm_head|w.e", "bf16"), (r".*", "e5m2"))) == set(LAYERS[:8])
    assert recipes((r".*", "bf16")) == recipes() == {}
    assert resolve([(".*", "bf16")], SHAPES).init() == {}


def test_a_pattern_matches_the_whole_path():
    assert list(recipes((r"blocks\.1\.mlp\.up", "e5m2"))) == ["blocks.1.mlp.up"]
    for part in ("blocks", "mlp", r"1\.mlp\.up", "lm_hea", "m_head", "wt"):
        with pytest.raises(ValueError, match="matches no layer"):
            recipes((part, "e5m2"))


def test_rules_that_decide_nothing_name_the_layers():
    with pytest.raises(ValueError) as caught:
        recipes((".*attn.*", "e5m2"), ("block.0.*", "e4m3"))
    assert str(caught.value) == (
        "precision rule 2 ('block.0.*', 'e4m3') matches no layer; the layers are blocks.0-1.attn.qkv,"
        " blocks.0-1.attn.proj, blocks.0-1.mlp.up, blocks.0-1.mlp.down, lm_head, wte, wpe"
    )
    with pytest.raises(
        ValueError, match=r"rule 3 \('.*qkv', 'e4m3'\) matches only layers that earlier rules have deci"
    ):
        recipes(("lm_head", "e5m2"), ("blocks.*", "bf16"), (".*qkv", "e4m3"))


@pytest.mark.parametrize("rule", ["e5m2", ("a", "e5m2", "b"), ("a",), (1, "e5m2"), ("a", None), None, {"a": "e5m2"}])
def test_what_is_no_rule(rule):
    with pytest.raises(ValueError, match=re.escape(f"precision rule {rule!r} is not a pair (pattern, recipe)")):
        parse_rule(rule)


def test_bad_patterns_and_recipes():
    with pytest.raises(ValueError, match=r"rule \('blocks\(', 'e5m2'\): the pattern is no regular expression"):
        recipes(("blocks(", "e5m2"))
    with pytest.raises(ValueError, match="unknown recipe or format 'hybird': did you mean 'hybrid'"):
        recipes((".*", "hybird"))
    pattern, recipe = parse_rule(["wte", "bf16"])  # as JSON gives it
    assert pattern.pattern == "wte" and recipe is None


def test_table_has_a_row_for_every_layer():
    rows = resolve([(r".*qkv", "hybrid scaling=current g.margin=1"), ("wte", "e4m3 scaling=none")], SHAPES).table()
    assert [row["layer"] for row in rows] == LAYERS
    assert [row["shape"] for row in rows] == [list(shape) for shape in SHAPES.values()]
    by_layer = {row["layer"]: row for row in rows}
    assert by_layer["blocks.1.attn.qkv"] == {
        "layer": "blocks.1.attn.qkv",
        "shape": [16, 48],
        "recipe": "hybrid scaling=current g.margin=1",
        "activation": "e4m3fn current",
        "weight": "e4m3fn current",
        "gradient": "e5m2 current margin 1",
        "backend": "emulated",
        "note": "no FP8 matrix units on this machine",
    }
    assert by_layer["wte"] == {
        **{"layer": "wte", "shape": [13, 16], "recipe": "e4m3 scaling=none", "weight": "e4m3fn none"},
        **{"backend": "emulated", "note": "rounded when looked up"},
    }
    assert by_layer["lm_head"] == {"layer": "lm_head", "shape": [16, 13], "recipe": "bf16", "backend": "16-bit"}


def test_lines_group_layers_that_run_alike():
    policy = resolve([(r"blocks\.0\.mlp\.up", "e4m3"), (r"blocks\..*", "e5m2_cast"), ("wpe", "e5m2")], SHAPES)
    cast = "activation, weight, gradient e5m2 none overflows"
    delayed = cast.replace("e5m2 none overflows", "e4m3fn delayed(16)")
    here = "emulated (no FP8 matrix units on this machine)"
    assert policy.lines() == [
        "blocks.*.attn.qkv 16x48, blocks.*.attn.proj 16x16, blocks.*.mlp.down 64x16, blocks.*.mlp.up 16x64 [7 layers]:"
        f" {cast}, {here}",
        f"blocks.*.mlp.up 16x64: {delayed}, {here}",
        "lm_head 16x13, wte 13x16 [2 layers]: bf16, 16-bit",
        "wpe 8x16: weight e5m2 delayed(16), emulated (rounded when looked up)",
    ]


def test_identity_is_the_arithmetic_not_the_machine(monkeypatch):
    rules = ((r".*qkv", "e5m2 history=3"), ("wte", "e4m3"))
    here = resolve(rules, SHAPES).identity()
    assert here == {
        "precision.layers.blocks.0.attn.qkv": "e5m2 delayed(3) | e5m2 delayed(3) | e5m2 delayed(3)",
        "precision.layers.blocks.1.attn.qkv": "e5m2 delayed(3) | e5m2 delayed(3) | e5m2 delayed(3)",
        "precision.layers.wte": "e4m3fn delayed(16)",
    }
    monkeypatch.setattr(policies, "fp8_hardware", lambda: "H200")
    assert resolve(rules, SHAPES).identity() == resolve(rules, SHAPES, backend="emulated").identity() == here
    options = ["e5m2 history=4", "e4m3 history=3", "e5m2 history=3 w.rounding=toward_zero", "e5m2 scaling=current"]
    options += ["e5m2 history=3 g.overflow=special", "e5m2 history=3 x.margin=1", "e5m2 scaling=static scale=2"]
    options += ["e5m2 scaling=static scale=3", "e5m2 scaling=current granularity=channel", "mxfp8"]
    others = [str(resolve([(r".*qkv", option)], SHAPES).identity()) for option in options]
    assert len(set(others)) == len(options)


# Backends.


def backends(rule: str, **options) -> tuple[bool, str]:
    """Whether the first block's qkv runs natively, and what is said about it."""
    [plan] = resolve([(r"blocks\.0\.attn\.qkv", rule)], SHAPES, **options).plans
    return plan.native, plan.why


def test_without_matrix_units():
    assert policies.fp8_hardware() == ""
    assert backends("e5m2") == backends("hybrid") == (False, "no FP8 matrix units on this machine")
    assert backends("hybrid", backend="native") == (True, "no FP8 matrix units on this machine")
    assert backends("e3m4:inf=0,nan=0") == (False, "XLA has no dtype e3m4:inf=0,nan=0")
    assert backends("mxfp8") == (False, "block scales need matrix units with microscaling")
    with pytest.raises(ValueError) as caught:
        recipes((".*", "hybrid"), strict=True)
    assert str(caught.value) == (
        "precision.strict: 9 layers would not be multiplied in 8 bits here, blocks.0.attn.qkv the first: no FP8 matrix"
        " units on this machine; use precision.strict=False to run them all the same"
    )
    assert recipes((".*", "bf16"), strict=True) == {}
    assert recipes(("wte", "e5m2"), strict=True) == {"wte": "e5m2"}, "a table is not multiplied"


@pytest.mark.parametrize(
    ("recipe", "why"),
    [
        ("e3m2fn", "XLA has no dtype e3m2fn"),
        ("e4m3 g=e6m1", "XLA has no dtype e6m1"),
        ("binary8p4", "XLA has no dtype binary8p4"),
        ("mxfp8", "block scales need matrix units with microscaling"),
        ("hybrid g.scaling=mx", "block scales need matrix units with microscaling"),
        ("float16", "XLA has no dtype float16"),
    ],
)
@pytest.mark.parametrize("hardware", ["", "H200"])
def test_what_has_no_native_form(monkeypatch, recipe, why, hardware):
    monkeypatch.setattr(policies, "fp8_hardware", lambda: hardware)
    if recipe != "float16":
        assert backends(recipe) == (False, why)
    assert not backends(recipe)[0] and backends(recipe)[1]
    with pytest.raises(ValueError, match=r"precision.backend=native: blocks.0.attn.qkv cannot run as .*; use auto or"):
        backends(recipe, backend="native")
    with pytest.raises(ValueError, match="would not be multiplied in 8 bits here"):
        backends(recipe, strict=True)


def test_with_matrix_units(monkeypatch):
    monkeypatch.setattr(policies, "fp8_hardware", lambda: "H200")
    for good in ("hybrid", "e4m3", "hybrid scaling=current granularity=channel", "e5m2 x=e4m3fn g=e4m3fn"):
        assert backends(good) == backends(good, strict=True) == (True, "")
    note = "cuBLASLt multiplies no E5M2 by E5M2, XLA may convert to 16 bits"
    # In y = x w, in dx = g w^T, and in dw = x^T g.
    for mixed in ("e5m2", "e5m2 g=e4m3fn", "e5m2 x=e4m3fn", "e5m2 w=e4m3fn"):
        assert backends(mixed) == backends(mixed, strict=True) == (True, note), "the audit decides"
    assert backends("hybrid", backend="emulated") == (False, "precision.backend=emulated")
    with pytest.raises(ValueError, match=r"the first: precision.backend=emulated"):
        backends("hybrid", backend="emulated", strict=True)
    assert backends("hybrid", traced=True) == (False, "the format is a traced value")


@pytest.mark.parametrize("fmt", ["e4m3", "e3m4", "e4m3b11fnuz", "e5m2fnuz", "e4m3fnuz"])
def test_float8_dtypes_that_no_nvidia_unit_multiplies(monkeypatch, fmt):
    """XLA has them as dtypes and converts them to 16 bits, which must be said, and is no faster than emulation."""
    monkeypatch.setattr(policies, "fp8_hardware", lambda: "H200")
    recipe, name = f"hybrid x={fmt} w={fmt}", get_format(fmt).name
    note = f"FP8 matrix units multiply e4m3fn and e5m2, not {name}"
    assert backends(recipe) == (False, note)
    assert backends(recipe, backend="native") == (True, note)
    with pytest.raises(ValueError, match=f"precision.strict: .*{note}"):
        backends(recipe, strict=True)


@pytest.mark.parametrize(
    ("platform", "capability", "found"),
    [
        ("cpu", None, ""),
        ("gpu", "8.0", ""),
        ("gpu", "8.9", "a device"),
        ("gpu", "9.0", "a device"),
        ("gpu", "10.0", "a device"),
        ("gpu", "gfx942", ""),  # AMD's: other formats, another library
        ("tpu", None, ""),
    ],
)
def test_what_counts_as_hardware(monkeypatch, platform, capability, found):
    device = type("Device", (), {"platform": platform, "device_kind": "a device"})()
    if capability:
        device.compute_capability = capability
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert policies.fp8_hardware() == found
    if not found:
        old = "a device has compute capability 8.0, FP8 matrix units begin with 8.9"
        assert policies.why_no_fp8() == (old if capability == "8.0" else "no FP8 matrix units on this machine")
        assert backends("hybrid") == (False, policies.why_no_fp8())


# Tables.


def untied() -> dict:
    return numpy_gpt.random_like(jax.eval_shape(lambda: init_params(MODEL, 0)), 1)


def quantised(policy: Policy, params: dict) -> dict:
    prepared, _ = policy.prepare(layer_weights(params), policy.init())
    probes = policy.probes(prepared)
    return {path: (layer, probes.get(path)) for path, layer in prepared.items()}


def test_tables_are_rounded_at_lookup_and_their_gradient_goes_straight_through():
    policy = resolve([("wte", "e4m3fn scaling=static scale=4"), ("wpe", "e5m2 scaling=none")], SHAPES)
    assert [plan.roles for plan in policy.plans] == [("weight",), ("weight",)]
    graphdef, params = model_structure(MODEL), untied()

    @jax.jit
    def loss_and_grad(params, layers):
        return jax.value_and_grad(lambda p: window_loss(graphdef, p, TOKENS[0], 64, None, layers))(params)

    loss, grads = loss_and_grad(params, quantised(policy, params))
    by_hand = params | {
        "wte": (params["wte"] * 4).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) / 4,
        "wpe": params["wpe"].astype(ml_dtypes.float8_e5m2).astype(np.float32),
    }
    expected_loss, expected = loss_and_grad(by_hand, {})
    assert loss == pytest.approx(float(expected_loss), rel=1e-6)
    for actual, reference in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(actual, reference, rtol=1e-5, atol=1e-7)
    assert abs(loss - loss_and_grad(params, {})[0]) > 1e-3


@pytest.mark.parametrize("recipe", ["e3m4 scaling=current granularity=channel", "mxfp4"])
def test_scales_of_a_table_run_along_its_rows(recipe):
    params = untied()
    params["wte"] *= 10.0 ** np.arange(-6, 7)[:, None]  # rows of very different sizes
    policy = resolve([("wte", recipe)], SHAPES)
    layer, probe = quantised(policy, params)["wte"]
    assert probe is None
    rows = np.asarray(layer.forward.values, np.float32) * np.asarray(layer.forward.inverse_scale)
    worst = np.abs(rows - params["wte"]).max(axis=1) / np.abs(params["wte"]).max(axis=1)
    # mxfp4's largest value is 6, and a block's amax may be scaled up to just under 8: at most a quarter is cut off.
    assert (worst <= 0.25).all(), worst


def test_a_tied_head_is_quantised_apart_from_the_table():
    model = dataclasses.replace(MODEL, tie_embeddings=True)
    params = numpy_gpt.random_like(jax.eval_shape(lambda: init_params(model, 0)), 1)
    for rules, paths in (
        ([("lm_head", "e5m2")], {"lm_head"}),
        ([("wte", "e5m2")], {"wte"}),
        ([("lm_head|wte", "e5m2")], {"lm_head", "wte"}),
    ):
        layers = quantised(resolve(rules, layer_shapes(model)), params)
        assert set(layers) == paths
        shapes = {path: layer.forward.values.shape for path, (layer, _) in layers.items()}
        assert shapes == {path: {"lm_head": (16, 13), "wte": (13, 16)}[path] for path in paths}


def test_a_policy_is_a_value():
    """Resolved twice it is equal, and hashable, as a static argument must be."""
    shapes = {"lm_head": (16, 31)}
    a, b, other = (resolve([(".*", recipe)], shapes) for recipe in ("e5m2", "e5m2", "e4m3"))
    assert a == b and hash(a) == hash(b) and a != other
