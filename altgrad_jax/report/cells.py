"""Tables whose numbers are the same wherever they are shown: on the page, in Markdown, in CSV.

A cell keeps its numbers whole. Page and CSV write them with `repr`, so that they are equal to the last digit; what
people read is rounded from them once.
"""

import math
from dataclasses import dataclass

from altgrad_jax.report.statistics import Paired

MISSING = "–"


@dataclass(frozen=True)
class Cell:
    """What stands in a table.

    Attributes:
      text: for people.
      value: the number in it; None of a text.
      low, high: ends of its interval; None without one.
      runs: numbers of the runs it comes from, to link to.
    """

    text: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    runs: tuple[int, ...] = ()

    @property
    def raw(self) -> tuple[str, str, str]:
        """value, low and high with all their digits; "" for what is not there."""
        value, low, high = ("" if x is None else repr(float(x)) for x in (self.value, self.low, self.high))
        return value, low, high


@dataclass(frozen=True)
class Row:
    """A row: its name, unique in the table, and a cell for every column."""

    name: str
    cells: tuple[Cell, ...]
    runs: tuple[int, ...] = ()


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
      key: its name in the CSV and its anchor on the page.
      title: for people.
      head: over the column of row names.
      columns: over the cells.
      rows: the rows.
      note: what the columns mean, and what is left out.
      folded: whether the page shows it closed.
    """

    key: str
    title: str
    head: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    note: str = ""
    folded: bool = False

    def alignment(self, column: int) -> str:
        """ "n" of a column with a number in it, "t" of one with texts alone."""
        return "n" if any(row.cells[column].value is not None for row in self.rows) else "t"


def number(value: float | None, digits: str = ".4f") -> Cell:
    """A number; a dash for one that is not there."""
    if value is None or math.isnan(value):
        return Cell(MISSING)
    return Cell(format(value, digits).replace("-", "−"), value)


def share(value: float) -> Cell:
    """A share: rounded to the digits that say something, 0 as "0"."""
    if math.isnan(value):
        return Cell(MISSING)
    return Cell("0" if value == 0 else f"{value:.3f}" if value >= 1e-3 else f"{value:.1e}".replace("-", "−"), value)


def text(value: object) -> Cell:
    """A text."""
    return Cell(str(value) if value not in (None, "") else MISSING)


def difference(found: Paired, digits: str = "+.4f") -> Cell:
    """A mean difference with its interval."""
    if math.isnan(found.mean):
        return Cell(MISSING)
    shown = format(found.mean, digits).replace("-", "−")
    if not found.has_interval:
        return Cell(shown, found.mean)
    return Cell(f"{shown} {interval(found, digits)}", found.mean, found.low, found.high)


def interval(found: Paired, digits: str = "+.4f") -> str:
    """ "[low, high]"."""
    return f"[{format(found.low, digits)}, {format(found.high, digits)}]".replace("-", "−")


def p_value(p: float) -> Cell:
    """A probability."""
    return Cell(MISSING) if math.isnan(p) else Cell("< 0.0001" if p < 1e-4 else f"{p:.4f}", p)


def size(value: float) -> Cell:
    """Bytes."""
    if math.isnan(value):
        return Cell(MISSING)
    return Cell(f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.1f} MB", value)
