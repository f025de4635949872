"""Goes through conditions, group by group, each in a process of its own; what has ended is not done again.

    MATRIX/matrix.json          what the matrix is: question, command, conditions
    MATRIX/<condition>/         a work directory like any run's, without checkpoints
    MATRIX/search/              the same for the search of learning rates, and rates.json, what it chose
    MATRIX/groups/<group>/      checkpoints of conditions that are running, a lock, and what their process printed

Sweeps of several processes or machines may share the folder, or be copied together afterwards: a condition's folder is
written by whoever holds its group's lock.
"""

import hashlib
import multiprocessing
import shutil
import signal
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from altgrad_jax import provenance
from altgrad_jax.errors import UserError
from altgrad_jax.files import make_folder, read_json, write_json
from altgrad_jax.interrupt import GracefulStop
from altgrad_jax.sweep.groups import ALONE, groups
from altgrad_jax.sweep.matrix import Condition
from altgrad_jax.sweep.progress import Progress
from altgrad_jax.sweep.requests import Member, Outcome, Request, ended, read_summary
from altgrad_jax.sweep.worker import answer, work
from altgrad_jax.workdir import BusyError, Workdir

IDENTITY = {"identity?": {"data.sha256?": str}}  # what of a condition's manifest is read here
PARTS = "parts.json"  # in a group's folder: the size it has been cut to
TRIES = 3  # of a condition whose process ends without a word
CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT)  # of what a process does itself
WAIT_SECONDS = 2.0  # between looks at a group that another process holds


@dataclass(frozen=True)
class _Unit:
    """Conditions that one process trains."""

    conditions: tuple[Condition, ...]
    alone: bool
    lost: int = 0  # how often its process has ended without a word

    @property
    def name(self) -> str:
        """Of its folder: the same for the same conditions."""
        names = "\n".join(c.name for c in self.conditions)
        return hashlib.sha256(names.encode()).hexdigest()[:12]


def run_all(
    conditions: Sequence[Condition],
    folder: Path,
    *,
    matrix: str,
    keys: Mapping[str, str],
    data_sha256: str,
    together: int,
    shard: tuple[int, int],
    progress: Progress,
    stop: GracefulStop,
    restart: bool = False,
) -> bool:
    """Trains what has not ended; returns False if it was interrupted.

    Args:
      conditions: of the whole matrix.
      folder: of their work directories.
      matrix: its name.
      keys: the conditions' program keys, by name.
      data_sha256: of the corpus.
      together: most conditions in one program.
      shard: (i, n): of the groups, the i-th of n parts.
      progress: is told what happens.
      stop: of signals.
      restart: whether conditions whose checkpoint is lost begin anew.

    Raises:
      UserError: a folder belongs to a condition with other settings; or what a training process was stopped by.
    """
    refuse_others(conditions, folder, data_sha256)
    units = [_Unit(tuple(g), keys[g[0].name] == ALONE) for g in groups(conditions, keys, together)]
    mine = deque(units[shard[0] :: shard[1]])
    progress.plan([c for unit in mine for c in unit.conditions], folder)
    waiting = 0
    while mine and not stop.requested:
        unit = mine.popleft()
        home = folder / "groups" / unit.name
        if _all_ended(unit, folder, progress):
            continue
        try:
            lock = Workdir(home)
        except BusyError:
            lock = None
        outcome = Outcome("busy")
        if lock is not None:
            try:
                if _all_ended(unit, folder, progress):  # by whoever held the lock until now
                    continue
                if parts := _cut(unit, home):
                    mine.extendleft(reversed(parts))
                    continue
                outcome = _in_process(unit, folder, home, matrix, progress, stop, restart)
                mine.extendleft(reversed(_after(unit, outcome, folder, home, progress)))
            finally:
                lock.close()
        if outcome.status == "busy":  # another sweep is at these conditions; the rest comes first
            mine.append(unit)
            waiting += 1
            if waiting >= len(mine):
                time.sleep(WAIT_SECONDS)
        else:
            waiting = 0
            _remove_if_ended(unit.conditions, folder, home)
    if not stop.requested:
        _remove_if_ended(conditions, folder, folder / "groups")
    return not stop.requested


