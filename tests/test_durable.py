"""A checkpoint counts when it is on disk: over power cuts, full disks, and files that cannot be read for a while."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from altgrad_jax import files
from altgrad_jax.checkpoint import Checkpoints, committed_steps, surplus
from altgrad_jax.errors import UserError
from tests.forks import ROOT
from tests.mounts import mounted
from tests.test_checkpoint import assert_is, make_state, restore, save


def test_a_power_cut_finds_the_checkpoint_whole(tmp_path):
    """What the disk holds when `wait` returns: the image is copied below the file system, whose caches a cut loses."""
    image, copy = tmp_path / "disk", tmp_path / "copy"
    image.write_bytes(b"")
    os.truncate(image, 16 * 2**20)
    if subprocess.run(["mkfs.ext4", "-q", str(image)], capture_output=True).returncode:
        pytest.skip("mkfs.ext4 cannot be run here")
    with mounted(tmp_path / "before", "-o", "loop,commit=300", str(image)) as folder:
        checkpoints = Checkpoints(folder / "checkpoints", max_to_keep=1)
        for step in (10, 20):
            save(checkpoints, step, make_state(step))
            checkpoints.wait()
        files.write_json(folder / "summary.json", {"step": 20})
        shutil.copy(image, copy)
        checkpoints.close()
    with mounted(tmp_path / "after", "-o", "loop", str(copy)) as folder:
        assert files.read_json(folder / "summary.json") == {"step": 20}
        assert committed_steps(folder / "checkpoints") == [20]
        assert_is(restore(folder / "checkpoints"), 20)


def test_the_order_of_what_is_asked_of_the_disk(tmp_path, monkeypatch):
    calls: list[tuple[str, str]] = []
    fsync, rename, rmtree = os.fsync, os.rename, shutil.rmtree
    name = lambda path: str(Path(path).relative_to(tmp_path))  # noqa: E731

    def note_sync(handle):
        calls.append(("sync", name(os.readlink(f"/proc/self/fd/{handle}"))))
        fsync(handle)

    def note_rename(old, new, **more):
        calls.append(("name", name(new)))
        rename(old, new, **more)

    def note_rmtree(path, *args, **more):
        calls.append(("delete", name(path)))
        rmtree(path, *args, **more)

    checkpoints = Checkpoints(tmp_path / "c", max_to_keep=1, committed=lambda: calls.append(("counts", "")))
    save(checkpoints, 10, make_state(10))
    checkpoints.wait()
    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "rename", note_rename)
    monkeypatch.setattr(shutil, "rmtree", note_rmtree)
    calls.clear()
    save(checkpoints, 20, make_state(20))
    checkpoints.close()
    named, unfinished = calls.index(("name", "c/20")), "c/20.orbax-checkpoint-tmp"
    synced = [path for kind, path in calls[:named] if kind == "sync"]
    stored = {f"{unfinished}/{path.relative_to(tmp_path / 'c/20')}" for path in (tmp_path / "c/20").rglob("*")}
    own = {f"{unfinished}/{file}" for file in ("commit_success.txt", "_CHECKPOINT_METADATA")}
    assert {*stored, unfinished} - own <= set(synced), "all of it is on disk before it has its name"
    for path in synced[:-1]:
        assert synced.index(str(Path(path).parent)) > synced.index(path), "a folder comes after what is in it"
    after = calls[named + 1 :]
    assert after.index(("sync", "c")) < after.index(("counts", "")) < after.index(("delete", "c/10.going"))
    assert ("sync", "c/20/commit_success.txt") in after[: after.index(("sync", "c"))]


@pytest.mark.parametrize(
    ("steps", "keep", "gone"),
    [
        ((10, 20, 30, 40), 3, [10]),
        ((10, 20), 3, []),
        ((20, 23, 26, 29), 3, []),  # interrupts beside the one regular checkpoint
        ((20, 23), 1, []),
        ((20, 23, 30), 1, [20, 23]),
        ((10, 20, 23, 26, 29, 30), 2, [10, 23, 26]),
        ((3, 6, 9), 1, [3, 6]),
    ],
)
def test_what_interrupts_save_pushes_out_no_regular_checkpoint(steps, keep, gone):
    assert surplus(steps, keep, 10) == gone


def test_a_checkpoint_keeps_its_place_and_its_kin(tmp_path, caplog):
    """Under another name, or with the iterator or manifest of another, it is damaged."""
    checkpoints = Checkpoints(tmp_path / "c", max_to_keep=9)
    for step in (5, 10, 20, 30, 40):
        save(checkpoints, step, make_state(step))
    checkpoints.close()
    (tmp_path / "c" / "40").rename(tmp_path / "c" / "45")
    shutil.copy(tmp_path / "c" / "10" / "iterator" / "metadata", tmp_path / "c" / "30" / "iterator" / "metadata")
    shutil.copy(tmp_path / "c" / "10" / "manifest" / "metadata", tmp_path / "c" / "20" / "manifest" / "metadata")
    assert_is(restore(tmp_path / "c"), 10)
    assert "45 is damaged: it is the checkpoint of step 40 under another name" in caplog.text
    assert "30 is damaged: the iterator is that of another checkpoint" in caplog.text
    assert "20 is damaged: it is the checkpoint of step 10 under another name" in caplog.text
    assert sorted(path.name for path in (tmp_path / "damaged").iterdir()) == ["20.0", "30.0", "45.0"]


def test_what_lies_among_checkpoints(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", max_to_keep=3)
    save(checkpoints, 10, make_state(10))
    checkpoints.close()
    for name in ("0999", "notes", "12a", "٣٠"):
        (tmp_path / "c" / name).mkdir()
    assert_is(restore(tmp_path / "c"), 10)
    (tmp_path / "c" / "20").write_text("")
    with pytest.raises(UserError, match=r"c/20 is no folder, and has the name of a checkpoint; move it away"):
        restore(tmp_path / "c")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file cannot be written: File exists"):
        Checkpoints(tmp_path / "file", max_to_keep=3)


READ = """
import os, sys
os.environ["JAX_PLATFORMS"] = "cpu"
import resource
from pathlib import Path
from altgrad_jax.errors import UserError
from tests.test_checkpoint import IDENTITY, like
import altgrad_jax.checkpoint_files as stored
folder = Path(sys.argv[1])
manifest = stored.read_manifest(folder, 20)
wanted = like()
if sys.argv[2] == "nobody":
    os.setuid(65534)
