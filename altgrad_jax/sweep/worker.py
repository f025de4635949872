"""A process that trains what it is asked to, so that whatever becomes of it the sweep goes on.

Out of memory, the kernel kills a process without a word; and a GPU's memory is freed for certain only with its process.
"""

import multiprocessing
import os
import shutil
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import jax

from altgrad_jax.checkpoint import committed_steps
from altgrad_jax.cli import quiet_libraries
from altgrad_jax.errors import UserError
from altgrad_jax.files import write_json
from altgrad_jax.interrupt import pass_on, watch
from altgrad_jax.kin import is_lost
from altgrad_jax.machine import OutOfMemoryError, is_out_of_memory
from altgrad_jax.streams import Unbreakable, protect_streams
from altgrad_jax.sweep.group import Tell, TooLargeError, train_together
from altgrad_jax.sweep.requests import Outcome, Request, ended, read_summary
from altgrad_jax.train import train
from altgrad_jax.workdir import BusyError, Workdir


def work(request: Request, connection: Connection) -> None:
    """Does what is asked, telling of progress as ("step", n) and at last an `Outcome`."""
    watch(words="")  # the sweep has the word
    protect_streams()
    _end_with_parent()
    threading.Thread(target=_obey, args=(connection,), daemon=True).start()
    quiet_libraries()
    tell: Tell = lambda what, value: connection.send((what, value))  # noqa: E731
    try:
        outcome = _train(request, tell)
    except TooLargeError as e:
        outcome = Outcome("too_large", fitting=e.fitting)
    except BusyError:
        outcome = Outcome("busy")
    except OutOfMemoryError as e:
        outcome = Outcome("too_large", str(e), len(request.members) // 2)
    except UserError as e:
        outcome = Outcome("stopped", str(e))
    except (ImportError, OSError) as e:  # of the installation or the disk, and no condition's fault
        outcome = Outcome("stopped", f"{type(e).__name__}: {' '.join(str(e).split())[:300]}")
    except Exception as e:  # a condition that fails is a result; its traceback is in the log
        with open(request.log, "a") as log:
            traceback.print_exc(file=log)
        if is_out_of_memory(e):
            outcome = Outcome("too_large", "out of memory", len(request.members) // 2)
        else:
            outcome = Outcome("failed", f"{type(e).__name__}: {' '.join(str(e).split())[:300]}")
    connection.send(outcome)
    connection.close()


def answer(function: Callable[..., Any], arguments: tuple[Any, ...], connection: Connection) -> None:
    """Sends what a function returns, or the user's mistake that it finds."""
    watch(words="")
    try:
        connection.send(function(*arguments))
    except UserError as e:
        connection.send(e)
    connection.close()


def _train(request: Request, tell: Tell) -> Outcome:
    cache = request.members[0].config.runtime.compilation_cache
    if cache:
        jax.config.update("jax_compilation_cache_dir", str(Path(cache).expanduser()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    with _printing_to(request.log):
        if not request.alone:
            return Outcome(train_together(request.members, request.folder, tell, request.restart))
        member = request.members[0]
        more = {"condition": member.facts | {"together": 1}}
        try:
            restart = request.restart and _is_lost(member.folder)
            status = train(member.config, str(member.folder), member.command, more, restart)
        except OutOfMemoryError:
            raise
        except (UserError, ImportError, OSError):
            _take_back(member.folder)
            raise
        if ended(member.folder) is None:
            return Outcome("interrupted" if status > 128 else "failed", f"exit status {status}")
        shutil.rmtree(member.folder / "checkpoints", ignore_errors=True)
        return Outcome("finished")


def _is_lost(folder: Path) -> bool:
    """Whether the run in a work directory has had a checkpoint, and has none."""
    workdir = Workdir(folder)
    try:
        return not committed_steps(workdir.checkpoints) and is_lost(workdir)
    finally:
        workdir.close()


def _take_back(folder: Path) -> None:
    """What stops the sweep is no result of the condition that met it: its run is one that can go on."""
    with suppress(UserError):
        summary = read_summary(folder)
        if summary is not None and summary["status"] == "failed":
            write_json(folder / "summary.json", summary | {"status": "interrupted"})


@contextmanager
def _printing_to(log: Path) -> Iterator[None]:
    log.parent.mkdir(parents=True, exist_ok=True)
    # What is printed there, on a full disk, is no reason to end.
    with open(log, "a") as file, redirect_stdout(Unbreakable(file, str(log))):
        yield


def _obey(connection: Connection) -> None:
    """Stops at the signals that the sweep was sent, and tells of by number."""
    with suppress(EOFError, OSError):
        while True:
            pass_on(connection.recv())


def _end_with_parent() -> None:
    """A sweep that is killed takes its worker with it, which else would go on in folders that a new sweep wants."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
