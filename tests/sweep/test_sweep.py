"""The whole command: what it leaves, what becomes of conditions that fail, killed sweeps, sweeps in parts."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from altgrad_jax.console import make_console
from altgrad_jax.errors import UsageError, UserError
from altgrad_jax.report.runs import read_runs
from altgrad_jax.sweep.__main__ import _refuse_gaps, parse_shard, sweep
from altgrad_jax.sweep.group import TooLargeError, train_together
from altgrad_jax.sweep.matrix import conditions
from altgrad_jax.sweep.memory import free_bytes, needed_bytes
from altgrad_jax.sweep.progress import Progress
from altgrad_jax.sweep.requests import Member, Outcome, Request, ended
from altgrad_jax.sweep.run import _after, _cut, _death, _Unit
from altgrad_jax.sweep.search import choose
from altgrad_jax.sweep.worker import _train
from altgrad_jax.tracking import read_metrics
from tests.forks import ROOT, run_module
from tests.runs import snapshot, summary
from tests.sweep.matrices import PLAIN, flags, tiny_matrix

ONE_GROUP = {"recipes": (("e5m2", "e5m2"), ("e3m4", "e3m4")), "optimizers": ("adamw",), "exclude": ()}


def folders(workdir: Path) -> list[str]:
    return sorted(path.parent.name for path in workdir.glob("*/manifest.json"))


def table(workdir: Path) -> dict[str, tuple]:
    """What must not depend on how often a sweep was killed."""
    found = {}
    for name in folders(workdir):
        records = [
            (r["step"], r.get("train/loss"), r.get("val/loss")) for r in read_metrics(workdir / name / "metrics.jsonl")
        ]
        found[name] = (summary(workdir / name)["status"], summary(workdir / name)["parameter_sha256"], records)
    return found


def command(lab, workdir: Path, **axes) -> list[str]:
    lab.prepare()
    return [sys.executable, "-m", "altgrad_jax.sweep", *flags(lab, workdir, **axes)]


@pytest.fixture(scope="module")
def done(lab, tmp_path_factory):
    """Two formats and two seeds, trained together."""
    workdir = tmp_path_factory.mktemp("sweep") / "matrix"
    assert sweep(tiny_matrix(lab, **ONE_GROUP), Path(os.path.relpath(workdir)), (0, 1)) == 0
    return workdir


def test_every_condition_has_a_work_directory_like_any_runs(done):
    assert folders(done) == ["e3m4-adamw-seed0", "e3m4-adamw-seed1", "e5m2-adamw-seed0", "e5m2-adamw-seed1"]
    described = json.loads((done / "matrix.json").read_text())
    assert [c["name"] for c in described["conditions"]] == sorted(folders(done), key=lambda n: (n[-1], n[:2] != "e5"))
    for name in folders(done):
        manifest = json.loads((done / name / "manifest.json").read_text())
        condition = manifest["condition"]
        assert f"{condition['recipe']}-{condition['optimizer']}-seed{condition['seed']}" == name
        assert condition["matrix"] == "quick" and condition["together"] == 4
        assert manifest["sessions"][0]["command"][:3] == ["python", "-m", "altgrad_jax.main"]
        assert manifest["identity"]["seed"] == condition["seed"]
        own = condition["recipe"]
        assert any(f"asked {own} x {own}" in line for line in manifest["audit"]["products"]), "its own, not the first's"
        assert summary(done / name)["status"] == "finished"
        records = read_metrics(done / name / "metrics.jsonl")
        assert [r["step"] for r in records if "train/loss" in r] == list(range(1, 13))
        assert [r["step"] for r in records if "val/loss" in r] == [0, 6, 12]
    assert not list(done.glob("compiled*")) and not list((done / "groups").glob("*"))


def test_the_time_left_is_that_of_the_steps_left(lab, tmp_path, monkeypatch, capsys):
    """At the speed of this session's steps: not of what had ended before, nor where a group went on."""
    now = 0.0
    monkeypatch.setattr("altgrad_jax.sweep.progress.time.monotonic", lambda: now)
    found = conditions(tiny_matrix(lab, **ONE_GROUP), PLAIN)  # 4 of 12 steps each
    (tmp_path / found[3].name).mkdir()
    (tmp_path / found[3].name / "summary.json").write_text('{"status": "finished", "final": {}}')
    progress = Progress(make_console())
    progress.plan(found, tmp_path)
    progress.begin([found[0].name, found[1].name])
    progress.tell("step", 4)  # it went on from step 3, say
    now = 100.0
    progress.tell("step", 9)  # 10 steps in 100 s; 2 x 3 + 12 are left
    assert capsys.readouterr().out.splitlines()[-1] == "[1/4  eta 0:03:00]  step 9/12"
    for condition in found[:2]:
        progress.ended(condition.name, "finished")
    progress.ended(found[2].name, "diverged")
    assert capsys.readouterr().out.splitlines()[-1] == f"[4/4]  {found[2].name} diverged"
    assert progress.statuses() == {"finished": 3, "diverged": 1}


