"""The classification task in two arithmetics and several seeds, beside what needs no network.

    python benchmarks/classify_losses.py --workdir=runs/classify --config.data.name=eurlex --out=docs/results/classify

Every condition is a run of the main job in a folder of its own; started again, finished runs are not repeated. Options
that begin with --config. are passed on to every run, and to the baselines (benchmarks/classify_baselines.py), which
have the same labels, splits and measures. Conditions of a seed share initial weights and batches. Writes OUT.json (all
figures, every run's command) and prints a Markdown table: means with standard deviations over seeds.
"""

import json
import statistics
from pathlib import Path
from typing import Any

from classify_baselines import baselines, configured
from common import save_results
from conditions import Condition, folder_of, gap, parse_arguments, run_all

CONDITIONS = {
    "bf16": Condition("configs/classify.py:quick"),
    "e5m2": Condition("configs/classify.py:e5m2,quick"),
}
COLUMNS = {
    "micro_f1": "micro F1",
    "macro_f1": "macro F1",
    "micro_precision": "micro precision",
    "micro_recall": "micro recall",
    "subset_accuracy": "subset accuracy",
    "hamming_loss": "Hamming loss",
    "micro_roc_auc": "ROC-AUC",
    "micro_pr_auc": "PR-AUC",
    "loss": "loss",
}


def main() -> None:
    """Runs what is missing, then reads all runs."""
    arguments, passed_on = parse_arguments(__doc__, CONDITIONS)
    results: dict[str, Any] = baselines(configured("configs/classify.py:quick", passed_on))
    run_all(arguments, CONDITIONS, passed_on)
    for name in arguments.conditions:
        results[name] = collect(arguments.workdir, name, arguments.seeds)
    if "bf16" in arguments.conditions:
        for name in set(arguments.conditions) - {"bf16"}:
            pairs = [(split, key) for split in ("val", "test") for key in COLUMNS]
            results[name]["gap_to_bf16"] = {
                f"{split}/{key}": gap(results[name][split][key], results["bf16"][split][key]) for split, key in pairs
            }
    save_results(f"{arguments.out}.json" if arguments.out else None, results)
    print(markdown(results))


def collect(workdir: Path, name: str, seeds: list[int]) -> dict[str, Any]:
    """What a condition's runs found, one value a seed."""
    row: dict[str, Any] = {"status": [], "seconds": [], "cosine": [], "threshold": [], "commands": []}
    row |= {split: {key: [] for key in COLUMNS} for split in ("val", "test")}
    for seed in seeds:
        folder = folder_of(workdir, name, seed)
        summary = json.loads((folder / "summary.json").read_text())
        manifest, final = json.loads((folder / "manifest.json").read_text()), summary["final"]
        row["status"].append(summary["status"])
        row["seconds"].append(summary["seconds"])
        row["cosine"].append(final.get("grads/cosine"))
        row["threshold"].append(final.get("val/threshold"))
        row["commands"].append(" ".join(manifest["sessions"][0]["command"]))
        for split in ("val", "test"):
            for key in COLUMNS:
                row[split][key].append(final.get(f"{split}/{key}"))
    return row


def markdown(results: dict[str, Any]) -> str:
    """The test split, a row a model."""
    rows = {name: found["test"] for name, found in results.items() if "test" in found}
    lines = [f"| test split | {' | '.join(COLUMNS.values())} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, found in rows.items():
        lines.append(f"| {name} | {' | '.join(_cell(found.get(key)) for key in COLUMNS)} |")
    return "\n".join(lines)


def _cell(value: float | list[float | None] | None) -> str:
    values = [v for v in (value if isinstance(value, list) else [value]) if v is not None]
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


if __name__ == "__main__":
    main()
