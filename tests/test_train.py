"""One run, in this process: what it leaves, how it ends, and that nothing but the work changes its losses."""

import dataclasses
import itertools
import json
import math
import os
import signal
from unittest import mock

import jax
import jax.numpy as jnp
import pytest

from altgrad_jax import experiment, program, step
from altgrad_jax.checkpoint import Checkpoints
from altgrad_jax.errors import UserError
from altgrad_jax.experiment import Experiment
from altgrad_jax.meter import Meter
from altgrad_jax.tracking import read_metrics
from tests.runs import Replaced, bits, checkpoint_steps, snapshot, summary, train_losses


def test_what_a_finished_run_leaves(finished, lab):
    assert {path.name for path in finished.iterdir()} == {
        *(".lock", "checkpoints", "config.json", "manifest.json", "metrics.jsonl", "summary.json")
    }
    assert checkpoint_steps(finished) == [10, 15, 20]
    records = read_metrics(finished / "metrics.jsonl")
    assert [r["step"] for r in records] == list(range(21))
    assert [r["step"] for r in records if "val/loss" in r] == [0, 10, 20]
    for r in records[1:]:
        assert math.isfinite(r["train/loss"]) and r["train/grad_norm"] > 0 and r["train/tokens_per_second"] > 0
    assert all(math.isclose(r["val/perplexity"], math.exp(r["val/loss"])) for r in records if "val/loss" in r)
    assert records[-1]["val/loss"] < records[0]["val/loss"] - 0.3, "it must have learned something"
    end = summary(finished)
    assert (end["status"], end["step"], end["tokens_seen"]) == ("finished", 20, 20 * 8 * 32)
    assert end["best_val_loss"] == min(r["val/loss"] for r in records if "val/loss" in r)
    assert end["final"]["train/loss"] == records[-1]["train/loss"]
    assert len(end["parameter_sha256"]) == 64 and end["seconds"] > 0 and end["peak_memory_bytes"]["host"] > 10**8


def test_a_repeated_run_is_equal_to_the_bit(lab, finished, tmp_path):
    assert lab.train(tmp_path / "run") == 0
    assert bits(tmp_path / "run") == bits(finished)
    assert summary(tmp_path / "run")["parameter_sha256"] == summary(finished)["parameter_sha256"]


def test_another_seed_is_another_run(lab, finished, tmp_path):
    assert lab.train(tmp_path / "run", seed=43) == 0
    assert not {loss for _, loss in train_losses(tmp_path / "run")} & {loss for _, loss in train_losses(finished)}


def test_a_finished_run_says_so_and_trains_nothing(lab, copied, capsys):
    before = snapshot(copied)
    assert lab.train(copied) == 0
    assert "already finished" in capsys.readouterr().out
    assert snapshot(copied) == before


@pytest.mark.parametrize("stale", ["absent", "interrupted"])
def test_a_run_killed_between_its_last_checkpoint_and_its_summary(lab, copied, stale):
    whole = summary(copied)
    if stale == "absent":
        (copied / "summary.json").unlink()
    else:
        (copied / "summary.json").write_text(json.dumps(whole | {"status": "interrupted", "step": 5}))
    metrics = (copied / "metrics.jsonl").read_bytes()
    assert lab.train(copied) == 0
    again = summary(copied)
    for key in ("status", "step", "final", "best_val_loss", "parameter_sha256"):
        assert again[key] == whole[key]
    assert (copied / "metrics.jsonl").read_bytes() == metrics


def test_how_often_one_looks_does_not_change_the_training(lab, finished, tmp_path):
    expected = dict(train_losses(finished))
    assert lab.train(tmp_path / "often", train__eval_every=1, checkpoint__every=1, train__eval_batches=1) == 0
    assert dict(train_losses(tmp_path / "often")) == expected
    assert lab.train(tmp_path / "seldom", train__eval_every=1000, train__log_every=7, checkpoint__every=1000) == 0
    seldom = dict(train_losses(tmp_path / "seldom"))
    assert list(seldom) == [7, 14, 20] and seldom.items() <= expected.items()
    hashes = {summary(workdir)["parameter_sha256"] for workdir in (finished, tmp_path / "often", tmp_path / "seldom")}
    assert len(hashes) == 1


