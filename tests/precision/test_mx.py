"""OCP MX blocks against a loop over blocks in NumPy, and against gfloat's own."""

import gfloat
import gfloat.formats
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from altgrad_jax.precision.formats import get_format
from altgrad_jax.precision.recipes import parse_recipe
from altgrad_jax.precision.scaling import initial_state, quantise
from tests.precision import numpy_quantised as reference

# Recipe -> element format, gfloat's block format.
MX = {
    "mxfp8": ("e4m3fn", gfloat.formats.format_info_mxfp8_e4m3),
    "mxfp8_e5m2": ("e5m2", gfloat.formats.format_info_mxfp8_e5m2),
    "mxfp6_e3m2": ("e3m2fn", gfloat.formats.format_info_mxfp6_e3m2),
    "mxfp6_e2m3": ("e2m3fn", gfloat.formats.format_info_mxfp6_e2m3),
    "mxfp4": ("e2m1fn", gfloat.formats.format_info_mxfp4_e2m1),
}
# OCP MX 1.0, table 1: exponent of the largest value, and that value.
LARGEST = {"e4m3fn": (8, 448), "e5m2": (15, 57344), "e3m2fn": (4, 28), "e2m3fn": (2, 7.5), "e2m1fn": (2, 6)}
recipes = pytest.mark.parametrize("recipe", MX)


def quantised(x, recipe: str, axis: int = 1, collect: bool = False):
    role = parse_recipe(recipe).activation
    x = x if isinstance(x, jax.Array) else jnp.asarray(x, jnp.float32)
    return quantise(x, role, initial_state(role), axis, collect=collect)


def values(x, recipe: str, axis: int = 1) -> np.ndarray:
    operand, _ = quantised(x, recipe, axis)
    assert operand.inverse_scale == 1 and operand.values.shape == np.shape(x)
    return np.asarray(operand.values, np.float64)


