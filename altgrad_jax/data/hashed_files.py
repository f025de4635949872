"""Files that are hashed as they are written, and on disk before anyone relies on them.

Whatever the operating system refuses becomes a UserError that names the path.
"""

import hashlib
import os
import shutil
from pathlib import Path
from types import TracebackType

from altgrad_jax import files
from altgrad_jax.errors import UserError


class HashedFile:
    """A new file, to be used as a context manager: hashed as it is written, and on disk when closed without error."""

    def __init__(self, path: Path):
        self._path = path
        self._hash = hashlib.sha256()

    @property
    def sha256(self) -> str:
        """Hex SHA-256 of what has been written."""
        return self._hash.hexdigest()

    def __enter__(self) -> "HashedFile":
        try:
            self._file = open(self._path, "xb")
        except OSError as error:
            raise unwritable(self._path, error) from error
        return self

    def write(self, data: bytes) -> None:
        """Appends."""
        self._hash.update(data)
        try:
            self._file.write(data)
        except OSError as error:
            raise unwritable(self._path, error) from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with self._file:
                if kind is None:
                    self._file.flush()
                    os.fsync(self._file.fileno())
        except OSError as failure:
            raise unwritable(self._path, failure) from failure


def write_file(path: Path, data: bytes) -> str:
    """Writes a new file; returns its hex SHA-256."""
    with HashedFile(path) as file:
        file.write(data)
    return file.sha256


def move_into_place(unfinished: Path, folder: Path) -> None:
    """Renames a finished folder whose files are on disk: after a power cut it is there whole, or not at all."""
    try:
        files.sync_folder(unfinished)
        os.rename(unfinished, folder)
        files.sync_folder(folder.parent)
    except OSError as error:
        raise unwritable(folder, error) from error


def remove_folder(folder: Path) -> None:
    """Removes a folder and what is in it, if it is there."""
    try:
        if folder.exists():
            shutil.rmtree(folder)
    except OSError as error:
        raise unwritable(folder, error) from error


def unwritable(path: Path, error: OSError) -> UserError:
    """The error to raise when the operating system refuses to write `path`."""
    return files.unwritable(path, error, "or give another folder with --config.data.data_dir=DIR")
