"""The measures of a multi-label classifier against scikit-learn, and the loss against float64."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics

from altgrad_jax import ranking
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
from altgrad_jax.ranking import of_documents, of_labels


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
    for average in ("weighted", "samples") if targets.shape[1] > 1 else ("weighted",):
        expected = metrics.f1_score(*of, average=average, zero_division=0, **labels)
        assert found[f"{average}_f1"] == pytest.approx(expected, rel=1e-12)
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
def test_rankings_are_those_of_scikit_learn(case):
    targets, scores = case
    several = targets.shape[1] > 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a class that is missing
        found = of_labels(targets, scores)
        each = [metrics.average_precision_score(y, z) for y, z in zip(targets.T, scores.T, strict=True)]
        assert found["macro_pr_auc"] == pytest.approx(np.mean(each), rel=1e-12)
        if several:
            assert found["macro_pr_auc"] == pytest.approx(metrics.average_precision_score(targets, scores), rel=1e-12)
        both = targets.any(0) & ~targets.all(0)
        areas = [metrics.roc_auc_score(y, z) for y, z in zip(targets.T[both], scores.T[both], strict=True)]
        assert found["macro_roc_auc"] == pytest.approx(np.mean(areas) if areas else np.nan, rel=1e-12, nan_ok=True)
    found = of_documents(targets, scores)
    if several:
        for name, score in (
            ("lrap", metrics.label_ranking_average_precision_score),
            ("coverage_error", metrics.coverage_error),
            ("ranking_loss", metrics.label_ranking_loss),
        ):
            assert found[name] == pytest.approx(score(targets, scores), rel=1e-12), name


def test_large_splits_are_ranked_in_parts(monkeypatch):
    rng = np.random.default_rng(0)
    targets, scores = rng.random((50, 7)) < 0.2, rng.integers(0, 9, (50, 7)) / 3
    whole = of_documents(targets, scores) | of_labels(targets, scores)
    monkeypatch.setattr(ranking, "CHUNK", 30)
    assert of_documents(targets, scores) | of_labels(targets, scores) == pytest.approx(whole, rel=1e-12)


def test_logits_are_ranked_where_their_sigmoids_are_equal():
    # sigmoid makes 1 of all of these, or less than 1e-17.
    logits = np.array([[90.0, 37.5, -80.0], [60.0, 45.0, -90.0], [38.0, 80.0, -100.0]])
    targets = np.array([[True, False, True], [True, False, False], [False, True, False]])
    threshold = best_threshold(targets, logits)
    assert 45 < threshold < 60
    found = measures(targets, logits, threshold)
    assert found["macro_roc_auc"] == found["macro_pr_auc"] == 1
    assert found["micro_precision"] == 1 and found["micro_recall"] == 0.75
    assert found["micro_roc_auc"] == pytest.approx(metrics.roc_auc_score(targets.ravel(), logits.ravel()))
    assert found["lrap"] == pytest.approx((1 + 2 / 3) / 2 / 3 + 2 / 3)
    separable = np.array([[50.0, 40.0], [60.0, 45.0]]), np.array([[True, False], [True, False]])
    assert measures(separable[1], separable[0], 47.0)["micro_roc_auc"] == 1


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
        found = measures(targets, logits, 0.0)
    assert found["micro_f1"] == 0.5 and found["loss"] == 5e3


def test_windows_of_a_document_are_averaged():
    logits = np.array([[1.0, -4], [2, 0], [6, 2], [7, 7]], np.float32)
    np.testing.assert_allclose(combine(logits, np.array([0, 0, 1, 0]), 2), [[10 / 3, 1], [6, 2]], rtol=1e-15)