def spread(seed: int, *shape: int, binades: int = 12) -> np.ndarray:
    """Normal numbers, each times a power of two of its own: blocks differ, and so do the elements of one."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=shape) * np.exp2(rng.integers(-binades, binades, shape))).astype(np.float32)


def by_reference(x, recipe: str, axis: int) -> np.ndarray:
    return reference.quantise(x, reference.Role(MX[recipe][0], "mx"), axis).value


@recipes
def test_largest_values_are_the_standard_s(recipe):
    name = MX[recipe][0]
    assert (get_format(name).max_exponent, get_format(name).max) == LARGEST[name]
    assert reference.magnitudes(name)[-1] == LARGEST[name][1]


@recipes
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shape", [(64, 64), (1, 32), (33, 33), (5, 100), (100, 5), (31, 1), (65, 3)])
def test_blocks_along_each_axis(recipe, axis, shape):
    """32 need not divide the axis: the last block is shorter."""
    x = spread(sum(shape), *shape)
    np.testing.assert_array_equal(values(x, recipe, axis), by_reference(x, recipe, axis))


@recipes
@given(st.integers(0, 2**32 - 1), st.integers(-90, 90))
@settings(max_examples=8, deadline=None)
def test_random_blocks(recipe, seed, exponent):
    x = spread(seed, 4, 70) * np.float32(2.0**exponent)
    for axis in (0, 1):
        np.testing.assert_array_equal(values(x, recipe, axis), by_reference(x, recipe, axis))


@recipes
def test_gfloat_s_blocks(recipe):
    x = spread(1, 12, 32)
    x[3] = 0
    x[4, 0], x[4, 1:] = 1.75, 2.0**-20
    expected = [gfloat.quantize_block(MX[recipe][1], row.astype(np.float64), gfloat.compute_scale_amax) for row in x]
    np.testing.assert_array_equal(values(x, recipe), expected)


@recipes
def test_blocks_of_zeros(recipe):
    x = np.zeros((2, 96), np.float32)
    x[0, 40], x[1, 95] = 3.0, -1.5
    actual = values(x, recipe)
    np.testing.assert_array_equal(actual, x)
    assert not np.isnan(values(np.zeros((1, 32)), recipe)).any()


@recipes
@pytest.mark.parametrize("k", [-60, -1, 0, 7, 60])
def test_amax_at_a_power_of_two_and_just_below(recipe, k):
    """The scale changes where amax reaches a power of two: just below, elements have half the spacing."""
    name = MX[recipe][0]
    emax, largest = LARGEST[name]
    rest = np.linspace(-0.9, 0.9, 31)
    for amax, scale in ((1.0, 2.0**-emax), (np.nextafter(np.float32(1), np.float32(0)), 2.0 ** (-1 - emax))):
        x = (np.append(rest, amax) * 2.0**k).astype(np.float32)[None]
        expected = reference.to_nearest(x / scale / 2.0**k, name) * scale * 2.0**k
        np.testing.assert_array_equal(values(x, recipe), expected)
        assert values(x, recipe)[0, -1] == (2.0**k if amax == 1 else largest * scale * 2.0**k)


@recipes
@pytest.mark.parametrize("k", [-40, 0, 3, 50])
def test_elements_beyond_the_largest_value_saturate(recipe, k):
    """The scale is a power of two that leaves amax in [2^emax, 2^(emax + 1)): up to twice what a format may hold."""
    emax, largest = LARGEST[MX[recipe][0]]
    x = np.full((1, 32), 0.25 * 2.0**k, np.float32)
    x[0, 5], x[0, 6] = 1.99 * 2.0**k, -1.99 * 2.0**k
    actual = values(x, recipe)
    assert actual[0, 5] == -actual[0, 6] == largest * 2.0 ** (k - emax) < 1.99 * 2.0**k
    np.testing.assert_array_equal(np.delete(actual, [5, 6]), 0.25 * 2.0**k)
    half_step = float(get_format(MX[recipe][0]).ulp(largest)) / 2
    _, stats = quantised(x, recipe, collect=True)
    beyond = 2 / 32 if 1.99 * 2.0**emax > largest + half_step else 0
    assert np.asarray(stats.shares)[2] == beyond
    assert beyond or recipe != "mxfp8"


@recipes
@given(st.integers(0, 2**32 - 1))
@settings(max_examples=8, deadline=None)
def test_results_are_exact_in_bfloat16(recipe, seed):
    """What is multiplied is bfloat16, and 2^k times an element of the format: nothing is rounded twice."""
    x = spread(seed, 3, 64, binades=30)
    operand, _ = quantised(x, recipe)
    assert operand.values.dtype == jnp.bfloat16
    s = reference.block_scales(x, MX[recipe][0], 1)
    elements = np.abs(np.asarray(operand.values, np.float64) * s)
    assert np.isin(elements, reference.magnitudes(MX[recipe][0])).all()


def test_an_outlier_spoils_its_own_block_alone():
    x = np.tile(np.linspace(-1, 1, 32), 3).astype(np.float32)[None]
    before = values(x, "mxfp4")
    x[0, 40] = 1e6
    after = values(x, "mxfp4")
    assert (after[0, :32] == before[0, :32]).all() and (after[0, 64:] == before[0, 64:]).all()
    assert (np.delete(after[0, 32:64], 8) == 0).all()


def test_the_two_products_of_an_operand_have_blocks_of_their_own():
    x = spread(2, 64, 64)
    assert (values(x, "mxfp4", 0) != values(x, "mxfp4", 1)).any()
    np.testing.assert_array_equal(values(x, "mxfp4", 0), values(x.T, "mxfp4", 1).T)


def test_spoilt_blocks():
    """As with the NaN of e8m0 for a scale."""
    x = np.ones((1, 128), np.float32)
    x[0, 3], x[0, 40] = np.nan, np.inf
    for array in (x, jnp.asarray(x, jnp.bfloat16)):
        actual = np.asarray(quantised(array, "mxfp8")[0].values, np.float32)
        assert np.isnan(actual[0, :64]).all() and (actual[0, 64:] == 1).all()


@pytest.mark.parametrize("exponent", [-126, -113, -112, -111, 120, 127])
@pytest.mark.parametrize(("fmt", "dtype"), [("e5m2", "float32"), ("e5m2", "bfloat16"), ("e0m7", "float32")])
def test_scales_to_the_ends_of_e8m0(fmt, dtype, exponent):
    """2^-127 and 2^127, by the definition in float64; of blocks down to the smallest normal float32."""
    rng = np.random.default_rng(exponent % 97)
    x = rng.uniform(-1, 1, (4, 64)) * 2.0 ** rng.integers(-9, 1, (4, 64)) * 1.99 * 2.0**exponent
    x[:, ::32] = 1.99 * 2.0**exponent  # saturates in e5m2, if the scale is small enough
    x = jnp.asarray(np.where(np.abs(x) < 2.0**-126, 0, x), dtype)
    role = parse_recipe(f"{fmt} scaling=mx").activation
    for axis in (0, 1):
        operand, stats = quantise(x, role, initial_state(role), axis, collect=True)
        expected = reference.quantise(np.asarray(x, np.float32), reference.Role(fmt, "mx"), axis).value
        np.testing.assert_array_equal(np.asarray(operand.values, np.float64), expected)
        assert np.isfinite(expected).all() and expected.any() and np.isfinite(stats.scale)


def test_gfloat_s_blocks_at_the_lower_end():
    x = np.zeros((1, 32), np.float32)
    x[0, :4] = np.array([1.99, -1.0, 0.3, 1.6]) * 2.0**-112
    expected = gfloat.quantize_block(MX["mxfp8_e5m2"][1], x[0].astype(np.float64), gfloat.compute_scale_amax)
    np.testing.assert_array_equal(values(x, "mxfp8_e5m2")[0], expected)
    assert expected[0] == 1.75 * 2.0**-112, "under a scale of 2^-126 it would not saturate"


def test_statistics():
    """Counted on elements, not on values times scales: 1e-6 beside 1 is lost in its block, alone in one it is not."""
    x = np.zeros((1, 96), np.float32)
    x[0, :4], x[0, 32:36] = [1, 1e-6, -1e-6, 0.5], 1e-6
    operand, stats = quantised(x, "mxfp8", collect=True)
    np.testing.assert_allclose(stats.shares, [8 / 96, 2 / 96, 0, 0, 0], rtol=1e-6)
    assert (np.asarray(operand.values)[0, 32:36] != 0).all()
    assert stats.amax == 1
    codes = np.asarray(stats.codes)
    assert codes[0] == pytest.approx(89 / 96) and codes[128] == pytest.approx(1 / 96)  # +0 and the -1e-6
    assert codes.sum() == pytest.approx(1)


def test_compiled_and_in_bfloat16():
    x = jnp.asarray(spread(3, 40, 70), jnp.bfloat16)
    role = parse_recipe("mxfp6_e2m3").activation
    operand, _ = jax.jit(lambda x: quantise(x, role, initial_state(role), 0))(x)
    np.testing.assert_array_equal(
        np.asarray(operand.values, np.float64), by_reference(np.asarray(x, np.float32), "mxfp6_e2m3", 0)
    )


@pytest.mark.parametrize(
    "recipe",
    [
        *MX,
        *("mxfp8 margin=1", "mxfp8 overflow=special", "mxfp8_e5m2 overflow=special", "mxfp4 overflow=special"),
        *("e3m4 scaling=mx", "e4m3fnuz scaling=mx", "binary8p1 scaling=mx overflow=special"),
    ],
)
@pytest.mark.parametrize("axis", [0, 1])
def test_bfloat16_is_rounded_as_the_same_numbers_in_float32_are(recipe, axis):
    """It has a way of its own, in 16-bit integers; here on blocks at all sizes, to the ends of the dtype."""
    rng = np.random.default_rng(axis)
    binades = rng.integers(0, 254, (24, 1, 24, 1)) - rng.integers(0, 16, (24, 32, 24, 32))
    x = rng.integers(0, 2, binades.shape) << 15 | np.maximum(binades, 0) << 7 | rng.integers(0, 128, binades.shape)
    x = jnp.asarray(x.reshape(768, 768), jnp.uint16).view(jnp.bfloat16)
    x = x.at[100, 100].set(jnp.inf).at[200, 300].set(-jnp.inf).at[300, 100].set(jnp.nan)
    role = parse_recipe(recipe).activation

    def both(x, collect: bool):
        run = jax.jit(lambda x: quantise(x, role, initial_state(role), axis, collect=collect))
        return run(x), run(x.astype(jnp.float32))

    (short, _), (long, _) = both(x, collect=False)
    assert short.values.dtype == long.values.dtype == jnp.bfloat16
    actual, expected = (np.asarray(operand.values) for operand in (short, long))
    np.testing.assert_array_equal(np.isnan(actual), np.isnan(expected))
    finite = ~np.isnan(expected)
    np.testing.assert_array_equal(actual[finite].view(np.uint16), expected[finite].view(np.uint16))
    # Whether float32's subnormals count as zeros is the machine's business.
    normal = jnp.where(jnp.abs(x) < 2.0**-126, 0, x)
    (collected, stats), (_, expected_stats) = both(normal, collect=True)
    np.testing.assert_array_equal(np.asarray(collected.values)[finite], expected[finite])
    for ours, theirs in zip(jax.tree.leaves(stats), jax.tree.leaves(expected_stats), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_stochastic_rounding_stays_on_the_blocks_grid_and_is_unbiased():
    role = parse_recipe("mxfp4 rounding=stochastic").activation
    x = jnp.tile(jnp.asarray(np.append(np.linspace(-2.9, 2.9, 31), 4.0), jnp.float32), (4096, 1))
    operand, _ = quantise(x, role, initial_state(role), 1, key=jax.random.key(0))
    drawn = np.asarray(operand.values, np.float64)
    assert np.isin(np.abs(drawn), [0, 0.5, 1, 1.5, 2, 3, 4]).all()
    # One draw is off by less than half the distance of its neighbours, 0.5 on average over the values.
    np.testing.assert_allclose(drawn.mean(axis=0), np.asarray(x)[0], atol=5 * 0.5 / np.sqrt(4096))
