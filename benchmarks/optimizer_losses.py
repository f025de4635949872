"""Trains the quick variant with each optimizer in each format, several seeds: losses, stalls, ulps moved, ranks.

    python benchmarks/optimizer_losses.py search --workdir=runs/rates --seeds 41 --config.data.name=eurlex
    python benchmarks/optimizer_losses.py compare --workdir=runs/optimizers --config.data.name=eurlex \
        --out=docs/results/optimizers

`search` finds each optimizer's learning rate in each format: three rates a factor of two apart around the one in
configs/optimizer.py, one seed that is not among those compared; the best are then written into that file by hand.
`compare` trains with those, three seeds each. Writes OUT.json and, for `compare`, OUT.png, and prints a Markdown table.
All conditions of a seed share initial weights and batches. Started again, finished runs are not repeated.
"""

import json
import math
import statistics
import sys
from pathlib import Path

from common import write_results
from conditions import Condition, folder_of, gap, parse_arguments, run_all

from altgrad_jax.config import load_config
from altgrad_jax.tracking import read_metrics

OPTIMIZERS = ("adamw", "before", "relative", "ulps", "grid", "madam")
FORMATS = ("e5m2", "e4m3", "e3m4", "e7m0")
FACTORS = (0.5, 1.0, 2.0)
STEPS = 150  # half of the quick variant's, so that the matrix fits into an hour on two cores
ASK = (
    f"--config.train.steps={STEPS}",
    f"--config.diagnostics.questions=('weights:49','spectra:{STEPS - 1}')",  # of the first step and the last
    *("--config.diagnostics.quant_every=0", "--config.diagnostics.shadow_every=0"),
)
MEASURES = ("weights/stall", "weights/ulps_q50", "weights/relative_update")
RANKS = ("effective_rank", "stable_rank")


def config_of(name: str, fmt: str) -> str:
    """The config file's argument."""
    return f"configs/optimizer.py:{name},{fmt},quick"


def compared() -> dict[str, Condition]:
    """Every optimizer in every format, and AdamW in BF16."""
    found = {f"{name}, {fmt}": Condition(config_of(name, fmt), ASK) for fmt in FORMATS for name in OPTIMIZERS}
    return {"adamw, bf16": Condition("configs/bf16.py:quick", ASK)} | found


def searched() -> dict[str, Condition]:
    """Three rates for each optimizer and format."""
    found = {}
    for fmt in FORMATS:
        for name in OPTIMIZERS:
            rate = load_config(config_of(name, fmt)).optimizer.learning_rate
            for factor in FACTORS:
                options = (*ASK, f"--config.optimizer.learning_rate={rate * factor:g}")
                found[f"{name}, {fmt}, {rate * factor:g}"] = Condition(config_of(name, fmt), options)
    return found


def main() -> None:
    """Runs what is missing, then reads all runs."""
    what = sys.argv.pop(1) if len(sys.argv) > 1 and not sys.argv[1].startswith("-") else ""
    if what not in ("search", "compare"):
        sys.exit("error: give search or compare first (see --help after it)")
    conditions = searched() if what == "search" else compared()
    arguments, passed_on = parse_arguments(__doc__, conditions)
    run_all(arguments, conditions, passed_on)
    results = {name: collect(arguments.workdir, name, arguments.seeds) for name in arguments.conditions}
    if what == "compare":
        add_gaps(results)
        print(markdown(results))
        if arguments.out:
            plot(results, Path(f"{arguments.out}.png"))
    else:
        for name, row in results.items():
            print(name, row["val_loss"])
    write_results(f"{arguments.out}.json" if arguments.out else None, results)


def collect(workdir: Path, name: str, seeds: list[int]) -> dict:
    """One value a seed of the loss and of the last step's measures; the validation curves."""
    row: dict = {"status": [], "val_loss": [], "curves": [], "commands": [], "measures": {}}
    for seed in seeds:
        folder = folder_of(workdir, name, seed)
        summary = json.loads((folder / "summary.json").read_text())
        records = read_metrics(folder / "metrics.jsonl")
        row["status"].append(summary["status"])
        row["val_loss"].append(summary["final"].get("val/loss"))
        row["curves"].append([(r["step"], r["val/loss"]) for r in records if "val/loss" in r])
        row["commands"].append(" ".join(json.loads((folder / "manifest.json").read_text())["sessions"][0]["command"]))
        for key in MEASURES:
            seen = [(r["step"], r[key]) for r in records if isinstance(r.get(key), float)]
            if seen:
                row["measures"].setdefault(key, []).append(seen)
        for rank in RANKS:
            seen = [(r["step"], found) for r in records if (found := _mean_of_layers(r, f"/{rank}")) is not None]
            row["measures"].setdefault(rank, []).append(seen)
    return row