def test_what_has_ended_is_not_repeated(done, lab, capsys):
    before = {path: path.stat().st_mtime_ns for path in done.glob("*/*")}
    assert sweep(tiny_matrix(lab, **ONE_GROUP), done, (0, 1)) == 0
    assert {path: path.stat().st_mtime_ns for path in done.glob("*/*")} == before
    assert "4 of 4 conditions have ended before" in capsys.readouterr().out


def test_a_folder_of_other_settings_is_refused(done, lab):
    with pytest.raises(
        UserError, match=r"e5m2-adamw-seed0 was run with other settings \(config.train.batch_size: 8 -> 16"
    ):
        sweep(tiny_matrix(lab, {"train__batch_size": 16}, **ONE_GROUP), done, (0, 1))


def test_a_condition_alone_gives_the_same_losses(done, lab, tmp_path):
    """Through the main job, with the configuration that the condition's folder says it had."""
    config = json.loads((done / "e3m4-adamw-seed1" / "config.json").read_text())
    changed = {f"{s}__{k}": v for s in ("train", "optimizer", "diagnostics") for k, v in config[s].items()}
    changed |= {"seed": 1, "precision__rules": tuple(map(tuple, config["precision"]["rules"]))}
    changed["diagnostics__questions"] = ()
    assert lab.train(tmp_path / "alone", **changed) == 0
    alone, together = (
        np.array([r["train/loss"] for r in read_metrics(path / "metrics.jsonl") if "train/loss" in r])
        for path in (tmp_path / "alone", done / "e3m4-adamw-seed1")
    )
    np.testing.assert_allclose(together, alone, rtol=1e-3)  # bfloat16 activations


@pytest.mark.slow
@pytest.mark.parametrize("patience", [2, 1000])
def test_failures_are_results_and_the_rest_goes_on(lab, tmp_path, patience):
    """One rate diverges among lanes, at once, or at the end."""
    axes = ONE_GROUP | {"recipes": (("e5m2", "e5m2"),), "rates": (1.0, 1e30), "seeds": (0,)}
    base = {"stability__nan_patience": patience, "optimizer__grad_clip": 0.0}
    assert sweep(tiny_matrix(lab, base, **axes), tmp_path / "a", (0, 1)) == 0
    assert {n: summary(tmp_path / "a" / n)["status"] for n in folders(tmp_path / "a")} == {
        "e5m2-adamw-rate1-seed0": "finished",
        "e5m2-adamw-rate1e-30-seed0": "diverged",
    }


def a_unit(lab, tmp_path) -> tuple[_Unit, Progress]:
    found = conditions(tiny_matrix(lab, **ONE_GROUP), PLAIN)
    progress = Progress(make_console())
    progress.plan(found, tmp_path)
    return _Unit(tuple(found), alone=False), progress


def test_what_does_not_fit_into_memory_is_cut_up_and_at_last_a_result(lab, tmp_path, capsys):
    unit, progress = a_unit(lab, tmp_path)
    home = tmp_path / "groups" / unit.name
    home.mkdir(parents=True)
    sizes = [
        [len(part.conditions) for part in _after(unit, Outcome("too_large", "", n), tmp_path, home, progress)]
        for n in (0, 1, 2, 3, 9)
    ]
    assert sizes == [[1] * 4, [1] * 4, [2, 2], [2, 2], [2, 2]]
    # A sweep that goes on cuts it at once, for as a whole it would overwrite what its parts have done.
    assert [len(part.conditions) for part in _cut(unit, home)] == [2, 2]
    one = _Unit(unit.conditions[:1], alone=False)
    assert _cut(one, home.with_name(one.name)) == []
    assert _after(one, Outcome("too_large", "out of memory"), tmp_path, home, progress) == []
    kept = summary(tmp_path / "e5m2-adamw-seed0")
    assert (kept["status"], kept["reason"]) == ("failed", "out of memory")
    assert "e5m2-adamw-seed0 failed: out of memory" in capsys.readouterr().out
    assert read_runs([str(tmp_path)])[0].status == "failed"


