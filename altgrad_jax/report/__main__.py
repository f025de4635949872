"""Compares runs at the terminal.

    python -m altgrad_jax.report runs/bf16 runs/e5m2 [RUN_OR_FOLDER ...]

Every run is compared with the first: last validation loss, perplexity, the ratio of losses, the cosine of its gradient
to the float32 one, the share of updates that move no rounded weight, the largest share of a role's values that
saturate, speed, and whether the loss is within 10 % of the first's. A folder of work directories stands for all in it.
"""

from altgrad_jax import cli
from altgrad_jax.console import make_console
from altgrad_jax.errors import UsageError
from altgrad_jax.report.compare import compare, notes, table
from altgrad_jax.report.runs import read_runs


def main(names: list[str]) -> int:
    """Prints the table and what it cannot say."""
    if not names:
        raise UsageError("name the work directories to compare, the baseline first: runs/bf16 runs/e5m2")
    rows = compare(read_runs(names))
    console = make_console()
    console.print(table(rows))
    for line in notes(rows):
        console.print(line, soft_wrap=True)
    return 0


if __name__ == "__main__":
    cli.run_with_names(main)
