"""The grid of a weight: spacing, codes and values against the format's own table, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from altgrad_jax.precision.formats import get_format
from altgrad_jax.precision.grid import Grid, stack_grids
from altgrad_jax.precision.recipes import parse_recipe
from altgrad_jax.precision.scaling import initial_state, quantise
from altgrad_jax.precision.weight_grid import WeightGrid, grid_of, policy_grid

FORMATS = ("e5m2", "e4m3fn", "e4m3", "e3m4", "e5m2fnuz", "binary8p4", "e2m1fn", "float16", "bfloat16")
FAMILY = tuple(f"e{e}m{7 - e}" for e in (0, 1, 2, 6, 7))


def weights(seed=0, shape=(64, 48)):
    rng = np.random.default_rng(seed)
    w = (0.02 * rng.standard_normal(shape)).astype(np.float32)
    w[0, :3] = 0.0, -0.0, w.max() * 3
    return w


@pytest.mark.parametrize("scale", [1.0, 64.0, 1000.0])
@pytest.mark.parametrize("name", [*FORMATS, *FAMILY])
def test_ulp_rounding_and_codes(name, scale):
    fmt, w = get_format(name), weights()
    grid = grid_of(name, w, scale)
    scaled = np.minimum(np.abs((w * np.float32(scale)).astype(np.float64)), fmt.max)
    np.testing.assert_allclose(grid.ulp(w), fmt.ulp(scaled) / scale, rtol=2e-7, atol=2.0**-126)
    values = fmt.finite_values()
    codes = np.asarray(grid.code(w))
    assert codes.dtype == np.int32 and int(grid.largest_code) == fmt.max_magnitude == (values.size - 1) // 2
    nearest = values[codes + fmt.max_magnitude]
    error = np.abs(nearest - np.clip((w * np.float32(scale)).astype(np.float64), -fmt.max, fmt.max))
    assert (error <= 0.5 * np.maximum(fmt.ulp(scaled), fmt.ulp(nearest))).all()
    np.testing.assert_allclose(grid.value(codes), nearest / scale, rtol=2e-7)
    np.testing.assert_array_equal(grid.value(codes), grid.round(w))
    np.testing.assert_array_equal(grid.code(grid.value(codes)), codes)


@pytest.mark.parametrize("name", [*FORMATS, *FAMILY])
def test_every_value_has_its_place(name):
    values = get_format(name).finite_values()
    grid = WeightGrid(Grid.of(name), jnp.float32(1.0))
    largest = int(grid.largest_code)
    codes = np.arange(-largest, largest + 1)
    normal = (np.abs(values) >= 2.0**-126) | (values == 0)
    np.testing.assert_array_equal(np.asarray(grid.value(codes))[normal], values.astype(np.float32)[normal])
    np.testing.assert_array_equal(np.asarray(grid.code(values))[normal], codes[normal])


def test_traced_and_batched_formats():
    names = ("e5m2", "e3m4", "e0m7", "e7m0")
    w = weights(1)

    @jax.jit
    def asked(grid, w):
        fitted = WeightGrid(grid, jnp.float32(1.0)).fitted(w)
        return fitted.scale, fitted.ulp(w), fitted.code(w), fitted.round(w), fitted.largest_code

    together = jax.vmap(asked, in_axes=(0, None))(stack_grids(names), w)
    for i, name in enumerate(names):
        alone = grid_of(name, w)
        expected = alone.scale, alone.ulp(w), alone.code(w), alone.round(w), alone.largest_code
        for actual, wanted in zip(together, expected, strict=True):
            np.testing.assert_array_equal(actual[i], wanted)


@pytest.mark.parametrize("name", ["e5m2", "e0m7", "e4m3fn", "e7m0"])
def test_fitted_grids_leave_room_and_nest(name):
    fmt, w = get_format(name), weights(2)
    grid = grid_of(name, w)
    assert float(np.log2(grid.scale)).is_integer()
    top = min(fmt.max, 2.0**50)
    assert top / 4 < float(grid.scale) * np.abs(w).max() <= top / 2
    on_grid = np.asarray(grid.round(w))
    # Weights that have grown past a binade are on the next grid, but for those too small for it.
    wider = WeightGrid(grid.grid, grid.scale / 2)
    kept = np.asarray(wider.round(on_grid)) == on_grid
    assert kept[np.abs(on_grid) * float(grid.scale) >= 2 * fmt.min_normal].all()
    fixed = WeightGrid(grid.grid, jnp.float32(3.0), fixed=True)
    assert fixed.fitted(w) is fixed


@pytest.mark.parametrize(
    "text",
    [
        *("e5m2", "e4m3 scaling=current", "e4m3 scaling=current pow2=1", "e3m4 granularity=channel scaling=current"),
        *("mxfp8", "mxfp8 margin=1", "e5m2_cast", "e5m2 scaling=static scale=64", "e5m2 pow2=1 margin=1"),
    ],
)
@pytest.mark.parametrize("axis", [0, 1])
def test_the_policys_grid_is_what_the_product_reads(text, axis):
    role = parse_recipe(text).weight
    w = weights(3, (70, 33))
    state = initial_state(role)
    operand, _ = quantise(jnp.asarray(w), role, state, axis)
    expected = np.asarray(operand.values, np.float32) * np.asarray(operand.inverse_scale)
    grid = policy_grid(jnp.asarray(w), role, state, axis)
    np.testing.assert_allclose(grid.round(w), expected, rtol=3e-7)
    assert grid.fixed == (role.scaling in ("none", "static"))
