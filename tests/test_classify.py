"""The classification task: its loss and where it reads, and whole runs of it."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree

from altgrad_jax import checkpoint, experiment, sample
from altgrad_jax.config import load_config, validate
from altgrad_jax.data.labels import open_labels
from altgrad_jax.diagnostics.curvature import largest_eigenvalues
from altgrad_jax.errors import UsageError, UserError
from altgrad_jax.flops import model_flops_per_token
from altgrad_jax.layers import layer_shapes, layer_weights
from altgrad_jax.model import UNQUANTISED, GPTConfig
from altgrad_jax.objectives import LabelLoss, pooled_logits
from altgrad_jax.parallel import DataParallel
from altgrad_jax.precision.policy import resolve
from altgrad_jax.report.compare import compare, notes
from altgrad_jax.report.runs import read_runs
from altgrad_jax.report.study import make_study
from altgrad_jax.state import init_params, model_structure
from altgrad_jax.step import window_loss
from altgrad_jax.task import make_task
from altgrad_jax.tracking import read_metrics
from tests import numpy_gpt
from tests.planted import PlantedSource, planted_cache
from tests.runs import ROOT, bits, summary

MODEL = GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=19, labels=3, compute_dtype="float32")
GRAPHDEF = model_structure(MODEL)
LOSS = LabelLoss(3, (1.0, 4.0, 0.5))
TOKENS = np.random.default_rng(0).integers(0, 9, (4, 8))
LAST = np.array([0, 3, 6, 7])
TARGETS = np.array([[0, 1, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]])


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(jnp.asarray, numpy_gpt.random_like(jax.eval_shape(lambda: init_params(MODEL, 0)), 1))


def rows(padding, tokens=TOKENS) -> np.ndarray:
    """Tokens up to the last one, `padding` after it, its place, labels."""
    inside = np.arange(8) <= LAST[:, None]
    return np.concatenate([np.where(inside, tokens, padding), LAST[:, None], TARGETS], axis=1).astype(np.int32)


@jax.jit
def logits(params, batch, quantised=UNQUANTISED):
    return pooled_logits(nnx.merge(GRAPHDEF, params, copy=True), batch[:, :9], None, quantised)


@jax.jit
def loss(params, batch, scale=1.0):
    return window_loss(GRAPHDEF, params, batch, 1, None, {}, scale, LOSS)


def test_padding_is_not_seen(params):
    first, second = (np.asarray(logits(params, rows(p))) for p in (9, np.arange(8) + 11))
    np.testing.assert_array_equal(first, second)
    # Each row is what the document alone gives, read off at its end.
    hidden = jax.jit(lambda tokens_BT: nnx.merge(GRAPHDEF, params, copy=True).hidden(tokens_BT)[0, -1])
    for row, tokens, last in zip(first, TOKENS, LAST, strict=True):
        expected = hidden(tokens[None, : last + 1]) @ params["classifier"]["kernel"] + params["classifier"]["bias"]
        np.testing.assert_allclose(row, expected, rtol=2e-5, atol=1e-6)


def test_only_tokens_up_to_the_last_get_a_gradient(params):
    grads = jax.grad(loss)(params, rows(np.arange(8) + 10))
    seen = {int(t) for tokens, last in zip(TOKENS, LAST, strict=True) for t in tokens[: last + 1]}
    norms = np.linalg.norm(grads["wte"], axis=1)
    assert set(np.flatnonzero(norms)) == seen and max(seen) < 9
    one = jax.grad(loss)(params, rows(9)[1:2])  # four tokens
    assert set(np.flatnonzero(np.linalg.norm(one["wpe"], axis=1))) == {0, 1, 2, 3}


def test_the_loss_against_float64(params):
    z = np.asarray(logits(params, rows(9)), np.float64)
    p = 1 / (1 + np.exp(-z))
    expected = np.mean(-np.array([1.0, 4.0, 0.5]) * TARGETS * np.log(p) - (1 - TARGETS) * np.log(1 - p))
    value, grads = jax.value_and_grad(loss)(params, rows(9))
    assert value == pytest.approx(expected, rel=1e-6)
    dz = (np.array([1.0, 4.0, 0.5]) * TARGETS * (p - 1) + (1 - TARGETS) * p) / TARGETS.size
    np.testing.assert_allclose(grads["classifier"]["bias"], dz.sum(0), rtol=1e-5, atol=1e-8)
    # A loss scale is on the gradient alone.
    scaled_value, scaled = jax.value_and_grad(loss)(params, rows(9), 64.0)
    assert scaled_value == value
    for a, b in zip(jax.tree.leaves(scaled), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(a, 64 * b, rtol=1e-4, atol=1e-6)


def test_large_logits_stay_finite(params):
    far = params | {"classifier": params["classifier"] | {"bias": jnp.array([1e4, -1e4, 1e4], jnp.float32)}}
    value, grads = jax.value_and_grad(loss)(far, rows(9))
    assert np.isfinite(value) and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize("tokens", [3, 20])
def test_a_shortened_row_is_the_shortened_document(params, tokens):
    kept = min(tokens, 8)
    short = np.asarray(LOSS.shortened(jnp.asarray(rows(9)), tokens))
    assert short.shape == (4, kept + 4)
    np.testing.assert_array_equal(short[:, kept], np.minimum(LAST, kept - 1))
    np.testing.assert_array_equal(short[:, kept + 1 :], TARGETS)
    np.testing.assert_array_equal(short[:, :kept], rows(9)[:, :kept])


@pytest.mark.parametrize("tied", [True, False])
def test_the_classifier_is_one_more_dense_layer(params, tied):
    model = dataclasses.replace(MODEL, tie_embeddings=tied)
    shapes = layer_shapes(model)
    assert shapes["classifier"] == (16, 3) and "lm_head" not in shapes
    assert "lm_head" not in jax.eval_shape(lambda: init_params(model, 0))
    policy = resolve([("classifier", "e5m2 scaling=current")], shapes)
    assert [plan.path for plan in policy.plans] == ["classifier"]
    prepared, _ = policy.prepare(layer_weights(params), policy.init())
    quantised = {path: (layer, policy.probes(prepared)[path]) for path, layer in prepared.items()}
    rounded, exact = logits(params, rows(9), quantised), logits(params, rows(9))
    assert 1e-3 < np.abs(rounded - exact).max() < 0.3 * np.abs(exact).max()
    with pytest.raises(ValueError, match="matches no layer; the layers are .*, classifier, wte, wpe"):
        resolve([("lm_head", "e5m2")], shapes)


def test_model_flops_count_the_output_once_a_document():
    language = dataclasses.replace(MODEL, labels=0)
    per_block = (model_flops_per_token(language) - model_flops_per_token(MODEL)) * MODEL.block_size
    assert per_block == 6 * 16 * (8 * 19 - 3)


def test_curvature_is_that_of_the_labels(params):
    """The Hessian's largest eigenvalue against the dense Hessian of the output layer's parameters."""
    few = {"classifier": params["classifier"]}
    of = lambda some: loss(params | some, rows(9))  # noqa: E731
    flat, back = ravel_pytree(few)
    dense = jax.jit(jax.hessian(lambda x: of(back(x))))(flat)
    found, _ = largest_eigenvalues(of, few, jax.random.key(0), 12)
    assert found[0] == pytest.approx(float(jnp.linalg.eigvalsh(dense)[-1]), rel=1e-3)


# Whole runs.

SMALL = {
    "task": "classify",
    "classify__min_documents": 3,
    "model__block_size": 24,
    "train__batch_size": 16,
    "train__steps": 20,
    "train__eval_every": 5,
}


@pytest.fixture(scope="module")
def classify(lab, tmp_path_factory):
    """(workdir, **changes) -> exit status of a small run on the planted labels."""
    cache = planted_cache(tmp_path_factory.mktemp("cache"))

    def run(workdir, **changes) -> int:
        return lab.train(workdir, **(SMALL | {"data__cache": str(cache.path)} | changes))

    run.config = lambda **changes: lab.config(**(SMALL | {"data__cache": str(cache.path)} | changes))
    run.cache = cache
    return run


@pytest.fixture(scope="module")
def twenty(classify, tmp_path_factory):
    """A run of twenty steps in E5M2. Not to be changed."""
    workdir = tmp_path_factory.mktemp("classify") / "run"
    assert classify(workdir, **E5M2) == 0
    return workdir


# Few layers: each takes its time to compile.
E5M2 = {"precision__rules": (("blocks.0.attn.proj|classifier", "e5m2"),), "diagnostics__quant_every": 10}


def test_it_learns_a_planted_rule(classify, tmp_path, capsys):
    whole = {"model__block_size": 32, "optimizer__learning_rate": 1e-2, "checkpoint__every": 1000}
    assert classify(tmp_path / "run", train__steps=400, train__eval_every=200, **whole) == 0
    final = summary(tmp_path / "run")["final"]
    assert final["val/micro_f1"] > 0.97 and final["val/macro_f1"] > 0.95
    assert final["test/micro_f1"] > 0.95 and final["test/subset_accuracy"] > 0.9
    assert final["test/hamming_loss"] < 0.03 and final["test/micro_roc_auc"] > 0.98 < final["test/micro_pr_auc"] + 0.02
    assert final["test/threshold"] == final["val/threshold"] and 0 < final["val/threshold"] < 1
    assert final["val/threshold"] == pytest.approx(1 / (1 + np.exp(-final["val/threshold_logit"])))
    assert final["test/lrap"] > 0.95 and final["test/ranking_loss"] < 0.05 and final["test/macro_roc_auc"] > 0.95
    out = " ".join(capsys.readouterr().out.split())
    assert "labels 3 of the corpus's 5, " in out
    assert "documents train 400 (" in out and "validation 50 (" in out and "examples 400 for training" in out
    assert f"micro F1 {final['val/micro_f1']:.4f}" in out and f"test loss {final['test/loss']:.4f}" in out
    assert "perplexity" not in out


def test_training_begins_with_the_label_prior(classify, twenty):
    task = make_task(classify.config(), classify.cache)
    first = read_metrics(twenty / "metrics.jsonl")[0]
    assert first["val/loss"] == pytest.approx(task.prior_loss("validation"), rel=0.05)


@pytest.mark.exhaustive
def test_every_question_is_answered(classify, tmp_path):
    questions = {"diagnostics__questions": ("gradients:1", "weights:1", "spectra:1")}
    assert classify(tmp_path / "run", train__steps=1, diagnostics__shadow_every=1, **E5M2, **questions) == 0
    asked = {key: value for record in read_metrics(tmp_path / "run" / "metrics.jsonl") for key, value in record.items()}
    for key in (
        "quant/classifier/gradient/underflow",
        "quant/classifier/weight/overflow",
        "grads/classifier/cosine",
        "weights/classifier/stall",
    ):
        assert np.isfinite(asked[key]), key
    assert [key for key in asked if key.startswith("spectra/classifier")]
    assert asked["grads/cosine"] > 0.9


def test_manifest_and_identity(classify, twenty):
    manifest = json.loads((twenty / "manifest.json").read_text())
    identity, task = manifest["identity"], manifest["task"]
    assert identity["task"] == "classify" and identity["classify.labels"] == 3
    assert task["label_ids"] == ["A", "B", "C"] and task["labels_of_corpus"] == 5
    learned = sum(label in "ABC" for document in PlantedSource().documents("train") for label in document.labels)
    assert task["splits"]["test"]["documents"] == 61 and task["splits"]["train"]["labels"] == learned
    assert manifest["config"]["task"] == "classify"
    before = make_task(classify.config(), classify.cache).identity()
    for change, names in {
        ("min_documents", 1): {"classify.labels", "classify.labels_sha256"},
        ("long_documents", "split"): {"classify.long_documents"},
        ("max_windows", 3): {"classify.max_windows"},
        ("positive_weight", 2.0): {"classify.positive_weight"},
        ("positive_weight", 0.0): {"classify.positive_weight"},
    }.items():
        after = make_task(classify.config(**{f"classify__{change[0]}": change[1]}), classify.cache).identity()
        assert {name for name in before if before[name] != after[name]} == names


def test_a_resumed_run_is_the_run(classify, twenty, tmp_path):
    workdir = tmp_path / "run"
    assert classify(workdir, train__steps=10, optimizer__decay_steps=20, **E5M2) == 0
    assert classify(workdir, optimizer__decay_steps=20, **E5M2) == 0
    assert bits(workdir) == bits(twenty)
    assert summary(workdir)["parameter_sha256"] == summary(twenty)["parameter_sha256"]
    finals = [summary(w)["final"] for w in (workdir, twenty)]
    measured = [{k: v for k, v in final.items() if k.startswith(("val/", "test/"))} for final in finals]
    assert measured[0] == measured[1] and len(measured[0]) > 20
    with pytest.raises(UserError, match="classify.labels: 3 -> 4"):
        classify(workdir, classify__min_documents=1, train__steps=30, optimizer__decay_steps=20, **E5M2)
    with pytest.raises(UserError, match="task: classify -> absent"):
        classify(workdir, task="lm", precision__rules=((r"blocks\..*", "e5m2"),))


@pytest.mark.parametrize(
    "changes",
    [
        {"parallel__devices": 8, "train__grad_accumulation": 2},
        pytest.param({"train__steps_per_dispatch": 5, "train__remat": "block"}, marks=pytest.mark.slow),
    ],
)
def test_however_a_step_is_cut_the_losses_are_the_same(classify, plain, tmp_path, changes):
    split = {"classify__long_documents": "split", "precision__compute": "float32"}
    assert classify(tmp_path / "run", **split, **changes) == 0
    found, expected = (read_metrics(w / "metrics.jsonl") for w in (tmp_path / "run", plain))
    for name in ("train/loss", "val/loss", "test/loss", "val/micro_pr_auc"):
        values = [[record[name] for record in records if name in record] for records in (found, expected)]
        np.testing.assert_allclose(*values, rtol=2e-5)


@pytest.fixture(scope="module")
def plain(classify, tmp_path_factory):
    """In float32, long documents split."""
    workdir = tmp_path_factory.mktemp("plain") / "run"
    assert classify(workdir, classify__long_documents="split", precision__compute="float32") == 0
    return workdir


@pytest.mark.exhaustive
def test_the_classifier_is_kept_on_its_grid(classify, tmp_path):
    rules = (("classifier", "e4m3 w.pow2=1"),)
    changes = {"optimizer__name": "grid", "optimizer__weights": "format", "precision__rules": rules}
    assert classify(tmp_path / "run", train__steps=3, **changes) == 0
    assert np.isfinite(summary(tmp_path / "run")["final"]["val/loss"])
    leaves = checkpoint.read_manifest(tmp_path / "run" / "checkpoints", 3)["leaves"]
    assert "int8" in str(leaves["params.classifier.kernel.codes"]) and "params.wte" in leaves


@pytest.mark.slow
def test_the_trunk_of_a_language_model(classify, lab, tmp_path):
    shape = {"model__block_size": 24, "model__tie_embeddings": False, "data__cache": str(classify.cache.path)}
    assert lab.train(tmp_path / "lm", train__steps=2, **shape) == 0
    start = {"checkpoint__restore_from": str(tmp_path / "lm"), "train__steps": 1, "optimizer__learning_rate": 0.0}
    assert classify(tmp_path / "run", model__tie_embeddings=False, optimizer__weight_decay=0.0, **start) == 0

    def params(workdir, labels):
        model = GPTConfig(1, 2, 32, 24, 257, tie_embeddings=False, labels=labels)
        like = DataParallel(1).abstract(jax.eval_shape(lambda: init_params(model, 0)))
        return checkpoint.read_params(str(workdir), like)[0]

    language, classifier = params(tmp_path / "lm", 0), params(tmp_path / "run", 3)
    assert language.keys() - classifier.keys() == {"lm_head"}
    for name in language.keys() & classifier.keys():
        for a, b in zip(jax.tree.leaves(language[name]), jax.tree.leaves(classifier[name]), strict=True):
            np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(
        classifier["classifier"]["bias"], make_task(classify.config(), classify.cache).label_set.log_odds()
    )
    with pytest.raises(UserError, match="do not fit config.model: params.classifier.bias"):
        lab.train(tmp_path / "back", **shape, checkpoint__restore_from=str(tmp_path / "run"), train__steps=1)


def test_what_is_done_without_a_split(classify, tmp_path):
    cache = planted_cache(tmp_path / "cache", sizes=(("train", 60), ("validation", 20)))
    exp = experiment.build(classify.config(), cache)
    state = exp.fresh_state()
    validated = exp.evaluation.validate(state)
    assert exp.evaluation.conclude(state, validated) == {} and validated["val/micro_f1"] > 0
    spoilt = dataclasses.replace(state, params=jax.tree.map(lambda x: x * jnp.nan, state.params))
    assert [str(v) for v in exp.evaluation.validate(spoilt).items()] == ["('val/loss', nan)"]
    for sizes in (("train", 60), ("test", 20)), (("train", 60),):
        cache = planted_cache(tmp_path / "cache", sizes=sizes)
        with pytest.raises(UserError, match="picks its threshold on a validation split"):
            classify(tmp_path / "other", data__cache=str(cache.path))


def test_positive_weights(classify):
    label_set = make_task(classify.config(), classify.cache).label_set
    assert make_task(classify.config(classify__positive_weight=3.5), classify.cache).objective.positive_weight == (3.5,)
    balanced = make_task(classify.config(classify__positive_weight=0.0, classify__min_documents=1), classify.cache)
    rate = open_labels(classify.cache).pairs("train")[:, 1]
    having = np.bincount(rate)[:4]
    expected = np.clip((400 - having + 0.5) / (having + 0.5), 1, 16)
    np.testing.assert_allclose(balanced.objective.positive_weight, expected, rtol=1e-5)
    assert len(label_set) == 3 and expected[3] == 16


def test_mistakes_are_named(classify, lab, twenty, tmp_path):
    with pytest.raises(UserError, match="carry no labels"):
        lab.train(tmp_path / "a", task="classify")
    with pytest.raises(UsageError, match="config.task='label' is not one of lm, classify"):
        classify.config(task="label")
    with pytest.raises(UsageError, match="config.classify.long_documents='drop' is not one of cut, split"):
        classify.config(classify__long_documents="drop")
    with pytest.raises(UsageError, match="config.classify.positive_weight=-1.0 must be 0 or more"):
        classify.config(classify__positive_weight=-1.0)
    with pytest.raises(UsageError, match="'sensitivity' is of next tokens"):
        classify.config(diagnostics__questions=("sensitivity:10",))
    with pytest.raises(UsageError, match="'lm_head', 'e5m2'.*matches no layer.*classifier"):
        classify(tmp_path / "b", precision__rules=(("lm_head", "e5m2"),))
    with pytest.raises(UserError, match="is a run of config.task=classify: it has no next token to draw"):
        sample.load_run(str(twenty), None)


def test_runs_of_two_tasks_are_set_apart(twenty, finished):
    runs = read_runs([str(finished), str(twenty)])
    rows = compare(make_study(runs, [], Path("report.html"), first=True))
    assert rows[1].verdict == "not comparable" and "task: lm -> classify" in notes(rows)[0]
    alone = compare(make_study(runs[1:], [], Path("report.html"), first=True))
    assert [row.verdict for row in alone] == ["baseline"]


@pytest.mark.parametrize("variant", ["", "quick", "e5m2", "e4m3fn g=e5m2 scaling=current,quick"])
def test_the_config_file(variant):
    config = load_config(f"{ROOT / 'configs' / 'classify.py'}:{variant}")
    validate(config)
    assert config.task == "classify" and config.model.n_layer == (4 if variant.endswith("quick") else 6)
    recipe = variant.removesuffix("quick").removesuffix(",")
    assert config.precision.rules == (((r"blocks\..*|classifier", recipe),) if recipe else ())
    assert config.tracking.name.startswith("classify") and " " not in config.tracking.name
