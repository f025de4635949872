"""Runs side by side at the terminal: final losses against the first run's, and what the formats did on the way.

A run is set against the first one's condition with its own seed, where there is one: the same initial weights and
batches. Conditions with several seeds have a line each, with what the tests say.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table
from rich.text import Text

from altgrad_jax.report.cells import difference
from altgrad_jax.report.conditions import condition_of
from altgrad_jax.report.runs import Run, speed
from altgrad_jax.report.study import Comparison, Study


@dataclass(frozen=True)
class Row:
    """One run against the baseline's of its seed.

    Attributes:
      run: the run.
      loss: its last validation loss, nats per token.
      gap: that less the baseline's; NaN where they cannot be compared.
      against: the run that it is compared with: the baseline's of its seed, else its first; None of none.
      verdict: "baseline", the status of a run that diverged or failed, "not comparable", "no loss",
        "again" (a condition and seed that another run stands for in the tests), or "".
      differs: why it is not comparable.
      shared: whether it ran in one program with others, whose speed is then that of all.
    """

    run: Run
    loss: float
    gap: float
    against: Run | None
    verdict: str
    differs: tuple[str, ...]
    shared: bool


def compare(study: Study) -> list[Row]:
    """Every run of a study, in the order given."""
    apart = {entry.number: reasons for entry, reasons in study.apart}
    again = {entry.number for entry, _ in study.again}
    base = {entry.seed: entry.run for entry in study.baseline.entries} if study.baseline else {}
    first = next(iter(base.values()), None)
    rows = []
    for entry in study.entries:
        run, reasons = entry.run, apart.get(entry.number, ())
        against = None if reasons else base.get(entry.seed, first)
        loss = run.last("val/loss")
        gap = loss - against.last("val/loss") if against is not None else math.nan
        verdict = _verdict(run, any(run is one for one in base.values()), gap, reasons)
        if entry.number in again and not verdict:
            verdict = "again"
        rows.append(Row(run, loss, gap, against, verdict, reasons, condition_of(run).together > 1))
    return rows


def _verdict(run: Run, is_baseline: bool, gap: float, reasons: Sequence[str]) -> str:
    if run.status in ("diverged", "failed"):
        return run.status
    if reasons:
        return "not comparable"
    if is_baseline:
        return "baseline"
    return "no loss" if math.isnan(gap) else ""


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
    ("gap", lambda row: "-" if row.run is row.against else number(row.gap, "+.4f")),
    ("cosine", lambda row: number(row.run.last("grads/cosine"), ".4f")),
    ("stall", lambda row: number(row.run.last("weights/stall"), ".3f")),
    ("overflow", lambda row: number(row.run.highest("quant", "overflow"), ".1e")),
    ("tokens/s", lambda row: "shared" if row.shared else number(speed(row.run), ",.0f")),
    ("verdict", lambda row: row.verdict),
)


def table(rows: Sequence[Row]) -> Table:
    """The rows as a table; names are shown as they are, never read as markup."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    made.add_column("run", overflow="fold")
    for title, _ in COLUMNS:
        made.add_column(title, justify="left" if title == "verdict" else "right", no_wrap=True)
    for row in rows:
        made.add_row(Text(row.run.name), *(Text(show(row)) for _, show in COLUMNS))
    return made


def decisions(study: Study) -> list[str]:
    """A line for each condition but the baseline: its gap, and what the tests say."""
    if study.baseline is None:
        return []
    return [_decision(c, study) for c in study.gaps]


def _decision(c: Comparison, study: Study) -> str:
    found = c.difference
    if not found.n:
        return f"{c.group.name}: no run shares a seed with {c.against.name}, so nothing is tested"
    seeds = f"{found.n} seed{'s' if found.n > 1 else ''}"
    lead = f"{c.group.name}: gap to {c.against.name} {difference(found).text} nats, {seeds}"
    if not found.has_interval:
        return f"{lead}: one run each, which no test can tell from chance"
    family = f"{c.tested.family} comparison{'s' if c.tested.family > 1 else ''}"
    return f"{lead}: {c.words} (95 % interval; tests corrected for {family}; margin {study.margin:g} nats)"


def notes(rows: Sequence[Row]) -> list[str]:
    """What the table cannot say: why runs are not compared, which share a speed, and what is missing in them."""
    lines = []
    for row in rows:
        if row.differs:
            lines.append(f"{row.run.name} is not compared with {rows[0].run.name}: {'; '.join(row.differs)}")
        lines += [f"{row.run.name}: {problem}" for problem in row.run.problems]
    if shared := [row.run.name for row in rows if row.shared]:
        some = ", ".join(shared[:3]) + (f" and {len(shared) - 3} more" if len(shared) > 3 else "")
        lines.append(f"{some}: ran in one program with other conditions, whose speed says nothing about one of them")
    return lines
