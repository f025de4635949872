"""What a few seeds can say about a difference: paired t intervals and tests, corrected for how many are asked.

A test that finds no difference does not show that there is none: that is a test of its own, whose null hypothesis is a
difference of at least a margin.

Two conditions that share seeds share initial weights and the order of the data, so their losses are compared seed by
seed. With d_1 ... d_n the differences, m their mean and s their standard deviation (n - 1 in the denominator),

    interval   m +- t s / sqrt(n), t the (1 + confidence) / 2 quantile of Student's distribution with n - 1 degrees
    p          two-sided, of m sqrt(n) / s under the same distribution: the paired t test
    TOST       the larger p of two one-sided t tests, that m is above -margin and that m is below +margin: small if the
               true difference lies within the margin (below 0.05 where the 90 % interval does)
    Holm       p values ascending p_(1) <= ... <= p_(k), adjusted to max over j <= i of min(1, (k - j + 1) p_(j))

(Schuirmann 1987, A comparison of the two one-sided tests procedure and the power approach; Holm 1979, A simple
sequentially rejective multiple test procedure). One seed has no interval and no p. Differences that are all zero are no
effect: the interval [0, 0], p = 1, and equivalent within any margin.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
LEVEL = 0.05  # of tests, after correction
MARGIN = 0.05  # nats per token: a perplexity 5 % higher or lower
WORSE, BETTER, EQUIVALENT, UNDECIDED, UNTESTED = "worse", "better", "equivalent", "not decided", "not tested"


@dataclass(frozen=True)
class Paired:
    """A mean difference over shared seeds.

    Attributes:
      n: seeds in both.
      mean: of the differences; NaN without a shared seed.
      low: lower end of the confidence interval; NaN with fewer than two seeds.
      high: its upper end, likewise.
      p: of the paired t test, likewise.
    """

    n: int
    mean: float
    low: float
    high: float
    p: float

    @property
    def has_interval(self) -> bool:
        """Whether there were two seeds or more."""
        return not math.isnan(self.low)

    @property
    def reversed(self) -> "Paired":
        """The reference less the values."""
        return Paired(self.n, -self.mean, -self.high, -self.low, self.p)

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of zero."""
        return self.has_interval and (self.low > 0 or self.high < 0)


NOTHING = Paired(0, math.nan, math.nan, math.nan, math.nan)


def shared_differences(values: Mapping[int, float], reference: Mapping[int, float]) -> tuple[float, ...]:
    """values - reference of the seeds in both whose two values are finite, by ascending seed."""
    shared = [s for s in values if s in reference and math.isfinite(values[s]) and math.isfinite(reference[s])]
    return tuple(values[s] - reference[s] for s in sorted(shared))


def paired(values: Mapping[int, float], reference: Mapping[int, float], confidence: float = CONFIDENCE) -> Paired:
    """The difference values - reference over the seeds in both whose two values are finite.

    Args:
      values: seed -> value.
      reference: likewise.
      confidence: of the interval.
    """
    return of_differences(shared_differences(values, reference), confidence)


def of_differences(differences: Sequence[float], confidence: float = CONFIDENCE) -> Paired:
    """Mean, interval and p of differences."""
    n = len(differences)
    if n == 0:
        return NOTHING
    mean = float(np.mean(differences))
    if n == 1:
        return Paired(1, mean, math.nan, math.nan, math.nan)
    error = float(np.std(differences, ddof=1)) / math.sqrt(n)
    half = float(stats.t.ppf((1 + confidence) / 2, n - 1)) * error
    if error == 0:
        return Paired(n, mean, mean, mean, 1.0 if mean == 0 else 0.0)
    p = 2 * float(stats.t.sf(abs(mean) / error, n - 1))
    return Paired(n, mean, mean - half, mean + half, p)


def ratio(values: Mapping[int, float], reference: Mapping[int, float], confidence: float = CONFIDENCE) -> Paired:
    """The geometric mean of values / reference over shared seeds; interval and p of the logarithms' mean.

    Only pairs of positive finite values count.
    """

    def logs(of: Mapping[int, float]) -> dict[int, float]:
        return {seed: math.log(v) for seed, v in of.items() if math.isfinite(v) and v > 0}

    found = paired(logs(values), logs(reference), confidence)
    return Paired(found.n, _exp(found.mean), _exp(found.low), _exp(found.high), found.p)


