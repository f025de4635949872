"""The training step in 8-bit recipes over the same step in BF16, and what the diagnostics add.

    python benchmarks/precision_step.py [--rounds=20] [--sizes quick_1M] [--recipes bf16 e5m2 ...] [--out=FILE.json]

All recipes live in one process and take a step in turn, `rounds` times over, so that a machine whose speed drifts
drifts for all of them. A ratio is the median over rounds of two steps of one round; `best_over` compares the fastest
steps, which says what is left when nothing else uses the machine. Diagnostics are programs of their own, so what they
add is their time spread over the steps between them: of all windows of the batch, and of an eighth of them.
"""

import argparse
import json
import os
import statistics
import tempfile
import time

from common import in_subprocess, write_results
from train_step import SIZES, experiment_of

from altgrad_jax.allocator import TUNABLES

RECIPES = ("bf16", "e5m2", "hybrid", "e3m4", "mxfp8", "hybrid scaling=current", "hybrid g.rounding=stochastic")
EVERY = 10
QUESTIONS = {
    "quant": {"quant": True, "shadow": False},
    "shadow": {"quant": False, "shadow": True},
    "both": {"quant": True, "shadow": True},
}


def main() -> None:
    """Runs all sizes, each in a process of its own with the allocator's settings that the main job has."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--sizes", nargs="*", default=["quick_1M"], choices=list(SIZES))
    parser.add_argument(
        "--recipes", nargs="*", default=list(RECIPES), help="the first is what others are compared with"
    )
    parser.add_argument("--diagnosed", default="e5m2", help="the recipe whose diagnostics are timed; empty: none")
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(measure(arguments.worker, arguments.recipes, arguments.rounds, arguments.diagnosed)))
        return
    own = ["--recipes", *arguments.recipes, f"--rounds={arguments.rounds}", f"--diagnosed={arguments.diagnosed}"]
    results = {
        size: in_subprocess(__file__, [f"--worker={size}", *own], {"GLIBC_TUNABLES": TUNABLES})
        for size in arguments.sizes
    }
    write_results(arguments.out, {"load_average": os.getloadavg(), **results})


def measure(size: str, recipes: list[str], rounds: int, diagnosed: str) -> dict:
    """Seconds of every recipe's step and their ratios to the first's; and of the diagnostics of one recipe."""
    import jax

    def timed(run) -> float:
        began = time.perf_counter()
        jax.block_until_ready(run())
        return time.perf_counter() - began

    with tempfile.TemporaryDirectory() as folder:
        stepped: dict = {}
        asked: dict = {}
        for recipe in recipes:
            rules = () if recipe == "bf16" else ((r"blocks\..*|lm_head", recipe),)
            exp = experiment_of(size, "bfloat16", folder, rules)
            stepped[recipe] = _stepper(exp)
            if recipe == diagnosed:
                for windows in (0, SIZES[size][1] // 8):
                    asked |= _askers(experiment_of(size, "bfloat16", folder, rules, windows), windows)
        for run in (*stepped.values(), *asked.values()):
            timed(run)
            timed(run)
        seconds: dict[str, list[float]] = {recipe: [] for recipe in recipes}
        for _ in range(rounds):
            for recipe, run in stepped.items():
                seconds[recipe].append(timed(run))
        result: dict = {"recipes": {}, "diagnostics": {}}
        base = seconds[recipes[0]]
        for recipe, taken in seconds.items():
            result["recipes"][recipe] = {
                "step_seconds": round(statistics.median(taken), 4),
                f"over_{recipes[0]}": round(statistics.median(a / b for a, b in zip(taken, base, strict=True)), 3),
                f"best_over_{recipes[0]}": round(min(taken) / min(base), 3),
            }
        for name, run in asked.items():
            ratios = [timed(run) / timed(stepped[diagnosed]) for _ in range(max(3, rounds // 4))]
            result["diagnostics"][name] = {
                "over_a_step": round(statistics.median(ratios), 2),
                f"step_with_it_every_{EVERY}": round(1 + statistics.median(ratios) / EVERY, 3),
            }
    return result


def _stepper(exp):
    """A function that takes one more step and returns its metrics."""
    batch, states = exp.shard(next(exp.batches.from_step(0))), [exp.fresh_state()]

    def step():
        states[0], metrics = exp.run_train(states[0], batch)
        return metrics

    return step


def _askers(exp, windows: int) -> dict:
    """Question -> a function that asks it."""
    batch, state = exp.shard(next(exp.batches.from_step(0))), exp.fresh_state()
    which = f"{windows} windows" if windows else "all windows"
    return {
        f"{name}, {which}": lambda questions=questions: exp.run_diagnose(state, batch, **questions)
        for name, questions in QUESTIONS.items()
    }


if __name__ == "__main__":
    main()
