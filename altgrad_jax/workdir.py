"""A run's work directory: its files, its lock, and writes that are whole or absent.

config.json  manifest.json  metrics.jsonl  summary.json  checkpoints/<step>/  damaged/  wandb/
"""

import fcntl
import json
import os
from pathlib import Path
from typing import Any

from altgrad_jax.errors import UserError


class Workdir:
    """The folder of one run, held by one process at a time.

    Attributes:
      path: the folder.
    """

    def __init__(self, path: str | os.PathLike[str], lock: bool = True):
        """Creates the folder if needed and locks it until `close` or the end of the process.

        Of several processes that train together in one folder, one locks it for all.

        Raises:
          UserError: the folder cannot be written, or another process trains in it.
        """
        self.path = Path(path).expanduser().absolute()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as e:
            raise UserError(f"--workdir={path} cannot be written: {e.strerror}; choose another folder") from e
        if not lock:
            return
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise UserError(
                f"another process is training in {self.path}; wait for it to end or use another --workdir"
            ) from None

    def close(self) -> None:
        """Releases the lock."""
        os.close(self._lock)

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints, one subfolder a step."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """The metrics file, one JSON object a line."""
        return self.path / "metrics.jsonl"

    def read_json(self, name: str) -> Any:
        """A JSON file's content, or None if there is no such file.

        Raises:
          UserError: the file is no JSON.
        """
        return read_json(self.path / name)

    def write_json(self, name: str, content: Any) -> None:
        """Writes a JSON file so that a reader sees the old or the new one, never half of it."""
        write_json(self.path / name, content)


def read_json(path: Path) -> Any:
    """A JSON file's content, or None if there is no such file. Raises UserError if it is no JSON."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as e:
        raise UserError(f"{path} is damaged ({e}); restore it, or delete it to have it written anew") from e


def write_json(path: Path, content: Any) -> None:
    """Replaces a JSON file atomically, on disk before it gets its name."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "w") as file:
            json.dump(content, file, indent=2, sort_keys=True)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as e:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written: {e.strerror}") from e
