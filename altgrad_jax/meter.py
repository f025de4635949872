"""Training speed, as a user sees it: over the last steps, without what is not training."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager


class Meter:
    """Training speed over the last steps, with evaluation and saving left out.

    A step's metrics come one step late, but at once where the loop stops to evaluate or to save: the time from one
    record to the next says little, that of `WINDOW` steps is right.
    """

    WINDOW = 10

    def __init__(self, tokens_per_step: int, step: int):
        self._tokens_per_step, self._paused = tokens_per_step, 0.0
        self._marks: deque[tuple[int, float]] = deque(maxlen=self.WINDOW + 1)
        self.restart(step)

    def restart(self, step: int) -> None:
        """Forgets what was before; called when the first step has been compiled."""
        self._marks.clear()
        self._marks.append((step, time.monotonic() - self._paused))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside does not count."""
        began = time.monotonic()
        yield
        self._paused += time.monotonic() - began

    def rate(self, step: int) -> float:
        """Tokens per second now that a step has ended."""
        self._marks.append((step, time.monotonic() - self._paused))
        (first, since), (_, now) = self._marks[0], self._marks[-1]
        return self._tokens_per_step * (step - first) / max(now - since, 1e-9)
