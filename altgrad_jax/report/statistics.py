"""What a few seeds can say about a difference: paired t intervals and tests, corrected for how many are asked.

Two conditions that share seeds share initial weights and the order of the data, so their losses are compared seed by
seed. With d_1 ... d_n the differences, m their mean and s their standard deviation (n - 1 in the denominator),

    interval   m +- t s / sqrt(n), t the (1 + confidence) / 2 quantile of Student's distribution with n - 1 degrees
    p          two-sided, of m sqrt(n) / s under the same distribution: the paired t test
    Holm       p values ascending p_(1) <= ... <= p_(k), adjusted to max over j <= i of min(1, (k - j + 1) p_(j))

(Holm 1979, A simple sequentially rejective multiple test procedure). One seed has no interval and no p. Differences
that are all zero are no effect: the interval [0, 0] and p = 1.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


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
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of zero."""
        return self.has_interval and (self.low > 0 or self.high < 0)


NOTHING = Paired(0, math.nan, math.nan, math.nan, math.nan)


def paired(values: Mapping[int, float], reference: Mapping[int, float], confidence: float = CONFIDENCE) -> Paired:
    """The difference values - reference over the seeds in both whose two values are finite.

    Args:
      values: seed -> value.
      reference: likewise.
      confidence: of the interval.
    """
    shared = [s for s in values if s in reference and math.isfinite(values[s]) and math.isfinite(reference[s])]
    return of_differences([values[s] - reference[s] for s in sorted(shared)], confidence)


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


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p values, in the order given; those that are NaN were not tested, stay NaN and do not count."""
    tested = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    adjusted, largest = [math.nan] * len(p_values), 0.0
    for rank, (p, i) in enumerate(tested):
        largest = max(largest, min(1.0, (len(tested) - rank) * p))
        adjusted[i] = largest
    return adjusted
