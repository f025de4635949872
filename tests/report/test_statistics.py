"""Intervals and tests over seeds, against scipy, by hand, and by drawing data whose answer is known."""

import math
import random

import numpy as np
import pytest
from scipy import stats

from altgrad_jax.report.statistics import (
    BETTER,
    EQUIVALENT,
    NOTHING,
    UNDECIDED,
    UNTESTED,
    WORSE,
    decide,
    equivalence,
    holm,
    of_differences,
    paired,
    ratio,
)


@pytest.mark.parametrize("n", [2, 3, 5, 12])
def test_paired_is_scipys(n):
    draw = np.random.default_rng(n)
    a, b = draw.normal(3, 0.5, n), draw.normal(3.1, 0.5, n)
    found = paired(dict(enumerate(a.tolist())), dict(enumerate(b.tolist())))
    test = stats.ttest_rel(a, b)
    interval = test.confidence_interval(0.95)
    np.testing.assert_allclose(
        [found.mean, found.low, found.high, found.p], [np.mean(a - b), *interval, test.pvalue], rtol=1e-10
    )
    assert found.n == n


def test_by_hand():
    """Differences 1, 2, 3: mean 2, standard deviation 1, t = 2 sqrt(3), 2 degrees of freedom, quantile 4.3027."""
    found = of_differences([1.0, 2.0, 3.0])
    half = 4.302652729911275 / math.sqrt(3)
    assert (found.n, found.mean) == (3, 2.0)
    np.testing.assert_allclose([found.low, found.high], [2 - half, 2 + half], rtol=1e-9)
    # With 2 degrees of freedom the two-sided p is 1 - t / sqrt(2 + t^2).
    t = 2 * math.sqrt(3)
    np.testing.assert_allclose(found.p, 1 - t / math.sqrt(2 + t * t), rtol=1e-9)
    assert not found.excludes_zero and of_differences([1.0, 1.1, 1.2]).excludes_zero


def test_pairs_are_of_shared_seeds_with_finite_values():
    found = paired({1: 3.0, 2: 4.0, 3: math.nan, 4: 5.0}, {1: 2.5, 2: 3.0, 3: 1.0, 5: 9.0})
    assert found.n == 2 and found.mean == 0.75
    assert paired({1: 3.0}, {2: 3.0}) == NOTHING
    one = paired({1: 3.0}, {1: 2.0})
    assert one.n == 1 and one.mean == 1.0 and math.isnan(one.p) and not one.has_interval and not one.excludes_zero


def test_no_difference_is_no_effect():
    same = {1: 3.1, 2: 3.2, 3: 3.3}
    found = paired(same, dict(same))
    assert (found.mean, found.low, found.high, found.p) == (0.0, 0.0, 0.0, 1.0)


def test_ratio_is_geometric():
    found = ratio({1: 2.0, 2: 8.0}, {1: 1.0, 2: 1.0})
    assert found.mean == pytest.approx(4.0) and found.low * found.high == pytest.approx(16.0)
    assert ratio({1: 2.0, 2: -1.0}, {1: 1.0, 2: 1.0}).n == 1


def test_holm_worked_example():
    """0.005 x 4, 0.01 x 3, 0.03 x 2, 0.04 x 1, none below the one before."""
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm([0.01, math.nan, 0.4, 0.9]), [0.03, math.nan, 0.8, 0.9])
    assert holm([]) == [] and holm([0.6, 0.7]) == [1.0, 1.0]


def test_intervals_cover_and_families_of_nothing_stay_quiet():
    """Of intervals of 3 seeds 95 % hold the truth; of families of 8 null comparisons at most 5 % show anything."""
    draw = random.Random(0)
    families, covered, alarms = 400, 0, 0
    for _ in range(families):
        found = [of_differences([draw.gauss(0, 0.1) for _ in range(3)]) for _ in range(8)]
        covered += sum(one.low <= 0 <= one.high for one in found)
        alarms += min(holm([one.p for one in found])) < 0.05
    assert covered / (8 * families) == pytest.approx(0.95, abs=0.015)
    assert alarms / families < 0.05 + 3 * math.sqrt(0.05 * 0.95 / families)


@pytest.mark.parametrize(("n", "margin"), [(2, 0.1), (3, 0.05), (8, 0.3)])
def test_equivalence_is_two_one_sided_tests(n, margin):
    """p < 0.05 exactly where the 90 % interval lies within the margin."""
    draw = np.random.default_rng(n)
    for _ in range(50):
        d = draw.normal(draw.uniform(-2 * margin, 2 * margin), margin / 2, n).tolist()
        inside = of_differences(d, 0.9)
        assert (equivalence(d, margin) < 0.05) == (-margin < inside.low and inside.high < margin)


def test_equivalence_by_hand():
    """Differences -1, 0, 1: t = margin / (1 / sqrt(3)), with 2 degrees of freedom p = (1 - t / sqrt(2 + t^2)) / 2."""
    t = 2 * math.sqrt(3)
    assert equivalence([-1.0, 0.0, 1.0], 2.0) == pytest.approx((1 - t / math.sqrt(2 + t * t)) / 2)
    assert math.isnan(equivalence([0.1], 1.0)) and math.isnan(equivalence([], 1.0))
    assert [equivalence([d, d], 0.05) for d in (0.0, 0.04, -0.06)] == [0.0, 0.0, 1.0]


def test_one_experiment_under_two_names_counts_once():
    assert holm([0.01, 0.01, 0.04], ["a", "a", "b"]) == [0.02, 0.02, 0.04]
    assert holm([0.01, 0.01, 0.04]) == [0.03, 0.03, 0.04]
    worse, twin = (0.5, 0.6, 0.55), (0.5, 0.6, 0.55)
    found = decide([worse, twin, (0.01, -0.01, 0.0), (0.2,)])
    assert [one.family for one in found] == [2, 2, 2, 2]  # the last has one seed: it is not tested
    assert found[0] == found[1] and found[0].p == pytest.approx(2 * found[0].found.p)


def test_three_verdicts_and_no_test():
    """Few seeds that scatter decide nothing; a difference below the margin is said to be one."""
    family = decide(
        [
            (0.50, 0.51, 0.52),
            (-0.50, -0.51, -0.52),
            (0.001, -0.002, 0.0),
            (0.0200, 0.0201, 0.0202),
            (0.4, -0.3, 0.2),
            (1.0,),
        ],
        0.05,
    )
    assert [one.verdict for one in family] == [WORSE, BETTER, EQUIVALENT, EQUIVALENT, UNDECIDED, UNTESTED]
    assert [one.words for one in family[2:4]] == ["equivalent within 0.05", "equivalent within 0.05 (worse by less)"]
    assert decide([(0.06, 0.05, 0.07)], 0.01)[0].verdict == WORSE
    assert decide([(0.06, 0.05, 0.07)], 0.1)[0].verdict == EQUIVALENT


def test_equivalence_is_claimed_falsely_at_most_one_time_in_twenty():
    """The truth is the margin itself: of families of 8 at most 5 % claim any equivalence."""
    draw = random.Random(1)
    claims = 0
    for _ in range(300):
        family = decide([tuple(draw.gauss(0.05, 0.02) for _ in range(5)) for _ in range(8)])
        claims += any(one.equivalent for one in family)
    assert claims / 300 < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 300)