def _all_ended(unit: _Unit, folder: Path, progress: Progress) -> bool:
    statuses = {c.name: ended(folder / c.name) for c in unit.conditions}
    for name, status in statuses.items():
        if status is not None:
            progress.ended(name, status)
    return None not in statuses.values()


def _cut(unit: _Unit, home: Path) -> list[_Unit]:
    """The parts into which a unit has been cut before, so that it is not begun as a whole again; none if it was not."""
    found = read_json(home / PARTS, {"size": int})
    return _parts(unit, max(1, found["size"])) if found is not None else []


def _parts(unit: _Unit, size: int) -> list[_Unit]:
    """Parts of at most this size, and of nearly one size."""
    count = -(-len(unit.conditions) // size)
    size = -(-len(unit.conditions) // count)
    return [_Unit(unit.conditions[i : i + size], unit.alone) for i in range(0, len(unit.conditions), size)]


def refuse_others(conditions: Sequence[Condition], folder: Path, data_sha256: str, without: Sequence[str] = ()) -> None:
    """Raises UserError if a condition's folder holds a run with other settings, or on other data.

    Args:
      conditions: what is to be run.
      folder: of their folders.
      data_sha256: of the corpus.
      without: keys of `config.optimizer` that are yet to be found.
    """
    for condition in conditions:
        stored = read_json(folder / condition.name / "config.json", {"checkpoint?": dict, "optimizer?": dict})
        if stored is None:
            continue
        current = provenance.config_dict(condition.config)
        for config in (stored, current):
            for section in ("tracking", "runtime", "parallel"):
                config.pop(section, None)
            for key in ("every", "max_to_keep"):
                config.get("checkpoint", {}).pop(key, None)
            for key in without:
                config.get("optimizer", {}).pop(key, None)
        manifest = read_json(folder / condition.name / "manifest.json", IDENTITY) or {}
        on = manifest.get("identity", {}).get("data.sha256", data_sha256)
        if stored != current or on != data_sha256:
            what = _first_difference(stored, current) if stored != current else f"data: {on[:8]} -> {data_sha256[:8]}"
            raise UserError(
                f"{folder / condition.name} was run with other settings ({what}); use the"
                " settings it was run with, or another --workdir"
            )


def _first_difference(stored: Any, current: Any, prefix: str = "config") -> str:
    if isinstance(stored, dict) and isinstance(current, dict):
        for key in sorted(stored.keys() | current.keys()):
            if stored.get(key) != current.get(key):
                return _first_difference(stored.get(key), current.get(key), f"{prefix}.{key}")
    return f"{prefix}: {stored} -> {current}"


def _started(target: Callable[..., None], *arguments: Any) -> tuple[Any, Connection]:
    """A process that has begun on target(*arguments, connection), and the other end of the connection."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["altgrad_jax.sweep.worker"])
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(*arguments, theirs))
    process.start()
    theirs.close()
    return process, ours


def in_process_of_its_own(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns, called where it may open the device: what opens a GPU holds its memory until it ends.

    Raises:
      UserError: as the function does.
    """
    process, ours = _started(answer, function, arguments)
    try:
        found = ours.recv()
    except EOFError:
        process.join()
        raise UserError(f"JAX could not be started: {_death(process).reason}") from None
    process.join()
    if isinstance(found, UserError):
        raise found
    return found


def _in_process(
    unit: _Unit,
    folder: Path,
    home: Path,
    matrix: str,
    progress: Progress,
    stop: GracefulStop,
    restart: bool = False,
) -> Outcome:
    """Has a process train a unit; what it says at last, or what its death says."""
    members = tuple(
        Member(c.name, folder / c.name, c.config, {"matrix": matrix} | c.facts, c.command) for c in unit.conditions
    )
    progress.begin([c.name for c in unit.conditions])
    process, ours = _started(work, Request(members, home, unit.alone, home / "log.txt", restart))
    outcome, told = None, False
    while outcome is None:
        if stop.requested and not told:
            told = True
            with suppress(OSError):  # it has ended
                ours.send(stop.number)  # no signal: the process may have been sent it too, and a second would end it
        try:
            message = ours.recv() if ours.poll(0.2) else None
        except EOFError:
            break
        if isinstance(message, Outcome):
            outcome = message
        elif message is not None:
            progress.tell(*message)
    process.join()
    if outcome is not None:
        return outcome
    if stop.requested:
        return Outcome("interrupted")
    return _death(process)


def _death(process: Any) -> Outcome:
    """What to make of a process that ended without a word. Who killed it is not known: the kernel, or somebody."""
    code = process.exitcode or 0
    how = f"by {signal.Signals(-code).name}" if code < 0 else f"with status {code}"
    return Outcome("crashed" if -code in CRASHES else "lost", f"its process ended {how}")


def _after(unit: _Unit, outcome: Outcome, folder: Path, home: Path, progress: Progress) -> list[_Unit]:
    """What is still to be done of a unit; failures are written down as results.

    Raises:
      UserError: something stands in the way of all conditions.
    """
    if outcome.status == "stopped":
        raise UserError(outcome.reason)
    if outcome.status in ("lost", "crashed"):
        return _after_loss(unit, outcome, folder, home, progress)
    count, failed = len(unit.conditions), outcome.status in ("failed", "too_large")
    if failed and count > 1:
        # Of those that fail together one may be to blame: each has its own chance.
        size = min(max(1, outcome.fitting), count - 1) if outcome.status == "too_large" else 1
        why = "do not fit into memory together" if outcome.status == "too_large" else f"failed ({outcome.reason})"
        return _cut_to(unit, size, why, outcome.reason, folder, home, progress)
    if failed:
        _write_failed(folder / unit.conditions[0].name, unit.conditions[0], outcome.reason)
    done = _all_ended(unit, folder, progress)
    # Saved, though nobody stopped the sweep: somebody has told the process alone.
    return [unit] if outcome.status == "interrupted" and not done else []


def _after_loss(unit: _Unit, outcome: Outcome, folder: Path, home: Path, progress: Progress) -> list[_Unit]:
    """Tries a unit again, from its checkpoint; what is lost every time is no result, unless it crashes by itself."""
    count, tries = len(unit.conditions), unit.lost + 1
    if tries < (TRIES if count == 1 else TRIES - 1):
        progress.note(
            f"{unit.conditions[0].name}{f' and {count - 1} more' if count > 1 else ''}: {outcome.reason}; again"
        )
        return [replace(unit, lost=tries)]
    reason = f"{outcome.reason}, {tries} times"
    if count > 1:
        return _cut_to(unit, count // 2, f"did not end: {reason}", reason, folder, home, progress)
    if outcome.status == "crashed":
        _write_failed(folder / unit.conditions[0].name, unit.conditions[0], reason)
        _all_ended(unit, folder, progress)
    else:
        progress.give_up(unit.conditions[0].name, reason)
    return []


def _cut_to(unit: _Unit, size: int, why: str, reason: str, folder: Path, home: Path, progress: Progress) -> list[_Unit]:
    """The parts of a unit, each to begin at step 0, and a note of it for sweeps to come."""
    parts = _parts(unit, size)
    for condition in unit.conditions:
        _forget_checkpoint(folder / condition.name)
    write_json(home / PARTS, {"size": size, "reason": reason})
    progress.note(f"{len(unit.conditions)} conditions {why}; {len(parts[0].conditions)} at a time")
    return parts


def _forget_checkpoint(folder: Path) -> None:
    """Lets a condition begin anew: its group's checkpoint is of no use to a part of the group."""
    workdir = Workdir(folder)
    try:
        workdir.forget_checkpoint()
    finally:
        workdir.close()


def _write_failed(folder: Path, condition: Condition, reason: str) -> None:
    """A failed condition's folder: what it was, and why it failed."""
    make_folder(folder)
    if read_json(folder / "manifest.json") is None:
        facts = {"condition": condition.facts, "config": provenance.config_dict(condition.config)}
        write_json(folder / "manifest.json", facts | {"command": list(condition.command)})
        write_json(folder / "config.json", facts["config"])
    summary = read_summary(folder) or {"step": 0, "final": {}}
    write_json(folder / "summary.json", summary | {"status": "failed", "reason": reason})


def _remove_if_ended(conditions: Sequence[Condition], folder: Path, home: Path) -> None:
    """Removes what was kept while conditions ran; that of failed ones stays, for its log."""
    statuses = {ended(folder / c.name) for c in conditions}
    if None not in statuses and "failed" not in statuses:
        shutil.rmtree(home, ignore_errors=True)
