"""Whole runs with quantised layers: resumed to the bit, refused where the arithmetic is another, sampled from."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from altgrad_jax import checkpoint, experiment
from altgrad_jax.data.corpus import open_corpus
from altgrad_jax.errors import UserError
from altgrad_jax.model import GPTConfig
from altgrad_jax.sample import load_run
from altgrad_jax.state import model_structure
from altgrad_jax.step import window_loss
from altgrad_jax.tracking import read_metrics
from tests.runs import bits, snapshot, summary

MODEL = GPTConfig(
    n_layer=1, n_head=2, n_embd=16, block_size=16, vocab_size=31, bias=True, tie_embeddings=False,
    compute_dtype="float32",
)  # fmt: skip
GRAPHDEF = model_structure(MODEL)
TOKENS = np.random.default_rng(0).integers(0, 31, (8, MODEL.block_size + 1)).astype(np.int32)
EVERYWHERE = r"blocks\..*|lm_head"


RUN = {
    "precision__rules": ((EVERYWHERE, "e5m2 history=4"),),
    "optimizer__decay_steps": 20,
    "train__eval_every": 3,
    "checkpoint__every": 3,
    "diagnostics__quant_every": 0,
}


@pytest.fixture(scope="module")
def whole(lab, tmp_path_factory) -> Path:
    """Six steps in E5M2. Not to be changed."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    assert lab.train(workdir, train__steps=6, **RUN) == 0
    return workdir


@pytest.fixture(scope="module")
def half(lab, tmp_path_factory) -> Path:
    """The first three of them. Not to be changed."""
    workdir = tmp_path_factory.mktemp("half") / "run"
    assert lab.train(workdir, train__steps=3, **RUN) == 0
    return workdir


@pytest.fixture(scope="module")
def sixteen_bits(lab, tmp_path_factory) -> Path:
    """Three steps without rules. Not to be changed."""
    workdir = tmp_path_factory.mktemp("bf16") / "run"
    assert lab.train(workdir, train__steps=3, **RUN | {"precision__rules": ()}) == 0
    return workdir


def sha256(workdir: Path) -> str:
    return summary(workdir)["parameter_sha256"]


def stored_leaves(workdir: Path, step: int) -> dict:
    return checkpoint.read_manifest(workdir / "checkpoints", step)["leaves"]


def test_a_resumed_run_is_equal_to_the_bit(lab, whole, half, tmp_path):
    workdir = shutil.copytree(half, tmp_path / "run")
    assert lab.train(workdir, train__steps=6, **RUN) == 0
    assert bits(workdir) == bits(whole) and sha256(workdir) == sha256(whole)
    leaves = stored_leaves(whole, 6)
    histories = {name for name in leaves if name.endswith(".history")}
    layers = [f"blocks.0.{name}" for name in ("attn.qkv", "attn.proj", "mlp.up", "mlp.down")] + ["lm_head"]
    roles = ("activation", "weight", "gradient")
    assert histories == {f"quant.{layer}.{role}.history" for layer in layers for role in roles}