@pytest.mark.slow
def test_before_training_the_program_is_held_against_the_memory_there_is(lab, tmp_path, monkeypatch):
    unit, _ = a_unit(lab, tmp_path)
    members = [Member(c.name, tmp_path / c.name, c.config, c.facts, c.command) for c in unit.conditions]
    monkeypatch.setattr("altgrad_jax.sweep.group.needed_bytes", lambda compiled: 1000 + 0 * needed_bytes(compiled))
    monkeypatch.setattr("altgrad_jax.sweep.group.free_bytes", lambda device: 700)
    with pytest.raises(TooLargeError) as caught:
        train_together(members, tmp_path / "group", lambda what, value: None)
    assert caught.value.fitting == 2
    assert not list(tmp_path.glob("*/manifest.json"))


def test_memory_that_is_known():
    compiled = jax.jit(lambda x: x @ x).lower(jnp.zeros((256, 256))).compile()
    assert needed_bytes(compiled) >= 4 * 256 * 256
    assert free_bytes(jax.devices()[0]) > 1e8
    gpu = SimpleNamespace(platform="gpu", memory_stats=lambda: {"bytes_limit": 1000, "bytes_in_use": 500})
    assert free_bytes(gpu) == 400
    assert free_bytes(SimpleNamespace(platform="tpu", memory_stats=lambda: None)) is None


def test_of_conditions_that_fail_together_each_has_its_own_chance(lab, tmp_path):
    unit, progress = a_unit(lab, tmp_path)
    (tmp_path / "home").mkdir()
    parts = _after(unit, Outcome("failed", "ValueError: x"), tmp_path, tmp_path / "home", progress)
    assert [[c.name for c in part.conditions] for part in parts] == [[c.name] for c in unit.conditions]
    assert folders(tmp_path) == []


def test_a_process_that_was_stopped_alone_goes_on(lab, tmp_path):
    unit, progress = a_unit(lab, tmp_path)
    assert _after(unit, Outcome("interrupted"), tmp_path, tmp_path, progress) == [unit]


def test_what_stands_in_the_way_of_all_stops_the_sweep(lab, tmp_path):
    """And is no result: mended, the same command goes on."""
    matrix = tiny_matrix(
        lab, {"stability__rewinds": 1, "checkpoint__restore_from": str(tmp_path / "none")}, **ONE_GROUP
    )
    with pytest.raises(UserError, match="no checkpoint in"):
        sweep(matrix, tmp_path / "m", (0, 1))
    assert not list((tmp_path / "m").glob("*/summary.json"))


@pytest.mark.slow
def test_what_needs_a_run_of_its_own_has_one(lab, tmp_path):
    axes = {"recipes": (("e5m2", "e5m2"),), "optimizers": ("adamw",), "exclude": (), "seeds": (3,)}
    assert sweep(tiny_matrix(lab, {"stability__rewinds": 1}, **axes), tmp_path / "m", (0, 1)) == 0
    folder = tmp_path / "m" / "e5m2-adamw-seed3"
    assert summary(folder)["status"] == "finished" and not (folder / "checkpoints").exists()
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["condition"]["together"] == 1 and manifest["condition"]["seed"] == 3
    assert "--config.stability.rewinds=1" in manifest["sessions"][0]["command"]


@pytest.mark.parametrize(("code", "how"), [(-15, "by SIGTERM"), (1, "with status 1"), (-11, "by SIGSEGV")])
def test_what_is_lost_without_a_word_is_tried_again(lab, tmp_path, code, how):
    """A group twice, then in halves; a condition three times. It is a result only of what crashes by itself."""
    unit, progress = a_unit(lab, tmp_path)
    home = tmp_path / "groups" / unit.name
    home.mkdir(parents=True)
    death = _death(SimpleNamespace(exitcode=code))
    assert death.reason == f"its process ended {how}", "and nothing of a cause that is not known"
    [again] = _after(unit, death, tmp_path, home, progress)
    assert again.conditions == unit.conditions and again.name == unit.name, "so that it finds its checkpoints"
    assert [len(part.conditions) for part in _after(again, death, tmp_path, home, progress)] == [2, 2]
    one = _Unit(unit.conditions[:1], alone=False)
    [second] = _after(one, death, tmp_path, home, progress)
    [third] = _after(second, death, tmp_path, home, progress)
    assert folders(tmp_path) == [] and not progress.given_up
    assert _after(third, death, tmp_path, home, progress) == []
    if code == -11:
        assert summary(tmp_path / "e5m2-adamw-seed0")["reason"] == "its process ended by SIGSEGV, 3 times"
        assert not progress.given_up
    else:
        assert folders(tmp_path) == [] and progress.given_up == {"e5m2-adamw-seed0": f"{death.reason}, 3 times"}
        with pytest.raises(UserError, match="e5m2-adamw-seed0 has no result: its process ended .* tries again"):
            _refuse_gaps(progress)


