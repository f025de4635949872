"""The run on the terminal: a header, a live line, a plain line where there is no terminal."""

import math
import sys
import textwrap
import time
from collections.abc import Iterable
from typing import Any

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from altgrad_jax.stability import no_step

PLAIN_LINE_SECONDS = 10.0  # without a terminal, at most one line so often, evaluations apart
PLAIN_WIDTH = 140
WHOLE_WORDS: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}  # as textwrap calls them
# What an evaluation's line says beside the loss, where it is there.
EVALUATION = (
    ("val/perplexity", "perplexity", ",.2f"),
    ("val/micro_f1", "micro F1", ".4f"),
    ("val/macro_f1", "macro F1", ".4f"),
)


def make_console(quiet: bool = False) -> RichConsole:
    """A console without colours and of a fixed width when its output is not a terminal; `quiet` prints nothing.

    Brackets and colons in paths and names are what they are, no markup.
    """
    width = None if sys.stdout.isatty() else PLAIN_WIDTH
    return RichConsole(highlight=False, markup=False, emoji=False, width=width, quiet=quiet)


def clock(seconds: float) -> str:
    """A duration as h:mm:ss."""
    return f"{int(seconds // 3600)}:{int(seconds // 60 % 60):02d}:{int(seconds % 60):02d}"


def print_header(console: RichConsole, title: str, facts: dict[str, str]) -> None:
    """What is about to run, as a two-column list. Long values go on in further lines, words stay whole."""
    console.print(title)
    width = max(map(len, facts)) + 2
    for key, value in facts.items():
        first, *more = textwrap.wrap(value, max(console.width - width, 20), **WHOLE_WORDS) or [""]
        console.print(Text.assemble((key.ljust(width), "bold"), first), soft_wrap=True)
        for line in more:
            console.print(" " * width + line, soft_wrap=True)


def print_lines(console: RichConsole, lines: Iterable[str]) -> None:
    """Lines below the header, two columns in; long ones go on further in, words stay whole."""
    for line in lines:
        for part in textwrap.wrap(
            line, max(console.width, 40), initial_indent="  ", subsequent_indent="      ", **WHOLE_WORDS
        ):
            console.print(part, soft_wrap=True)


class ConsoleSink:
    """Shows records: a progress bar with loss, speed and time left on a terminal, plain lines elsewhere."""

    def __init__(self, console: RichConsole, first_step: int, total_steps: int, best: float = math.nan):
        """Starts the display at `first_step` of `total_steps`.

        `best` is the lowest loss that earlier sessions evaluated, NaN for none: an evaluation is the best only if it
        beats that, and if a step has been taken.
        """
        self._console, self._first, self._total = console, first_step, total_steps
        self._last_line = -math.inf
        # What the time left is told by: the first step seen, and when. The steps before it compiled their programs.
        self._since: tuple[int, float] | None = None
        self._best = math.inf if math.isnan(best) else best
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn())
            self._bar = Progress(*columns, TextColumn("{task.fields[now]}"), TimeRemainingColumn(), console=console)
            self._bar.start()
            self._task = self._bar.add_task("train", total=total_steps, completed=first_step, now="compiling")

    def log(self, record: dict[str, Any]) -> None:
        """Moves the bar, and prints a line for every evaluation (and, without a terminal, every ten seconds)."""
        step = record["step"]
        if "event" in record:
            about = ", ".join(str(record[key]) for key in ("event/layer", "event/change") if key in record)
            self._line(
                f"step {step:>6}/{self._total}  {record['event']}: {about}{' ' if about else ''}"
                f"{record['event/reason'] if not about else '(' + record['event/reason'] + ')'}"
            )
            return
        now = ""
        if step > self._first and self._since is None:
            self._since = step, time.monotonic()
        if "train/loss" in record:
            now = f"loss {record['train/loss']:.4f}  {record['train/tokens_per_second']:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, now=now)
        if "val/loss" in record:
            self._print_evaluation(step, record, now)
        elif self._bar is None and time.monotonic() - self._last_line >= PLAIN_LINE_SECONDS:
            self._line(f"step {step:>6}/{self._total}  {now}  {self._eta(step)}")

    def _print_evaluation(self, step: int, record: dict[str, Any], now: str) -> None:
        loss = record["val/loss"]
        mark = ""
        if loss < self._best and not no_step(record):
            mark, self._best = "  best", loss
        floor = f"  above floor {record['val/loss_above_floor']:.4f}" if "val/loss_above_floor" in record else ""
        eta = self._eta(step) if self._bar is None else ""
        measures = "".join(f"  {name} {record[key]:{digits}}" for key, name, digits in EVALUATION if key in record)
        text = f"step {step:>6}/{self._total}  val loss {loss:.4f}{measures}{floor}{mark}"
        self._line("  ".join(part for part in (text, now, eta) if part))
        if "test/loss" in record:
            found = {name.removeprefix("test/"): record[name] for name in record if name.startswith("test/")}
            text = "  ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in found.items())
            self._console.print(f"test  {text}", soft_wrap=True)

    def _line(self, text: str) -> None:
        self._last_line = time.monotonic()
        self._console.print(text)

    def _eta(self, step: int) -> str:
        if self._since is None or step <= self._since[0] or step >= self._total:
            return ""
        first, began = self._since
        return f"eta {clock((time.monotonic() - began) / (step - first) * (self._total - step))}"

    def rewind(self, step: int) -> None:
        """Moves the bar back; the time left is told anew."""
        self._since = None
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def sync(self) -> None:
        """Nothing is held back."""

    def close(self, status: str) -> None:
        """Takes the bar down."""
        del status
        if self._bar is not None:
            self._bar.stop()
