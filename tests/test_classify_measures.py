"""The measures of a multi-label classifier against scikit-learn, and the loss against float64."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics

from altgrad_jax.multilabel import (
    average_precision,
    best_threshold,
    binary_cross_entropy,
    combine,
    decisions,
    measures,
    roc_auc,
    sigmoid,
)


@st.composite
def cases(draw):
    """(targets, scores): labels without positives, documents without labels, and many equal scores among them."""
    documents, labels = draw(st.integers(1, 12)), draw(st.integers(1, 7))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    targets = rng.random((documents, labels)) < draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    targets[:, rng.random(labels) < 0.3] = False
    targets[rng.random(documents) < 0.3] = False
    steps = draw(st.sampled_from([2, 5, 10**6]))
    scores = rng.integers(0, steps, targets.shape) / steps
    return targets, np.where(targets & (rng.random(targets.shape) < 0.5), 1.0, scores)


@settings(max_examples=150, deadline=None)
@given(cases(), st.sampled_from([0.0, 0.2, 0.5, 0.999, 2.0]))
def test_decisions_are_those_of_scikit_learn(case, threshold):
    targets, scores = case
    chosen = scores >= threshold
    found = decisions(targets, chosen)
    # Of a single label scikit-learn must be told that it is one of several, and not the classes 0 and 1.
    labels = dict(labels=list(range(targets.shape[1]))) if targets.shape[1] > 1 else dict(labels=[1])
    of = [(y.astype(int) if y.shape[1] > 1 else y[:, 0].astype(int)) for y in (targets, chosen)]
    for average in ("micro", "macro"):
        expected = metrics.precision_recall_fscore_support(*of, average=average, zero_division=0, **labels)[:3]
        got = [found[f"{average}_{name}"] for name in ("precision", "recall", "f1")]
        np.testing.assert_allclose(got, expected, rtol=1e-12)
    assert found["subset_accuracy"] == pytest.approx(metrics.accuracy_score(*of), rel=1e-12)
    assert found["hamming_loss"] == pytest.approx(metrics.hamming_loss(*of), rel=1e-12)


@settings(max_examples=150, deadline=None)
@given(cases())
def test_areas_are_those_of_scikit_learn(case):
    targets, scores = case
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a class that is missing
        assert average_precision(targets, scores) == pytest.approx(
            metrics.average_precision_score(targets.ravel(), scores.ravel()), rel=1e-12
        )
        if targets.all() or not targets.any():
            assert np.isnan(roc_auc(targets, scores))
        else:
            assert roc_auc(targets, scores) == pytest.approx(
                metrics.roc_auc_score(targets.ravel(), scores.ravel()), rel=1e-12
            )


@settings(max_examples=150, deadline=None)
@given(cases())
def test_no_threshold_gives_a_better_f1(case):
    targets, scores = case
    best = best_threshold(targets, scores)
    tried = [best, *np.unique(scores), np.inf]
    f1 = [decisions(targets, scores >= t)["micro_f1"] for t in tried]
    assert f1[0] == max(f1)
    if not targets.any():
        assert not (scores >= best).any()


@pytest.mark.parametrize("positive_weight", [1.0, 10.0, np.array([1.0, 4.0, 0.5])])
def test_cross_entropy_against_scikit_learn(positive_weight):
    rng = np.random.default_rng(0)
    targets, logits = rng.random((20, 3)) < 0.3, rng.normal(0, 4, (20, 3))
    weight = np.where(targets, positive_weight, 1.0)
    expected = sum(
        metrics.log_loss(targets[:, j], sigmoid(logits[:, j]), sample_weight=weight[:, j], labels=[0, 1])
        * weight[:, j].sum()
        for j in range(3)
    )
    assert binary_cross_entropy(targets, logits, positive_weight) == pytest.approx(expected / targets.size, rel=1e-12)


def test_extreme_logits_overflow_nothing():
    targets, logits = np.array([[True, False, True, False]]), np.array([[1e4, -1e4, -1e4, 1e4]], np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(sigmoid(logits), [[1, 0, 0, 1]])
        assert binary_cross_entropy(targets, logits) == 5e3
        found = measures(targets, logits, 0.5)
    assert found["micro_f1"] == 0.5 and found["loss"] == 5e3


def test_windows_of_a_document_are_averaged():
    logits = np.array([[1.0, -4], [2, 0], [6, 2], [7, 7]], np.float32)
    np.testing.assert_allclose(combine(logits, np.array([0, 0, 1, 0]), 2), [[10 / 3, 1], [6, 2]], rtol=1e-15)
