"""round_to_format against ml_dtypes, gfloat and the NumPy reference; every format, all but stochastic rounding."""

from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from gfloat import RoundMode, round_ndarray
from hypothesis import given, settings
from hypothesis import strategies as st

from altgrad_jax.precision import rounding as rounding_module
from altgrad_jax.precision.formats import FloatFormat, family, get_format, registry
from altgrad_jax.precision.grid import Grid, stack_grids
from altgrad_jax.precision.rounding import OVERFLOWS, ROUNDINGS, encode, round_to_format
from tests.precision.numpy_rounding import (
    NATIVE,
    SMALL,
    assert_same,
    in_gfloat,
    largest,
    random_floats,
    round_reference,
    telling_inputs,
)

FAMILY_7 = [fmt.name for fmt in family(7)]
FAMILY_15 = [fmt.name for fmt in family(15)]
P3109 = [f"binary8p{p}" for p in range(1, 8)]
# Biases odd, even and far off; without mantissa bits, where ties go to the even code; grids that float32's subnormals
# reach into, or that float32 ends before.
USER = [
    *("e4m0:bias=3", "e5m0:bias=4", "e3m0:bias=-2,nan=zero", "e6m0:inf=1", "e8m0:bias=200", "e8m0:bias=201"),
    *("e0m5:bias=3,nan=1", "e1m3:bias=-7", "e2m1:bias=-60", "e4m2:inf=1,nan=top", "e1m0:bias=5", "e0m1:bias=-9"),
    *("e8m5:bias=140", "e5m3:bias=150", "e4m3:bias=-100", "e3m2:bias=130,inf=1,nan=1", "e4m1:bias=-112,inf=1"),
]
FOREIGN = [*FAMILY_7, *P3109, *SMALL, *USER]
EIGHT_BITS = [name for name, fmt in registry().items() if fmt.bits <= 8 and fmt.signed]
MODES = [("nearest", "saturate"), ("nearest", "special"), ("toward_zero", "saturate"), ("toward_zero", "special")]


@partial(jax.jit, static_argnums=(2, 3))
def general(x, grid, rounding="nearest", overflow="saturate"):
    """With the format traced: few compilations for many formats."""
    return round_to_format(x, grid, rounding, overflow)


@partial(jax.jit, static_argnums=(1, 2, 3))
def by_name(x, name, rounding="nearest", overflow="saturate"):
    """With the format built in."""
    return round_to_format(x, name, rounding, overflow)


@pytest.fixture(params=["native cast", "general path"])
def path(request, monkeypatch):
    """Both ways of rounding to a native format, whichever this machine would take. Not with `by_name`, which caches."""
    monkeypatch.setattr(rounding_module, "_native_is_faster", lambda: request.param == "native cast")
    return request.param


def inputs(fmt: FloatFormat, seed: int = 0) -> np.ndarray:
    """All that is telling, and random bits up to a size that formats share."""
    telling = telling_inputs(fmt)
    size = 2**14 if telling.size < 2**13 else 2**19
    return np.concatenate([telling, random_floats(seed, size - telling.size)])


def gfloat_reference(x, fmt: FloatFormat, rounding: str, overflow: str) -> tuple[np.ndarray, np.ndarray]:
    """(at, gfloat's results for x[at]): the elements of which gfloat has an opinion."""
    info, at = in_gfloat(fmt), np.ones(x.shape, bool)
    if info is None:
        return ~at, np.zeros(0)
    with np.errstate(invalid="ignore"):
        x = x.astype(np.float64)
    if fmt.nan == "none":
        at &= ~np.isnan(x)
        if overflow == "special":  # nothing to overflow to: an error in gfloat
            at &= np.abs(x) <= fmt.max
    if fmt.max > largest(fmt):  # float32 ends before the format does
        at &= np.abs(x) <= largest(fmt)
    mode = {"nearest": RoundMode.TiesToEven, "toward_zero": RoundMode.TowardZero}[rounding]
    return at, round_ndarray(info, x[at], mode, sat=overflow == "saturate")


