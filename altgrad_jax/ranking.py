"""How well scores rank: labels within a document, documents within a label, and all decisions at once. NumPy alone.

Only the order of the scores matters, and which are equal. Logits are to be ranked, not their sigmoids, which are all 1
from 37 up. The definitions, ties and empty rows included, are scikit-learn's; what it warns of is decided here.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Targets = npt.NDArray[np.bool_]  # [rows, columns]
Scores = npt.NDArray[np.float64]  # the same shape
CHUNK = 1 << 20  # scores that are ranked at once, which bounds the memory


def ratio(above: npt.NDArray, below: npt.NDArray) -> Scores:
    """above / below, 0 / 0 being 0."""
    return np.divide(above, below, out=np.zeros(np.shape(above), np.float64), where=np.asarray(below) != 0)


@dataclass(frozen=True)
class Ranked:
    """Rows of scores, each sorted from the highest down; equal scores count together.

    Attributes:
      positive: whether the entry should be chosen, [rows, columns].
      true: entries that should be, among those that score as high or higher.
      false: entries that should not be, likewise.
      false_above: entries that should not be, among those that score higher.
    """

    positive: Targets
    true: npt.NDArray[np.int64]
    false: npt.NDArray[np.int64]
    false_above: npt.NDArray[np.int64]

    @property
    def positives(self) -> npt.NDArray[np.int64]:
        """How many entries of a row should be chosen."""
        return self.positive.sum(1)

    @property
    def negatives(self) -> npt.NDArray[np.int64]:
        """How many should not be."""
        return self.positive.shape[1] - self.positives

    def mean_over_positives(self, values: npt.NDArray) -> Scores:
        """Each row's mean of values over the entries that should be chosen; 0 where there are none."""
        return ratio(np.where(self.positive, values, 0).sum(1), self.positives)

    def precision(self) -> Scores:
        """Average precision of each row: of those that should be chosen, the mean of true / (true + false)."""
        return self.mean_over_positives(self.true / (self.true + self.false))

    def wrong_pairs(self, ties: float) -> Scores:
        """Of a row's pairs of one that should be chosen and one that should not, the share in the wrong order.

        Args:
          ties: for how much a pair of equal scores counts.
        """
        wrong = self.mean_over_positives(ties * self.false + (1 - ties) * self.false_above)
        return ratio(wrong, self.negatives)


def ranked(targets: Targets, scores: Scores) -> Ranked:
    """Sorts each row. The scores must be finite."""
    order = np.argsort(-scores, axis=1, kind="stable")
    positive, sorted_scores = np.take_along_axis(targets, order, 1), np.take_along_axis(scores, order, 1)
    place = np.arange(scores.shape[1])
    changes = sorted_scores[:, 1:] != sorted_scores[:, :-1]
    edge = np.ones((len(scores), 1), bool)
    first = np.maximum.accumulate(np.where(np.concatenate([edge, changes], 1), place, 0), 1)
    last = np.where(np.concatenate([changes, edge], 1), place, place[-1])
    last = np.minimum.accumulate(last[:, ::-1], 1)[:, ::-1]
    hits = np.cumsum(positive, 1, dtype=np.int64)
    misses = place + 1 - hits
    before = np.take_along_axis(misses - ~positive, first, 1)
    return Ranked(positive, np.take_along_axis(hits, last, 1), np.take_along_axis(misses, last, 1), before)


def _chunks(targets: Targets, scores: Scores) -> Iterator[Ranked]:
    rows = max(1, CHUNK // targets.shape[1])
    for start in range(0, len(targets), rows):
        yield ranked(targets[start : start + rows], scores[start : start + rows])


def of_documents(targets: Targets, scores: Scores) -> dict[str, float]:
    """`lrap`, `coverage_error` and `ranking_loss`, each the mean over documents.

    LRAP: of each label that the document carries, the share of carried ones among those that score as high; their mean.
    Coverage error: how many labels must be taken, from the highest score down, to have all that the document carries.
    Ranking loss: of the pairs of a label that it carries and one that it does not, the share in the wrong order, equal
    scores included. Documents that carry no label, or all, have LRAP 1 and ranking loss 0; without any, coverage 0.
    """
    lrap, coverage, loss = [], [], []
    for part in _chunks(targets, scores):
        same = (part.positives == 0) | (part.negatives == 0)
        lrap.append(np.where(same, 1.0, part.precision()))
        coverage.append(np.where(part.positive, part.true + part.false, 0).max(1))
        loss.append(part.wrong_pairs(ties=1.0))
    found = {"lrap": lrap, "coverage_error": coverage, "ranking_loss": loss}
    return {name: float(np.mean(np.concatenate(values))) for name, values in found.items()}


def of_labels(targets: Targets, scores: Scores) -> dict[str, float]:
    """`macro_roc_auc` and `macro_pr_auc`, each the mean over labels.

    ROC-AUC leaves out the labels that no document carries, or all do, for which there is none (NaN if that leaves no
    label). PR-AUC is average precision, 0 of a label that no document carries.
    """
    roc, precision = [], []
    for part in _chunks(targets.T, scores.T):
        defined = (part.positives > 0) & (part.negatives > 0)
        roc.append(1 - part.wrong_pairs(ties=0.5)[defined])
        precision.append(part.precision())
    areas = np.concatenate(roc)
    return {
        "macro_roc_auc": float(np.mean(areas)) if areas.size else float("nan"),
        "macro_pr_auc": float(np.mean(np.concatenate(precision))),
    }
