"""float64 is rounded once: arrays, Python floats and lists, traced or not, with and without jax_enable_x64."""

from fractions import Fraction
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gfloat import RoundMode, round_ndarray
from hypothesis import given, settings
from hypothesis import strategies as st

from altgrad_jax.precision.formats import FloatFormat, family, get_format
from altgrad_jax.precision.grid import Grid, stack_grids
from altgrad_jax.precision.operands import _cut, as_operand, to_float64
from altgrad_jax.precision.rounding import encode, round_to_format
from tests.precision.numpy_rounding import NATIVE, assert_same, in_gfloat, magnitudes, round_reference
from tests.precision.test_rounding import MODES, USER

NAMES = [
    *(fmt.name for fmt in family(7)),
    *(fmt.name for fmt in family(15)[:9]),
    *NATIVE,
    *("e2m1fn", "e3m2fn", "binary8p1", "binary8p4", "e1m6", "binary6p3sf"),
    *(name for name in USER if get_format(name).max_exponent <= 127 and not Grid.of(name).has_tiny_values),
]


def inputs(fmt: FloatFormat, seed: int = 0) -> np.ndarray:
    """Values, ties and their nearest float64 neighbours on both sides; numbers around them; random bits."""
    values, rng = magnitudes(fmt), np.random.default_rng(seed)
    if values.size > 300:
        values = values[np.unique(np.append(rng.integers(0, values.size, 300), [0, 1, 2, values.size - 1]))]
    ties = (values[1:] + values[:-1]) / 2
    beyond = [values[-1] + fmt.ulp(values[-1]) / 2 * k for k in (1, 2, 3)]
    points = np.concatenate([values, ties, beyond, values[1:] / 2, [1e300, 5e-324, 1e-310, 2.0**-149, 2.0**-150]])
    points = np.concatenate([points, np.nextafter(points, 0), np.nextafter(points, np.inf), points * (1 + 2.0**-25)])
    near = points[-600:] * 2.0 ** rng.uniform(-4, 4, points[-600:].size)
    bits = rng.integers(0, 2**64, 3000, dtype=np.uint64).view(np.float64)
    return np.concatenate([points, -points, near, bits, [np.inf, -np.inf, np.nan]])[:6000]


@partial(jax.jit, static_argnums=(2, 3))
def traced(x, grid, rounding, overflow):
    return round_to_format(x, grid, rounding, overflow)


@pytest.mark.parametrize("name", NAMES)
def test_every_format_and_mode_from_float64(name):
    fmt = get_format(name)
    x = inputs(fmt)
    x = np.append(x, np.full(6000 - x.size, 1.0))
    for mode in MODES:
        expected = round_reference(x, fmt, *mode)
        alone = round_to_format(x, Grid.of(fmt), *mode)
        assert alone.dtype == np.float32
        assert_same(alone, expected, x, f"{name} {mode}")
        with jax.enable_x64(True):
            wide = traced(jnp.asarray(x), Grid.of(fmt), *mode)
        assert wide.dtype == np.float64 and wide.shape == x.shape
        # Not to bits of float32 but to all of float64's.
        np.testing.assert_array_equal(np.asarray(wide), np.asarray(alone).astype(np.float64))
        assert_same(wide, expected, x, f"{name} {mode} with x64")


@pytest.mark.parametrize("name", ["e5m2", "e4m3fn", "e4m3fnuz", "e2m5", "float16"])
def test_codes_by_gfloat_and_numpy(name):
    # ml_dtypes is no reference here: its casts from float64 to 8 bits go through float32 and round twice.
    fmt = get_format(name)
    x = inputs(fmt, seed=1)
    x = np.append(x[~np.isnan(x)], np.full(6000, 1.0))[:6000]
    info, at = in_gfloat(fmt), np.abs(x) <= fmt.max
    assert info is not None
    expected = round_ndarray(info, x[at], RoundMode.TiesToEven)
    codes = np.asarray(encode(x, name, overflow="special"))
    assert_same(fmt.values()[codes[at]], expected, x[at], name)
    with np.errstate(over="ignore", under="ignore"):
        twice = round_reference(x.astype(np.float32), fmt)
        assert (twice[at] != expected).sum() > 50, "the inputs tell"
        if name == "float16":
            np.testing.assert_array_equal(codes, x.astype(np.float16).view(np.uint16))


def test_float32_itself():
    x = np.concatenate([inputs(get_format("e5m2")), inputs(get_format("bfloat16"))])
    spread = np.float32(np.random.default_rng(0).standard_normal(2000) * 1e-3).astype(np.float64)
    edge = np.float64(np.finfo(np.float32).max) + np.array([-1.0, 1, 2, 3]) * 2.0**102
    x = np.concatenate([x, spread * (1 + 2.0**-24), spread * (1 - 2.0**-25), edge, 2.0**-140 * (1 + spread)])
    with np.errstate(over="ignore", under="ignore"):
        with jax.enable_x64(True):
            nearest = traced(x, Grid.of("float32"), "nearest", "special")
            toward = np.asarray(traced(x, Grid.of("float32"), "toward_zero", "special"))
        assert_same(nearest, x.astype(np.float32), x)
    finite = np.isfinite(x)
    assert (np.abs(toward[finite]) <= np.minimum(np.abs(x[finite]), np.finfo(np.float32).max)).all()


