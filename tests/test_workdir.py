"""The work directory: one process at a time, and files that are whole or absent."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from altgrad_jax.errors import UserError
from altgrad_jax.workdir import Workdir, read_json
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


@pytest.mark.parametrize("below", [".", "below"])
def test_a_file_in_the_place_of_the_folder(tmp_path, below):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"--workdir=.*file.* cannot be written: .*; choose another folder"):
        Workdir(tmp_path / "file" / below)
    assert (tmp_path / "file").read_text() == "mine"


def test_json_files_are_replaced_whole(tmp_path, monkeypatch):
    workdir = Workdir(tmp_path)
    assert workdir.read_json("summary.json") is None
    workdir.write_json("summary.json", {"b": [1, 2.5], "a": None})
    assert workdir.read_json("summary.json") == {"b": [1, 2.5], "a": None}

    def refuse(self, target):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", refuse)
        with pytest.raises(UserError, match=r"summary.json cannot be written: No space left on device"):
            workdir.write_json("summary.json", {"new": True})
    assert workdir.read_json("summary.json") == {"b": [1, 2.5], "a": None}
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "summary.json"]
    workdir.close()


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", json.dumps({"a": 1}).encode()[:-1]])
def test_a_damaged_json_file_is_told(tmp_path, content):
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(UserError, match=r"manifest.json is damaged .*; restore it, or delete it"):
        read_json(tmp_path / "manifest.json")
