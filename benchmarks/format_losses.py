"""Trains the quick variant in many formats and several seeds, and compares losses, gradients and rounding errors.

    python benchmarks/format_losses.py --workdir=runs/formats --config.data.name=eurlex --out=docs/results/formats

Every condition is a run of the main job in a folder of its own; started again, finished runs are not repeated. Options
that begin with --config. are passed on to every run. All conditions of a seed share initial weights and batches.
Writes OUT.json (all figures, every run's command) and OUT.png, and prints a Markdown table. A loss is given as mean and
standard deviation over seeds; its gap is the mean of the differences to BF16 of the same seed, with a 95 % confidence
interval from Student's t.
"""

import json
import statistics
from pathlib import Path

from common import write_results
from conditions import Condition, folder_of, gap, parse_arguments, run_all

from altgrad_jax.tracking import read_metrics

FAMILY = ("e0m7", "e1m6", "e2m5", "e3m4:inf=0,nan=0", "e4m3:inf=0,nan=0", "e5m2:inf=0,nan=0", "e6m1", "e7m0")
CONDITIONS = {
    "bf16": Condition("configs/bf16.py:quick"),
    "hybrid": Condition("configs/hybrid.py:quick"),
    "e4m3": Condition("configs/format.py:e4m3,quick"),
    "e5m2": Condition("configs/e5m2.py:quick"),
    "e5m2_cast, dynamic loss scale": Condition("configs/e5m2_cast.py:quick"),
    "e5m2_cast, no loss scale": Condition("configs/e5m2_cast.py:quick", ("--config.train.loss_scale=1",)),
    **{name: Condition(f"configs/format.py:{name},quick") for name in FAMILY},
    "mxfp8": Condition("configs/mxfp8.py:quick"),
    "mxfp8 margin=1": Condition("configs/format.py:mxfp8 margin=1,quick"),
    "mixed": Condition("configs/mixed.py:quick"),
}
RATES = ("underflow", "overflow")
ROLES = ("activation", "weight", "gradient")


def main() -> None:
    """Runs what is missing, then reads all runs."""
    arguments, passed_on = parse_arguments(__doc__, CONDITIONS)
    run_all(arguments, CONDITIONS, passed_on)
    results = {name: collect(arguments.workdir, name, arguments.seeds) for name in arguments.conditions}
    if "bf16" in results:
        for row in results.values():
            row["gap_to_bf16"] = gap(row["val_loss"], results["bf16"]["val_loss"])
    write_results(f"{arguments.out}.json" if arguments.out else None, results)
    print(markdown(joined(results)))
    if arguments.out:
        plot(joined(results), Path(f"{arguments.out}.png"))


def collect(workdir: Path, name: str, seeds: list[int]) -> dict:
    """What a condition's runs found: one value a seed, and the diagnostics of every measured step, mean over seeds."""
    row: dict = {"status": [], "val_loss": [], "curves": [], "commands": []}
    measured: dict[int, dict[str, list[float]]] = {}
    for seed in seeds:
        folder = folder_of(workdir, name, seed)
        summary = json.loads((folder / "summary.json").read_text())
        manifest = json.loads((folder / "manifest.json").read_text())
        records = read_metrics(folder / "metrics.jsonl")
        row["status"].append(summary["status"])
        row["val_loss"].append(summary["final"].get("val/loss"))
        row["curves"].append([(r["step"], r["val/loss"]) for r in records if "val/loss" in r])
        row["commands"].append(" ".join(manifest["sessions"][0]["command"]))
        row["unigram_nats"] = manifest["corpus"]["unigram_nats"]
        wanted = ["grads/cosine", "grads/snr_db", *(f"quant/{role}/{rate}" for role in ROLES for rate in RATES)]
        for record in records:
            if "grads/cosine" in record:
                at = measured.setdefault(record["step"], {})
                for key in wanted:
                    if isinstance(record.get(key), float):
                        at.setdefault(key, []).append(record[key])
        worst = worst_layers(records)
        row.setdefault("worst_layer", []).append(worst)
    row["diagnostics"] = {
        step: {key: statistics.mean(values) for key, values in found.items()}
        for step, found in sorted(measured.items())
    }
    return row