@pytest.mark.slow
def test_a_full_disk_is_no_result_of_a_condition_alone(lab, tmp_path, monkeypatch):
    """Its run is one that can go on; what stops it stops the sweep."""
    found = conditions(tiny_matrix(lab, {"stability__rewinds": 1}, **ONE_GROUP), PLAIN)[0]
    member = Member(found.name, tmp_path / "run", found.config, found.facts, found.command)

    def full(*_):
        raise UserError("a checkpoint could not be written: No space left on device")

    monkeypatch.setattr("altgrad_jax.checkpoint.Checkpoints.save", full)
    with pytest.raises(UserError, match="No space left"):
        _train(Request((member,), tmp_path / "home", True, tmp_path / "log.txt"), lambda what, value: None)
    assert summary(tmp_path / "run")["status"] == "interrupted" and ended(tmp_path / "run") is None


@pytest.mark.slow
def test_a_group_goes_on_only_from_what_it_saved(lab, tmp_path):
    """Records that are gone are told of; conditions without their checkpoint begin anew when that is asked for."""
    unit, _ = a_unit(lab, tmp_path)
    members = [Member(c.name, tmp_path / c.name, c.config, c.facts, c.command) for c in unit.conditions[:2]]

    def stop_at(step):
        def tell(what, value):
            if value == step:
                os.kill(os.getpid(), signal.SIGTERM)

        return tell

    def steps_of(member):
        return [r["step"] for r in read_metrics(member.folder / "metrics.jsonl") if "train/loss" in r]

    assert train_together(members, tmp_path / "group", stop_at(5)) == "interrupted"
    shutil.copytree(tmp_path / "group", tmp_path / "copy")
    path = members[0].folder / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))
    assert train_together(members, tmp_path / "group", stop_at(7)) == "interrupted"
    (told,) = [r for r in read_metrics(path) if r.get("event") == "records"]
    assert told["step"] == 6 and told["event/reason"].endswith("4 of 7 records are missing")
    shutil.rmtree(tmp_path / "group")
    before = snapshot(members[0].folder)
    with pytest.raises(UserError, match=r"has the records of a run, and its checkpoints are gone"):
        train_together(members, tmp_path / "group", stop_at(0))
    assert snapshot(members[0].folder) == before
    assert train_together(members, tmp_path / "group", stop_at(3), restart=True) == "interrupted"
    with pytest.raises(UserError, match=r"has been begun anew since the checkpoint .*copy/checkpoints/6 was saved"):
        train_together(members, tmp_path / "copy", stop_at(0))
    assert train_together(members, tmp_path / "group", stop_at(0)) == "finished"
    for member in members:
        assert steps_of(member) == list(range(1, 13)) and (member.folder / "earlier" / "0" / "manifest.json").exists()


@pytest.mark.slow
def test_a_sweep_killed_and_interrupted_ends_as_one_never_stopped(done, lab, tmp_path):
    kill_and_resume(done, lab, tmp_path / "matrix", kills=2, seed=0)


@pytest.mark.exhaustive
def test_a_sweep_killed_at_random_ten_times(done, lab, tmp_path):
    for seed in range(3):
        kill_and_resume(done, lab, tmp_path / f"matrix{seed}", kills=10, seed=seed)


