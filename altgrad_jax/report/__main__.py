"""Compares runs: at the terminal, or as a page.

    python -m altgrad_jax.report runs/bf16 runs/e5m2 [RUN_OR_FOLDER ...]
    python -m altgrad_jax.report runs/matrix --out=report.html [--baseline=bf16]

At the terminal every run is compared with the first condition's run of its seed: last validation loss, perplexity, gap
in nats, the cosine of its gradient to the float32 one, the share of updates that move no rounded weight, the largest
share of a role's values that saturate, and speed (median over steps). Then each condition over its seeds: whether it is
worse or better, equivalent within --margin, or not decided. A folder of work directories stands for all in it.

With --out a page is written that needs no network, with the same numbers in a .csv and a .md beside it: every condition
against bf16 with AdamW (or --baseline), over its seeds; see docs/report.md.
"""

from altgrad_jax.interrupt import watch

if __name__ == "__main__":
    watch()  # before imports that take seconds

import math
import shlex
import sys
from pathlib import Path

from absl import flags

from altgrad_jax import cli
from altgrad_jax.console import make_console
from altgrad_jax.errors import UsageError
from altgrad_jax.report.compare import compare, decisions, notes, table
from altgrad_jax.report.export import check_out, write_report
from altgrad_jax.report.results import other_windows
from altgrad_jax.report.runs import read_runs, visible
from altgrad_jax.report.statistics import MARGIN as DEFAULT_MARGIN
from altgrad_jax.report.study import make_study

OUT = flags.DEFINE_string("out", None, "Page to write, ending in .html; .csv and .md go beside it.")
BASELINE = flags.DEFINE_string(
    "baseline", None, "With --out: what others are compared with, a condition, a format, or a run's name."
)
MARGIN = flags.DEFINE_float(
    "margin", DEFAULT_MARGIN, "Nats per token within which two conditions are as good as equal.", lower_bound=1e-6
)


def main(names: list[str]) -> int:
    """Prints the table and what it cannot say, or writes the page."""
    if not names:
        raise UsageError("name the work directories to compare, the baseline first: runs/bf16 runs/e5m2")
    if OUT.value is None and BASELINE.value is not None:
        raise UsageError("--baseline goes with --out; at the terminal the first run is the baseline")
    console = make_console()
    if not math.isfinite(MARGIN.value):
        raise UsageError(f"--margin={MARGIN.value} must be a finite number of nats")
    folders = [Path(name).expanduser() for name in names]
    if OUT.value is not None:
        page = check_out(OUT.value)
        study = make_study(read_runs(names), folders, page, BASELINE.value, MARGIN.value)
        command = visible(shlex.join(["python", "-m", "altgrad_jax.report", *sys.argv[1:]]))
        for path in write_report(study, page, command):
            console.print(f"{path}: {path.stat().st_size / 1e6:.2f} MB", soft_wrap=True)
        return 0
    study = make_study(read_runs(names), folders, Path("report.html"), margin=MARGIN.value, first=True)
    rows = compare(study)
    console.print(table(rows))
    for line in (*decisions(study), *study.merged, *other_windows(study), *notes(rows)):
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    return 0


if __name__ == "__main__":
    cli.run_with_names(main)
