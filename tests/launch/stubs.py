"""Commands that only write down how they were called, put first in PATH, and a copy of launch/ to try them on.

`Desk` is a laptop and a rented machine in one: `ssh` runs its command in the folder that stands for the machine's home.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.forks import ROOT, Ended

H100 = "580.65.06, 9.0, NVIDIA H100 80GB HBM3"
NOTE = 'echo "${0##*/} $*" >>"$CALLS"\n'

# Signals that the tests' own parent ignores, as nohup and background jobs do, are not ignored in a terminal.
AS_IN_A_TERMINAL = """
import os, signal, sys
for number in (signal.SIGHUP, signal.SIGINT):
    signal.signal(number, signal.SIG_DFL)
os.execvp(sys.argv[1], sys.argv[1:])
"""

PYTHON = """
case "$1 ${2%%;*}" in
  "-c import sys") exec "$REAL" -c "import sys; sys.version_info = ${VERSION:-3, 11}${2#import sys}" ;;
  "-c import jax") [[ -z ${NO_GPU:-} ]] && echo "JAX 0.10.2 sees [CudaDevice(id=0)]" ;;
  "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && exit "${VENV_STATUS:-0}" ;;
  "-m pip") exit "${PIP_STATUS:-0}" ;;
  "-m wandb") exit "${WANDB_STATUS:-0}" ;;
  "-m altgrad_jax.data") exit "${DATA_STATUS:-0}" ;;
  "-m altgrad_jax.main" | "-m altgrad_jax.sweep") echo "XLA_FLAGS=$XLA_FLAGS" >>"$CALLS"; eval "$MAIN" ;;
esac
"""
STUBS = {
    "python3.11": PYTHON,
    # -p PORT, -t; then the machine; then the command, which finds none of the laptop's variables there.
    "ssh": """
        while [[ $1 == -* ]]; do [[ $1 != -p ]] || shift; shift; done
        shift
        unset XLA_MODES XLA_FLAGS CHIP PYTHON BOX_DIR
        cd "$BOX" && exec bash -c "$*"
    """,
    "rsync": """
        from=${*: -2:1} to=${*: -1}
        if [[ $from == ./ ]]; then cp -r . "$BOX/${to#*:}"; else cp -r "$BOX/${from#*:}." "$to"; fi
        exit "${RSYNC_STATUS:-0}"
    """,
    "nvidia-smi": """
        [[ -n $GPUS ]] || exit 9
        if [[ $1 == --query-gpu=name ]]; then echo "${GPUS##*, }"; else echo "$GPUS"; fi
    """,
    "df": 'echo header; echo "/dev/sda 1 1 $((DISK_GB * 1048576)) 1% /"',
    # Starts the tasks as Slurm does, here; answers SIGTERM as srun does: by killing them.
    "srun": """
        for argument; do [[ $argument != --ntasks=* ]] || tasks=${argument#*=}; done
        while [[ $1 == --* ]]; do shift; done
        : >"$TASKS"
        for ((i = 0; i < tasks; i++)); do
          SLURM_NODEID=$i SLURM_PROCID=$i bash -c 'echo $$ >>"$TASKS"; exec "$@"' task "$@" &
          pids+=($!)
        done
        trap 'kill -KILL "${pids[@]}"; exit 137' TERM
        highest=0
        for pid in "${pids[@]}"; do wait "$pid"; status=$?; ((status <= highest)) || highest=$status; done
        exit "$highest"
    """,
    "scancel": '[[ $* == "--signal=TERM $SLURM_JOB_ID" ]] && kill -TERM $(cat "$TASKS")',
    "scontrol": """
        case "$1 $2" in
          "show hostnames") printf "%s\\n" $NODES ;;
          "show job") echo "JobId=$3 JobState=$STATE Reason=None" ;;
        esac
    """,
}
for name in ("python3.12", "python3.13", "python3"):
    STUBS[name] = "exit 1"


class Desk:
    """A folder with launch/ in it, stubs, and the calls they got."""

    def __init__(self, folder: Path):
        self.root, self.box, self.bin = folder / "repo", folder / "box", folder / "bin"
        for made in (self.root, self.box, self.bin):
            made.mkdir()
        shutil.copytree(ROOT / "launch", self.root / "launch")
        (self.root / "configs").mkdir()
        for config in ("hybrid.py", "format.py"):
            (self.root / "configs" / config).touch()
        for name, body in STUBS.items():
            self.stub(name, body)
        self.environment = {
            "PATH": f"{self.bin}:/usr/bin:/bin",
            "HOME": str(folder),
            "CALLS": str(folder / "calls"),
            "TASKS": str(folder / "tasks"),
            "BOX": str(self.box),
            "GPUS": H100,
            "DISK_GB": "100",
            "MAIN": "echo step 1",
            "REAL": sys.executable,
        }

    def stub(self, name: str, body: str) -> None:
        """Makes or changes a command."""
        path = self.bin / name
        path.write_text(f"#!/usr/bin/env bash\n{NOTE}{body}\n")
        path.chmod(0o755)

    def remove(self, name: str) -> None:
        """Takes a command away."""
        (self.bin / name).unlink()

    def installed(self) -> None:
        """Leaves what setup.sh leaves."""
        (self.root / ".venv" / "bin").mkdir(parents=True)
        shutil.copy(self.bin / "python3.11", self.root / ".venv" / "bin" / "python")

    def start(self, script: str, *arguments: str, **environment: str) -> subprocess.Popen:
        """Starts a script of launch/, or a bash script given as text."""
        file = self.root / "launch" / script
        command = [str(file)] if "\n" not in script and file.exists() else ["bash", "-c", script, "script"]
        return subprocess.Popen(
            [sys.executable, "-c", AS_IN_A_TERMINAL, *command, *arguments],
            cwd=self.root,
            env=self.environment | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, script: str, *arguments: str, **environment: str) -> Ended:
        """Runs it to its end."""
        process = self.start(script, *arguments, **environment)
        out, err = process.communicate(timeout=60)
        return Ended(process.returncode, out, err)

    @property
    def calls(self) -> list[str]:
        """What the stubs were called with, in order."""
        path = Path(self.environment["CALLS"])
        return path.read_text().splitlines() if path.exists() else []

    def called(self, *names: str) -> list[str]:
        """Those calls of some commands."""
        return [call for call in self.calls if call.split()[0] in names]


def alive(pid: int) -> bool:
    """Whether a process runs."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