def _exp(x: float) -> float:
    return math.exp(x) if math.isnan(x) or x < 700 else math.inf


def equivalence(differences: Sequence[float], margin: float = MARGIN) -> float:
    """p of the two one-sided paired t tests (TOST): small if the mean difference lies within +-margin.

    Args:
      differences: one a seed.
      margin: above zero, in the differences' unit.

    Returns:
      p; NaN with fewer than two differences.
    """
    if len(differences) < 2:
        return math.nan
    if min(differences) == max(differences):  # scipy divides by their spread
        return 0.0 if abs(differences[0]) < margin else 1.0
    above = stats.ttest_1samp(differences, -margin, alternative="greater").pvalue
    below = stats.ttest_1samp(differences, margin, alternative="less").pvalue
    return float(max(above, below))


def holm(p_values: Sequence[float], same: Sequence[Hashable] | None = None) -> list[float]:
    """Adjusted p values, in the order given; those that are NaN were not tested, stay NaN and do not count.

    Args:
      p_values: of one family.
      same: what each tests; those that are equal are one test under several names and count once. None: all differ.
    """
    keys: Sequence[Hashable] = range(len(p_values)) if same is None else same
    tested = sorted({key: p for key, p in zip(keys, p_values, strict=True) if not math.isnan(p)}.items(), key=_p)
    adjusted: dict[Hashable, float] = {}
    largest = 0.0
    for rank, (key, p) in enumerate(tested):
        largest = max(largest, min(1.0, (len(tested) - rank) * p))
        adjusted[key] = largest
    return [math.nan if math.isnan(p) else adjusted[key] for key, p in zip(keys, p_values, strict=True)]


def _p(test: tuple[Hashable, float]) -> float:
    return test[1]


@dataclass(frozen=True)
class Tested:
    """A difference with both of its tests, each corrected for its family.

    Attributes:
      found: the difference.
      p: of the paired t test, Holm-corrected; NaN where there were fewer than two pairs.
      p_equivalent: of the equivalence test, Holm-corrected; NaN likewise.
      margin: of the equivalence test.
      family: how many comparisons each correction is for.
    """

    found: Paired
    p: float
    p_equivalent: float
    margin: float
    family: int

    @property
    def differs(self) -> bool:
        """Whether a difference was shown."""
        return self.p < LEVEL

    @property
    def equivalent(self) -> bool:
        """Whether it was shown to be within the margin."""
        return self.p_equivalent < LEVEL

    @property
    def verdict(self) -> str:
        """EQUIVALENT if that was shown, though it may differ by less; else WORSE, BETTER, UNDECIDED or UNTESTED."""
        if math.isnan(self.p):
            return UNTESTED
        if self.equivalent:
            return EQUIVALENT
        return (WORSE if self.found.mean > 0 else BETTER) if self.differs else UNDECIDED

    @property
    def words(self) -> str:
        """The verdict with the margin: "equivalent within 0.05"."""
        if self.verdict != EQUIVALENT:
            return self.verdict
        less = f" ({WORSE if self.found.mean > 0 else BETTER} by less)" if self.differs else ""
        return f"equivalent within {self.margin:g}{less}"


def decide(differences: Sequence[tuple[float, ...]], margin: float = MARGIN) -> list[Tested]:
    """Both tests of every comparison of a family, in the order given.

    Comparisons whose differences are equal to the last digit are one experiment under two names and count once.

    Args:
      differences: of each comparison, one a seed, as `shared_differences` gives them.
      margin: of equivalence.
    """
    found = [of_differences(of) for of in differences]
    p = holm([one.p for one in found], differences)
    p_equivalent = holm([equivalence(of, margin) for of in differences], differences)
    family = len({of for of, one in zip(differences, found, strict=True) if not math.isnan(one.p)})
    return [Tested(one, a, b, margin, family) for one, a, b in zip(found, p, p_equivalent, strict=True)]