def kill_and_resume(done: Path, lab, workdir: Path, kills: int, seed: int) -> None:
    """Kills at so many random places, ever later; every second time by SIGTERM. Compares with a sweep never stopped."""
    draw, ended_at = np.random.default_rng(seed), {}
    lines_of_all = sum(path.read_bytes().count(b"\n") for path in done.glob("*/metrics.jsonl"))
    for kill, lines in enumerate(sorted(draw.integers(0, lines_of_all, kills))):
        process = subprocess.Popen(
            command(lab, workdir, **ONE_GROUP), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        deadline = time.monotonic() + 120
        while sum(path.read_bytes().count(b"\n") for path in workdir.glob("*/metrics.jsonl")) < lines:
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(draw.uniform(0, 0.03 if lines else 6))
        process.send_signal(signal.SIGTERM if kill % 2 == 1 else signal.SIGKILL)
        out, _ = process.communicate()
        assert "Traceback" not in out, out
        for path in workdir.glob("*/summary.json"):
            assert ended_at.setdefault(path, path.stat().st_mtime_ns) == path.stat().st_mtime_ns, "run twice"
    ended = subprocess.run(command(lab, workdir, **ONE_GROUP), cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert table(workdir) == table(done)


@pytest.mark.slow
def test_parts_merge_by_copying(done, lab, tmp_path):
    axes = ONE_GROUP | {"together": 2}
    for i in (0, 1):
        assert sweep(tiny_matrix(lab, **axes), tmp_path / f"part{i}", (i, 2)) == 0
    assert not set(folders(tmp_path / "part0")) & set(folders(tmp_path / "part1"))
    for i in (0, 1):
        shutil.copytree(tmp_path / f"part{i}", tmp_path / "merged", dirs_exist_ok=True)
    assert folders(tmp_path / "merged") == folders(done)
    assert sweep(tiny_matrix(lab, **axes), tmp_path / "merged", (0, 1)) == 0  # nothing is left to do


@pytest.mark.slow
def test_a_search_chooses_each_optimizers_rate(lab, tmp_path, capsys):
    axes = {"recipes": (("e5m2", "e5m2"),), "optimizers": ("adamw",), "exclude": (), "seeds": (0,)}
    matrix = tiny_matrix(lab, **axes)
    matrix.search.update(factors=(1e-6, 1.0), recipes=("e5m2",))
    assert sweep(matrix, tmp_path / "m", (0, 1)) == 0
    found = json.loads((tmp_path / "m" / "search" / "rates.json").read_text())
    assert found["factors"] == {"adamw": 1.0}
    assert found["tried"]["adamw"]["1"] < found["tried"]["adamw"]["1e-06"]
    assert "learning rates x {'adamw': 1.0" in capsys.readouterr().out


def test_the_choice_of_rates(lab, tmp_path):
    from altgrad_jax.sweep.search import search_conditions

    matrix = tiny_matrix(lab, optimizers=("adamw",), exclude=())
    matrix.search.update(factors=(0.5, 1.0, 2.0, 4.0), recipes=("e5m2", "e4m3"))
    tried = search_conditions(matrix, PLAIN)
    losses = {0.5: (3.0, 2.0), 1.0: (2.2, 2.4), 2.0: (1.0, None), 4.0: (9.0, 9.0)}
    for condition in tried:
        loss = losses[condition.facts["rate"]][condition.facts["recipe"] == "e4m3"]
        (tmp_path / condition.name).mkdir()
        content = {"status": "finished" if loss else "diverged", "final": {"val/loss": loss}}
        (tmp_path / condition.name / "summary.json").write_text(json.dumps(content))
    found = choose(tried, tmp_path)
    assert found["factors"] == {"adamw": 1.0} and found["notes"] == []
    assert found["tried"]["adamw"] == {"0.5": 2.5, "1": pytest.approx(2.3), "2": None, "4": 9.0}
    for condition in tried:
        (tmp_path / condition.name / "summary.json").write_text('{"status": "failed"}')
    with pytest.raises(UserError, match="adamw finished with no learning rate"):
        choose(tried, tmp_path)


@pytest.mark.parametrize("text", ["", "1", "1/1", "2/1", "-1/2", "a/2", "0/0"])
def test_a_shard_that_is_none(text):
    with pytest.raises(UsageError, match="is not i/n"):
        parse_shard(text)


def test_a_mistake_is_one_line(lab, tmp_path):
    cases = [
        ["--config=configs/bf16.py", f"--workdir={tmp_path / 'w'}"],
        [*flags(lab, tmp_path / "w"), "--shard=3/2"],
        [*flags(lab, tmp_path / "w"), "--config.base.tracking.wandb=offline"],
        [*flags(lab, tmp_path / "w"), "--config.seedz=(1,)"],
        [*flags(lab, tmp_path / "w"), "--config.recipes=(('x','e5m99'),)", "--config.exclude=()"],
        [*flags(lab, tmp_path / "w"), "--config.layers=(('x','nosuch'),)"],
    ]
    wanted = ["names no matrix", "--shard=3/2 is not i/n", "must be 'disabled'", "did you mean config.seeds", "e5m99"]
    wanted.append("matches no layer")
    ends = run_module(
        "altgrad_jax.sweep", cases, tmp_path / "forks", ["altgrad_jax.train"], os.environ | {"GLIBC_TUNABLES": ""}
    )
    for end, text in zip(ends, wanted, strict=True):
        assert (end.code, text in end.err, len(end.err.splitlines())) == (2, True, 1), end
    assert not (tmp_path / "w").exists()
