"""Writes a report: the page, and beside it the same tables in CSV and Markdown."""

import csv
import io
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from altgrad_jax.errors import UsageError, UserError
from altgrad_jax.files import write_atomically
from altgrad_jax.report.answer import answer, question
from altgrad_jax.report.cells import Cell, Table
from altgrad_jax.report.facts import (
    apart_table,
    classification_table,
    facts,
    hardware_table,
    runs_table,
    search_table,
)
from altgrad_jax.report.failures import attribution_table, first_failure_table, sweet_spots
from altgrad_jax.report.groups import shortened
from altgrad_jax.report.results import (
    equal_loss_table,
    format_table,
    gains_table,
    gap_matrix,
    other_windows,
    results_table,
    same_grids,
)
from altgrad_jax.report.study import Study

NEEDS = {"altair": "altair>=5.4", "vl_convert": "vl-convert-python>=1.6", "jinja2": "jinja2>=3"}
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet's formula may begin with
CSV_HEAD = ("table", "row", "column", "value", "low", "high", "text")


def check_out(out: str) -> Path:
    """The page's path, checked before runs are read.

    Raises:
      UsageError: it does not end in .html.
      UserError: a package for it is missing, or it cannot be written there.
    """
    path = Path(out).expanduser()
    if path.suffix != ".html":
        raise UsageError(f"--out={out}: name a file that ends in .html; the .csv and .md go beside it")
    if missing := [wanted for module, wanted in NEEDS.items() if find_spec(module) is None]:
        packages = " ".join(f"'{wanted}'" for wanted in missing)
        raise UserError(
            f'--out needs packages that are not installed: pip install "altgrad_jax[report]", in a clone pip install'
            f' -e ".[report]"; or by themselves, pip install {packages}'
        )
    if path.is_dir():
        raise UsageError(f"{path} is a folder; name a file in it")
    if not path.resolve().parent.is_dir():
        raise UsageError(f"there is no folder {path.resolve().parent}: make it first")
    if not os.access(path.resolve().parent, os.W_OK):
        raise UserError(f"{path.resolve().parent} cannot be written")
    return path


def tables(study: Study) -> dict[str, Table]:
    """Every table of the report by its key, in the order of the page."""
    made = [
        results_table(study),
        equal_loss_table(study)[0],
        format_table(study),
        gap_matrix(study),
        gains_table(study),
        search_table(study),
        first_failure_table(study),
        attribution_table(study),
        sweet_spots(study),
        hardware_table(study),
        classification_table(study),
        apart_table(study),
        runs_table(study),
    ]
    return {table.key: table for table in made}


def write_report(study: Study, page: Path, command: str) -> list[Path]:
    """Writes the page, the CSV and the Markdown, each whole or not at all; returns their paths.

    Raises:
      UserError: one cannot be written; the old one is as it was.
    """
    from altgrad_jax.report.page import Document, render  # needs Altair, which the terminal's table does without

    made = tables(study)
    texts = {
        page: render(Document(study, made, command)),
        page.with_suffix(".csv"): as_csv(made),
        page.with_suffix(".md"): as_markdown(study, made, command),
    }
    for path, content in texts.items():
        write_atomically(path, content)
    return list(texts)


def as_csv(made: Mapping[str, Table]) -> str:
    """One line a cell: table, row, column, value, low, high, text; numbers with all their digits.

    A spreadsheet takes a text that begins with = + - @ for a formula, and runs it: such a text gets a ' before it.
    """
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(CSV_HEAD)
    for table in made.values():
        for row in table.rows:
            for column, cell in zip(table.columns, row.cells, strict=True):
                named = map(_no_formula, (table.key, row.name, column))
                writer.writerow((*named, *cell.raw, _no_formula(cell.text)))
    return file.getvalue()


def _no_formula(text: str) -> str:
    return f"'{text}" if text.lstrip().startswith(FORMULA) else text


def as_markdown(study: Study, made: Mapping[str, Table], command: str) -> str:
    """The report without its charts."""
    lines = [f"# {_plain(question(study))}", "", *(f"- {_plain(sentence)}" for sentence in answer(study)), ""]
    lines += [f"> {_plain(note)}\n" for note in (*study.merged, *same_grids(study), *other_windows(study))]
    if study.missing:
        lines += [f"> Missing of the matrix ({len(study.missing)}): {_plain(shortened(study.missing))}", ""]
    lines += _table("", ("", ""), ((name, what) for name, what in facts(study)))
    for table in made.values():
        if table.rows:
            rows = ((row.name, *map(_text, row.cells), " ".join(map(str, row.runs))) for row in table.rows)
            lines += _table(table.title, (table.head, *table.columns, "runs"), rows)
            lines += [_plain(table.note), ""] if table.note else []
    lines += [f"Made by: {_plain(command)}", ""]
    return "\n".join(lines)


def _text(cell: Cell) -> str:
    return cell.text


def _table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [f"## {_plain(title)}", ""] if title else []
    lines += [_line(head), _line(["---"] * len(head), escaped=True), *map(_line, rows), ""]
    return lines


def _line(cells: Sequence[str], escaped: bool = False) -> str:
    return f"| {' | '.join(cells if escaped else map(_plain, cells))} |"


def _plain(text: str) -> str:
    """Text that Markdown shows as it is: nothing in it is a tag, a link or the end of a cell."""
    flat = " ".join(text.split())
    flat = flat.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|#])", r"\\\1", flat)