def poison(values: dict[int, float]):
    """Makes the training loss of some steps (counted from 1) what it is told to be; their gradient becomes zero."""
    make_train_step, window_loss = step.make_train_step, step.window_loss

    def make_poisoned(*args, **kwargs):
        inner = make_train_step(*args, **kwargs)

        def train_step(state, tokens):
            def poisoned(*args):
                loss = window_loss(*args)
                for number, value in values.items():
                    loss = jnp.where(state.step + 1 == number, value, loss)
                return loss

            with mock.patch.object(step, "window_loss", poisoned):
                return inner(state, tokens)

        return train_step

    return mock.patch.object(program, "make_train_step", make_poisoned)


@pytest.mark.parametrize("value", [math.nan, pytest.param(math.inf, marks=pytest.mark.slow)])
def test_losses_that_are_no_numbers_stop_the_run(lab, tmp_path, value, capsys):
    """With W&B off; counted in steps, not in logged steps, and only where they follow each other."""
    workdir = tmp_path / "run"
    changes = {"stability__nan_patience": 4, "checkpoint__every": 2, "train__log_every": 5}
    with poison({number: value for number in (2, 3, 4, 8, 9, 10, 11, 12)}):
        assert lab.train(workdir, **changes) == 1
    end = summary(workdir)
    assert (end["status"], end["step"], end["parameter_sha256"]) == ("diverged", 11, None)
    assert checkpoint_steps(workdir) == [6], "those of steps 2, 4, 8 and 10 would hold what a NaN left behind"
    assert "diverged at step 11" in capsys.readouterr().out
    last = [r for r in read_metrics(workdir / "metrics.jsonl") if "train/loss" in r][-1]
    assert last["step"] == 11 and last["train/nonfinite_steps"] == 4 and not math.isfinite(last["train/loss"])
    before = snapshot(workdir)
    with pytest.raises(UserError, match=r"diverged at step 11; change the settings and use a new --workdir"):
        lab.train(workdir, **changes)
    assert snapshot(workdir) == before
    assert lab.train(tmp_path / "next", checkpoint__restore_from=str(workdir)) == 0


def test_a_rate_that_blows_up_stops_the_run_by_itself(lab, tmp_path):
    changes = {"optimizer__learning_rate": 1e38, "optimizer__warmup_steps": 0, "stability__nan_patience": 3}
    assert lab.train(tmp_path / "run", **changes) == 1
    assert summary(tmp_path / "run")["status"] == "diverged"


def test_a_new_run_from_weights(lab, finished, tmp_path):
    source = {int(r["step"]): r["val/loss"] for r in read_metrics(finished / "metrics.jsonl") if "val/loss" in r}
    for name, at, expected in ("newest", "", source[20]), ("older", "@10", source[10]):
        workdir = tmp_path / name
        assert lab.train(workdir, checkpoint__restore_from=f"{finished}{at}") == 0
        first = read_metrics(workdir / "metrics.jsonl")[0]
        assert first["step"] == 0 and first["val/loss"] == expected
        assert summary(workdir)["step"] == 20
    with pytest.raises(UserError, match=r"has no checkpoint of step 11; it has 10, 15, 20"):
        lab.train(tmp_path / "absent", checkpoint__restore_from=f"{finished}@11")
    with pytest.raises(UserError, match=r"do not fit config.model: .*; and \d+ more"):
        lab.train(tmp_path / "wide", checkpoint__restore_from=str(finished), model__n_embd=64)


INTERRUPTS = [
    ("compilation", 1, signal.SIGINT, 1),
    ("step", 8, signal.SIGTERM, 8),
    ("evaluation", 2, signal.SIGINT, 10),
    ("save", 1, signal.SIGTERM, 6),
]


