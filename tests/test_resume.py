"""However a run is stopped, the next start of the same command ends in the same bits, or says why it cannot."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys

import pytest

from altgrad_jax.errors import UserError
from altgrad_jax.tracking import read_metrics
from tests.runs import (
    ROOT,
    bits,
    checkpoint_steps,
    ended,
    kill,
    snapshot,
    summary,
    train_losses,
    wait_for_step,
)

LONG = {"train.steps": 2000, "optimizer.decay_steps": 20, "checkpoint.every": 5}  # the same schedule, no end in sight


@pytest.fixture(scope="module")
def whole(lab, tmp_path_factory):
    """The run of `finished` to step 40, its schedule over at 20. Not to be changed."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    assert go_on(lab, workdir) == 0
    return workdir


def go_on(lab, workdir, **changes) -> int:
    return lab.train(workdir, train__steps=40, optimizer__decay_steps=20, **changes)


def assert_equal(workdir, whole) -> None:
    assert bits(workdir) == bits(whole)
    assert summary(workdir)["status"] == "finished"
    assert summary(workdir)["parameter_sha256"] == summary(whole)["parameter_sha256"]


def test_more_steps_with_the_schedule_fixed(lab, copied, whole):
    assert go_on(lab, copied) == 0
    assert_equal(copied, whole)
    assert [s["from_step"] for s in json.loads((copied / "manifest.json").read_text())["sessions"]] == [0, 20]


def test_killed_and_started_again(lab, whole, tmp_path):
    """Once while training, once while what is left of a checkpoint lies about; the long form is a benchmark."""
    workdir = tmp_path / "run"
    for step in (7, 21):
        process = lab.start(workdir, LONG)
        wait_for_step(process, workdir, step)
        kill(process)
        assert not (workdir / "summary.json").exists()
    shutil.copytree(workdir / "checkpoints" / "10", workdir / "checkpoints" / "15.orbax-checkpoint-tmp")
    for step in checkpoint_steps(workdir):
        if step > 30:  # the process went on for a little
            shutil.rmtree(workdir / "checkpoints" / str(step))
    assert go_on(lab, workdir) == 0
    assert_equal(workdir, whole)


def test_a_second_process_is_refused_and_a_signal_ends_the_first(lab, whole, tmp_path):
    workdir = tmp_path / "run"
    process = lab.start(workdir, LONG)
    wait_for_step(process, workdir, 3)
    with pytest.raises(UserError, match=r"another process is training in .*; wait for it to end or use another"):
        lab.train(workdir)
    os.kill(process.pid, signal.SIGTERM)
    done = ended(process)
    assert done.code == 143 and done.err == "", done
    step = summary(workdir)["step"]
    assert summary(workdir)["status"] == "interrupted" and f"interrupted at step {step}" in done.out
    assert checkpoint_steps(workdir)[-1] == step == read_metrics(workdir / "metrics.jsonl")[-1]["step"]
    if step < 40:
        assert go_on(lab, workdir) == 0
        assert_equal(workdir, whole)


def test_a_second_signal_ends_at_once():
    program = (
        "import os, signal, time\n"
        "from altgrad_jax.interrupt import GracefulStop\n"
        "with GracefulStop() as stop:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(0.5)\n"
        "    print(stop.requested, stop.exit_code, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(60)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "")
    first, noted, last = done.stdout.splitlines()
    assert first == "finishing this step, then saving; again: stop without saving" and noted == "True 130"
    assert last.startswith("stopped without saving")


@pytest.mark.parametrize("item", ["state", "iterator", "manifest"])
def test_a_damaged_newest_checkpoint_costs_steps_not_bits(lab, copied, whole, caplog, item):
    for path in (copied / "checkpoints" / "20" / item).rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert go_on(lab, copied) == 0
    assert f"checkpoint {copied / 'checkpoints' / '20'} is damaged" in caplog.text
    assert f"moved to {copied / 'damaged' / '20.0'}; resuming from step 15" in caplog.text
    assert_equal(copied, whole)


def test_damage_is_told_in_two_lines(lab, copied, whole):
    """Not in the pages that Python prints about what the storage layers leave behind; so in a process of its own."""
    (copied / "checkpoints" / "20" / "state" / "array_metadatas" / "process_0").write_text("")
    done = ended(lab.start(copied, {"train.steps": 40, "optimizer.decay_steps": 20}))
    assert done.code == 0
    told, moved = done.err.splitlines()
    assert told.startswith(f"WARNING: checkpoint {copied / 'checkpoints' / '20'} is damaged: ")
    assert moved == f"WARNING: moved to {copied / 'damaged' / '20.0'}; resuming from step 15"
    assert_equal(copied, whole)


def test_with_every_checkpoint_damaged_nothing_starts(lab, copied):
    for step in checkpoint_steps(copied):
        (copied / "checkpoints" / str(step) / "manifest" / "metadata").unlink()
    before = snapshot(copied)
    with pytest.raises(UserError, match=r"every checkpoint in .* is damaged \(steps 20, 15, 10\)"):
        go_on(lab, copied)
    assert snapshot(copied) == before


def test_a_full_disk(lab, copied, whole):
    """No file may grow past 20 kB: checkpoints fail as they do when the disk is full."""
    before = snapshot(copied / "checkpoints")
    process = lab.start(copied, {"train.steps": 40, "optimizer.decay_steps": 20})
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (20_000, 20_000))
    done = ended(process)
    assert done.code == 1
    assert done.err == (
        f"error: a checkpoint could not be written to {copied / 'checkpoints'}: File too large; raise the limit of"
        " a file's size (ulimit -f); checkpoints kept: 10, 15, 20. When that is mended, run the same command again\n"
    )
    assert summary(copied)["status"] == "failed"
    assert {k: v for k, v in snapshot(copied / "checkpoints").items() if "tmp" not in k} == before
    assert go_on(lab, copied) == 0
    assert_equal(copied, whole)


