"""Standard output and error that may break: what a run prints must not end it.

A reader may leave (`| head`), a disk may be full, a stream may be closed from the start (`>&-`). Then the rest of what
would be printed is dropped, and a line on standard error says so, where that one still works.
"""

import os
import sys
from contextlib import suppress
from typing import Any, TextIO

_closed: list[str] = []


def occupy_closed_streams() -> None:
    """Gives streams that were closed from the start somewhere to go; call before any file is opened."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:  # a file of the run would get the number, and what a library prints would go there
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
        if getattr(sys, name) is None:
            _closed.append(name)
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115  for good


def protect_streams() -> None:
    """Puts streams that never raise into the place of sys.stdout and sys.stderr."""
    occupy_closed_streams()
    sys.stderr = _standing(sys.stderr, "stderr", None)
    sys.stdout = _standing(sys.stdout, "stdout", sys.stderr)
    if "stdout" in _closed:
        sys.stderr.write(_gone("stdout", "it is closed"))


def _standing(stream: TextIO, name: str, tell: TextIO | None) -> Any:
    return stream if isinstance(stream, Unbreakable) else Unbreakable(stream, name, tell)


def _gone(name: str, why: str) -> str:
    return f"warning: nothing more can be written to {name} ({why}); the program goes on without\n"


class Unbreakable:
    """A text stream that, once it cannot be written, takes everything and writes nothing."""

    def __init__(self, stream: TextIO, name: str, tell: TextIO | None = None):
        """Stands for `stream`; when it breaks, a line with its `name` goes to `tell`."""
        self._stream, self._name, self._tell = stream, name, tell

    def write(self, text: str) -> int:
        """Writes, or drops the text. Returns how much it was given."""
        try:
            try:
                self._stream.write(text)
            except UnicodeEncodeError as e:  # such as a name in a locale of ASCII alone
                self._stream.write(text.encode(e.encoding, "replace").decode(e.encoding))
        except (OSError, ValueError) as e:
            self._break(e)
        return len(text)

    def flush(self) -> None:
        """Flushes what can be."""
        try:
            self._stream.flush()
        except (OSError, ValueError) as e:
            self._break(e)

    def _break(self, error: OSError | ValueError) -> None:
        # What the stream still holds must have somewhere to go, or Python complains of it at its end.
        with suppress(OSError, ValueError):
            number = self._stream.fileno()  # a closed one has none
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, number)
            os.close(null)
        if self._tell is not None:
            tell, self._tell = self._tell, None
            why = (error.strerror if isinstance(error, OSError) else None) or str(error)
            tell.write(_gone(self._name, why))
            tell.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
