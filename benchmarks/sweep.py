"""Conditions an hour: a matrix whose conditions share programs by vmap, over the same one after another.

    python benchmarks/sweep.py [--conditions=8] [--rounds=2] [--out=docs/results/sweep.json]

Runs `python -m altgrad_jax.sweep` on eight small conditions (e0m7 ... e7m0 with AdamW, of `matrix.py:formats8,quick`,
on the embedded corpus) in three ways, in turn, compilation and the start of every process included:

    together   all in one program
    in_turn    the same sweep, one condition at a time (`--config.together=1`), compiled programs kept from one to the
               next, as a sweep does
    main       `python -m altgrad_jax.main` once for each, as one would without sweeps

Ratios are of wall times within a round. The largest difference of final validation losses is reported beside them.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import write_results

from altgrad_jax.config import load_config
from altgrad_jax.sweep.matrix import conditions

ROOT = Path(__file__).resolve().parents[1]
MATRIX = "configs/matrix.py:formats8,quick"
WAYS = ("together", "in_turn", "main")


def main() -> None:
    """Times the ways in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conditions", type=int, default=8, help="1 to 8 formats")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--out", help="JSON file of the results")
    parser.add_argument("--tiny", action="store_true", help="two conditions, ten steps, one round: that it runs")
    given = parser.parse_args()
    if given.tiny:
        given.conditions, given.steps, given.rounds = 2, 10, 1
    formats = tuple((f"e{e}m{7 - e}", f"e{e}m{7 - e} w.pow2=1") for e in range(given.conditions))
    options = [
        *(
            "--config.base.data.name=embedded",
            f"--config.base.train.steps={given.steps}",
            f"--config.recipes={formats}",
        ),
        *("--config.optimizers=('adamw',)", "--config.seeds=(0,)", "--config.exclude=()", "--config.search.factors=()"),
        f"--config.base.diagnostics.questions=('weights:50', 'spectra:{given.steps - 1}')",
    ]
    seconds: dict[str, list[float]] = {way: [] for way in given.ways}
    losses: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for _ in range(given.rounds):
            for way in given.ways:
                folder = Path(scratch) / way
                shutil.rmtree(folder, ignore_errors=True)
                began = time.perf_counter()
                if way == "main":
                    _run_alone(folder, options, given.steps, formats)
                else:
                    together = given.conditions if way == "together" else 1
                    _run(
                        [
                            sys.executable,
                            "-m",
                            "altgrad_jax.sweep",
                            f"--config={MATRIX}",
                            f"--workdir={folder}",
                            *options,
                            f"--config.together={together}",
                        ]
                    )
                seconds[way].append(time.perf_counter() - began)
                losses[way] = {
                    path.parent.name: json.loads(path.read_text())["final"]["val/loss"]
                    for path in folder.glob("*/summary.json")
                }
                print(way, round(seconds[way][-1], 1), file=sys.stderr, flush=True)
    base = losses[given.ways[0]]
    results = {
        "conditions": given.conditions,
        "steps": given.steps,
        "seconds": seconds,
        "conditions_per_hour": {way: 3600 * given.conditions / statistics.median(s) for way, s in seconds.items()},
        "together_over": {
            way: statistics.median(b / a for a, b in zip(seconds["together"], s, strict=True))
            for way, s in seconds.items()
            if "together" in seconds and way != "together"
        },
        "largest_relative_loss_difference": {
            way: max(abs(found[name] - base[name]) / base[name] for name in base) for way, found in losses.items()
        },
    }
    write_results(given.out, results)


def _run(command: list[str]) -> None:
    # With a folder of compiled programs for all, the second round would compile nothing.
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-1000:]}{done.stderr[-1000:]}")


def _run_alone(folder: Path, options: list[str], steps: int, formats: tuple) -> None:
    """The main job for each condition, with the command that the matrix gives it."""
    matrix = load_config(f"{ROOT / MATRIX}")
    matrix.update_from_flattened_dict(
        {
            "base.data.name": "embedded",
            "base.train.steps": steps,
            "base.diagnostics.questions": ("weights:50", f"spectra:{steps - 1}"),
            "recipes": formats,
            "optimizers": ("adamw",),
            "seeds": (0,),
            "exclude": (),
        }
    )
    for condition in conditions(matrix, load_config(str(ROOT / "configs" / "bf16.py"))):
        python, *rest = condition.command
        del python
        _run([sys.executable, *rest, f"--workdir={folder / condition.name}"])


if __name__ == "__main__":
    main()