DIFFERENT = [
    ({"model__n_layer": 2}, ["model.n_layer: 1 -> 2"]),
    ({"model__n_embd": 64, "model__n_head": 4}, ["model.n_embd: 32 -> 64", "model.n_head: 2 -> 4"]),
    ({"precision__compute": "float32"}, ["precision.compute: bfloat16 -> float32"]),
    ({"optimizer__b2": 0.99, "seed": 1}, ["optimizer.b2: 0.95 -> 0.99", "seed: 42 -> 1"]),
    ({"train__batch_size": 4}, ["train.batch_size: 8 -> 4"]),
    ({"train__eval_batches": 4}, ["train.eval_batches: 2 -> 4"]),
    ({"train__steps": 30, "optimizer__decay_steps": 0}, ["optimizer.decay_steps: 20 -> 30"]),
]


@pytest.mark.parametrize(("changes", "differences"), DIFFERENT)
def test_another_run_is_refused(lab, whole, changes, differences):
    before = snapshot(whole)
    with pytest.raises(UserError) as caught:
        lab.train(whole, **{"train__steps": 60, "optimizer__decay_steps": 20} | changes)
    assert f"belongs to a different run ({'; '.join(differences)}); use the settings it" in str(caught.value)
    assert snapshot(whole) == before


def test_other_data_is_refused(lab, whole, tmp_path):
    (tmp_path / "corpus.txt").write_text(lab.corpus.read_text() + " one word more")
    before = snapshot(whole)
    with pytest.raises(UserError, match=r"belongs to a different run \(data.sha256: [0-9a-f]{8} -> [0-9a-f]{8}\)"):
        go_on(lab, whole, data__path=str(tmp_path / "corpus.txt"))
    assert snapshot(whole) == before


def test_what_may_change_at_a_restart(lab, copied, whole):
    other = {"tracking__name": "x", "tracking__tags": ("a",), "train__log_every": 4, "train__eval_every": 7}
    other |= {"checkpoint__every": 3, "checkpoint__max_to_keep": 1}
    assert go_on(lab, copied, **other) == 0
    assert set(train_losses(copied)) < set(train_losses(whole))
    assert summary(copied)["parameter_sha256"] == summary(whole)["parameter_sha256"]
    assert json.loads((copied / "config.json").read_text())["tracking"]["name"] == "x"
    assert checkpoint_steps(copied) == [39, 40]  # the newest, and the newest regular one


def test_diagnostics_of_other_windows_are_marked_once(lab, copied):
    """They may be asked of less from a restart on, and whoever reads the records is told where."""
    for _ in range(2):
        assert go_on(lab, copied, diagnostics__windows=1, diagnostics__lanczos_steps=4) == 0
    marks = [r for r in read_metrics(copied / "metrics.jsonl") if r.get("event") == "measured"]
    assert [mark["step"] for mark in marks] == [20]
    assert "windows: 0 -> 1; diagnostics.lanczos_steps: 6 -> 4" in marks[0]["event/reason"]


@pytest.mark.parametrize("damage", ["none", "deleted", "changed"])
def test_the_best_evaluation_is_the_best_of_all_sessions(lab, copied, capsys, damage):
    """A resumed session marks what beats the sessions before it too, whatever became of the records."""
    metrics, sealed = copied / "metrics.jsonl", summary(copied)["best_val_loss"]
    if damage == "deleted":
        metrics.unlink()
    elif damage == "changed":
        metrics.write_text(re.sub(r'"val/loss": [0-9.]+', '"val/loss": 0.5', metrics.read_text()))
    assert go_on(lab, copied) == 0
    out = capsys.readouterr().out
    told = {line.split("/")[0]: "  best" in line for line in out.splitlines() if "val loss" in line}
    best, expected = sealed, {}
    for record in read_metrics(metrics):
        if "val/loss" in record and record["step"] > 20:
            expected[f"step {record['step']:>6}"] = record["val/loss"] < best
            best = min(best, record["val/loss"])
    assert told == expected and len(told) == 2 and any(told.values())
    assert summary(copied)["best_val_loss"] == best
    events = [e["event/reason"] for e in summary(copied)["events"] if e["event"] == "records"]
    what = {"none": [], "deleted": ["21 of 21 records are missing"], "changed": ["records were changed"]}[damage]
    assert [event.rpartition(": ")[2] for event in events] == what and all(event in out for event in events)


@pytest.mark.slow
def test_dropout_and_microbatches_resume_to_the_bit(lab, tmp_path):
    changes = {"model__dropout": 0.2, "train__grad_accumulation": 2, "optimizer__decay_steps": 20}
    assert lab.train(tmp_path / "whole", train__steps=30, **changes) == 0
    for steps in (20, 30):
        assert lab.train(tmp_path / "run", train__steps=steps, **changes) == 0
    assert_equal(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize(
    "devices", [pytest.param(1, marks=pytest.mark.slow), pytest.param(8, marks=pytest.mark.exhaustive)]
)
def test_killed_at_random_moments(tmp_path, devices):
    """The benchmark that kills a run twenty times, shortened."""
    out = tmp_path / "resume.json"
    command = [sys.executable, "benchmarks/resume.py", "--kills=2", f"--devices={devices}", "--seed=1", f"--out={out}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text())["results"]
    assert results["equal"] and len(results["kills"]) == 2 and results["kills_during_a_save"] >= 1
