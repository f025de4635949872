"""The training step in 8-bit recipes over the same step in BF16, and what the diagnostics add.

    python benchmarks/precision_step.py [--rounds=3] [--sizes quick_1M baseline_30M] [--out=FILE.json]

Every recipe is timed in a process of its own, in turn, `rounds` times over; a figure is the median over rounds of the
median over steps, a ratio the median over rounds of the ratio within the round. Diagnostics are programs of their own,
so what they add is their time spread over the steps between them.
"""

import argparse
import json
import statistics
import tempfile
import time

from common import in_subprocess, write_results
from train_step import SIZES, experiment_of

from altgrad_jax.allocator import TUNABLES

RECIPES = ("bf16", "e5m2", "hybrid", "mxfp8", "e3m4", "e5m2 scaling=current", "hybrid g.rounding=stochastic")
EVERY = 10


def main() -> None:
    """Runs all recipes of all sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", nargs="*", default=["quick_1M", "baseline_30M"], choices=list(SIZES))
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES))
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        size, recipe = arguments.worker.split(":", 1)
        print(json.dumps(time_recipe(size, recipe)))
        return
    write_results(arguments.out, {size: measure(size, arguments.recipes, arguments.rounds) for size in arguments.sizes})


def measure(size: str, recipes: list[str], rounds: int) -> dict:
    """Seconds of every recipe, and its ratios to the first."""
    taken: dict[str, list[dict]] = {recipe: [] for recipe in recipes}
    for _ in range(rounds):
        for recipe in recipes:
            # The allocator's settings are those that the main job runs with.
            row = in_subprocess(__file__, [f"--worker={size}:{recipe}"], {"GLIBC_TUNABLES": TUNABLES})
            taken[recipe].append(row)
    base, result = taken[recipes[0]], {}
    for recipe, rows in taken.items():
        over = [row["step"] / first["step"] for row, first in zip(rows, base, strict=True)]
        result[recipe] = {
            "step_seconds": round(statistics.median(row["step"] for row in rows), 5),
            f"step_over_{recipes[0]}": round(statistics.median(over), 3),
            "all_rounds": [round(ratio, 3) for ratio in over],
        }
        for question in ("quant", "shadow", "both"):
            if question in rows[0]:
                added = statistics.median(1 + row[question] / (EVERY * row["step"]) for row in rows)
                result[recipe][f"with_{question}_every_{EVERY}"] = round(added, 3)
    return result


def time_recipe(size: str, recipe: str) -> dict:
    """Median seconds of the step and of its diagnostics."""
    import jax

    with tempfile.TemporaryDirectory() as folder:
        rules = () if recipe == "bf16" else ((r"blocks\..*|lm_head", recipe),)
        exp = experiment_of(size, "bfloat16", folder, rules)
        steps = SIZES[size][2]
        batch, state = exp.shard(next(exp.batches.from_step(0))), exp.fresh_state()

        def timed(run) -> float:
            began = time.perf_counter()
            jax.block_until_ready(run())
            return time.perf_counter() - began

        times = []
        for _ in range(steps + 2):
            began = time.perf_counter()
            state, metrics = exp.run_train(state, batch)
            jax.block_until_ready(metrics)
            times.append(time.perf_counter() - began)
        result = {"step": statistics.median(times[2:])}
        questions = {"shadow": {"quant": False, "shadow": True}}
        if rules:
            questions |= {"quant": {"quant": True, "shadow": False}, "both": {"quant": True, "shadow": True}}
        for name, asked in questions.items():
            runs = [timed(lambda asked=asked: exp.run_diagnose(state, batch, **asked)) for _ in range(4)]
            result[name] = statistics.median(runs[1:])
    return result


if __name__ == "__main__":
    main()