def check(name: str, x: np.ndarray, *mode: str) -> None:
    """The traced general path against both references."""
    fmt = get_format(name)
    actual = np.asarray(general(x, Grid.of(fmt), *mode))
    assert_same(actual, round_reference(x, fmt, *mode), x, f"{name} by the NumPy reference")
    at, expected = gfloat_reference(x, fmt, *mode)
    assert_same(actual[at], expected, x[at], f"{name} by gfloat")


@pytest.mark.parametrize("mode", MODES, ids="-".join)
@pytest.mark.parametrize("name", [*FOREIGN, *NATIVE])
def test_formats_of_up_to_8_bits_and_native_ones(name, mode):
    check(name, inputs(get_format(name)), *mode)


@pytest.mark.parametrize("name", FAMILY_15)
def test_family_of_16_bits(name):
    x = inputs(get_format(name))
    for mode in MODES if name == "e9m6" else MODES[::3]:
        check(name, x, *mode)


@pytest.mark.parametrize("name", [*FAMILY_7, "binary8p1", "e2m1fn", "e8m0:bias=201", "e5m3:bias=150"])
def test_built_in_equals_traced(name):
    x = inputs(get_format(name))
    for mode in (MODES[0], MODES[3]):
        assert_same(by_name(x, name, *mode), general(x, Grid.of(name), *mode), x, name)


def test_gfloat_knows_nearly_all_formats():
    unknown = [name for name in [*FOREIGN, *FAMILY_15, *NATIVE] if in_gfloat(get_format(name)) is None]
    assert unknown == ["e11m4", "e12m3", "e13m2", "e14m1", "e15m0"]


def check_ten_million(name: str) -> None:
    """Random bits, and values near the format's own range, where few random bits lie."""
    fmt, rng = get_format(name), np.random.default_rng(1)
    for part in range(10):
        near = largest(fmt) * 2.0 ** rng.uniform(-2 * fmt.bits - 4, 2, 500_000) * rng.choice([-1, 1], 500_000)
        with np.errstate(over="ignore"):
            check(name, np.concatenate([near.astype(np.float32), random_floats(part, 500_000)]), "nearest", "saturate")


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILY_7)
def test_ten_million_random_values(name):
    check_ten_million(name)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", [*P3109, *SMALL, *USER, *FAMILY_15])
def test_ten_million_random_values_of_the_other_formats(name):
    check_ten_million(name)


@st.composite
def user_formats(draw) -> str:
    """Texts of user formats; some of them are refused."""
    e, m = draw(st.integers(0, 9)), draw(st.integers(0, 9))
    inf, nan = draw(st.sampled_from("01")), draw(st.sampled_from(["none", "ieee", "top", "zero"]))
    return f"e{e}m{m}:bias={draw(st.integers(-160, 200))},inf={inf},nan={nan.replace('none', '0')}"


@given(text=user_formats(), mode=st.sampled_from(MODES), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=100, deadline=None)
def test_any_user_format(text, mode, seed):
    try:
        fmt = get_format(text)
    except ValueError:
        return
    x = inputs(fmt, seed)
    assert_same(general(x, Grid.of(fmt), *mode), round_reference(x, fmt, *mode), x, text)


@pytest.mark.parametrize("name", EIGHT_BITS)
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_every_16_bit_input(name, dtype):
    fmt = get_format(name)
    x = np.arange(2**16, dtype=np.uint16).view(dtype)
    if dtype == np.float16 and fmt.max > 65504:
        with pytest.raises(
            ValueError, match=rf"^float16 cannot hold every value of {fmt.name}; pass float32 or bfloat16"
        ):
            by_name(x, name)
        return
    for mode in (MODES[0], MODES[1], MODES[3]):
        expected = round_reference(x.astype(np.float32), fmt, *mode)
        for actual in (by_name(x, name, *mode), general(x, Grid.of(fmt), *mode)):
            assert actual.dtype == dtype
            # Through float32, exactly.
            assert_same(np.asarray(actual).astype(np.float32), expected, x.astype(np.float32), f"{name} {mode}")


