"""Signals: answered at once, whatever the process is busy with; and the exit status says which."""

import signal
import subprocess
import sys
import time
from collections.abc import Sequence

import pytest

from tests.forks import ROOT

FIRST = "finishing this step, then saving; again: stop without saving"
LAST = "stopped without saving; the newest checkpoint is where the same command goes on"
# A main thread in a long call of C, like a compilation: no handler of Python's runs until it returns.
BUSY = "import hashlib; hashlib.pbkdf2_hmac('sha256', b'', b'', 400_000_000)"
STOP = f"from altgrad_jax.interrupt import GracefulStop\nwith GracefulStop():\n    print('on', flush=True)\n    {BUSY}"
IMPORTING = """
from altgrad_jax.interrupt import watch
watch()
print("on", flush=True)
import time
while True:
    try:
        time.sleep(60)
    except BaseException:  # as some libraries have it
        pass
"""
LEAVING = """
import time
from altgrad_jax.interrupt import unwinding, watch
watch()
with unwinding():
    try:
        print("on", flush=True)
        time.sleep(60)
    finally:
        print("cleaned up", flush=True)
"""


def sent(program: str, signals: Sequence[int]) -> tuple[int, list[str], str]:
    """Exit status, lines printed and stderr of a program that is sent signals once it has printed a line."""
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    first = process.stdout.readline()
    for number in signals:
        process.send_signal(number)
        time.sleep(0.3)
    out, err = process.communicate(timeout=20)
    return process.returncode, (first + out).splitlines(), err


@pytest.mark.parametrize(
    ("signals", "code"),
    [
        ((signal.SIGHUP, signal.SIGHUP), 129),
        ((signal.SIGUSR1, signal.SIGUSR1), 138),
        ((signal.SIGINT, signal.SIGTERM), 143),
        # A scheduler's warning, and its end some time later, are one request.
        ((signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP, signal.SIGTERM), 143),
    ],
)
def test_a_busy_process_answers_the_first_and_ends_at_the_second(signals, code):
    assert sent(STOP, signals) == (code, ["on", FIRST, LAST], "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_nothing_swallows_a_signal_while_a_program_starts(number):
    assert sent(IMPORTING, [number]) == (128 + number, ["on"], "interrupted\n")


def test_what_was_begun_is_left_tidily():
    assert sent(LEAVING, [signal.SIGHUP]) == (129, ["on", "cleaned up"], "interrupted\n")


def test_what_is_ignored_from_the_start_stays_so():
    """As `nohup` and shells that put a job into the background have it."""
    program = (
        'import os, signal; from altgrad_jax.interrupt import watch; watch(); print("on", flush=True);'
        ' os.kill(os.getpid(), signal.SIGHUP); print("still there")'
    )
    done = subprocess.run(
        ["bash", "-c", f"trap '' HUP; exec {sys.executable} -c '{program}'"], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "on\nstill there\n", "")