@pytest.mark.slow
def test_diagnostics_change_no_bit(lab, whole, tmp_path):
    changes = RUN | {"diagnostics__quant_every": 2, "diagnostics__shadow_every": 2}
    assert lab.train(tmp_path / "run", train__steps=6, **changes) == 0
    assert bits(tmp_path / "run") == bits(whole) and sha256(tmp_path / "run") == sha256(whole)
    asked = [r["step"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "grads/cosine" in r]
    assert asked == [1, 3, 5]
    assert not any("grads/cosine" in r for r in read_metrics(whole / "metrics.jsonl"))


def test_a_rule_of_bf16_is_no_rule(lab, sixteen_bits, half, tmp_path):
    changes = RUN | {"precision__rules": ((r"blocks\..*", "bf16"), (r".*", "bf16"))}
    assert lab.train(tmp_path / "run", train__steps=3, **changes) == 0
    assert bits(tmp_path / "run") == bits(sixteen_bits) and sha256(tmp_path / "run") == sha256(sixteen_bits)
    assert sha256(sixteen_bits) != sha256(half)
    assert not any(name.startswith("quant") for name in stored_leaves(sixteen_bits, 3))


LAYER = "precision.layers.lm_head: "
E5M2 = "e5m2 delayed(4)"
OTHER_RUNS = [
    ({"precision__rules": ((EVERYWHERE, "hybrid history=4"),)}, [f" layers: {E5M2} -> e4m3fn delayed(4) | e4m3fn"]),
    ({"precision__rules": ((EVERYWHERE, "e5m2 history=5"),)}, [f" layers: {E5M2} -> e5m2 delayed(5)"]),
    ({"precision__rules": ((EVERYWHERE, "e5m2 scaling=current"),)}, [f" layers: {E5M2} -> e5m2 current"]),
    ({"precision__rules": ((r"blocks\..*", "e5m2 history=4"),)}, [f"{LAYER}{E5M2} -> absent"]),
    ({"precision__rules": ()}, [f" layers: {E5M2} -> absent"]),
    ({"train__loss_scale": "1024"}, ["train.loss_scale: 1 -> 1024"]),
    ({"train__loss_scale": "dynamic"}, ["train.loss_scale: 1 -> dynamic"]),
]


@pytest.mark.parametrize(("changes", "differences"), OTHER_RUNS)
def test_another_arithmetic_is_refused(lab, half, changes, differences):
    before = snapshot(half)
    with pytest.raises(UserError, match=r"belongs to a different run \(.*\); use the settings it was made") as caught:
        lab.train(half, train__steps=6, **RUN | changes)
    for text in differences:
        assert text in str(caught.value)
    assert snapshot(half) == before


def test_a_bf16_run_is_not_resumed_in_e5m2(lab, sixteen_bits):
    before = snapshot(sixteen_bits)
    with pytest.raises(UserError, match=r"different run \(.* layers: absent -> e5m2 delayed\(4\)"):
        lab.train(sixteen_bits, train__steps=6, **RUN)
    assert snapshot(sixteen_bits) == before


def test_what_may_change_at_a_restart(lab, whole, half, tmp_path):
    """Rules written otherwise that come to the same, and where operands are multiplied."""
    workdir = shutil.copytree(half, tmp_path / "run")
    rules = ((r"wte|wpe", "bf16"), (r".*", "e5m2_cast scaling=delayed overflow=saturate history=4"))
    assert (
        lab.train(workdir, train__steps=6, **RUN | {"precision__rules": rules, "precision__backend": "emulated"}) == 0
    )
    assert sha256(workdir) == sha256(whole)
    assert {s["from_step"] for s in json.loads((workdir / "manifest.json").read_text())["sessions"]} == {0, 3}


def test_weights_are_taken_over_into_another_arithmetic(lab, half, sixteen_bits, tmp_path):
    changes = RUN | {"precision__rules": (), "checkpoint__restore_from": str(half)}
    assert lab.train(tmp_path / "to bf16", train__steps=3, **changes) == 0
    changes = RUN | {"checkpoint__restore_from": str(sixteen_bits)}
    assert lab.train(tmp_path / "to e5m2", train__steps=3, **changes) == 0
    for source, target in ((half, "to bf16"), (sixteen_bits, "to e5m2")):
        last, first = (read_metrics(path / "metrics.jsonl") for path in (source, tmp_path / target))
        # The same weights, in other arithmetic: near, and not equal.
        assert first[0]["val/loss"] == pytest.approx(last[-1]["val/loss"], rel=0.02)
        assert first[0]["val/loss"] != last[-1]["val/loss"]


def test_a_loaded_run_evaluates_as_it_did_in_training(lab, half):
    """What sampling reads from a checkpoint, scales of the histories included."""
    run = load_run(str(half), None)
    config = lab.config(train__steps=3, **RUN)
    exp = experiment.build(config, open_corpus(config))
    assert set(run.quantised) == {plan.path for plan in exp.policy.plans}
    loss = jax.jit(lambda layers, tokens: window_loss(exp.graphdef, run.params, tokens, 256, None, layers))
    found = np.mean([loss(run.quantised, batch[0]) for batch in exp.evaluation.batches])
    expected = read_metrics(half / "metrics.jsonl")[-1]["val/loss"]
    assert found == pytest.approx(expected, rel=1e-5)
    far = jnp.full((4,), 1e4)
    other_histories = {
        path: (dataclasses.replace(layer, activation=dataclasses.replace(layer.activation, history=far)), probe)
        for path, (layer, probe) in run.quantised.items()
    }
    assert np.mean([loss(other_histories, batch[0]) for batch in exp.evaluation.batches]) != pytest.approx(
        expected, rel=1e-5
    )


@pytest.mark.exhaustive
def test_stochastic_rounding_resumes_to_the_bit(lab, tmp_path):
    rules = ((r"lm_head|.*\.up", "e5m2 history=4 g.rounding=stochastic"),)
    changes = RUN | {"precision__rules": rules, "train__grad_accumulation": 2}
    assert lab.train(tmp_path / "whole", train__steps=6, **changes) == 0
    for steps in (3, 6):
        assert lab.train(tmp_path / "run", train__steps=steps, **changes) == 0
    assert bits(tmp_path / "run") == bits(tmp_path / "whole")
    assert sha256(tmp_path / "run") == sha256(tmp_path / "whole")
    # The draws follow from the seed: another one, with the same batches, is another run.
    nearest = RUN | {"precision__rules": ((r"lm_head|.*\.up", "e5m2 history=4"),), "train__grad_accumulation": 2}
    assert lab.train(tmp_path / "nearest", train__steps=3, **nearest) == 0
    assert bits(tmp_path / "nearest")[1:4] != bits(tmp_path / "whole")[1:4]