@pytest.mark.parametrize("name", [name for name in NATIVE if name not in ("float16", "bfloat16")])
def test_native_cast_of_every_16_bit_input(name, path):
    fmt = get_format(name)
    for dtype in (ml_dtypes.bfloat16, np.float16):
        x = np.arange(2**16, dtype=np.uint16).view(dtype)
        for overflow in ("saturate", "special"):
            expected = round_reference(x.astype(np.float32), fmt, "nearest", overflow)
            actual = jax.jit(partial(round_to_format, fmt=name, overflow=overflow))(x)
            assert actual.dtype == dtype
            assert_same(np.asarray(actual).astype(np.float32), expected, x.astype(np.float32), f"{name} {path}")


@pytest.mark.parametrize(
    "name", ["e7m0:bias=149", "e6m1:bias=160", "e5m3:bias=140", "e4m10:bias=138", "e0m14:bias=125"]
)
def test_grids_among_the_subnormals_of_float32(name):
    # Arithmetic may flush them to zero.
    x = np.concatenate([inputs(get_format(name)), np.arange(2**12, dtype=np.uint32).view(np.float32)])
    for mode in MODES[::3]:
        check(name, x, *mode)


def test_float32_subnormals_stay_in_float32():
    x = np.arange(2**12, dtype=np.uint32).view(np.float32)
    assert_same(by_name(x, "float32"), x, x)


def test_defect_3_values_just_under_the_smallest_normal_go_to_the_nearest(path):
    # AltGrad made 5.34e-5 the largest subnormal of E5M2, 4.58e-5, and encoded something else.
    x = np.float32([5.34e-5, 6.0e-5, 6.1e-5, 5.35e-5, -5.34e-5, 5.3e-5])
    normal, subnormal = 2.0**-14, 3 * 2.0**-16
    expected = np.float32([subnormal, normal, normal, normal, -subnormal, subnormal])
    midpoint = (normal + subnormal) / 2  # 5.3406e-5
    assert ((np.abs(x) > midpoint) == (np.abs(expected) == normal)).all()
    np.testing.assert_array_equal(jax.jit(partial(round_to_format, fmt="e5m2"))(x), expected)
    codes = np.asarray(encode(x, "e5m2"))
    np.testing.assert_array_equal(codes.view(ml_dtypes.float8_e5m2).astype(np.float32), expected)
    for name in FAMILY_7:
        fmt = get_format(name)
        below = np.float32(fmt.min_normal) * np.float32(1 - 2.0 ** -np.arange(1, 24))
        assert_same(by_name(below, name), round_reference(below, fmt), below, name)


@pytest.mark.parametrize("name", ["e5m2", "e4m3fnuz", "e7m0", "e2m1fn"])
def test_nan_stays_nan(name, path):
    bits = np.array([0x7FC00000, 0xFFC00000, 0x7F800001, 0xFFFFFFFF], np.uint32)
    inputs = [bits.view(np.float32), np.array([0x7FC0, 0xFF81, 0x7F80 + 1, 0xFFFF], np.uint16).view(ml_dtypes.bfloat16)]

    @jax.jit
    def all_ways(inputs):
        ways = product(inputs, ROUNDINGS, OVERFLOWS)
        return [round_to_format(x, name, *way, key=jax.random.key(0)) for x, *way in ways]

    assert all(np.isnan(np.asarray(result, np.float32)).all() for result in all_ways(inputs))


