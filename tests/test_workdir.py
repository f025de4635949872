"""The work directory: one process at a time, and files that are whole or absent."""

import fcntl
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from altgrad_jax.console import make_console, print_header
from altgrad_jax.errors import UserError
from altgrad_jax.workdir import Workdir
from tests.runs import ROOT

HOLD = (
    "import sys; from altgrad_jax.workdir import Workdir; w = Workdir(sys.argv[1]); print('held', flush=True); input()"
)


def test_a_folder_is_made_and_its_files_have_their_places(tmp_path):
    workdir = Workdir(tmp_path / "a" / "b")
    assert workdir.path == tmp_path / "a" / "b" and workdir.path.is_dir()
    assert workdir.checkpoints == workdir.path / "checkpoints" and workdir.metrics == workdir.path / "metrics.jsonl"
    workdir.close()


def test_a_folder_is_held_by_one_at_a_time(tmp_path):
    first = Workdir(tmp_path)
    with pytest.raises(UserError, match=r"another process is training in .*; wait for it to end or use another"):
        Workdir(tmp_path)
    first.close()
    Workdir(tmp_path).close()


def test_a_killed_process_holds_nothing(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    with pytest.raises(UserError, match="another process is training"):
        Workdir(tmp_path)
    process.kill()
    process.communicate()
    Workdir(tmp_path).close()


def test_one_of_several_processes_that_train_together_locks(tmp_path):
    first, second = Workdir(tmp_path), Workdir(tmp_path, lock=False)
    second.close()
    with pytest.raises(UserError, match="another process is training"):
        Workdir(tmp_path)
    first.close()


def everything(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


# What a user gets wrong that shows only once the folder is held: no corpus, no weights, weights of another model.
LATE_MISTAKES = {
    "no corpus": {"data__path": "nowhere.txt"},
    "short corpus": {"model__block_size": 100_000},
    "no weights": {"checkpoint__restore_from": "nowhere"},
    "other weights": {"checkpoint__restore_from": "finished", "model__n_embd": 64},
}


@pytest.mark.parametrize("mistake", LATE_MISTAKES)
def test_a_start_that_fails_leaves_what_was_there(lab, finished, tmp_path, mistake):
    changes = {key: str(finished) if value == "finished" else value for key, value in LATE_MISTAKES[mistake].items()}
    (tmp_path / "opened" / "checkpoints").mkdir(parents=True)
    (tmp_path / "opened" / ".lock").touch()
    before = everything(tmp_path)
    for name in ("new/below", "opened"):
        with pytest.raises(UserError):
            lab.train(tmp_path / name, **changes)
        assert everything(tmp_path) == before, name


@pytest.mark.parametrize("name", ["new", "new/below", "empty", "empty/below", "used", "used/below"])
def test_what_a_session_made_in_vain_goes_with_it(tmp_path, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    before = everything(tmp_path)
    workdir = Workdir(tmp_path / name)
    workdir.checkpoints.mkdir()
    workdir.close()
    assert everything(tmp_path) == before


def test_a_folder_whose_name_looks_like_markup_is_shown_as_it_is(lab, finished, tmp_path, capsys):
    name = "a [/b] [red]c :smile:"
    shutil.copytree(finished, tmp_path / name)
    assert lab.train(tmp_path / name) == 0
    print_header(make_console(), "title [/b]", {"work directory": name})
    out = capsys.readouterr().out.replace("\n", "")
    assert f"{name} is at step 20 of 20" in out and f"title [/b]work directory  {name}" in out


def test_what_was_written_keeps_the_lock_file(tmp_path):
    for name, content in (("kept", "manifest.json"), ("kept too", "checkpoints/10")):
        workdir = Workdir(tmp_path / name)
        (workdir.path / content).mkdir(parents=True)
        workdir.close()
        assert (workdir.path / ".lock").exists() and (workdir.path / content).exists()


def test_a_path_that_fails_half_way_leaves_none_of_it(tmp_path):
    with pytest.raises(UserError, match="cannot be written: File name too long"):
        Workdir(tmp_path / "new" / ("x" * 300))
    assert everything(tmp_path) == []


def test_a_process_that_does_not_lock_leaves_the_lock_alone(tmp_path):
    first = Workdir(tmp_path / "run")
    Workdir(tmp_path / "run", lock=False).close()
    with pytest.raises(UserError, match="another process is training"):
        Workdir(tmp_path / "run")
    first.close()
    Workdir(tmp_path / "run", lock=False).close()
    assert everything(tmp_path) == []


@pytest.mark.parametrize("newcomer", [False, True])
def test_a_lock_file_removed_between_opening_and_locking_is_no_lock(tmp_path, monkeypatch, newcomer):
    """Another session ends in vain meanwhile; once more, and a third one has already begun in the folder anew."""
    ending, flock, others = Workdir(tmp_path / "run"), fcntl.flock, []

    def late(handle, operation):
        monkeypatch.setattr(fcntl, "flock", flock)
        ending.close()
        assert everything(tmp_path) == []
        if newcomer:
            others.append(Workdir(tmp_path / "run"))
        flock(handle, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    if newcomer:
        with pytest.raises(UserError, match="another process is training"):
            Workdir(tmp_path / "run")
    else:
        others.append(Workdir(tmp_path / "run"))
    with pytest.raises(UserError, match="another process is training"):
        Workdir(tmp_path / "run")
    [holder] = others
    holder.close()
    assert everything(tmp_path) == []


@pytest.mark.parametrize("below", [".", "below"])
def test_a_file_in_the_place_of_the_folder(tmp_path, below):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"--workdir=.*file.* cannot be written: .*; choose another folder"):
        Workdir(tmp_path / "file" / below)
    assert (tmp_path / "file").read_text() == "mine"


def test_what_is_not_of_a_run_stays_where_a_run_begins_anew(tmp_path):
    for name in ("summary.json", "thesis.tex", ".netrc"):
        (tmp_path / name).write_text(name)
    for name in ("checkpoints", "photos"):
        (tmp_path / name).mkdir()
    workdir = Workdir(tmp_path)
    moved = workdir.set_aside()
    assert moved == tmp_path / "earlier" / "0" and {p.name for p in moved.iterdir()} == {"summary.json", "checkpoints"}
    assert {p.name for p in tmp_path.iterdir()} == {".lock", ".netrc", "earlier", "photos", "thesis.tex"}
    assert workdir.set_aside() is None
    workdir.close()
