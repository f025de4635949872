"""One progress line on stderr, for work that takes seconds to minutes: downloads, preparing a corpus.

On a terminal it is a live bar; elsewhere (a pipe, a log file) only its final state is printed, as one plain line.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


@contextmanager
def progress_bar(
    description: str, *, total: int | None = None, unit: str = "items", show: bool = True
) -> Iterator[Callable[[int], None]]:
    """Yields a function that advances the bar by so many units.

    Args:
      description: what is being done, at the left of the line.
      total: units in all, None if unknown (the bar then only counts).
      unit: "bytes" is written in kB, MB and so on; anything else is written after the count.
      show: False draws nothing and makes the yielded function a no-op.
    """
    if not show:
        yield lambda amount: None
        return
    label = TextColumn("{task.description}", markup=False)
    count = (DownloadColumn(),) if unit == "bytes" else (MofNCompleteColumn(), TextColumn(unit))
    bar = () if total is None else (BarColumn(),)
    with Progress(label, *bar, *count, TimeElapsedColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task(description, total=total)
        yield lambda amount: progress.advance(task, amount)
        if total is None:
            progress.update(task, total=progress.tasks[task].completed)
