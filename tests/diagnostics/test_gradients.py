"""Sizes, correlations and dead units: by hand, in float64, at the edges of float32, under every transformation."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from altgrad_jax.diagnostics import gradients
from altgrad_jax.precision.formats import get_format
from altgrad_jax.precision.grid import Grid, stack_grids
from altgrad_jax.precision.weight_grid import WeightGrid, grid_of

FORMATS = ("e5m2", "e4m3fn", "e3m4", "e0m7", "e7m0")
GRIDS = {fmt: jax.tree.map(lambda x, i=i: x[i], stack_grids(FORMATS)) for i, fmt in enumerate(FORMATS)}  # one program
measure = jax.jit(gradients.measure)


def drawn(seed=0, size=1.0, shape=(32, 24)) -> tuple[np.ndarray, np.ndarray]:
    """Gradients of very different sizes that grow with the weight, some of them zero; and weights."""
    rng = np.random.default_rng(seed)
    w = 0.02 * rng.standard_normal(shape)
    g = (rng.standard_normal(shape) + 100 * w) * 10.0 ** rng.uniform(-4, 0, shape) * size
    g[rng.random(shape) < 0.1] = 0.0
    return g.astype(np.float32), w.astype(np.float32)


def in_float64(g, w, fmt, scale) -> list[float]:
    """The definitions, in the order of MEASURES."""
    g, w, fmt = np.float64(g), np.float64(w), get_format(fmt)
    size, spacing = np.abs(g), fmt.ulp(np.minimum(np.abs(w * scale), fmt.max)) / scale
    with np.errstate(invalid="ignore"):
        correlation = lambda y: np.corrcoef((size / size.max()).ravel(), y.ravel())[0, 1]  # noqa: E731
        of_spacing = correlation(spacing) if np.unique(spacing).size > 1 else math.nan
    norms = [np.linalg.norm(g), size.max(), size.mean(), size.mean() / g.std()]
    shares = [np.mean(size < 1e-8), np.mean(g == 0)]
    return [*norms, *shares, of_spacing, correlation(np.abs(w)), np.mean(size / spacing)]


def test_numbers_worked_out_by_hand():
    """E2M1, scale 1: the spacing is 0.5 below 2, and 2 from 4."""
    g, w = jnp.array([3.0, -4.0, 0.0, 1e-9]), jnp.array([1.0, -4.0, 0.0, 0.0])
    (row,) = np.asarray(measure([g], [w], [WeightGrid(Grid.of("e2m1fn"), jnp.float32(1.0))]))
    found = dict(zip(gradients.MEASURES, row, strict=True))
    assert found["l2"] == pytest.approx(5.0) and found["linf"] == 4.0 and found["mean_abs"] == pytest.approx(1.75)
    assert found["mean_over_std"] == pytest.approx(1.75 / math.sqrt(25 / 4 - 0.25**2))
    assert found["below_1e-8"] == 0.5 and found["zeros"] == 0.25
    # |g| less its mean: 1.25, 2.25, -1.75, -1.75; S: -0.375, 1.125, -0.375, -0.375; |w|: -0.25, 2.75, -1.25, -1.25.
    assert found["corr_stiffness"] == pytest.approx(3.375 / math.sqrt(12.75 * 1.6875))
    assert found["corr_weight"] == pytest.approx(10.25 / math.sqrt(12.75 * 10.75))
    assert found["mean_over_ulp"] == pytest.approx((3 / 0.5 + 4 / 2) / 4)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("size", [1.0, 1e-8, 1e-20, 1e-30, 1e20])
def test_against_float64(fmt, size):
    g, w = drawn(1, size)
    amax = np.abs(w).max(0, keepdims=True)
    scales = {"tensor": np.float32(7.0), "channel": np.float32(0.7 * np.minimum(get_format(fmt).max, 2.0**50) / amax)}
    grids = {layer: WeightGrid(GRIDS[fmt], jnp.asarray(scale)) for layer, scale in scales.items()}
    rows = measure(dict.fromkeys(grids, g), dict.fromkeys(grids, w), grids)
    for layer, row in zip(sorted(grids), np.asarray(rows), strict=True):
        expected = in_float64(g, w, fmt, np.float64(scales[layer]))
        np.testing.assert_allclose(row, expected, rtol=1e-4, atol=1e-6 * min(size, 1.0), err_msg=layer)


def test_subnormal_gradients_are_not_zero():
    row = np.asarray(measure([np.float32([1e-40, 0.0, -1e-45, 1.0])], [np.ones(4, np.float32)], [None]))[0]
    assert dict(zip(gradients.MEASURES, row, strict=True))["zeros"] == 0.25


def test_zero_constant_and_spoilt_gradients():
    w = np.float32([1.0, 2.0, 3.0])
    rows = np.asarray(measure([0 * w, 0 * w + 0.1, w * np.float32(np.nan)], [w, w, w], [None, None, None]))
    zero, constant, spoilt = (dict(zip(gradients.MEASURES, row, strict=True)) for row in rows)
    assert zero["l2"] == zero["linf"] == zero["mean_abs"] == 0.0 and zero["zeros"] == zero["below_1e-8"] == 1.0
    assert math.isnan(zero["mean_over_std"]) and math.isnan(zero["corr_weight"])
    assert constant["mean_over_std"] == math.inf and math.isnan(constant["corr_weight"])
    assert math.isnan(spoilt["l2"]) and math.isnan(spoilt["mean_abs"])


def test_names():
    params = {"a": {"kernel": jnp.zeros((2, 3))}, "wte": jnp.zeros(2)}
    values = np.arange(18, dtype=np.float32).reshape(2, 9)
    values[1, 8] = np.nan
    record = gradients.name(params, values)
    assert record["grads/a/l2"] == 0.0 and record["grads/wte/linf"] == 10.0 and len(record) == 27
    assert record["grads/l2"] == 9.0  # the largest
    assert record["grads/mean_abs"] == pytest.approx((6 * 2 + 2 * 11) / 8)  # by size
    assert record["grads/mean_over_ulp"] == 8.0  # of those that have one


def test_traced_and_batched_formats():
    g, w = drawn(2)

    def of_format(grid):
        return gradients.measure([g, g], [w, w], [WeightGrid(grid, jnp.float32(1.0)).fitted(w), None])

    together = np.asarray(jax.jit(jax.vmap(of_format))(stack_grids(FORMATS)))
    for fmt, (row, ungridded) in zip(FORMATS, together, strict=True):
        expected = np.array(in_float64(g, w, fmt, float(grid_of(fmt, w).scale)))
        np.testing.assert_allclose(row, expected, rtol=1e-4, err_msg=fmt)
        of_grid = [what in ("corr_stiffness", "mean_over_ulp") for what in gradients.MEASURES]
        np.testing.assert_allclose(ungridded, np.where(of_grid, np.nan, expected), rtol=1e-4)


def test_on_several_devices():
    pairs = [drawn(seed) for seed in (3, 4)]
    stacked = [np.stack(x) for x in zip(*pairs, strict=True)]
    both = jax.pmap(lambda g, w: gradients.measure([g], [w], [grid_of("e3m4", w)]))(*stacked)
    for rows, (g, w) in zip(both, pairs, strict=True):
        np.testing.assert_allclose(rows, measure([g], [w], [grid_of("e3m4", w)]), rtol=1e-5)


# Dead units.


def test_units_die_after_a_hundred_quiet_steps():
    """Columns of a matrix, rows of a table; one loud step and a unit is alive again."""
    params = {"down": {"kernel": np.zeros((2, 4)), "bias": np.zeros(4)}, "wte": np.zeros((3, 2))}
    counts = gradients.init_counts(params)
    assert {name: x.shape for name, x in counts.items()} == {"down": (4,), "wte": (3,)}
    kernel, table = np.full((2, 4), 1e-9, np.float32), np.full((3, 2), 1.0, np.float32)
    kernel[1, 0], kernel[0, 1], table[2] = 1e-3, -np.nan, 0.0
    grads = {"down": {"kernel": kernel, "bias": np.zeros(4)}, "wte": table}
    step, share = jax.jit(gradients.quiet_steps), jax.jit(gradients.dead_share)
    for _ in range(99):
        counts = step(counts, grads)
    assert counts["down"].tolist() == [0, 0, 99, 99] and counts["wte"].tolist() == [0, 0, 99]
    assert counts["down"].dtype == jnp.int32 and share(counts).tolist() == [0.0, 0.0, 0.0]
    kernel[0, 3] = 1e-7
    counts = step(counts, grads)
    assert counts["down"].tolist() == [0, 0, 100, 0]
    record = gradients.name_dead(counts, np.asarray(share(counts)))
    expected = {"grads/dead": 2 / 7, "grads/down/dead": 0.25, "grads/wte/dead": 1 / 3}
    assert record == pytest.approx(expected)


def test_quiet_steps_on_devices_and_in_batches():
    counts = {"a": jnp.array([[5, 5], [7, 7]], jnp.int32)}
    grads = {"a": jnp.array([[[0.0, 1.0]], [[1.0, 0.0]]])}
    for transformed in (jax.pmap, jax.vmap):
        assert transformed(gradients.quiet_steps)(counts, grads)["a"].tolist() == [[6, 0], [0, 8]]
        assert transformed(gradients.dead_share)({"a": counts["a"] + 94}).tolist() == [[0.0, 0.0], [1.0, 1.0]]
