"""The lock between processes: exclusive, released however its holder ends."""

import subprocess
import sys
import threading

import pytest

from altgrad_jax.data.locks import exclusive
from altgrad_jax.errors import UserError

HOLDER = """
import sys, time
from pathlib import Path
from altgrad_jax.data.locks import exclusive
with exclusive(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_other_process_waits_until_the_holder_is_killed(tmp_path):
    path, entered = tmp_path / "lock", threading.Event()
    waiting = threading.Event()
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"

        def enter() -> None:
            with exclusive(path, on_wait=waiting.set):
                entered.set()

        thread = threading.Thread(target=enter)
        thread.start()
        assert waiting.wait(10)
        assert not entered.wait(0.1)
        holder.kill()
        assert entered.wait(10)
        thread.join()


def test_free_lock_is_taken_at_once_and_again_after_an_error(tmp_path):
    def fail() -> None:
        raise AssertionError("nobody holds the lock")

    with pytest.raises(ZeroDivisionError), exclusive(tmp_path / "lock", on_wait=fail):
        raise ZeroDivisionError
    with exclusive(tmp_path / "lock", on_wait=fail):
        pass


def test_folder_that_is_not_there(tmp_path):
    with (
        pytest.raises(UserError, match=r"lock cannot be written: No such"),
        exclusive(tmp_path / "absent" / "lock"),
    ):
        pass
