"""A run killed at random moments and started again each time, against one never killed: equal to the bit?

    python benchmarks/resume.py [--kills=20] [--devices=1|8] [--seed=0] [--out=docs/results/resume_1.json]
    source launch/xla_flags.sh auto deterministic && python benchmarks/resume.py --here --config=configs/hybrid.py:quick

Half of the kills (SIGKILL) wait for a checkpoint that is being written, some come while the program is still starting,
restoring or loading its compiled steps, the others at any moment of a step. Equal means: the same SHA-256 of the final
parameters, and the same losses, gradient norms and validation losses in metrics.jsonl, at the same steps; and every
session began at the newest checkpoint of the time. Exit status 1 otherwise. About six seconds a kill on two cores.

It runs on virtual CPU devices; with --here on what JAX takes by itself, a GPU if there is one, and with XLA_FLAGS as
they are. On a GPU equal bits need the flags of launch/xla_flags.sh's mode `deterministic`.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import write_results

from altgrad_jax.checkpoint import committed_steps
from altgrad_jax.tracking import read_metrics

ROOT = Path(__file__).resolve().parents[1]
STEPS_PER_KILL = 30
SAVE_EVERY = 5
COMPARED = ("step", "train/loss", "train/grad_norm", "train/learning_rate", "val/loss")
MOMENTS = {"save": 0.5, "step": 0.3, "start": 0.2}
SETTINGS = {
    "model.n_layer": 2,
    "model.n_embd": 64,
    "model.block_size": 64,
    "model.vocab_size": 512,
    "data.name": "embedded",
    "train.eval_every": 25,
    "train.eval_batches": 2,
    "checkpoint.every": SAVE_EVERY,
    "tracking.wandb": "disabled",
}


def main() -> int:
    """Runs both, compares them, prints and writes the verdict; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--devices", type=int, default=1, help="virtual CPU devices")
    parser.add_argument("--here", action="store_true", help="on JAX's own devices rather than virtual ones")
    parser.add_argument("--config", default="configs/bf16.py:quick")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", help="JSON file to write")
    arguments = parser.parse_args()
    if arguments.here and arguments.devices != 1:
        parser.error("--devices is the number of virtual CPU devices, and --here uses none")
    with tempfile.TemporaryDirectory() as folder:
        devices = None if arguments.here else arguments.devices
        runs = Runs(Path(folder), arguments.config, devices, STEPS_PER_KILL * (arguments.kills + 1))
        whole, start_seconds = runs.never_killed()
        killed, kills = runs.killed(arguments.kills, start_seconds, random.Random(arguments.seed))
        expected = [kill["resumed_from"] for kill in kills] + [kills[-1]["newest_checkpoint"] if kills else 0]
        results = compare(whole, killed, expected) | {
            "steps": runs.steps,
            "save_every": SAVE_EVERY,
            "config": arguments.config,
            "virtual_devices": devices,
            "seed": arguments.seed,
            "kills": kills,
            "kills_during_a_save": sum(kill["save_in_progress"] for kill in kills),
            "settings": SETTINGS,
        }
    write_results(arguments.out, results)
    print("equal to the bit" if results["equal"] else "DIFFERENT")
    return 0 if results["equal"] else 1


