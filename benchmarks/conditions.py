"""Runs of the main job for many conditions and seeds, one folder each, and the comparison of their losses."""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

ROOT = Path(__file__).resolve().parents[1]
# Two-sided 95 % quantiles of Student's t, by degrees of freedom.
STUDENT_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}


@dataclass(frozen=True)
class Condition:
    """What is run: a config file with its variant, and further options."""

    config: str
    options: tuple[str, ...] = ()


def parse_arguments(doc: str | None, conditions: dict[str, Condition]) -> tuple[argparse.Namespace, list[str]]:
    """The options that such benchmarks share; what begins with --config. is passed on to every run."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True, help="folder of the runs' folders")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--conditions", nargs="+", default=list(conditions), choices=list(conditions))
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, each on its own share of the cores")
    parser.add_argument("--out", type=Path, help="name of the results, without suffix")
    arguments, passed_on = parser.parse_known_args()
    if wrong := [option for option in passed_on if not option.startswith("--config.")]:
        parser.error(f"unknown option {wrong[0]}")
    return arguments, passed_on


def run_all(arguments: argparse.Namespace, conditions: dict[str, Condition], passed_on: list[str]) -> None:
    """Every condition with every seed; those that have ended are not run again."""
    runs = [(name, seed) for seed in arguments.seeds for name in arguments.conditions]
    places: Queue[int] = Queue()
    for place in range(arguments.jobs):
        places.put(place)

    def run(condition: tuple[str, int]) -> None:
        name, seed = condition
        place = places.get()
        try:
            folder = folder_of(arguments.workdir, name, seed)
            loss = train(folder, conditions[name], seed, passed_on, place, arguments.jobs)
            print(name, seed, loss, file=sys.stderr, flush=True)
        finally:
            places.put(place)

    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(run, runs))


def folder_of(workdir: Path, name: str, seed: int) -> Path:
    """A run's folder."""
    plain = "".join(c if c.isalnum() or c in ".-" else "-" for c in name)
    return workdir / f"{plain}-seed{seed}"


def train(
    folder: Path, condition: Condition, seed: int, passed_on: list[str], place: int = 0, places: int = 1
) -> float | str | None:
    """One run of the main job, unless it has ended; a diverged run is a result too. Its validation loss."""
    summary = folder / "summary.json"
    if not (summary.exists() and json.loads(summary.read_text())["status"] in ("finished", "diverged")):
        command = [sys.executable, "-m", "altgrad_jax.main", f"--config={condition.config}", f"--workdir={folder}"]
        command += [f"--config.seed={seed}", "--config.tracking.wandb=disabled", "--config.checkpoint.every=1000"]
        cores = sorted(os.sched_getaffinity(0))[place::places]
        done = subprocess.run(
            [*command, *condition.options, *passed_on],
            cwd=ROOT,
            capture_output=True,
            text=True,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )
        if not summary.exists():
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(summary.read_text())["final"].get("val/loss")


def gap(losses: list, base: list) -> dict:
    """Mean difference over seeds with its 95 % interval (Student's t on the differences of equal seeds)."""
    if any(not isinstance(loss, float) for loss in [*losses, *base]):
        return {"mean": None, "half_width": None}
    differences = [a - b for a, b in zip(losses, base, strict=True)]
    mean, count = statistics.mean(differences), len(differences)
    if count < 2:
        return {"mean": mean, "half_width": None}
    return {"mean": mean, "half_width": STUDENT_T[count - 1] * statistics.stdev(differences) / count**0.5}