@pytest.mark.parametrize(("moment", "call", "number", "stops_at"), INTERRUPTS)
def test_a_signal_at_any_moment_saves_and_leaves(lab, finished, tmp_path, monkeypatch, moment, call, number, stops_at):
    """The step is finished, evaluated if it is due, and saved; the next start ends in the same bits."""

    def interrupted(function):
        calls = itertools.count(1)

        def wrapped(*args, **kwargs):
            if next(calls) == call:
                os.kill(os.getpid(), number)
            return function(*args, **kwargs)

        return wrapped

    def build(*args):
        exp = experiment_build(*args)
        return dataclasses.replace(exp, run_train=Replaced(exp.run_train, interrupted(exp.run_train)))

    workdir, experiment_build = tmp_path / "run", experiment.build
    with monkeypatch.context() as patch:
        if moment == "evaluation":
            patch.setattr(Experiment, "evaluate", interrupted(Experiment.evaluate))
        elif moment == "save":
            patch.setattr(Checkpoints, "save", interrupted(Checkpoints.save))
        else:
            patch.setattr(experiment, "build", build)
        assert lab.train(workdir) == 128 + number
    assert (summary(workdir)["status"], summary(workdir)["step"]) == ("interrupted", stops_at)
    assert checkpoint_steps(workdir)[-1] == stops_at
    assert lab.train(workdir) == 0
    assert bits(workdir) == bits(finished)
    assert summary(workdir)["parameter_sha256"] == summary(finished)["parameter_sha256"]


def test_a_signal_before_the_first_step_leaves_nothing_to_save(lab, finished, tmp_path, monkeypatch, capsys):
    workdir, evaluate = tmp_path / "run", Experiment.evaluate

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGHUP)
        return evaluate(*args)

    monkeypatch.setattr("sys.argv", ["main", "--config=bf16", "--restart"])
    with monkeypatch.context() as patch:
        patch.setattr(Experiment, "evaluate", interrupted)
        assert lab.train(workdir) == 128 + signal.SIGHUP
    assert capsys.readouterr().out.endswith("to go on: python -m altgrad_jax.main --config=bf16\n")
    assert summary(workdir)["step"] == 0 and not (workdir / "checkpoints").exists()
    assert lab.train(workdir) == 0
    assert bits(workdir) == bits(finished)


@pytest.mark.parametrize("waits", [True, False])
def test_the_speed_is_that_of_the_steps(monkeypatch, waits):
    """Steps of 0.1 s whose metrics come a step late, stops every 7 steps, 5 s of evaluation; `waits`: for the step."""
    clock = 0.0
    monkeypatch.setattr("altgrad_jax.meter.time.monotonic", lambda: clock)
    meter, rates = Meter(1000, 0), []
    for number in range(1, 100):
        clock += 30.0 if number == 1 else 0.1 if waits else 0.0
        if number == 1:
            meter.restart(0)
        elif (number - 1) % 7:
            rates.append(meter.rate(number - 1))
        clock += 0.0 if waits else 0.1
        if number % 7 == 0:
            rates.append(meter.rate(number))
            with meter.paused():
                clock += 5.0
    assert len(rates) == 98 and all(9000 < rate < 13000 for rate in rates[10:]), rates


def test_one_copy_to_the_host_a_step(lab, tmp_path, monkeypatch):
    """From the second step to the last, before they are evaluated and saved, nothing else reads a device's array."""
    fetches: list[set[str]] = []
    reads: list[str] = []
    fetching = False
    device_get, build = jax.device_get, experiment.build
    array = type(jnp.zeros(()))

    def counted_get(tree):
        nonlocal fetching
        fetching = True
        fetches.append(set(tree) if isinstance(tree, dict) else {"evaluation"})
        try:
            return device_get(tree)
        finally:
            fetching = False

    def counted_read(name):
        read = getattr(array, name)

        def wrapped(*args, **kwargs):
            if not fetching:
                reads.append(name)
            return read(*args, **kwargs)

        return wrapped

    def build_counted(*args):
        exp, calls = build(*args), itertools.count(1)

        def run_train(*args):
            number = next(calls)
            if number == 2:
                reads.clear()
            result = exp.run_train(*args)
            if number == 20:
                assert reads == []
            return result

        return dataclasses.replace(exp, run_train=Replaced(exp.run_train, run_train))

    monkeypatch.setattr(experiment, "build", build_counted)
    monkeypatch.setattr(jax, "device_get", counted_get)
    for name in ("__array__", "__float__", "__int__", "__bool__", "__index__", "item", "tolist", "block_until_ready"):
        monkeypatch.setattr(array, name, counted_read(name))
    assert lab.train(tmp_path / "run", train__eval_every=1000, checkpoint__every=1000) == 0
    assert len([names for names in fetches if "train/loss" in names]) == 20
    assert fetches.count({"evaluation"}) == 2, "before the first step and after the last"
    assert len(fetches) == 22
    float(jnp.ones(()))
    assert reads, "or nothing has been counted at all"