class Runs:
    """The same run in two work directories."""

    def __init__(self, folder: Path, config: str, devices: int | None, steps: int):
        self.steps = steps
        self._folder, self._config, self._devices = folder, config, devices

    def start(self, workdir: Path) -> subprocess.Popen:
        """Starts or resumes the run in a process of its own."""
        settings = SETTINGS | {
            "train.steps": self.steps,
            "data.data_dir": self._folder / "data",
            "runtime.compilation_cache": self._folder / "compiled",
        }
        command = [sys.executable, "-m", "altgrad_jax.main", f"--config={self._config}", f"--workdir={workdir}"]
        command += [f"--config.{key}={value}" for key, value in settings.items()]
        flags = {}
        if self._devices is not None:
            flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={self._devices}", "JAX_PLATFORMS": "cpu"}
        with open(self._folder / "log.txt", "a") as log:
            return subprocess.Popen(command, cwd=ROOT, env=os.environ | flags, stdout=log, stderr=log)

    def finish(self, workdir: Path) -> None:
        """Runs to the end."""
        if self.start(workdir).wait() != 0:
            raise RuntimeError(f"the run failed:\n{(self._folder / 'log.txt').read_text()[-2000:]}")

    def never_killed(self) -> tuple[Path, float]:
        """The work directory of the run that is left alone, and how long a start takes once all is compiled."""
        workdir = self._folder / "whole"
        self.finish(workdir)
        again = self._folder / "start"
        process, began = self.start(again), time.monotonic()
        wait_until(process, lambda: last_step(again / "metrics.jsonl") >= 1)
        seconds = time.monotonic() - began
        process.kill()
        process.wait()
        return workdir, seconds

    def killed(self, count: int, start_seconds: float, draw: random.Random) -> tuple[Path, list[dict[str, Any]]]:
        """The work directory of the run that is killed `count` times and then finished, and the record of the kills."""
        workdir, kills = self._folder / "killed", []
        for number in range(count):
            moment = draw.choices(list(MOMENTS), list(MOMENTS.values()))[0]
            kills.append({"moment": moment, **self._kill_once(workdir, moment, number, count, start_seconds, draw)})
            print(f"kill {number + 1}/{count}: {kills[-1]}", file=sys.stderr)
        self.finish(workdir)
        return workdir, kills

    def _kill_once(
        self, workdir: Path, moment: str, number: int, count: int, start_seconds: float, draw: random.Random
    ) -> dict[str, Any]:
        metrics, checkpoints = workdir / "metrics.jsonl", workdir / "checkpoints"
        newest = max(committed_steps(checkpoints), default=0)
        most = self.steps * (number + 1) // (count + 1)  # so that the run is not over before the last kill
        target = draw.randint(min(newest + 1, most), most)
        before = file_id(metrics)
        process, began = self.start(workdir), time.monotonic()
        if moment == "start":
            time.sleep(draw.uniform(0, start_seconds))
        else:
            # The file is written anew when a run resumes; what it says before is of the session before.
            wait_until(process, lambda: file_id(metrics) != before and last_step(metrics) >= target)
            if moment == "save":
                wait_until(process, lambda: is_saving(checkpoints))
            time.sleep(draw.uniform(0, 0.02 if moment == "save" else 0.1))
        process.kill()
        process.wait()
        return {
            "seconds_after_start": round(time.monotonic() - began, 3),
            "resumed_from": newest,
            "last_logged_step": last_step(metrics),
            "newest_checkpoint": max(committed_steps(checkpoints), default=0),
            "save_in_progress": is_saving(checkpoints),
        }


def compare(whole: Path, killed: Path, expected_starts: list[int]) -> dict[str, Any]:
    """Whether two finished runs are equal, and what is not.

    The killed one says itself where its sessions began, but for those killed before they could: so what it says must
    be a part of what is expected, in the same order.
    """
    sessions = [s["from_step"] for s in json.loads((killed / "manifest.json").read_text())["sessions"]]
    remaining = iter(expected_starts)
    resumed_right = all(step in remaining for step in sessions)
    hashes = [json.loads((run / "summary.json").read_text())["parameter_sha256"] for run in (whole, killed)]
    records = [
        [[r.get(key) for key in COMPARED] for r in read_metrics(run / "metrics.jsonl")] for run in (whole, killed)
    ]
    different = [a[0] for a, b in zip(*records, strict=False) if a != b]
    equal = hashes[0] == hashes[1] and records[0] == records[1] and resumed_right
    return {
        "equal": equal,
        "parameter_sha256": {"never_killed": hashes[0], "killed": hashes[1]},
        "records_compared": len(records[0]),
        "values_compared": list(COMPARED),
        "first_different_steps": different[:10],
        "sessions_began_at": sessions,
        "each_at_the_newest_checkpoint": resumed_right,
    }


def wait_until(process: subprocess.Popen, reached) -> None:
    """Polls every millisecond; raises RuntimeError if the process ends first."""
    while not reached():
        if process.poll() is not None:
            raise RuntimeError(f"the run ended by itself, with status {process.returncode}")
        time.sleep(0.001)


def file_id(path: Path) -> int | None:
    """Changes when a file is replaced."""
    return path.stat().st_ino if path.exists() else None


def last_step(metrics: Path) -> int:
    """Step of the last whole line of a metrics file; -1 where there is none."""
    if not metrics.exists():
        return -1
    lines = metrics.read_bytes().split(b"\n")
    return json.loads(lines[-2])["step"] if len(lines) > 1 else -1


def is_saving(checkpoints: Path) -> bool:
    """Whether a checkpoint is half written."""
    return any("orbax-checkpoint-tmp" in path.name for path in checkpoints.iterdir()) if checkpoints.is_dir() else False


if __name__ == "__main__":
    sys.exit(main())
