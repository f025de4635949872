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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from altgrad_jax import provenance
from altgrad_jax.errors import UserError
from altgrad_jax.interrupt import GracefulStop
from altgrad_jax.sweep.groups import ALONE, groups, program_key
from altgrad_jax.sweep.matrix import Condition
from altgrad_jax.sweep.progress import Progress
from altgrad_jax.sweep.requests import Member, Outcome, Request, ended
from altgrad_jax.sweep.worker import work
from altgrad_jax.workdir import BusyError, Workdir, read_json, write_json

WAIT_SECONDS = 2.0  # between looks at a group that another process holds


@dataclass(frozen=True)
class _Unit:
    """Conditions that one process trains."""

    conditions: tuple[Condition, ...]
    alone: bool

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
    together: int,
    shard: tuple[int, int],
    progress: Progress,
    stop: GracefulStop,
) -> bool:
    """Trains what has not ended; returns False if it was interrupted.

    Args:
      conditions: of the whole matrix.
      folder: of their work directories.
      matrix: its name.
      together: most conditions in one program.
      shard: (i, n): of the groups, the i-th of n parts.
      progress: is told what happens.
      stop: of signals.

    Raises:
      UserError: a folder belongs to a condition with other settings; or what a training process was stopped by.
    """
    refuse_others(conditions, folder)
    units = [_Unit(tuple(g), program_key(g[0]) == ALONE) for g in groups(conditions, together)]
    mine = deque(units[shard[0] :: shard[1]])
    progress.plan([c for unit in mine for c in unit.conditions], folder)
    waiting = 0
    while mine and not stop.requested:
        unit = mine.popleft()
        if all(ended(folder / c.name) for c in unit.conditions):
            continue
        home = folder / "groups" / unit.name
        try:
            lock = Workdir(home)
        except BusyError:  # another sweep is at it; the rest comes first
            mine.append(unit)
            waiting += 1
            if waiting >= len(mine):
                time.sleep(WAIT_SECONDS)
            continue
        waiting = 0
        try:
            outcome = _in_process(unit, folder, home, matrix, progress, stop)
            for part in _after(unit, outcome, folder, progress):
                mine.appendleft(part)
        finally:
            lock.close()
        _remove_if_ended(unit, folder, home)
    return not stop.requested


def refuse_others(conditions: Sequence[Condition], folder: Path) -> None:
    """Raises UserError if a condition's folder holds a run with other settings."""
    for condition in conditions:
        stored = read_json(folder / condition.name / "config.json")
        if stored is None:
            continue
        current = provenance.config_dict(condition.config)
        for section in ("tracking", "checkpoint", "runtime", "parallel"):
            stored.pop(section, None), current.pop(section, None)
        if stored != current:
            raise UserError(
                f"{folder / condition.name} was run with other settings ({_first_difference(stored, current)}); use the"
                " settings it was run with, or another --workdir"
            )


def _first_difference(stored: Any, current: Any, prefix: str = "config") -> str:
    if isinstance(stored, dict) and isinstance(current, dict):
        for key in sorted(stored.keys() | current.keys()):
            if stored.get(key) != current.get(key):
                return _first_difference(stored.get(key), current.get(key), f"{prefix}.{key}")
    return f"{prefix}: {stored} -> {current}"


def _in_process(unit: _Unit, folder: Path, home: Path, matrix: str, progress: Progress, stop: GracefulStop) -> Outcome:
    """Has a process train a unit; what it says at last, or what its death says."""
    members = tuple(
        Member(c.name, folder / c.name, c.config, {"matrix": matrix} | c.facts, c.command) for c in unit.conditions
    )
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["altgrad_jax.sweep.worker"])
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(Request(members, home, unit.alone, home / "log.txt"), theirs))
    progress.begin([c.name for c in unit.conditions], unit.conditions[0].config.train.steps)
    process.start()
    theirs.close()
    outcome, told = None, False
    while outcome is None:
        if stop.requested and not told:
            process.terminate()
            told = True
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
    return _death(process, len(members))


def _death(process: Any, conditions: int) -> Outcome:
    """What to make of a process that ended without a word."""
    code = process.exitcode or 0
    how = f"signal {-code} ({signal.Signals(-code).name}), as when memory runs out" if code < 0 else f"status {code}"
    return Outcome("too_large", f"its process ended by {how}", conditions // 2)


def _after(unit: _Unit, outcome: Outcome, folder: Path, progress: Progress) -> list[_Unit]:
    """What is still to be done of a unit; failures are written down as results.

    Raises:
      UserError: something stands in the way of all conditions.
    """
    if outcome.status == "stopped":
        raise UserError(outcome.reason)
    if outcome.status == "too_large" and len(unit.conditions) > 1:
        size = min(max(1, outcome.fitting), len(unit.conditions) - 1)
        count = -(-len(unit.conditions) // size)
        size = -(-len(unit.conditions) // count)
        progress.note(f"{len(unit.conditions)} conditions do not fit into memory together; {size} at a time")
        parts = [unit.conditions[i : i + size] for i in range(0, len(unit.conditions), size)]
        return [_Unit(part, unit.alone) for part in reversed(parts)]
    if outcome.status in ("failed", "too_large"):
        if len(unit.conditions) > 1:  # one of them may be to blame: each has its own chance
            progress.note(f"{len(unit.conditions)} conditions failed together ({outcome.reason}); one at a time")
            return [_Unit((c,), unit.alone) for c in reversed(unit.conditions)]
        _write_failed(folder / unit.conditions[0].name, unit.conditions[0], outcome.reason)
    for condition in unit.conditions:
        if status := ended(folder / condition.name):
            progress.ended(condition.name, status)
    return []


def _write_failed(folder: Path, condition: Condition, reason: str) -> None:
    """A failed condition's folder: what it was, and why it failed."""
    folder.mkdir(parents=True, exist_ok=True)
    if read_json(folder / "manifest.json") is None:
        facts = {"condition": condition.facts, "config": provenance.config_dict(condition.config)}
        write_json(folder / "manifest.json", facts | {"command": list(condition.command)})
        write_json(folder / "config.json", facts["config"])
    summary = read_json(folder / "summary.json") or {"step": 0, "final": {}}
    write_json(folder / "summary.json", summary | {"status": "failed", "reason": reason})


def _remove_if_ended(unit: _Unit, folder: Path, home: Path) -> None:
    """Removes a group's folder; that of a failed one stays, for its log."""
    statuses = {ended(folder / c.name) for c in unit.conditions}
    if None not in statuses and "failed" not in statuses:
        shutil.rmtree(home, ignore_errors=True)
