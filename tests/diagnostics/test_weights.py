"""What an update did to weights: by hand, in float64 on the formats' own tables, and under every transformation."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from altgrad_jax.diagnostics import weights
from altgrad_jax.precision.formats import get_format
from altgrad_jax.precision.grid import Grid, stack_grids
from altgrad_jax.precision.weight_grid import WeightGrid, grid_of

FORMATS = ("e5m2", "e4m3fn", "e3m4", "e0m7", "e7m0")
GRIDS = {fmt: jax.tree.map(lambda x, i=i: x[i], stack_grids(FORMATS)) for i, fmt in enumerate(FORMATS)}  # one program
measure = jax.jit(weights.measure)


def named(before, after, grids) -> dict[str, float | str]:
    return weights.name(before, *jax.device_get(measure(before, after, grids)))


def updated(seed=0, shape=(48, 40), scale=1.0) -> tuple[np.ndarray, np.ndarray]:
    """Weights, some of them zero, and the same after an update of nine in ten, over several orders of magnitude."""
    rng = np.random.default_rng(seed)
    w = (0.02 * rng.standard_normal(shape)).astype(np.float32)
    w[0, :3] = 0.0
    d = 1e-3 * rng.standard_normal(shape) * 10.0 ** rng.uniform(-3, 0, shape) * (rng.random(shape) < 0.9)
    return w * np.float32(scale), ((w + d) * scale).astype(np.float32)


def by_table(w, new, fmt, scale) -> dict[str, float]:
    """The definitions in float64, rounding by search in the table of values. `scale` broadcasts to w."""
    fmt = get_format(fmt)
    values = fmt.finite_values()
    middles = (values[1:] + values[:-1]) / 2
    zero = values.size // 2
    scale = np.broadcast_to(np.float64(scale), w.shape)
    w, new = np.float64(w), np.float64(new)
    code = lambda x: np.searchsorted(middles, x * scale) - zero  # noqa: E731
    ulp = lambda x: fmt.ulp(np.clip(x * scale, -fmt.max, fmt.max)) / scale  # noqa: E731
    changed = w != new
    ulps = (np.abs(new - w) / ulp(w))[changed]
    log2, codes = np.log2(ulp(new)), code(new)
    shares = np.unique(codes, return_counts=True)[1] / codes.size
    position = np.abs(codes) / zero
    flips = np.mean(code(w) != codes)
    lower = np.quantile(ulps, list(weights.QUANTILES.values()), method="inverted_cdf")
    return {
        "updates": changed.mean(),
        "zero_updates": 1 - changed.mean(),
        "flips": flips,
        "stall": 1 - flips / changed.mean(),
        "relative_update": np.linalg.norm(new - w) / np.linalg.norm(w),
        "ulps_mean": ulps.mean(),
        **dict(zip(weights.QUANTILES, lower, strict=True)),
        "distance": np.mean(np.abs(new - values[codes + zero] / scale) / ulp(new)),
        "stiffness_log2_mean": log2.mean(),
        "stiffness_log2_std": log2.std(),
        "stiffness_log2_min": log2[new != 0].min(),
        "position_mean": position.mean(),
        "position_std": position.std(),
        "codes_used": shares.size / values.size,
        "codes_entropy": -np.sum(shares * np.log2(shares)),
    }


def three_grids(fmt, w) -> dict[str, WeightGrid]:
    """With one scale, with one that is no power of two, and with one a column."""
    largest = min(get_format(fmt).max, 2.0**50)
    channels = 2.0 ** np.round(np.log2(largest / np.abs(w).max(0, keepdims=True)))
    scales = {"channel": channels, "free": grid_of(fmt, w).scale, "odd": 0.8 * largest / np.abs(w).max()}
    return {layer: WeightGrid(GRIDS[fmt], jnp.asarray(scale, jnp.float32)) for layer, scale in scales.items()}


def assert_agrees(record, layer, expected):
    for what, value in expected.items():
        # float32 sums, and logarithms near 100, known to 1e-5; quantiles are kept to 7 significant bits.
        rtol = 2.0**-7 if what in weights.QUANTILES else 2e-4
        atol = 2e-5 if what.startswith("stiffness") else 2e-6
        np.testing.assert_allclose(record[f"weights/{layer}/{what}"], value, rtol=rtol, atol=atol, err_msg=what)


def test_numbers_worked_out_by_hand():
    """E2M1, scale 1: 0, 0.5, 1, 1.5, 2, 3, 4, 6; spacing 0.5 below 2, 1 from 2, 2 from 4."""
    before = {"a": jnp.array([0.5, 1.0, 2.0, -4.0, 0.0])}
    after = {"a": jnp.array([0.625, 1.5, 2.0, -5.5, 0.0])}
    grid = WeightGrid(Grid.of("e2m1fn"), jnp.float32(1.0))
    record = named(before, after, {"a": grid})
    # Three of five updated, by 0.125 / 0.5, 0.5 / 0.5 and 1.5 / 2 spacings; 1 -> 1.5 and -4 -> -6 are other values.
    expected = {
        "updates": 0.6,
        "zero_updates": 0.4,
        "flips": 0.4,
        "stall": 1 / 3,
        "relative_update": math.sqrt((0.125**2 + 0.5**2 + 1.5**2) / (0.25 + 1 + 4 + 16)),
        "ulps_mean": 2 / 3,
        "ulps_q10": 0.25,
        "ulps_q50": 0.75,
        "ulps_q90": 1.0,
        "ulps_q99": 1.0,
        "distance": (0.125 / 0.5 + 0.5 / 2) / 5,
        "stiffness_log2_mean": (-1 - 1 + 0 + 1 - 1) / 5,  # spacings 0.5, 0.5, 1, 2, 0.5
        "stiffness_log2_std": 0.8,
        "stiffness_log2_min": -1.0,
        "position_mean": (1 + 3 + 4 + 7 + 0) / 35,
        "position_std": math.sqrt(75 / 5 - 9) / 7,
        "codes_used": 5 / 15,
        "codes_entropy": math.log2(5),
    }
    for key, value in expected.items():
        assert record[f"weights/a/{key}"] == pytest.approx(value, rel=1e-6), key
        assert record[f"weights/{key}"] == pytest.approx(value, rel=1e-6), key
    assert record["weights/a/stiffness"] == "60,20,20" + 29 * ",0"
    assert record["weights/a/codes"] == "20,0,0,0,0,0,0,20,20,0,20,20,0,0,0"


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("scale", [1.0, 1e-20, 3e8])
def test_against_the_table(fmt, scale):
    """Weights of any size, for a scale goes with them."""
    w, new = updated(1, scale=scale)
    grids = three_grids(fmt, w)
    record = named(dict.fromkeys(grids, w), dict.fromkeys(grids, new), grids)
    for layer, grid in grids.items():
        assert_agrees(record, layer, by_table(w, new, fmt, np.asarray(grid.scale)))
        shares = np.array(record[f"weights/{layer}/stiffness"].split(","), float)
        assert shares.sum() == pytest.approx(100, abs=0.5)


def test_the_stiffness_histogram():
    """E2M1, e_min = 0: subnormals and zeros in the first bin, each binade above them in its own; none was updated."""
    w = {"a": jnp.array([0.0, 0.9, 1.5, 4.0, 100.0])}
    record = named(w, w, {"a": WeightGrid(Grid.of("e2m1fn"), jnp.float32(1.0))})
    assert record["weights/a/stiffness"].split(",")[:4] == ["60", "0", "40", "0"]
    assert record["weights/a/stiffness_log2_min"] == -1.0
    assert math.isnan(record["weights/a/stall"]) and record["weights/a/updates"] == 0.0


def test_large_layers_are_sampled_over_all_columns():
    """2^20 elements and more: norms and rates are of all, tables of every k-th, k without a factor of the last axis."""
    rng = np.random.default_rng(2)
    w = (rng.standard_normal((1030, 1024)) * 2.0 ** (np.arange(1024) % 8)).astype(np.float32)
    new = w + np.float32(1e-3) * rng.standard_normal(w.shape).astype(np.float32)
    expected = by_table(w, new, "e4m3fn", float(grid_of("e4m3fn", w).scale))
    record = named([w], [new], [grid_of("e4m3fn", w)])
    for what in ("flips", "stall", "ulps_mean", "distance", "relative_update"):
        assert record[f"weights/0/{what}"] == pytest.approx(expected[what], rel=1e-4), what
    for what in ("ulps_q10", "ulps_q50", "stiffness_log2_mean", "stiffness_log2_std", "codes_entropy"):
        assert record[f"weights/0/{what}"] == pytest.approx(expected[what], rel=0.01), what


def test_layers_without_a_grid_and_wide_formats():
    w, new = updated(3)
    before, after = {"norm": w, "wide": w, "x": {"kernel": w}}, {"norm": new, "wide": new, "x": {"kernel": w}}
    grids = {"norm": None, "wide": grid_of("bfloat16", w), "x": {"kernel": grid_of("e5m2", w)}}
    record = named(before, after, grids)
    of_norm = {key.split("/")[2] for key in record if key.startswith("weights/norm/")}
    assert of_norm == {"updates", "zero_updates", "relative_update"}
    assert math.isnan(record["weights/wide/codes_used"]) and "weights/wide/codes" not in record
    assert record["weights/codes_entropy"] == record["weights/x/codes_entropy"] > 3
    assert record["weights/updates"] == pytest.approx(np.mean(w != new) * 2 / 3, rel=1e-6)
    assert record["weights/relative_update"] == record["weights/norm/relative_update"]
    # Nothing was updated in x, so stall and distances moved are those of the other layer with a grid.
    assert record["weights/stall"] == pytest.approx(record["weights/wide/stall"])
    assert record["weights/ulps_mean"] == pytest.approx(record["weights/wide/ulps_mean"])


def test_a_spoilt_update_shows():
    w, new = updated(4)
    grids = three_grids("e5m2", w)
    new[3, 3] = np.nan
    record = named(dict.fromkeys(grids, w), dict.fromkeys(grids, new), grids)
    assert all(math.isnan(record[f"weights/{what}"]) for what in ("relative_update", "ulps_mean", "distance"))
    assert record["weights/updates"] > 0.8


def test_traced_and_batched_formats():
    w, new = updated(5)

    def of_format(grid):
        return weights.measure([w, w[0]], [new, new[0]], [WeightGrid(grid, jnp.float32(1.0)).fitted(w), None])

    together = jax.jit(jax.vmap(of_format))(stack_grids(FORMATS))
    for i, fmt in enumerate(FORMATS):
        record = weights.name([w, w[0]], *(np.asarray(part[i]) for part in together))
        assert_agrees(record, "0", by_table(w, new, fmt, float(grid_of(fmt, w).scale)))


def test_on_several_devices():
    pairs = [updated(seed) for seed in (6, 7)]
    stacked = [np.stack(x) for x in zip(*pairs, strict=True)]
    both = jax.pmap(lambda w, new: weights.measure([w], [new], [grid_of("e3m4", w)]))(*stacked)
    for i, (w, new) in enumerate(pairs):
        record = weights.name([w], *(np.asarray(part[i]) for part in both))
        assert_agrees(record, "0", by_table(w, new, "e3m4", float(grid_of("e3m4", w).scale)))
