"""What a conversion did to a tensor, against counts on hand-made arrays."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from altgrad_jax.precision.formats import family, get_format
from altgrad_jax.precision.recipes import parse_recipe
from altgrad_jax.precision.scaling import initial_state, quantise, traced_grid
from altgrad_jax.precision.statistics import SHARES, RoleStats, empty_stats, over_devices, over_parts
from tests.precision import numpy_quantised as reference

FAMILY = [fmt.name for fmt in family(7)]


def seen(x, text: str, history=(), traced: bool = False) -> RoleStats:
    role = parse_recipe(text).activation
    state = initial_state(role)
    if history:
        state = replace(state, history=jnp.asarray(history, jnp.float32))
    if traced:
        state = replace(state, grid=traced_grid(role.fmt))
    return quantise(jnp.asarray(x, jnp.float32), role, state, 1, collect=True)[1]


def shares(stats: RoleStats) -> dict[str, float]:
    return dict(zip(SHARES, map(float, np.asarray(stats.shares)), strict=True))


def counted(x, fmt: str, s: float = 1.0) -> dict[str, float]:
    """The shares by definition, in float64."""
    x = np.asarray(x, np.float32)
    q, scaled = reference.to_nearest(x.astype(np.float64) * s, fmt), x.astype(np.float64) * s
    top = reference.magnitudes(fmt)[-2:]
    found = {
        "nonzero": x != 0,
        "underflow": (x != 0) & (q == 0),
        "overflow": np.isfinite(x) & (np.abs(scaled) > top[1] + (top[1] - top[0]) / 2),
        "nan": np.isnan(q),
        "nonfinite": ~np.isfinite(x),
    }
    return {what: float(np.float32(which.mean())) for what, which in found.items()}


def test_by_hand():
    """E5M2: steps of 2^-16, half of which rounds to zero; the largest value is 57344, and the next would be 65536."""
    x = [[1.0, -1.3, 0.0, -0.0, 2.0**-17, 2.0**-17 * 1.01, -(2.0**-30), 57344, 60000, 61440, 61441, -1e9]]
    stats = seen(x, "e5m2 scaling=none")
    assert shares(stats) == pytest.approx(
        {
            "nonzero": 10 / 12,
            "underflow": 2 / 12,  # the tie and 2^-30
            "overflow": 2 / 12,  # 61441 and -1e9; 60000 was rounded to the largest
            "nan": 0,
            "nonfinite": 0,
        }
    )
    assert stats.amax == 1e9 and stats.scale == 1
    codes = np.asarray(stats.codes) * 12
    # 1 is 0 01111 00; -1.3 rounds to -1.25; the smallest value has code 1; the largest is 0 11110 11.
    expected = {0x3C: 1, 0xBD: 1, 0x00: 2, 0x80: 2, 0x01: 1, 0x7B: 4, 0xFB: 1}
    assert {int(code): round(float(codes[code])) for code in np.flatnonzero(codes)} == expected
    assert codes.size == 256 and codes.sum() == pytest.approx(12)


@pytest.mark.parametrize("spoil", [np.inf, -np.inf, np.nan])
def test_infinities_and_nan_are_counted_apart(spoil):
    stats = seen([[1.0, 1e6, spoil, 0.0]], "e5m2 scaling=none")
    assert shares(stats) == {"nonzero": 3 / 4, "underflow": 0, "overflow": 1 / 4, "nan": 1, "nonfinite": 1 / 4}
    assert np.isnan(stats.scale) and not np.isfinite(stats.amax)
    assert {int(c): float(stats.codes[c]) for c in np.flatnonzero(stats.codes)} == {0x7E: 1.0}


def test_special_values_where_they_are_not_saturated():
    x = [[1.0, 1e6, -1e6, 1e7, 60000.0, 0.0, 0.0, 0.0]]
    overflowing = seen(x, "e5m2_cast")
    assert shares(overflowing) == {"nonzero": 5 / 8, "underflow": 0, "overflow": 3 / 8, "nan": 0, "nonfinite": 0}
    assert {int(c) for c in np.flatnonzero(overflowing.codes)} == {0x00, 0x3C, 0x7C, 0xFC, 0x7B}
    # E4M3 has no infinity: what overflows is NaN, and is counted as both.
    assert shares(seen(x, "e4m3fn scaling=none overflow=special")) == {
        "nonzero": 5 / 8,
        "underflow": 0,
        "overflow": 4 / 8,
        "nan": 4 / 8,
        "nonfinite": 0,
    }


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("fmt", ["e5m2", "e4m3fn", "e4m3fnuz", "e2m3fn", *FAMILY])
def test_edge_of_overflow(fmt, traced):
    """Half a step beyond the largest value begins what is more than rounding; exactly there nothing is lost yet."""
    below, largest = reference.magnitudes(fmt)[-2:]
    edge = np.float32(largest + (largest - below) / 2 if "m0" not in fmt else 1.5 * largest)
    further = np.nextafter(edge, np.float32(np.inf))
    for x, share in (([[largest, -largest, edge, -edge]], 0), ([[0.0, edge, further, -further]], 0.5)):
        assert shares(seen(x, f"{fmt} scaling=none", traced=traced))["overflow"] == share


@pytest.mark.parametrize("fmt", ["e5m2", "e4m3fn", "e3m4", *FAMILY])
@given(st.integers(0, 2**32 - 1), st.integers(-30, 30))
@settings(max_examples=5, deadline=None)
def test_any_tensor(fmt, seed, exponent):
    rng = np.random.default_rng(seed)
    shape = 8, 32  # a power of two: shares are exact
    x = (rng.normal(size=shape) * np.exp2(rng.integers(-20, 20, shape) + exponent)).astype(np.float32)
    x[rng.random(x.shape) < 0.1] = 0
    if "m0" in fmt:  # its step is not that between the last two values
        x = np.clip(x, -(2.0**64), 2.0**64)
    stats = seen(x, f"{fmt} scaling=none")
    assert shares(stats) == counted(x, fmt)
    table, q, codes = get_format(fmt).values(), reference.to_nearest(x, fmt), np.asarray(stats.codes)
    for value in np.unique(q):
        assert codes[table == value].sum() == (q == value).mean()
    assert codes.sum() == 1


def test_defect_5_overflow_under_a_scale_that_has_become_too_small_is_seen():
    """A scale from the same tensor never overflows; yesterday's does, and AltGrad reported 0 all the same."""
    x = np.random.default_rng(0).normal(size=(8, 128)).astype(np.float32)
    before = np.abs(x).max() / 4  # the history knows a quarter of today's amax
    for fmt in ("e5m2", "e4m3fn", "e0m7", "e3m4:inf=0,nan=0"):
        stats = seen(x, f"{fmt} history=2", (before, before / 2))
        true = counted(x, fmt, float(reference.scale_of(before, fmt)))
        assert shares(stats) == true
        assert 0.1 < true["overflow"] < 0.5
        assert shares(seen(x, f"{fmt} scaling=current"))["overflow"] == 0
        # Each further step with that amax in the history lets all fit again.
        assert shares(seen(x, f"{fmt} history=2", (np.abs(x).max(), before)))["overflow"] == 0


