"""A lock between processes: who holds it does the work, who waits finds it done."""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from altgrad_jax import files


@contextmanager
def exclusive(path: Path, on_wait: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Holds an exclusive advisory lock on the file `path` (created if absent, left in place).

    The kernel drops the lock when the process ends, however it ends, so a killed process never blocks the next one.
    The file is not deleted: another process may already be waiting on it, and would then lock a file nobody sees.

    Args:
      path: the lock file; its folder must exist.
      on_wait: called once if another process holds the lock, before waiting for it.

    Raises:
      UserError: the lock file cannot be created.
    """
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise files.unwritable(path, error, "or choose another folder") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
