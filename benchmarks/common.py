"""What every benchmark shares: the machine's description, and JSON results that name how they were made.

python benchmarks/common.py        # prints the description, as JSON
"""

import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax

from altgrad_jax import provenance

RESULT = "RESULT "  # begins a line of a worker's output that holds JSON
NVIDIA_SMI = ("name", "driver_version", "clocks.max.sm", "power.limit", "memory.total", "mig.mode.current")


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


def accelerator() -> dict[str, Any]:
    """What JAX and NVIDIA's driver say of the first device: kind, capability, runtime and versions of CUDA's parts."""
    device = jax.local_devices()[0]
    found = {"kind": device.device_kind, "runtime": " ".join(device.client.platform_version.split())}
    if device.platform != "gpu":
        return found
    found["compute_capability"] = str(getattr(device, "compute_capability", ""))
    return found | {"cuda": cuda_versions(), "nvidia_smi": nvidia_smi()}


def cuda_versions() -> dict[str, int | str]:
    """Versions of the driver's API and of CUDA's libraries, as JAX finds them; where it does not, its reason."""
    from jax._src.lib import cuda_versions as versions  # exported nowhere as of jax 0.10

    found: dict[str, int | str] = {}
    for name in ("cuda_driver", "cuda_runtime", "cublas", "cudnn", "cusolver"):
        try:
            found[name] = getattr(versions, f"{name}_get_version")()
        except (AttributeError, RuntimeError) as e:
            found[name] = str(e).splitlines()[0]
    return found


def nvidia_smi() -> dict[str, str] | None:
    """Of the first GPU: name, driver, highest clock, power limit, memory; None without the tool."""
    command = ["nvidia-smi", f"--query-gpu={','.join(NVIDIA_SMI)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(zip(NVIDIA_SMI, done.stdout.splitlines()[0].split(", "), strict=False))


def machine() -> dict[str, Any]:
    """The processor and what JAX runs on. Starts JAX's backend, which on a GPU takes memory."""
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "devices": provenance.devices(),
        "accelerator": accelerator(),
    }


def machine_of_workers() -> dict[str, Any]:
    """`machine`, as a process of its own sees it: for parents of workers that need the device to themselves."""
    return in_subprocess(str(Path(__file__).resolve()), [])


def save_results(path: str | Path | None, results: dict[str, Any], of: dict[str, Any] | None = None) -> None:
    """If a path is given, writes the results as JSON with command, date, machine, versions, flags and revision.

    Args:
      path: the file; its folder is made.
      results: what was measured.
      of: the machine, where it is not to be looked up in this process.
    """
    if path is None:
        return
    environment = provenance.environment()
    report = {
        "command": ["python", *sys.argv],
        "date": datetime.now(UTC).date().isoformat(),
        "machine": of or machine(),
        "versions": provenance.versions(),
        "xla_flags": environment.get("XLA_FLAGS", ""),
        "environment": environment,
        "git": provenance.git_revision(),
        "results": results,
    }
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(report, indent=2) + "\n")


def write_results(path: str | None, results: dict[str, Any], of: dict[str, Any] | None = None) -> None:
    """Prints the results and, if a path is given, saves them."""
    print(json.dumps(results, indent=2))
    save_results(path, results, of)


def skipped(reason: str) -> dict[str, str]:
    """The entry of what this machine cannot run."""
    return {"skipped": reason}


def failed(error: BaseException | str) -> dict[str, str]:
    """The entry of what was tried and did not run: the error's first line, and its kind."""
    if isinstance(error, str):
        return {"failed": error}
    lines = str(error).strip().splitlines() or [""]
    return {"failed": f"{type(error).__name__}: {lines[0][:500]}"}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the machine, had too little memory."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or "resource_exhausted" in text or "out of memory" in text


def worker_environment(changes: dict[str, str] | None = None) -> dict[str, str]:
    """This process's environment with the package on the path."""
    root = str(Path(__file__).resolve().parents[1])
    inherited = os.environ.get("PYTHONPATH")
    path = f"{root}{os.pathsep}{inherited}" if inherited else root
    return os.environ | {"PYTHONPATH": path} | (changes or {})


def in_subprocess(script: str, arguments: list[str], environment: dict[str, str] | None = None) -> dict[str, Any]:
    """Runs a benchmark's own worker and returns the JSON object on its last line of output.

    Memory peaks and allocator settings belong to a process, so each measurement of either has one of its own.
    """
    command = [sys.executable, script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=worker_environment(environment))
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def say(result: dict[str, Any]) -> None:
    """A worker's way to hand a result to its parent as soon as it has it: `heard` reads it."""
    print(RESULT + json.dumps(result), flush=True)


def heard(script: str, arguments: list[str], timeout: float | None) -> tuple[list[dict[str, Any]], str]:
    """Runs a worker that may die: what it said until then, and what was wrong, "" if nothing.

    Args:
      script: its file.
      arguments: of its command line.
      timeout: seconds after which it is ended; None: never.
    """
    command = [sys.executable, script, *arguments]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=worker_environment()
    )
    problem = ""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        problem = f"ended after {timeout:.0f} s"
    if process.returncode and not problem:
        last = err.strip().splitlines()[-1:] or ["no message"]
        problem = f"the process ended with status {process.returncode}: {last[0][:500]}"
    lines = [line.removeprefix(RESULT) for line in out.splitlines() if line.startswith(RESULT)]
    return [json.loads(line) for line in lines], problem


if __name__ == "__main__":
    print(json.dumps(machine()))