def test_defect_5_overflow_is_seen_even_where_the_product_with_the_scale_is_infinite():
    x = np.array([[10.0, -1.0, 1e-36, 0.0]])
    stats = seen(x, "e5m2 history=1", (1e-35,))
    assert stats.scale == 2.0**126
    assert shares(stats) == {"nonzero": 3 / 4, "underflow": 0, "overflow": 2 / 4, "nan": 0, "nonfinite": 0}


@pytest.mark.parametrize("size", [0.02, 1.0])
def test_defect_5_underflow_is_the_true_one(size):
    """AltGrad guessed it from ranges: 100 % in E7M0, where nothing underflows, and 0.15 % of the 9.2 % in E0M7."""
    x = (size * np.random.default_rng(1).normal(size=(100, 1000))).astype(np.float32)
    amax = np.abs(x).max()
    measured = {}
    for fmt in FAMILY:
        stats = seen(x, f"{fmt} scaling=current")
        measured[fmt] = shares(stats)["underflow"]
        s = reference.scale_of(amax, fmt)
        true = np.mean((x != 0) & (reference.to_nearest(x * s, fmt) == 0))
        assert measured[fmt] == pytest.approx(true, abs=1e-7)
    assert measured["e7m0"] == 0 and measured["e5m2:inf=0,nan=0"] == 0
    # A normal distribution has a density of 0.4 around 0; zero takes half a step to each side, amax / 127 / 2.
    assert measured["e0m7"] == pytest.approx(0.4 * amax / size / 127, rel=0.05)
    assert measured["e0m7"] == measured["e1m6"] > measured["e2m5"] > measured["e3m4:inf=0,nan=0"]


