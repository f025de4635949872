"""Loss curves of finished runs, read from their metrics.jsonl.

python benchmarks/plot_losses.py runs/quick [runs/other ...] --out=docs/images/losses.png
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from altgrad_jax.data.cache import open_cache
from altgrad_jax.tracking import read_metrics

# Okabe and Ito's palette, told apart by colour-blind readers too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")


def draw(axes: plt.Axes, run: Path) -> None:
    """One run: training loss thin, validation loss with marks, and what the losses are to be compared with."""
    records = read_metrics(run / "metrics.jsonl")
    manifest = json.loads((run / "manifest.json").read_text())
    for key, style, label in (
        ("train/loss", {"linewidth": 0.7, "alpha": 0.6}, "training loss, each step"),
        ("val/loss", {"linewidth": 1.6, "marker": "o", "markersize": 3}, "validation loss"),
    ):
        points = [(r["step"], r[key]) for r in records if key in r]
        axes.plot(*zip(*points, strict=True), color=COLOURS[key == "val/loss"], label=label, **style)
    cache = open_cache(manifest["corpus"]["cache"])
    unigram = cache.split_header("validation").unigram_nats
    axes.axhline(unigram, color="0.45", linestyle="--", linewidth=1)
    axes.annotate("unigram entropy", (records[-1]["step"], unigram), ha="right", va="bottom", fontsize=8, color="0.35")
    floor = cache.entropy_floor("validation")
    if floor is not None:
        axes.axhline(floor, color=COLOURS[2], linestyle="--", linewidth=1)
        axes.annotate("entropy floor", (0, floor), ha="left", va="bottom", fontsize=8, color=COLOURS[2])
    axes.set_title(
        f"{manifest['corpus']['source']}, {manifest['parameters']['total'] / 1e6:.1f} M parameters", fontsize=10
    )
    axes.set_xlabel("step")
    axes.set_ylabel("nats per token")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)


def main() -> None:
    """Draws the runs side by side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="work directories")
    parser.add_argument("--out", required=True, help="picture to write; the suffix chooses the format")
    arguments = parser.parse_args()
    figure, axes = plt.subplots(1, len(arguments.runs), figsize=(4.6 * len(arguments.runs), 3.4), squeeze=False)
    for one, run in zip(axes[0], arguments.runs, strict=True):
        draw(one, run)
    figure.tight_layout()
    figure.savefig(arguments.out, dpi=140)


if __name__ == "__main__":
    main()