def worst_layers(records: list[dict]) -> dict[str, tuple[str, float]]:
    """For each role, the layer that loses most to underflow in the last measured step; and the lowest cosine."""
    last = [r for r in records if "grads/cosine" in r][-1]
    found = {}
    for role in ROLES:
        rates = {k.split("/")[1]: v for k, v in last.items() if k.endswith(f"/{role}/underflow") and k.count("/") == 3}
        if rates:
            layer = max(rates, key=lambda name: rates[name])
            found[f"{role} underflow"] = (layer, rates[layer])
    cosines = {k.split("/")[1]: v for k, v in last.items() if k.startswith("grads/") and k.endswith("/cosine")}
    cosines = {layer: v for layer, v in cosines.items() if v == v and layer != "cosine"}
    if cosines:
        layer = min(cosines, key=lambda name: cosines[name])
        found["cosine"] = (layer, cosines[layer])
    return found


def joined(results: dict) -> dict:
    """Conditions whose losses agree to the last digit with every seed are one experiment, and one row: "e0m7, e1m6"."""
    names: dict[tuple, list[str]] = {}
    for name, row in results.items():
        names.setdefault(tuple(row["val_loss"]), []).append(name)
    return {", ".join(of_one): results[of_one[0]] for of_one in names.values()}


def markdown(results: dict) -> str:
    """The table: loss and gap, then the last measured step's gradient and rates."""
    lines = [
        "| recipe | validation loss | gap to bf16 (95 %) | gradient cosine | SNR, dB | underflow x / w / g, % |"
        " overflow x / w / g, % |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in results.items():
        losses = [loss for loss in row["val_loss"] if isinstance(loss, float)]
        spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
        difference, last = row.get("gap_to_bf16", {}), list(row["diagnostics"].values())[-1]
        half = difference.get("half_width")
        text = "" if difference.get("mean") is None else f"{difference['mean']:+.3f}"
        text += "" if half is None else f" ± {half:.3f}"
        keys = [[f"quant/{role}/{rate}" for role in ROLES] for rate in RATES]
        rates = [" / ".join(f"{100 * last[key]:.2g}" if key in last else "-" for key in of_rate) for of_rate in keys]
        snr = last.get("grads/snr_db")
        lines.append(
            f"| {name} | {statistics.mean(losses):.3f} ± {spread:.3f} | {text} | {last['grads/cosine']:.4f} |"
            f" {'' if snr is None else f'{snr:.1f}'} | {rates[0]} | {rates[1]} |"
        )
    return "\n".join(lines)


def plot(results: dict, path: Path) -> None:
    """Gap to BF16 with interval beside the gradient's cosine error, a row a condition."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [name for name in results if name != "bf16"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 0.34 * len(names) + 1.2), sharey=True)
    for y, name in enumerate(names):
        difference = results[name]["gap_to_bf16"]
        left.errorbar(
            difference["mean"], y, xerr=difference["half_width"], fmt="o", color="#0072B2", capsize=3, markersize=5
        )
        base = results["bf16"]["val_loss"]
        singles = [a - b for a, b in zip(results[name]["val_loss"], base, strict=True)]
        left.plot(singles, [y] * len(singles), "|", color="0.4", markersize=9)
        steps = results[name]["diagnostics"]
        for i, (step, found) in enumerate(steps.items()):
            right.plot(
                max(1 - found["grads/cosine"], 1e-6),
                y,
                "os^D"[i % 4],
                color=("#56B4E9", "#D55E00", "#000000", "#009E73")[i % 4],
                markersize=5,
                label=f"step {step}" if y == 0 else None,
            )
    left.axvline(0, color="0.6", linewidth=1)
    left.set_xscale("symlog", linthresh=0.05)
    left.set_xticks([-0.1, 0, 0.1, 1], ["-0.1", "0", "0.1", "1"])
    left.set_xlabel("validation loss above BF16, nats\n(dot: mean and 95 % interval; bars: seeds)")
    left.set_yticks(range(len(names)), names, fontsize=9)
    left.invert_yaxis()
    right.set_xscale("log")
    right.set_xlabel("1 - cosine between the gradient\nand the float32 gradient")
    right.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=140)


if __name__ == "__main__":
    main()
