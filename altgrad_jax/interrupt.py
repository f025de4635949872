"""Signals: the first one stops in order, a second at once; either is answered at once.

SIGINT (Ctrl-C), SIGTERM, SIGHUP (the terminal is gone) and SIGUSR1 (a scheduler's warning) mean the same. Python runs
handlers in the main thread alone, which a compilation or a long step keeps busy for minutes; so a thread of its own
hears of signals, through `signal.set_wakeup_fd`. The exit status is 128 + the signal's number.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn, TextIO

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
# Of these a scheduler sends one after the other: a warning, then the end. They are one request.
WARNINGS = (signal.SIGHUP, signal.SIGUSR1)
FIRST_WORDS = "finishing this step, then saving; again: stop without saving"
LAST_WORDS = "stopped without saving; the newest checkpoint is where the same command goes on"
_CLEANING_SECONDS, _WRITING_SECONDS = 10.0, 1.0
_policies: list["_Policy"] = []  # what to do with a signal: the last one decides
_watcher: "_Listener | None" = None  # of a process that watches from beginning to end


class Interrupted(SystemExit):
    """A signal has come, and what was begun is to be left tidily. `code` is the exit status."""


class _Policy:
    """What to do with a signal."""

    def hear(self, number: int) -> None:
        """Runs in the listening thread."""
        raise NotImplementedError

    def meet(self, number: int) -> None:
        """Runs in the main thread, as soon as that comes to it."""

    def ask(self, number: int) -> None:
        """As `hear`, of a signal that another process was sent and passes on."""
        self.hear(number)


def watch(words: str = "interrupted") -> None:
    """From now on a signal ends this process at once, with these words; no import can swallow it. Call first of all."""
    global _watcher
    if _watcher is None:
        _policies.append(_AtOnce(words, lambda: None, sys.stderr))
        _watcher = _Listener()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # see `hold_back`


def pass_on(number: int) -> None:
    """Does what the process has to at a signal that another process was sent, and tells it of."""
    if _policies:
        _policies[-1].ask(number)


def hold_back() -> None:
    """Until `watch`, signals wait: also through an exec, between two programs neither of which would answer them."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


@contextmanager
def unwinding() -> Iterator[None]:
    """In a process that watches, a signal raises `Interrupted` in here; one that is slow to leave is ended."""
    with _policy(_Unwinding()):
        yield


@contextmanager
def ending_at_once(words: str, clean_up: Callable[[], None]) -> Iterator[None]:
    """In a process that watches, a signal says these words, cleans up and ends it, though the main thread be busy."""
    with _policy(_AtOnce(words, clean_up, sys.stdout)):
        yield


@contextmanager
def _policy(policy: _Policy) -> Iterator[None]:
    if _watcher is None:
        yield
        return
    _watcher.claim()
    _policies.append(policy)
    try:
        yield
    finally:
        _policies.remove(policy)


class GracefulStop(_Policy):
    """Notes the first signal, to be seen to between two steps; a second one ends the process.

    Use as a context manager in the main thread.

    Attributes:
      number: the signal's; 0 as long as none has come.
      first_words: what is said when it comes.
    """

    def __init__(self, first_words: str = FIRST_WORDS, last_words: str = LAST_WORDS) -> None:
        self.number, self.first_words, self._last_words = 0, first_words, last_words
        self._heard: set[int] = set()
        self._listener: _Listener | None = None

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return self.number != 0

    @property
    def exit_code(self) -> int:
        """128 + the signal's number: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + self.number

    def ask(self, number: int) -> None:
        """Notes a signal that another process was sent; it does not count as a second."""
        self.number = self.number or number

    meet = ask

    def hear(self, number: int) -> None:
        """Notes the first; ends the process at a second."""
        orders = self._heard - set(WARNINGS)
        if number in self._heard or (orders and number not in WARNINGS):
            _say(self._last_words, sys.stdout)
            end_process(128 + number)
        first = not self._heard
        self._heard.add(number)
        self.ask(number)
        if first:
            _say(self.first_words, sys.stdout)

    def __enter__(self) -> "GracefulStop":
        if _watcher is None:
            self._listener = _Listener()
        else:
            _watcher.claim()
        _policies.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _policies.remove(self)
        if self._listener is not None:
            self._listener.forget()


class _AtOnce(_Policy):
    def __init__(self, words: str, clean_up: Callable[[], None], stream: TextIO):
        self._words, self._clean_up, self._stream = words, clean_up, stream

    def hear(self, number: int) -> None:
        _say(self._words, self._stream)
        with suppress(Exception):  # nothing may keep the process from ending
            self._clean_up()
        end_process(128 + number)


class _Unwinding(_Policy):
    def __init__(self) -> None:
        self._heard, self._said = False, threading.Event()

    def meet(self, number: int) -> None:
        self._said.wait(_WRITING_SECONDS)  # else the process might end before it is said why
        raise Interrupted(128 + number)

    def hear(self, number: int) -> None:
        _say("interrupted", sys.stderr)
        self._said.set()
        if self._heard:
            end_process(128 + number)
        self._heard = True
        timer = threading.Timer(_CLEANING_SECONDS, end_process, [128 + number])
        timer.daemon = True
        timer.start()


def end_process(code: int) -> NoReturn:
    """Ends the process with what it has printed, whatever its other threads are at."""

    def flush() -> None:
        with suppress(OSError, ValueError):
            sys.stdout.flush()
        with suppress(OSError, ValueError):
            if os.isatty(1):
                os.write(1, b"\x1b[?25h")  # a progress bar hides the cursor
            sys.stderr.flush()

    _briefly(flush)
    os._exit(code)


def _say(text: str, stream: TextIO) -> None:
    if not text:
        return

    def say() -> None:
        with suppress(OSError, ValueError):
            print(text, file=stream, flush=True)

    _briefly(say)


def _briefly(function: Callable[[], None]) -> None:
    """Calls a function that writes, but does not wait for ever where nobody reads."""
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    thread.join(_WRITING_SECONDS)


def _in_main_thread(number: int, frame: FrameType | None) -> None:
    del frame
    if _policies:
        _policies[-1].meet(number)


class _Listener:
    """A thread that takes the signals which the process was not started to ignore."""

    def __init__(self) -> None:
        heard, self._told = os.pipe()
        os.set_blocking(self._told, False)
        # What is ignored from the start stays so, as `nohup` has it.
        self._before = {n: h for n in SIGNALS if (h := signal.getsignal(n)) is not signal.SIG_IGN}
        self._wakeup = signal.set_wakeup_fd(self._told, warn_on_full_buffer=False)
        self.claim()
        threading.Thread(target=self._listen, args=(heard,), daemon=True).start()

    def claim(self) -> None:
        """Takes the signals, again where a library has taken them in the meantime, as JAX does when hosts join."""
        for number in self._before:
            signal.signal(number, _in_main_thread)
        signal.set_wakeup_fd(self._told, warn_on_full_buffer=False)

    def forget(self) -> None:
        """Gives them back."""
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._told)

    @staticmethod
    def _listen(heard: int) -> None:
        while data := os.read(heard, 1):
            if data[0] in SIGNALS and _policies:
                _policies[-1].hear(data[0])
        os.close(heard)
