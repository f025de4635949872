"""What diagnostics add to a run: the time of every question, asked every 50 steps, over the time of those steps.

    python benchmarks/diagnostics.py [--sizes baseline_30M] [--recipe=e5m2] [--rounds=3] [--out=FILE.json]

Each question is a program of its own; its time is taken in turn with training steps, in one process, after both have
been compiled. "weights" includes the copy of the weights that it compares with. Counting dead units, which "gradients"
does in every step, is the difference between the training step with and without it, over the step.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from functools import partial

from common import in_subprocess, write_results
from train_step import SIZES, experiment_of

from altgrad_jax.allocator import TUNABLES

EVERY = 50
QUESTIONS = ("quant", "shadow", "gradients", "weights", "spectra", "curvature", "sensitivity")
SHARED = ("quant", "shadow", "gradients")  # repeat one backward pass when they are asked together


def main() -> None:
    """Runs all sizes, each in a process of its own with the settings that the main job has."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", default=["baseline_30M"], choices=list(SIZES))
    parser.add_argument("--recipe", default="e5m2")
    parser.add_argument("--windows", type=int, default=1, help="windows of the batch that the first three measure")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(measure(arguments.worker, arguments.recipe, arguments.windows, arguments.rounds)))
        return
    own = [f"--recipe={arguments.recipe}", f"--windows={arguments.windows}", f"--rounds={arguments.rounds}"]
    settings = {"GLIBC_TUNABLES": TUNABLES, "OPENBLAS_NUM_THREADS": "1"}
    results = {size: in_subprocess(__file__, [f"--worker={size}", *own], settings) for size in arguments.sizes}
    write_results(arguments.out, {"load_average": os.getloadavg(), "every": EVERY, **results})


def measure(size: str, recipe: str, windows: int, rounds: int) -> dict:
    """Median seconds of the step and of every question, and their shares of a run that asks every 50 steps."""
    import jax

    def timed(run) -> float:
        began = time.perf_counter()
        jax.block_until_ready(run())
        return time.perf_counter() - began

    with tempfile.TemporaryDirectory() as folder:
        rules = ((r"blocks\..*|lm_head", recipe),)
        exp = experiment_of(size, "bfloat16", folder, rules, windows)
        plain = experiment_of(size, "bfloat16", folder, rules, windows, questions=())
        batch = exp.shard(next(exp.batches.from_step(0)))
        states = {"step": exp.fresh_state(), "step without counting": plain.fresh_state()}

        def step(name: str, experiment):
            states[name], metrics = experiment.run_train(states[name], batch)
            return metrics

        def ask(names) -> dict:
            answers: dict = {}
            if before := frozenset(names) - {"weights"}:
                answers |= exp.diagnose(states["step"], batch, before)
            if "weights" in names:
                answers |= exp.measure_update(exp.keep(states["step"]), states["step"])
            return answers

        runs = {
            "step": partial(step, "step", exp),
            "step without counting": partial(step, "step without counting", plain),
            **{name: partial(ask, [name]) for name in QUESTIONS},
            "quant, shadow and gradients together": partial(ask, SHARED),
        }
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for run in runs.values():
            timed(run)
        for _ in range(rounds):
            for name, run in runs.items():
                seconds[name].append(timed(run))
    found = {name: statistics.median(taken) for name, taken in seconds.items()}
    base = found["step without counting"]
    apart = [found[name] for name in QUESTIONS if name not in SHARED]
    asked = sum(apart) + found["quant, shadow and gradients together"]
    counting = max(0.0, found["step"] - base) / base
    return {
        "seconds": {name: round(value, 4) for name, value in found.items()},
        "steps": {name: round(value / base, 3) for name, value in found.items()},
        "counting_over_step": round(counting, 4),
        f"all_every_{EVERY}_over_run": round(asked / (EVERY * base) + counting, 4),
    }


if __name__ == "__main__":
    main()