if sys.argv[2] == "few files":
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 1, 100))
try:
    stored.attempt(lambda: stored.read(folder, 20, wanted, manifest), folder / "20")
except UserError as e:
    print(e)
"""


@pytest.mark.parametrize("why", ["nobody", "few files"])
def test_what_cannot_be_read_for_a_while_is_not_damaged(why):
    if why == "nobody" and os.getuid() != 0:
        pytest.skip("only root can become nobody")
    with tempfile.TemporaryDirectory() as name:  # not in pytest's own folders, which are for one user alone
        folder = Path(name) / "c"
        checkpoints = Checkpoints(folder, max_to_keep=3)
        for step in (10, 20):
            save(checkpoints, step, make_state(step))
        checkpoints.close()
        largest = max((folder / "20" / "state").rglob("*"), key=lambda path: path.stat().st_size)
        said = "cannot be read: Too many open files"
        if why == "nobody":
            Path(name).chmod(0o755)
            largest.chmod(0)
            said = f"{largest} cannot be read: Permission denied"
        command = [sys.executable, "-c", READ, str(folder), why]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert said in done.stdout and len(done.stdout.splitlines()) == 1, done
        assert_is(restore(folder), 20)


@pytest.mark.parametrize("size", ["nr_inodes=48", "size=192k"])
def test_a_disk_that_fills_up_during_a_save(tmp_path, size):
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", size, "tmpfs") as folder:
        checkpoints = Checkpoints(folder / "c", max_to_keep=9)
        with pytest.raises(UserError, match=r"could not be written to .*: No space left on device") as caught:
            for step in range(10, 100, 10):
                save(checkpoints, step, make_state(step))
                checkpoints.wait()
        what = "no inode is free" if "inodes" in size else "bytes are free"
        said = str(caught.value)
        assert what in said and "checkpoints kept: 10" in said and "\n" not in said
        checkpoints.close()
        assert_is(restore(folder / "c"), max(committed_steps(folder / "c")))