def test_underflow_is_seen_even_where_the_product_with_the_scale_is_no_normal_number():
    x = np.array([[1e35, 1e-10, 1e-30, 0.0]])
    lost = {"nonzero": 3 / 4, "underflow": 2 / 4, "overflow": 0, "nan": 0, "nonfinite": 0}
    assert shares(seen(x, "e5m2 scaling=current")) == lost


def test_what_underflow_takes_away():
    """Nearly all elements may be nothing of a tensor; or half of its sum, as in a softmax: one -1 and many 1/V."""
    mixed = np.full((1, 512), 1e-3, np.float32)
    mixed[0, ::2], mixed[0, 7] = -1e-3, 1.0
    tail = np.full((1, 512), 1 / 511, np.float32)
    tail[0, 7] = -1
    even = np.array([[1.0, 0.5, 1e-3, -1e-3]], np.float32)
    for x, sum_lost, energy_lost in ((mixed, 1e-3 / 1.511, 5.1e-4), (tail, 0.5, 1 / 512), (even, 0.0, 1.6e-6)):
        found = seen(x, "e0m7 scaling=current")
        of_x, gone, energy, energy_gone = map(float, np.asarray(found.sums))
        assert shares(found)["underflow"] >= 0.5
        assert abs(gone) / of_x == pytest.approx(sum_lost, rel=1e-2, abs=1e-9)
        assert energy_gone / energy == pytest.approx(energy_lost, rel=1e-2)
    assert not np.asarray(seen(tail, "e5m2 scaling=current").sums)[[1, 3]].any()
    tiny = np.asarray(seen(1e-30 * tail, "e0m7 scaling=current").sums)
    assert tiny[3] / tiny[2] == pytest.approx(1 / 512, rel=1e-2), "squares of small numbers are no float32 numbers"


def test_nothing_is_counted_unless_asked_for():
    role = parse_recipe("e5m2").activation
    stats = quantise(jnp.ones((2, 2)), role, initial_state(role), 1)[1]
    assert (stats.scale, stats.shares, stats.codes) == (None, None, None) and stats.amax == 1


@pytest.mark.parametrize("name", ["e5m2", "e2m1fn", "e3m2fn", "float16", "e3m4:bias=5,inf=0,nan=top"])
@pytest.mark.parametrize("collect", [False, True])
def test_a_probe_of_zeros_has_the_structure_of_what_is_counted(name, collect):
    role = parse_recipe(name).activation
    stats = quantise(jnp.ones((2, 2)), role, initial_state(role), 1, collect=collect)[1]
    empty = empty_stats(get_format(name), collect)
    assert jax.tree.map(jnp.shape, empty) == jax.tree.map(jnp.shape, stats)
    assert jax.tree.map(jnp.result_type, empty) == jax.tree.map(jnp.result_type, stats)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(empty))
    assert (stats.codes is None) == (not collect or name == "float16")


def test_codes_of_short_formats():
    stats = seen([[0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -6.0, 100.0]], "e2m1fn scaling=none")
    assert np.asarray(stats.codes).size == 16
    np.testing.assert_allclose(
        np.asarray(stats.codes) * 10, [1, 1, 1, 1, 1, 1, 1, 2, 0, 0, 0, 0, 0, 0, 0, 1], rtol=1e-6
    )


def test_combined_over_parts_and_devices():
    """The shares of a whole are the means of its equal parts' shares; amax is the largest."""
    x = np.random.default_rng(2).normal(size=(8, 40)).astype(np.float32)
    x[5, 30], x[:, :7] = 99, 1e-9
    whole = seen(x, "e5m2 scaling=none")
    parts = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(seen(row[None], "e5m2 scaling=none") for row in x))
    devices = jax.pmap(lambda stats: over_devices(stats, "data"), axis_name="data")(parts)
    for combined in (over_parts(parts), jax.tree.map(lambda leaf: leaf[3], devices)):
        for a, b in zip(jax.tree.leaves(combined), jax.tree.leaves(whole), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)
    assert whole.amax == 99
    amaxes = over_parts(RoleStats(jnp.asarray([1.0, 3.0, 2.0])))
    assert amaxes.amax == 3 and amaxes.shares is None
