"""Output that breaks ends no program: what is left of it is dropped, and a line says so."""

import subprocess
import sys

import pytest

from tests.forks import ROOT
from tests.runs import ended, summary

PROGRAM = """
import sys
from altgrad_jax.streams import occupy_closed_streams, protect_streams
occupy_closed_streams()
with open(sys.argv[1], "w") as file:
    protect_streams()
    for i in range(10_000):
        print("line", i)
    print("line", flush=True)
    file.write("done")
"""
GONE = "warning: nothing more can be written to stdout ({}); the program goes on without\n"


@pytest.mark.parametrize(
    ("redirection", "err"),
    [
        ("| true", GONE.format("Broken pipe")),
        (">/dev/full", GONE.format("No space left on device")),
        (">&-", GONE.format("it is closed")),
        (">/dev/full 2>/dev/full", ""),
        (">&- 2>&-", ""),
        ("<&- >&- 2>&-", ""),
    ],
)
def test_a_program_whose_output_breaks_does_its_work(tmp_path, redirection, err):
    line = (
        f'{sys.executable} -c "$0" {tmp_path / "file"} {redirection}; echo "${{PIPESTATUS[0]}}" >{tmp_path / "status"}'
    )
    done = subprocess.run(["bash", "-c", line, PROGRAM], cwd=ROOT, capture_output=True, text=True)
    assert (done.stderr, (tmp_path / "status").read_text()) == (err, "0\n")
    assert (tmp_path / "file").read_text() == "done", "and nothing that was meant for a closed stream"


def test_what_a_streams_encoding_has_no_letter_for_is_replaced():
    program = "from altgrad_jax.streams import protect_streams; protect_streams(); print('caf\\u00e9'); print('on')"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, env={"PYTHONIOENCODING": "ascii"}
    )
    assert (done.stdout, done.stderr, done.returncode) == ("caf?\non\n", "", 0)


@pytest.mark.slow
def test_a_run_outlives_its_reader(lab, tmp_path):
    process = lab.start(tmp_path / "run")
    process.stdout.close()
    process.stdout = None
    done = ended(process)
    assert done.code == 0 and done.err == GONE.format("Broken pipe")
    assert summary(tmp_path / "run")["status"] == "finished"