def test_numbers_and_lists_of_python():
    # 7.499999999999999 is below the tie of 7 and 8 in E5M2's last place but float32 makes 7.5 of it.
    below = float(np.nextafter(7.5, 0))
    for x in (below, ((below, 1.0), [below, 8])):
        expected = np.where(np.asarray(x) == below, 7, np.asarray(x))
        for wide in (False, True):
            with jax.enable_x64(wide):
                # What is not traced is the same inside jit, which compiles once and not operation by operation.
                rounded, codes = jax.jit(lambda x=x: (round_to_format(x, "e5m2"), encode(x, "e5m2")))()
                assert rounded.dtype == (np.float64 if wide else np.float32)
                np.testing.assert_array_equal(rounded, expected)
                np.testing.assert_array_equal(codes, np.where(expected == 7, 0x47, np.where(expected == 1, 0x3C, 0x48)))
    with jax.enable_x64(True):
        value, slope = jax.jit(jax.value_and_grad(lambda v: round_to_format(v, "e5m2")))(below)
    assert (float(value), float(slope), slope.dtype) == (7, 1, np.float64)


@given(st.floats(allow_nan=False, allow_infinity=False))
@settings(max_examples=300, deadline=None)
def test_what_is_cut_off_is_known_exactly(x):
    bits, share = (int(part) for part in _cut(as_operand(x)))
    if abs(x) >= 2.0**128:
        assert bits >= 0x7F800000
        return
    field, fraction = bits >> 23, bits & 0x7FFFFF
    ulp = Fraction(2) ** (max(field, 1) - 150)
    kept = (fraction + (2**23 if field else 0)) * ulp
    rest = abs(Fraction(x)) - kept
    assert 0 <= rest < ulp
    assert share == rest / ulp * 2**32 if abs(x) >= 2.0**-126 or x == 0 else abs(share - rest / ulp * 2**32) <= 1
    assert (share == 0) == (rest == 0)


def test_stochastic_rounding_is_unbiased():
    # Next to one step of float32 the share of the way up is 1/3, and twice rounded it would be 0 or 1.
    fmt, n = get_format("float32"), 40_000
    rounding = jax.jit(round_to_format, static_argnames="rounding")
    for x in (1 + 2.0**-23 / 3, -(2.0**-130) * (1 + 2.0**-19 / 3)):
        with jax.enable_x64(True):
            rounded = np.asarray(rounding(np.full(n, x), fmt, rounding="stochastic", key=jax.random.key(0)))
        low, high = sorted(np.unique(rounded))
        share = np.mean(rounded == high)
        assert abs(share - (x - low) / (high - low)) < 5 * 0.5 / n**0.5
    x = np.full(n, 1 + 0.3 * 2.0**-2)
    with jax.enable_x64(True):
        rounded = np.asarray(rounding(x, get_format("e5m2"), rounding="stochastic", key=jax.random.key(1)))
    assert set(rounded) == {1.0, 1.25} and abs(np.mean(rounded == 1.25) - 0.3) < 5 * 0.5 / n**0.5
    narrow, key = np.float32(np.random.default_rng(0).standard_normal(n)), jax.random.key(2)
    as_narrow = jax.jit(partial(encode, fmt="e4m3fn", rounding="stochastic"))(narrow, key=key)
    wide = narrow.astype(np.float64)
    as_wide = jax.jit(lambda: encode(wide, "e4m3fn", "stochastic", key=key))()
    np.testing.assert_array_equal(as_wide, as_narrow)


def test_formats_beyond_float32_are_refused_and_other_kinds_of_number():
    for name in ("e9m6", "e8m0:bias=100", "e5m3:bias=150"):
        for call in (round_to_format, encode):
            with pytest.raises(
                ValueError, match=rf"^float64 is not rounded to {name}.*beyond float32's range; pass fl"
            ):
                call(1.5, name)
        assert round_to_format(np.float32(1.5), name).dtype == np.float32
    with pytest.raises(ValueError, match="^float64 is not rounded to one of these formats"):
        round_to_format(1.5, stack_grids(["e5m2", "e15m0"]))
    for x, said in (
        (np.longdouble(1.5), "x has dtype "),
        (np.arange(3, dtype=np.uint64), "x has dtype uint64"),
        ([1, 2], "x has dtype int64"),
        (True, "x has dtype bool"),
        (2.5 + 0j, "x has dtype complex128"),
        ([np.complex64(1), 2.5], "x has dtype complex64"),
        ([True, 0.5], "x has dtype bool"),
        ([0.5, 2**60 + 1], "x has the integer 1152921504606846977, beyond 2^53"),
        ([np.array([2**62]), [0.5]], "beyond 2^53"),
        ([0.5, jnp.float32(1)], "x mixes JAX arrays with other numbers"),
        (jnp.ones(2, jnp.float8_e5m2), "x has dtype float8_e5m2"),
        (None, "x has dtype object"),
    ):
        with pytest.raises(ValueError, match=said.replace("^", r"\^")):
            round_to_format(x, "e4m3fn")
    for x, dtype, expected in (
        ([jnp.bfloat16(1.1), jnp.float32(1.1)], np.float32, [1, 1]),
        ([np.float16(1.1), 3], np.float32, [1, 3]),
        (np.array([1.3], ">f8"), np.float32, [1.25]),
        (np.array([1.3], ">f4"), np.float32, [1.25]),
        (np.array([1.3], np.float16), np.float16, [1.25]),
    ):
        rounded = jax.jit(lambda x=x: round_to_format(x, "e5m2"))()
        assert rounded.dtype == dtype and rounded.tolist() == expected


def test_float32_widens_exactly():
    bits = np.concatenate([np.arange(3000), np.random.default_rng(0).integers(0, 2**32, 5000)]).astype(np.uint32)
    x = bits.view(np.float32)
    with jax.enable_x64(True):
        wide = np.asarray(jax.jit(to_float64)(x))
    with np.errstate(invalid="ignore"):
        assert_same(wide, x, x)
        np.testing.assert_array_equal(wide[~np.isnan(x)], x[~np.isnan(x)].astype(np.float64))
