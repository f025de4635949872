"""A trace of a few steps, for XProf (TensorBoard) and Perfetto."""

import logging
from pathlib import Path

import jax

log = logging.getLogger(__name__)
FIRST, LAST = 6, 10  # of the session: the steps before have compiled everything and filled the pipeline


class StepTrace:
    """Traces steps 6 to 10 of a session into a folder, if it is asked to; `before` and `after` frame every step.

    With several steps in one dispatch it is dispatches that are counted.
    """

    def __init__(self, folder: Path | None):
        self._folder, self._count, self.active = folder, 0, False

    def before(self) -> None:
        """A step is about to be dispatched."""
        self._count += 1
        if self._folder is not None and self._count == FIRST:
            jax.profiler.start_trace(str(self._folder), create_perfetto_trace=True)
            self.active = True

    def after(self, result: object) -> bool:
        """It was; returns whether the trace has just been written."""
        if not (self.active and self._count == LAST):
            return False
        jax.block_until_ready(result)
        self.close()
        return True

    def close(self) -> None:
        """Writes what there is, where the session ends before the last step of the trace."""
        if self._folder is not None and self._count < FIRST:
            log.warning("config.profile: nothing was traced, for the session ended before its step %d", FIRST)
        if self.active:
            jax.profiler.stop_trace()
            self.active = False
