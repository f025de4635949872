"""How far a sweep has come, in lines: what runs now, what has ended, and how long the rest will take."""

import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from altgrad_jax.console import PLAIN_LINE_SECONDS, clock
from altgrad_jax.sweep.matrix import Condition
from altgrad_jax.sweep.requests import ended
from altgrad_jax.workdir import read_json


class Progress:
    """Counts steps of conditions: done over all, and since this session began, for the time left."""

    def __init__(self, console: Console):
        self._console = console
        self._total = self._done = self._new = self._conditions = 0
        self._ended: dict[str, str] = {}
        self._running: Sequence[str] = ()
        self._step = self._first_step = 0
        self._seen_step = False
        self._began, self._last_line = time.monotonic(), 0.0

    def plan(self, conditions: Sequence[Condition], folder: Path) -> None:
        """What there is to do, and what of it is done already."""
        self._folder, self._conditions = folder, len(conditions)
        self._total = sum(c.config.train.steps for c in conditions)
        self._ended = {c.name: status for c in conditions if (status := ended(folder / c.name))}
        self._done = sum(c.config.train.steps for c in conditions if c.name in self._ended)
        self._new, self._began = 0, time.monotonic()
        if self._ended:
            self.note(f"{len(self._ended)} of {len(conditions)} conditions have ended before")

    def begin(self, names: Sequence[str], steps: int) -> None:
        """These conditions start together."""
        self._running, self._step, self._steps, self._seen_step = names, 0, steps, False
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        self.note(f"{len(names)} together: {shown}" if len(names) > 1 else f"alone: {shown}")

    def tell(self, what: str, value: int) -> None:
        """A message of the process that trains."""
        if what != "step":
            return
        if self._seen_step:  # where it resumed from, or the first step, is no measure of speed
            passed = (value - self._step) * len(self._running)
            self._done, self._new = self._done + passed, self._new + passed
        else:
            self._done += value * len(self._running)
        self._step, self._seen_step = value, True
        if time.monotonic() - self._last_line >= PLAIN_LINE_SECONDS:
            self.note(f"step {value}/{self._steps}")

    def ended(self, name: str, status: str) -> None:
        """A condition has ended."""
        if name in self._ended:
            return
        self._ended[name] = status
        summary = read_json(self._folder / name / "summary.json") or {}
        loss = summary.get("final", {}).get("val/loss")
        result = f"val loss {loss:.4f}" if isinstance(loss, float) else summary.get("reason", "")
        self.note(f"{name} {status}{': ' if result else ''}{result}")

    def note(self, text: str) -> None:
        """A line, after how far all is."""
        self._last_line = time.monotonic()
        left = self._total - self._done
        seconds = (time.monotonic() - self._began) / self._new * left if self._new else 0.0
        eta = f"  eta {clock(seconds)}" if seconds and left > 0 else ""
        self._console.print(f"[{len(self._ended)}/{self._conditions}{eta}]  {text}", soft_wrap=True)

    def statuses(self) -> dict[str, int]:
        """How many conditions have ended in each way."""
        found = list(self._ended.values())
        return {status: found.count(status) for status in dict.fromkeys(found)}
