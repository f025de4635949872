"""A run's work directory: its files, its lock, and writes that are whole or absent.

config.json  manifest.json  metrics.jsonl  summary.json  checkpoints/<step>/  damaged/  earlier/<n>/  wandb/
"""

import fcntl
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from altgrad_jax import files
from altgrad_jax.errors import UserError

EARLIER = "earlier"  # folder of what was there before a run began anew
# What a run leaves in its folder; whatever else lies there is not its own.
OWN = ("config.json", "manifest.json", "metrics.jsonl", "summary.json", "checkpoints", "damaged", "profile", "wandb")
# What a summary and a manifest hold, as far as this program reads them again.
SUMMARY = {"status": str, "step": int, "final": dict}
MANIFEST = {"run_id": str, "identity": dict, "config": dict, "sessions": [dict]}


class BusyError(UserError):
    """Another process holds the folder."""


class Workdir:
    """The folder of one run, held by one process at a time.

    A session that comes to write nothing (its corpus is missing, say) leaves nothing: `close` removes the folders and
    the lock file that it created, where nothing else has come to lie in them.

    Attributes:
      path: the folder.
    """

    def __init__(self, path: str | os.PathLike[str], lock: bool = True):
        """Creates the folder if needed and locks it until `close` or the end of the process.

        Of several processes that train together in one folder, one locks it for all.

        Raises:
          UserError: the folder cannot be written, or (`BusyError`) another process trains in it.
        """
        self.path = Path(path).expanduser().absolute()
        self._made: set[Path] = set()  # folders that were not there
        self._found: set[str] = set()  # what lay in `path` before
        self._lock: int | None = None
        self._noted = False
        try:
            self._make_folders()
            if lock:
                self._lock = self._hold()
        except OSError as e:
            self._remove_made_folders()
            why = files.cause(self.path, e)
            raise UserError(f"--workdir={path} cannot be written: {why}; choose another folder") from e

    def _make_folders(self) -> None:
        self._made |= {folder for folder in (self.path, *self.path.parents) if not folder.exists()}
        self.path.mkdir(parents=True, exist_ok=True)
        self._found = set(os.listdir(self.path))

    def _hold(self) -> int:
        """The lock file, locked. Raises BusyError if another process holds it."""
        while True:
            handle = os.open(self._lock_file, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(handle)
                raise BusyError(
                    f"another process is training in {self.path}; wait for it to end or use another --workdir"
                ) from None
            if _is_at(handle, self._lock_file):
                return handle
            # Who held it until now has removed it: a third process would lock a new one.
            os.close(handle)
            self._make_folders()

    @property
    def _lock_file(self) -> Path:
        return self.path / ".lock"

    def close(self) -> None:
        """Removes what this process created in vain, and releases the lock."""
        if self._lock is not None:
            with suppress(OSError):  # a folder that cannot be cleaned is no reason to fail
                self._clean()
        self._remove_made_folders()
        if self._lock is not None:
            os.close(self._lock)

    def _clean(self) -> None:
        if self.checkpoints.name not in self._found:
            _remove_if_empty(self.checkpoints)
        new = set(os.listdir(self.path)) - self._found
        if new == {self._lock_file.name}:
            self._lock_file.unlink()

    def _remove_made_folders(self) -> None:
        for folder in sorted(self._made, key=lambda folder: len(folder.parts), reverse=True):
            _remove_if_empty(folder)

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints, one subfolder a step."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """The metrics file, one JSON object a line."""
        return self.path / "metrics.jsonl"

    def set_aside(self) -> Path | None:
        """Moves what an earlier run left to a folder of its own in `earlier`, and returns that; None if there is none.

        What else lies in the folder stays where it is.

        Raises:
          UserError: it cannot be moved.
        """
        found = sorted(set(os.listdir(self.path)) & set(OWN))
        if not found:
            return None
        target = next(p for i in range(10**6) if not (p := self.path / EARLIER / f"{i}").exists())
        try:
            target.mkdir(parents=True)
            for name in found:
                os.rename(self.path / name, target / name)
        except OSError as e:
            raise files.unwritable(target, e) from e
        return target

    def note_checkpoint(self) -> None:
        """Writes into the manifest that there is a checkpoint, so that its loss would show."""
        if not self._noted and (manifest := self.read_json("manifest.json")) is not None:
            self.write_json("manifest.json", manifest | {"checkpointed": True})
        self._noted = True

    def forget_checkpoint(self) -> None:
        """Takes that out of the manifest: the run may begin anew."""
        if (manifest := self.read_json("manifest.json")) is not None and manifest.pop("checkpointed", None):
            self.write_json("manifest.json", manifest)

    def read_json(self, name: str, shape: Any = dict) -> Any:
        """A JSON file's content, or None if there is no such file; as `files.read_json`."""
        return files.read_json(self.path / name, shape)

    def write_json(self, name: str, content: Any) -> None:
        """Replaces a JSON file; as `files.write_json`."""
        files.write_json(self.path / name, content)


def _is_at(handle: int, path: Path) -> bool:
    """Whether an open file is the one that now has this path."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):  # not empty, or gone
        folder.rmdir()
