"""Runs side by side at the terminal: final losses against the first run's, and what the formats did on the way."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table
from rich.text import Text

from altgrad_jax.report.runs import Run, differences

TOLERANCE = 0.10  # AltGrad's rule: a format is fit for use if its final loss is within 10 % of the baseline's


@dataclass(frozen=True)
class Row:
    """One run against the first.

    Attributes:
      run: the run.
      loss: its last validation loss, nats per token.
      ratio: of that to the first run's; NaN where they cannot be compared.
      verdict: "baseline", "within 10 %", "not within 10 %", the status of a run that failed, or "not comparable".
      differs: why it is not comparable.
    """

    run: Run
    loss: float
    ratio: float
    verdict: str
    differs: tuple[str, ...]


def compare(runs: Sequence[Run]) -> list[Row]:
    """Every run against the first one."""
    first = runs[0]
    baseline = first.last("val/loss")
    rows = []
    for run in runs:
        loss = run.last("val/loss")
        differs = () if run is first else tuple(_apart(run, first))
        ratio = math.nan if differs else loss / baseline if baseline else math.nan
        rows.append(Row(run, loss, ratio, _verdict(run, first, ratio, differs), differs))
    return rows


def _apart(run: Run, first: Run) -> list[str]:
    """Differences that matter; that a diverged run has fewer steps is its result, not another experiment."""
    found = differences(run, first)
    return [text for text in found if not (run.status == "diverged" and text.startswith("steps:"))]


def _verdict(run: Run, first: Run, ratio: float, differs: tuple[str, ...]) -> str:
    if run.status in ("diverged", "failed"):
        return run.status
    if differs:
        return "not comparable"
    if run is first:
        return "baseline"
    if math.isnan(ratio):
        return "no loss"
    return "within 10 %" if ratio <= 1 + TOLERANCE else "not within 10 %"


def number(value: float, digits: str) -> str:
    """A value for people; a dash for one that is not there."""
    return "-" if math.isnan(value) else format(value, digits)


def _perplexity(row: Row) -> float:
    if row.run.identity.get("task", "lm") != "lm":
        return math.nan  # its loss is of decisions, not of tokens
    return math.exp(row.loss) if row.loss < 700 else row.loss


COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("step", lambda row: f"{row.run.step:,}"),
    ("val loss", lambda row: number(row.loss, ".4f")),
    ("perplexity", lambda row: number(_perplexity(row), ",.2f")),
    ("ratio", lambda row: number(row.ratio, ".4f")),
    ("cosine", lambda row: number(row.run.last("grads/cosine"), ".4f")),
    ("stall", lambda row: number(row.run.last("weights/stall"), ".3f")),
    ("overflow", lambda row: number(row.run.highest("quant", "overflow"), ".1e")),
    ("tokens/s", lambda row: number(row.run.last("train/tokens_per_second"), ",.0f")),
    ("verdict", lambda row: row.verdict),
)


def table(rows: Sequence[Row]) -> Table:
    """The rows as a table; names are shown as they are, never read as markup."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    made.add_column("run", overflow="fold")
    for title, _ in COLUMNS:
        made.add_column(title, justify="left" if title == "verdict" else "right", no_wrap=True)
    for row in rows:
        name = "".join(c if c.isprintable() else "?" for c in row.run.name)
        made.add_row(Text(name), *(Text(show(row)) for _, show in COLUMNS))
    return made


def notes(rows: Sequence[Row]) -> list[str]:
    """What the table cannot say: why runs are not compared, and what is missing in them."""
    lines = []
    for row in rows:
        if row.differs:
            lines.append(f"{row.run.name} is not compared with {rows[0].run.name}: {'; '.join(row.differs)}")
        lines += [f"{row.run.name}: {problem}" for problem in row.run.problems]
    return lines
