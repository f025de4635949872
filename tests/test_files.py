"""Whatever lies in the place of a file, or keeps one from being written, is one line with the cause and the way out."""

import errno
import json
import os
from pathlib import Path

import pytest

from altgrad_jax import files
from altgrad_jax.errors import UserError
from altgrad_jax.files import DamagedFileError, UnreadableError, UnwritableError, misfit, read_json, write_atomically
from tests.mounts import mounted

SHAPE = {"name": str, "runs": [{"step": int, "loss?": (float, type(None))}], "on?": bool}
GOOD = {"name": "a", "runs": [{"step": 3}, {"step": 4, "loss": 2}, {"step": 5, "loss": None}], "more": []}

CONTENTS = {
    "empty": (b"", "it is empty"),
    "blank": (b" \n", "it is empty"),
    "cut": (b'{"a": 1', "it is no JSON: Expecting"),
    "two values": (b"{} {}", "it is no JSON: Extra data"),
    "not UTF-8": (b'{"a": "\xff"}', "it is not UTF-8 from byte 7 on"),
    "UTF-16": ("{}".encode("utf-16"), "it is not UTF-8 from byte 0 on"),
    "a tail of NUL": (b"{}\n" + bytes(9), "it has NUL bytes from byte 3 on"),
    "deep": (b'{"a":' * 100_000, "it is nested too deeply"),
    "long number": (b'{"a": ' + b"1" * 5000 + b"}", "it is no JSON: "),
    "a list": (b"[1]", "it is a list, not an object"),
    "null": (b"null", "it is null, not an object"),
    "missing": (b'{"name": "a"}', "runs is missing"),
    "another type": (b'{"name": 5, "runs": []}', "name is a whole number, not a text"),
    "inside": (b'{"name": "a", "runs": [{"step": true}]}', "an entry of runs.step is a truth, not a whole number"),
    "of none": (b'{"name": "a", "runs": [{"step": 1, "loss": "x"}]}', "an entry of runs.loss is a text"),
    "optional": (b'{"name": "a", "runs": [], "on": null}', "on is null, not a truth"),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_what_is_no_such_json_is_told(tmp_path, name):
    content, said = CONTENTS[name]
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(DamagedFileError) as caught:
        read_json(path, SHAPE, "bring back a copy")
    text = str(caught.value)
    assert text.startswith(f"{path} is damaged: {said}") and text.endswith("; bring back a copy") and "\n" not in text


def test_what_is_of_the_shape_is_returned(tmp_path):
    assert misfit(GOOD, SHAPE) == "" and misfit(1, float) == "" and misfit({"x": [[]]}, {"x": [object]}) == ""
    files.write_json(tmp_path / "x.json", GOOD)
    assert read_json(tmp_path / "x.json", SHAPE) == GOOD
    assert read_json(tmp_path / "absent.json", SHAPE) is None
    assert read_json(tmp_path / "no folder" / "absent.json", SHAPE) is None


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_what_is_no_file_is_not_waited_for(tmp_path, make):
    make(tmp_path / "x.json")
    with pytest.raises(DamagedFileError, match=r"x.json is a (folder|pipe), where a file is wanted; move it away"):
        read_json(tmp_path / "x.json")


@pytest.mark.parametrize("kind", ["below a file", "forbidden", "broken disk"])
def test_what_cannot_be_read_is_no_damage(tmp_path, monkeypatch, kind):
    path = tmp_path / "x.json"
    if kind == "below a file":
        path.write_text("{}")
        path, said = path / "y.json", f"Not a directory: {path} is a file"
    else:
        path.write_text("{}")
        number = errno.EACCES if kind == "forbidden" else errno.EIO
        said = f"cannot be read: {os.strerror(number)}"

        def refuse(self):
            raise OSError(number, os.strerror(number), str(self))

        monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(UnreadableError) as caught:
        read_json(path)
    assert str(path) in str(caught.value) and said in str(caught.value) and "damage" not in str(caught.value)


@pytest.mark.parametrize("number", [errno.EROFS, errno.EDQUOT, errno.EACCES, errno.EFBIG, errno.EIO, errno.EMFILE])
def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch, number):
    path = tmp_path / "x.json"
    files.write_json(path, {"old": 1})

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", refuse)
        with pytest.raises(UnwritableError) as caught:
            files.write_json(path, {"new": 1})
    assert str(caught.value).startswith(f"{path} cannot be written: {os.strerror(number)}")
    assert ("free some space" in str(caught.value)) is False, "a guess"
    assert json.loads(path.read_text()) == {"old": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.json"]


def test_a_folder_that_is_gone_or_in_the_way(tmp_path):
    with pytest.raises(UnwritableError, match=r"x cannot be written: No such file .*: .*/moved is not there$"):
        write_atomically(tmp_path / "moved" / "below" / "x", "")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UnwritableError, match=r"folder cannot be written: Is a directory"):
        write_atomically(tmp_path / "folder", "")
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]


def test_links_and_devices_stay_what_they_are(tmp_path):
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to("file")
    write_atomically(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "new"
    write_atomically(Path("/dev/null"), "new")
    assert Path("/dev/null").is_char_device()


def test_the_new_file_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    calls, replace, fsync = [], os.replace, os.fsync

    def note_sync(handle):
        calls.append(("sync", Path(os.readlink(f"/proc/self/fd/{handle}")).name.rpartition(".")[0] or tmp_path.name))
        fsync(handle)

    def note_replace(old, new):
        calls.append(("name", Path(new).name))
        replace(old, new)

    monkeypatch.setattr(files.os, "fsync", note_sync)
    monkeypatch.setattr(files.os, "replace", note_replace)
    write_atomically(tmp_path / "x", b"data")
    assert calls == [("sync", ".x"), ("name", "x"), ("sync", tmp_path.name)]


def test_processes_of_one_number_write_one_file(tmp_path, monkeypatch):
    """As containers on several machines do in a folder that they share."""
    fsync, others = os.fsync, iter(["theirs"])

    def meanwhile(handle):
        for content in others:
            write_atomically(tmp_path / "x", content)
            assert (tmp_path / "x").read_text() == content
        fsync(handle)

    monkeypatch.setattr(files.os, "fsync", meanwhile)
    write_atomically(tmp_path / "x", "ours")
    assert (tmp_path / "x").read_text() == "ours" and os.listdir(tmp_path) == ["x"]


def test_a_folder_is_made_or_what_lies_in_its_place_is_told(tmp_path):
    files.make_folder(tmp_path / "a" / "b")
    files.make_folder(tmp_path / "a" / "b")
    (tmp_path / "file").write_text("")
    with pytest.raises(UnwritableError, match="file cannot be written: File exists, and is no folder; move it away"):
        files.make_folder(tmp_path / "file")
    with pytest.raises(UnwritableError, match="below cannot be written: Not a directory: .*file is a file"):
        files.make_folder(tmp_path / "file" / "below")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, with room for few bytes and few files."""
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=64k,nr_inodes=20", "tmpfs") as folder:
        yield folder


def test_what_a_disk_is_out_of_is_told(small_disk):
    with pytest.raises(UserError, match=r"No space left on device: [0-9,]+ bytes are free in .*disk; free some space"):
        write_atomically(small_disk / "x", bytes(200_000))
    with pytest.raises(UserError, match=r"No space left on device: no inode is free in .*disk; delete some files"):
        for i in range(30):
            write_atomically(small_disk / f"{i}", "")