def _mean_of_layers(record: dict, ending: str) -> float | None:
    """Mean of a measure of the spectra over the dense layers, where the record has it."""
    found = [v for key, v in record.items() if key.startswith("spectra/blocks.") and key.endswith(ending)]
    return statistics.mean(found) if found else None


def add_gaps(results: dict) -> None:
    """Differences to AdamW in the same format, and to BF16, of the same seeds."""
    for name, row in results.items():
        for key, base in (("to_adamw", f"adamw, {name.partition(', ')[2]}"), ("to_bf16", "adamw, bf16")):
            if base in results:
                row[key] = gap(row["val_loss"], results[base]["val_loss"])


def last(row: dict, key: str) -> float:
    """Mean over seeds of a measure's last value."""
    seen = row["measures"].get(key)
    return statistics.mean(values[-1][1] for values in seen) if seen else math.nan


def markdown(results: dict) -> str:
    """One row a condition."""
    lines = [
        "| format | optimizer | validation loss | gap to AdamW (95 %) | gap to BF16 (95 %) | stall | ulps a step,"
        " median | effective rank kept |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in results.items():
        optimizer, _, fmt = name.partition(", ")
        losses = [loss for loss in row["val_loss"] if isinstance(loss, float)]
        spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
        text = f"{statistics.mean(losses):.3f} ± {spread:.3f}" if losses else "diverged"
        if len(losses) < len(row["val_loss"]):
            text += f" ({len(row['val_loss']) - len(losses)} diverged)"
        gaps = [_interval(row.get(key, {})) for key in ("to_adamw", "to_bf16")]
        stall, ulps = last(row, "weights/stall"), last(row, "weights/ulps_q50")
        ranks = [values[-1][1] / values[0][1] for values in row["measures"]["effective_rank"] if values]
        kept = f"{100 * statistics.mean(ranks):.0f} %" if ranks else ""
        measures = " | ".join("-" if math.isnan(x) else f"{x:.3g}" for x in (stall, ulps))
        lines.append(f"| {fmt} | {optimizer} | {text} | {gaps[0]} | {gaps[1]} | {measures} | {kept} |")
    return "\n".join(lines)


def _interval(found: dict) -> str:
    if found.get("mean") is None:
        return ""
    half = found["half_width"]
    return f"{found['mean']:+.3f}" + ("" if half is None else f" ± {half:.3f}")


def plot(results: dict, path: Path) -> None:
    """Gap to AdamW of each optimizer, a panel a format; below it, the stall ratio over training."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = dict(zip(OPTIMIZERS, ("#000000", "#56B4E9", "#0072B2", "#009E73", "#D55E00", "#CC79A7"), strict=True))
    figure, axes = plt.subplots(2, len(FORMATS), figsize=(3.1 * len(FORMATS), 5.6), sharey="row")
    for (top, bottom), fmt in zip(axes.T, FORMATS, strict=True):
        for x, name in enumerate(OPTIMIZERS[1:]):
            row, base = results[f"{name}, {fmt}"], results[f"adamw, {fmt}"]
            pairs = zip(row["val_loss"], base["val_loss"], strict=True)
            singles = [a - b for a, b in pairs if isinstance(a, float) and isinstance(b, float)]
            top.plot([x] * len(singles), singles, "_", color="0.4", markersize=12)
            if row["to_adamw"]["mean"] is not None:
                top.errorbar(
                    x, row["to_adamw"]["mean"], row["to_adamw"]["half_width"], fmt="o", color=colours[name], capsize=3
                )
        top.axhline(0, color="0.6", linewidth=1)
        top.set_yscale("symlog", linthresh=0.1)
        top.set_xticks(range(len(OPTIMIZERS) - 1), OPTIMIZERS[1:], rotation=45, ha="right", fontsize=8)
        top.set_title(fmt, fontsize=10)
        for name in OPTIMIZERS:
            seen = results[f"{name}, {fmt}"]["measures"].get("weights/stall", [])
            steps = [step for step, _ in seen[0]] if seen else []
            means = [statistics.mean(values[i][1] for values in seen if i < len(values)) for i in range(len(steps))]
            bottom.plot(steps, means, ".-", color=colours[name], linewidth=1, label=name)
        bottom.set_xlabel("step", fontsize=9)
        bottom.set_ylim(-0.02, 1.02)
    axes[0][0].set_ylabel("validation loss over AdamW's, nats\n(dot: mean, 95 %; bars: seeds)", fontsize=9)
    axes[1][0].set_ylabel("stall: share of updates\nthat flip no code", fontsize=9)
    axes[1][-1].legend(frameon=False, fontsize=7, loc="lower right")
    for panel in axes.flat:
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=140)


if __name__ == "__main__":
    main()
