"""`python -m MODULE` many times over, in forks of one process that has already imported what is slow to import."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

_PROGRAM = """
import gc, importlib, json, os, runpy, sys, traceback
task = json.load(sys.stdin)
for name in task["imports"]:
    importlib.import_module(name)
gc.freeze()
for number, arguments in enumerate(task["cases"]):
    pid = os.fork()
    if pid == 0:
        for fd, name in (1, "out"), (2, "err"):
            path = os.path.join(task["folder"], f"{number}.{name}")
            os.dup2(os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY), fd)
        sys.argv, code = [task["module"], *arguments], 0
        try:
            runpy.run_module(task["module"], run_name="__main__", alter_sys=True)
        except SystemExit as e:
            code = e.code or 0
        except BaseException:
            traceback.print_exc()
            code = 70
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)  # taking the interpreter down takes longer than most cases
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@dataclass(frozen=True)
class Ended:
    """How a command ended: exit status (negative: killed by that signal) and what it printed."""

    code: int
    out: str
    err: str


def run_module(
    module: str,
    cases: Sequence[Sequence[str]],
    folder: Path,
    imports: Sequence[str],
    environment: Mapping[str, str] | None = None,
) -> list[Ended]:
    """Runs `python -m module` with each list of arguments, one after the other.

    Args:
      module: its name.
      cases: command lines.
      folder: empty or not there yet; what the cases print goes through it.
      imports: modules to import once for all; none that defines the same flags as `module`.
      environment: of the process; this one's by default.
    """
    folder.mkdir(exist_ok=True)
    task = {"module": module, "cases": [list(case) for case in cases], "folder": str(folder), "imports": list(imports)}
    command = [sys.executable, "-c", _PROGRAM]
    done = subprocess.run(command, input=json.dumps(task), cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    codes = [int(line) for line in done.stdout.split()]
    texts = [[(folder / f"{i}.{name}").read_text() for name in ("out", "err")] for i in range(len(cases))]
    return [Ended(code, *text) for code, text in zip(codes, texts, strict=True)]
