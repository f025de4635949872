"""Every float32 there is, through every native format, by every path, against ml_dtypes bit for bit.

All 2^32 inputs of one format take minutes: one format runs with the slow tests, all of them with `-m exhaustive`. The
fast tests take a dense sample and everything near a value or a midpoint.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from altgrad_jax.precision.formats import get_format
from altgrad_jax.precision.grid import Grid
from altgrad_jax.precision.rounding import encode, has_native_cast, native_cast, round_to_format
from tests.precision.numpy_rounding import NATIVE, telling_inputs

CHUNK = 2**24


@partial(jax.jit, static_argnums=2)
def differences(bits, expected, name):
    """How many elements each path gets wrong; `expected`: ml_dtypes' codes, which overflow to inf or NaN."""
    fmt = get_format(name)
    x = lax.bitcast_convert_type(bits, jnp.float32)
    special = lax.bitcast_convert_type(expected, fmt.dtype).astype(jnp.float32)
    # What is not finite, though x is no NaN, is saturated: the same for all such x of one sign.
    saturated = jnp.where(jnp.isnan(x) | jnp.isfinite(special), special, jnp.copysign(np.float32(fmt.max), x))
    results = {
        "general, special": (round_to_format(x, Grid.of(fmt), overflow="special"), special),
        "general, saturate": (round_to_format(x, Grid.of(fmt)), saturated),
    }
    if has_native_cast(fmt):
        results |= {
            "native, special": (native_cast(x, fmt, "special").astype(jnp.float32), special),
            "native, saturate": (native_cast(x, fmt).astype(jnp.float32), saturated),
        }
    wrong = {path: jnp.sum(~_same(*pair)) for path, pair in results.items()}
    codes = encode(x, fmt, overflow="special")
    # A NaN's sign is kept by ml_dtypes where the format has room for it, and in float16 its payload too.
    wrong["codes"] = jnp.sum((codes != expected) & ~jnp.isnan(special))
    if name != "float16":
        wrong["codes of NaN"] = jnp.sum(((codes ^ expected) & (fmt.magnitudes - 1) != 0) & jnp.isnan(special))
    return wrong


def _same(a, b):
    a_bits, b_bits = (lax.bitcast_convert_type(v, jnp.uint32) for v in (a, b))
    return (a_bits == b_bits) | (jnp.isnan(a) & jnp.isnan(b))


def check(bits: np.ndarray, name: str) -> None:
    with np.errstate(over="ignore", invalid="ignore"):
        expected = bits.view(np.float32).astype(NATIVE[name]).view(get_format(name).code_dtype)
    wrong = {path: int(n) for path, n in differences(bits, expected, name).items() if n}
    assert not wrong, f"{name}: {wrong} of {bits.size} from bits {bits[0]:#x}"


def check_all(name: str) -> None:
    offsets = np.arange(CHUNK, dtype=np.uint32)
    for start in range(0, 2**32, CHUNK):
        check(offsets + np.uint32(start), name)


@pytest.mark.parametrize("name", NATIVE)
def test_dense_sample_and_all_ties(name):
    telling = telling_inputs(get_format(name)).view(np.uint32)
    sample = np.arange(0, 2**32, 4093, dtype=np.uint64).astype(np.uint32)  # a prime: all low bits occur
    check(np.concatenate([telling, sample]), name)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_all_float32_to_e5m2():
    check_all("e5m2")


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", NATIVE)
def test_all_float32(name):
    check_all(name)


def test_the_check_can_fail():
    bits = np.arange(2**20, dtype=np.uint32) * np.uint32(4096)
    with np.errstate(invalid="ignore"):
        expected = bits.view(np.float32).astype(NATIVE["e4m3fn"]).view(np.uint8)
    right = {path: int(n) for path, n in differences(bits, expected, "e4m3fn").items()}
    assert set(right.values()) == {0} and len(right) == 6
    expected[bits.searchsorted(np.float32(1.0).view(np.uint32))] ^= 1
    wrong = {path: int(n) for path, n in differences(bits, expected, "e4m3fn").items()}
    assert wrong == {path: path != "codes of NaN" for path in right}