def test_one_compilation_serves_the_family():
    traces = []

    @jax.jit
    def rounded(x, grid):
        traces.append(grid)
        return round_to_format(x, grid)

    grids, x = stack_grids(FAMILY_7), inputs(get_format("e3m4"))
    for i, name in enumerate(FAMILY_7):
        grid = jax.tree.map(lambda leaf, i=i: leaf[i], grids)
        assert_same(rounded(x, grid), round_reference(x, get_format(name)), x, name)
    assert len(traces) == 1 and rounded._cache_size() == 1


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_vmap_over_formats_equals_separate_calls(rounding):
    key, x = jax.random.key(5), inputs(get_format("e3m4"))
    batched = jax.jit(jax.vmap(lambda grid: round_to_format(x, grid, rounding, key=key)))(stack_grids(FAMILY_7))
    for i, name in enumerate(FAMILY_7):
        alone = jax.jit(partial(round_to_format, fmt=name, rounding=rounding, key=key))(x)
        assert_same(batched[i], alone, x, name)
    each = np.stack([x, x[::-1]])
    pairwise = jax.jit(jax.vmap(lambda x, grid: round_to_format(x, grid, rounding, key=key)))(
        each, stack_grids(["e2m1fn", "e15m0"])
    )
    for i, name in enumerate(["e2m1fn", "e15m0"]):
        alone = jax.jit(partial(round_to_format, fmt=name, rounding=rounding, key=key))(each[i])
        assert_same(pairwise[i], alone, each[i], name)


@pytest.mark.parametrize("overflow", OVERFLOWS)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_gradient_is_straight_through(rounding, overflow, path):
    x = jnp.float32([0.0, -0.0, 1e-9, 0.3, -0.37, 5.34e-5, 1e4, -6e4, 1e9, -np.inf])
    cotangent = jnp.arange(1.0, 11.0) * 1.2345678

    @jax.jit
    def derivatives(grid):
        results = []
        for fmt in ("e5m2", "e0m7", grid):
            f = partial(round_to_format, fmt=fmt, rounding=rounding, overflow=overflow, key=jax.random.key(0))
            of_sum = jax.grad(lambda v, f=f: jnp.sum(jnp.where(jnp.isfinite(f(v)), f(v), v)))(x)
            results.append((of_sum, jax.vjp(f, x)[1](cotangent)[0], *jax.jvp(f, (x,), (cotangent,)), f(x)))
        return results

    for of_sum, backward, value, tangent, rounded in derivatives(Grid.of("e7m0")):
        np.testing.assert_array_equal(of_sum, np.ones(10))
        np.testing.assert_array_equal(backward, cotangent)
        np.testing.assert_array_equal(tangent, cotangent)
        np.testing.assert_array_equal(value, rounded)
        assert (np.asarray(rounded) != x).any()


def test_wrong_arguments():
    x = jnp.ones(3)
    for call in (round_to_format, encode):
        with pytest.raises(ValueError, match="^rounding='up' is not one of nearest, toward_zero, stochastic$"):
            call(x, "e5m2", rounding="up")
        with pytest.raises(ValueError, match="^overflow='wrap' is not one of saturate, special$"):
            call(x, "e5m2", overflow="wrap")
        with pytest.raises(ValueError, match="^rounding='stochastic' needs key=, a PRNG key$"):
            call(x, "e5m2", "stochastic")
        with pytest.raises(ValueError, match="^x has dtype int32; rounding takes float64, float32, bfloat16, float16$"):
            call(jnp.arange(3), "e5m2")
        with pytest.raises(ValueError, match="^unknown format 'e5m3fn': "):
            call(x, "e5m3fn")
        with pytest.raises(ValueError, match="^e8m0fnu holds only powers of two"):
            call(x, "e8m0fnu")
    with pytest.raises(ValueError, match="^float16 cannot hold every value of each of these formats; pass float32 or"):
        round_to_format(x.astype(jnp.float16), stack_grids(FAMILY_7))
    with pytest.raises(ValueError, match="^bfloat16 cannot hold every value of e5m10"):
        round_to_format(x.astype(jnp.bfloat16), "e5m10")
