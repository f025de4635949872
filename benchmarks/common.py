"""What every benchmark shares: the machine's description, and JSON results that name how they were made."""

import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from altgrad_jax import provenance


def cpu_model() -> str:
    """The processor's name and the matrix instructions it has."""
    name, flags = platform.processor() or platform.machine(), ""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
            if line.startswith("flags"):
                wanted = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
                flags = " ".join(flag for flag in wanted if flag in line.split())
                break
    except OSError:
        pass  # not Linux: the name alone
    return f"{name} ({flags})" if flags else name


def write_results(path: str | None, results: dict[str, Any]) -> None:
    """Prints the results and, if a path is given, writes them as JSON with command, date, machine and versions."""
    report = {
        "command": ["python", *sys.argv],
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {"cpu": cpu_model(), "cores": os.cpu_count(), "devices": provenance.devices()},
        "versions": provenance.versions(),
        "environment": provenance.environment(),
        "git": provenance.git_revision(),
        "results": results,
    }
    print(json.dumps(results, indent=2))
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(report, indent=2) + "\n")


def in_subprocess(script: str, arguments: list[str], environment: dict[str, str] | None = None) -> dict[str, Any]:
    """Runs a benchmark's own worker and returns the JSON object on its last line of output.

    Memory peaks and allocator settings belong to a process, so each measurement of either has one of its own.
    """
    command = [sys.executable, script, *arguments]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])} | (environment or {})
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])
