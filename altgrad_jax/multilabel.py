"""What a multi-label classifier is worth: precision, recall, F1, exact matches, areas, rankings. NumPy alone.

With TP, FP, FN the counts of a label's true positives, false positives and false negatives over all documents:

    precision = TP / (TP + FP)        recall = TP / (TP + FN)        F1 = 2 TP / (2 TP + FP + FN)

`micro` sums the counts over labels first; `macro` is the mean of the labels' own values, labels without any document
in the split included; `weighted` is that mean, each label weighted by its documents; `samples` is the mean of the
documents' own values. What is 0 / 0 counts as 0. These are scikit-learn's definitions with zero_division=0.

Scores are logits throughout: labels are ranked, and chosen at a threshold, before a sigmoid makes large ones equal.
"""

import numpy as np
import numpy.typing as npt

from altgrad_jax.ranking import Scores, Targets, of_documents, of_labels, ratio


def sigmoid(logits: npt.NDArray) -> Scores:
    """Probabilities of logits, float64, without overflow."""
    z = np.asarray(logits, np.float64)
    small = np.exp(-np.abs(z))
    return np.where(z >= 0, 1.0, small) / (1.0 + small)


def binary_cross_entropy(targets: Targets, logits: npt.NDArray, positive_weight: npt.NDArray | float = 1.0) -> float:
    """Mean over documents and labels of -w y log p - (1 - y) log(1 - p), p = sigmoid(logit), in nats."""
    z = np.asarray(logits, np.float64)
    softplus = np.maximum(z, 0.0) + np.log1p(np.exp(-np.abs(z)))  # -log(1 - p); -log p is softplus - z
    return float(np.mean(np.where(targets, positive_weight * (softplus - z), softplus)))


def decisions(targets: Targets, chosen: npt.NDArray[np.bool_]) -> dict[str, float]:
    """What follows from the labels chosen for each document.

    `micro_*` and `macro_*` (precision, recall, f1), `weighted_f1`, `samples_f1`, `subset_accuracy`, `hamming_loss`.

    Subset accuracy is the share of documents all of whose labels are right; the Hamming loss the share of wrong
    decisions among all, documents times labels.
    """
    hit = (targets & chosen).sum(0).astype(np.float64)
    claimed, real = chosen.sum(0).astype(np.float64), targets.sum(0).astype(np.float64)
    found = {}
    for name, (tp, p, r) in {"micro": (hit.sum(), claimed.sum(), real.sum()), "macro": (hit, claimed, real)}.items():
        for measure, value in (("precision", ratio(tp, p)), ("recall", ratio(tp, r)), ("f1", ratio(2 * tp, p + r))):
            found[f"{name}_{measure}"] = float(np.mean(value))
    f1 = ratio(2 * hit, claimed + real)
    found["weighted_f1"] = float(ratio(np.sum(f1 * real), real.sum()))
    found["samples_f1"] = float(np.mean(ratio(2 * (targets & chosen).sum(1), chosen.sum(1) + targets.sum(1))))
    wrong = targets != chosen
    return found | {"subset_accuracy": float(1 - wrong.any(1).mean()), "hamming_loss": float(wrong.mean())}


def _curve(targets: Targets, scores: Scores) -> tuple[npt.NDArray, npt.NDArray, npt.NDArray]:
    """Over all decisions, by descending score: the distinct scores, and true and false positives down to each."""
    order = np.argsort(-scores, axis=None, kind="stable")
    sorted_scores, hits = scores.ravel()[order], targets.ravel()[order]
    last = np.append(np.flatnonzero(np.diff(sorted_scores)), len(order) - 1)  # equal scores are passed together
    true = np.cumsum(hits, dtype=np.int64)[last]
    return sorted_scores[last], true, last + 1 - true


def roc_auc(targets: Targets, scores: Scores) -> float:
    """Micro ROC-AUC: the chance that a decision that should be positive scores above one that should not, ties half.

    NaN where all should be the same.
    """
    _, true, false = _curve(targets, scores)
    if not true[-1] or not false[-1]:
        return float("nan")
    x, y = np.append(0, false / false[-1]), np.append(0, true / true[-1])
    return float(np.sum(np.diff(x) * (y[1:] + y[:-1]) / 2))


def average_precision(targets: Targets, scores: Scores) -> float:
    """Micro PR-AUC as average precision: precision at each distinct score times the recall won there, summed.

    0 where nothing is positive.
    """
    _, true, false = _curve(targets, scores)
    if not true[-1]:
        return 0.0
    return float(np.sum(np.diff(np.append(0, true / true[-1])) * (true / (true + false))))


def best_threshold(targets: Targets, scores: Scores) -> float:
    """The threshold, at or above which a label is chosen, with the highest micro F1; between two scores, if it can be.

    Of several, the highest. Without any positive it is above every score.
    """
    values, true, false = _curve(targets, scores)
    if not true[-1]:
        return float(np.nextafter(values[0], np.inf))
    f1 = 2 * true / (true + false + true[-1])
    best = int(np.argmax(f1))
    below = values[best + 1] if best + 1 < len(values) else values[best]
    middle = (values[best] + below) / 2
    return float(middle if middle > below else values[best])


def measures(targets: Targets, logits: npt.NDArray, threshold: float) -> dict[str, float]:
    """All of the above, and the rankings: `loss` (unweighted), `decisions` where the logit is at least `threshold`."""
    z = np.asarray(logits, np.float64)
    found = {"loss": binary_cross_entropy(targets, z)} | decisions(targets, z >= threshold)
    found |= {"micro_roc_auc": roc_auc(targets, z), "micro_pr_auc": average_precision(targets, z)}
    return found | of_labels(targets, z) | of_documents(targets, z)


def combine(logits: npt.NDArray, document: npt.NDArray, documents: int) -> npt.NDArray[np.float64]:
    """Logits of documents from those of their windows: the mean, [documents, labels].

    The mean of log odds, not the largest: with many windows and many labels, the largest of noise is high.
    """
    summed = np.zeros((documents, logits.shape[1]))
    np.add.at(summed, document, logits.astype(np.float64))
    return summed / np.bincount(document, minlength=documents)[:, None]
