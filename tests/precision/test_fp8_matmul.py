"""The Pallas kernel: on Pallas's interpreter against its reference, and through the compiler for an H100."""

import importlib.util
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams  # exported nowhere as of jax 0.10

from altgrad_jax.precision.kernels.fp8_matmul import fp8_matmul, reference
from altgrad_jax.precision.kernels.tiles import CANDIDATES, MULTIPLE, SHARED_BYTES, Tiles, choose_tiles
from altgrad_jax.precision.policy import resolve

SMALL = Tiles(64, 64, 128, 2)


def operands(m: int, n: int, k: int, dtype) -> tuple[jax.Array, jax.Array]:
    a, b = (jax.random.normal(jax.random.key(i), (rows, k)).astype(dtype) for i, rows in enumerate((m, n)))
    return a, b


@pytest.mark.parametrize(
    ("m", "n", "k", "dtype"), [(256, 128, 256, jnp.float8_e5m2), (130, 72, 200, jnp.float8_e4m3fn)]
)
def test_on_the_interpreter(m, n, k, dtype):
    """Every block, warpgroup and slice, and the padding. Products are exact in float32, their sums are not."""
    a, b = operands(m, n, k, dtype)
    found = fp8_matmul(a, b, SMALL, InterpretGPUParams())
    exact = np.asarray(a, np.float64) @ np.asarray(b, np.float64).T
    assert found.shape == (m, n) and found.dtype == jnp.float32
    bound = 2.0**-23 * k * (np.abs(np.asarray(a, np.float64)) @ np.abs(np.asarray(b, np.float64)).T)
    assert (np.abs(np.asarray(found, np.float64) - exact) <= bound).all()
    np.testing.assert_allclose(found, reference(a, b), rtol=1e-5, atol=1e-4)


def test_small_integers_are_exact():
    a = jnp.asarray(np.random.default_rng(0).integers(-3, 4, (128, 128)), jnp.float8_e5m2)
    b = jnp.asarray(np.random.default_rng(1).integers(-3, 4, (64, 128)), jnp.float8_e5m2)
    found = fp8_matmul(a, b, SMALL, InterpretGPUParams())
    np.testing.assert_array_equal(found, np.asarray(a, np.float64) @ np.asarray(b, np.float64).T)


@given(*[st.integers(1, 40).map(lambda i: i * MULTIPLE)] * 3)
def test_there_are_tiles_for_every_size(m, n, k):
    tiles = choose_tiles(m, n, k)
    assert tiles.divide(m, n, k) and tiles.shared_bytes() <= SHARED_BYTES


def test_large_products_get_large_tiles():
    assert choose_tiles(8192, 4096, 4096) == CANDIDATES[0]
    small = choose_tiles(256, 256, 4096)
    assert small.m * small.n == min(tiles.m * tiles.n for tiles in CANDIDATES)


def test_every_candidate_fits_into_shared_memory():
    assert len(set(CANDIDATES)) == len(CANDIDATES) == 5
    assert all(tiles.shared_bytes() <= SHARED_BYTES for tiles in CANDIDATES)
    # By hand: two slices of 128 bytes for 128 + 256 rows, and 128 x 256 float32 results.
    assert CANDIDATES[0].shared_bytes() == 2 * 128 * (128 + 256) + 4 * 128 * 256


def test_what_it_refuses():
    a, b = operands(128, 128, 128, jnp.float8_e5m2)
    with pytest.raises(ValueError, match="not float8_e5m2 by float8_e4m3fn"):
        fp8_matmul(a, b.astype(jnp.float8_e4m3fn))
    with pytest.raises(ValueError, match="not bfloat16 by bfloat16"):
        fp8_matmul(a.astype(jnp.bfloat16), b.astype(jnp.bfloat16))
    with pytest.raises(ValueError, match="do not divide a product of 128 x 128 x 128"):
        fp8_matmul(a, b, Tiles(128, 128, 128, 2))
    with pytest.raises(ValueError, match="every axis must be a multiple of 128"):
        choose_tiles(100, 128, 128)


def test_rules_that_leave_products_to_it(monkeypatch):
    shapes = {"lm_head": (64, 96)}

    def plan(recipe: str, **options):
        [found] = resolve([("lm_head", recipe)], shapes, **options).plans
        return found

    with pytest.raises(ValueError, match=r"precision.kernel=pallas: .*multiply lm_head .*use precision.kernel=xla"):
        plan("e5m2", backend="native", kernel="pallas")
    assert not plan("e5m2", kernel="pallas").kernel, "emulated here"
    monkeypatch.setattr("altgrad_jax.precision.policy.fp8_hardware", lambda: "H100")
    monkeypatch.setattr("altgrad_jax.precision.policy.has_wgmma", lambda: True)
    assert (plan("e5m2", kernel="pallas").kernel, plan("e5m2", kernel="pallas").why) == (True, "")
    assert plan("hybrid", kernel="pallas").kernel, "x and w have one type"
    assert not plan("e5m2").kernel and plan("e5m2").why
    [row] = resolve([("lm_head", "e5m2")], shapes, kernel="pallas").table()
    assert row["backend"] == "native, Pallas kernel"


COMPILE = """
import jax, jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
jax.config.update("jax_platforms", "cpu")
from altgrad_jax.precision.kernels.fp8_matmul import fp8_matmul
from altgrad_jax.precision.kernels.tiles import CANDIDATES
from altgrad_jax.precision.target import absent_gpu
device = absent_gpu("h100")
dtype, there = jnp.dtype("float8_{}"), SingleDeviceSharding(device)
a, b = (jax.ShapeDtypeStruct((rows, 256), dtype, sharding=there) for rows in (512, 256))
with jax.default_device(device):
    for tiles in CANDIDATES:
        compiled = jax.jit(lambda a, b: fp8_matmul(a, b, tiles)).lower(a, b).compile()
        assert "mosaic_gpu" in compiled.as_text()
        print("tiles compiled")
print(len(CANDIDATES))
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is None, reason='needs pip install ".[gpu-compiler]"')
@pytest.mark.parametrize("fmt", ["e5m2", "e4m3fn"])
def test_the_instructions_for_an_h100(fmt):
    """Every candidate compiles, into warpgroup instructions whose two operands are of the FP8 type."""
    environment = os.environ | {"MOSAIC_GPU_DUMP_PTX": "1"}
    program = COMPILE.replace("{}", fmt)
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("tiles compiled") == len(CANDIDATES)
    instruction = f"k32.f32.{fmt.removesuffix('fn')}.{fmt.removesuffix('fn')}"
    assert done.stdout.count("wgmma.mma_async") == done.stdout.count(instruction) > 0
