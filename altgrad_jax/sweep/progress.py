"""How far a sweep has come, in lines: what runs now, what has ended, and how long the rest will take."""

import math
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from altgrad_jax.console import PLAIN_LINE_SECONDS, clock
from altgrad_jax.sweep.matrix import Condition
from altgrad_jax.sweep.requests import ended, read_summary


class Progress:
    """Counts steps of conditions: done over all, and since this session began, for the time left."""

    def __init__(self, console: Console):
        self._console = console
        self._steps: dict[str, int] = {}  # of each condition
        self._done: dict[str, int] = {}
        self._ended: dict[str, str] = {}
        self.given_up: dict[str, str] = {}  # conditions without a result, and why
        self._running: Sequence[str] = ()
        self._resumed = True
        self._before = 0  # steps that cost this session nothing
        self._began, self._last_line = time.monotonic(), 0.0

    def plan(self, conditions: Sequence[Condition], folder: Path) -> None:
        """What there is to do, and what of it is done already."""
        self._folder = folder
        self._steps = {c.name: c.config.train.steps for c in conditions}
        self._ended = {c.name: status for c in conditions if (status := ended(folder / c.name))}
        self._done = {name: self._steps[name] for name in self._ended}
        self._before, self._began = sum(self._done.values()), time.monotonic()
        if self._ended:
            self.note(f"{len(self._ended)} of {len(conditions)} conditions have ended before")

    def begin(self, names: Sequence[str]) -> None:
        """These conditions start together."""
        self._running, self._resumed = names, True
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        self.note(f"{len(names)} together: {shown}" if len(names) > 1 else f"alone: {shown}")

    def tell(self, what: str, value: int) -> None:
        """A message of the process that trains: ("step", steps done)."""
        assert what == "step"
        passed = 0
        for name in self._running:
            passed += max(0, value - self._done.get(name, 0))
            self._done[name] = max(value, self._done.get(name, 0))
        if self._resumed:  # where a group resumed from, or its first step, is no measure of speed
            self._before, self._resumed = self._before + passed, False
        if time.monotonic() - self._last_line >= PLAIN_LINE_SECONDS:
            self.note(f"step {value}/{self._steps[self._running[0]]}")

    def ended(self, name: str, status: str) -> None:
        """A condition has ended."""
        if name in self._ended:
            return
        self._ended[name] = status
        if name not in self._running:  # another sweep ran it
            self._before += self._steps[name] - self._done.get(name, 0)
        self._done[name] = self._steps[name]
        summary = read_summary(self._folder / name) or {}
        loss = summary.get("final", {}).get("val/loss")
        result = summary.get("reason") or (f"val loss {loss:.4f}" if isinstance(loss, float) else "")
        self.note(f"{name} {status}{': ' if result else ''}{result}")

    def give_up(self, name: str, reason: str) -> None:
        """A condition is left without a result, for a later sweep."""
        self.given_up[name] = reason
        self.note(f"{name} has no result: {reason}")

    def note(self, text: str) -> None:
        """A line, after how far all is."""
        self._last_line = time.monotonic()
        done = sum(self._done.values())
        left, new = sum(self._steps.values()) - done, done - self._before
        eta = f"  eta {clock((time.monotonic() - self._began) / new * left)}" if new > 0 and left > 0 else ""
        self._console.print(f"[{len(self._ended)}/{len(self._steps)}{eta}]  {text}", soft_wrap=True)

    def table(self) -> list[str]:
        """A row for each condition that has ended, by its last validation loss, the lowest first."""
        rows = []
        for name, status in self._ended.items():
            loss = (read_summary(self._folder / name) or {}).get("final", {}).get("val/loss")
            rows.append((loss if isinstance(loss, float) else math.inf, name, status))
        width = max(map(len, self._ended), default=0)
        cells = [
            (f"{loss:8.4f}" if loss < math.inf else f"{'-':>8}", name, status) for loss, name, status in sorted(rows)
        ]
        return ["val loss  condition", *(f"{loss}  {name:{width}}  {status}" for loss, name, status in cells)]

    def statuses(self) -> dict[str, int]:
        """How many conditions have ended in each way."""
        found = list(self._ended.values())
        return {status: found.count(status) for status in dict.fromkeys(found)}
