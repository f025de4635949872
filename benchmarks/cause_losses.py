"""Reads the sweeps of configs/causes.py: which layer, operand, scale or vocabulary a loss is due to.

    python benchmarks/cause_losses.py runs/output_layer-tiny runs/control-tiny ... --out=docs/results/causes.json
    python benchmarks/cause_losses.py runs/more --before=docs/results/causes.json --out=docs/results/causes.json

Writes every condition's last validation loss, those of an earlier result (--before) first, and comparisons over shared
seeds: mean, 95 % interval, p of the paired t test and of the equivalence test within 0.05 nats
(altgrad_jax/report/statistics.py), Holm-corrected over the table that they stand in. Prints the tables as Markdown. A
gap is to BF16 with AdamW of the same sizes, seed and rate, and a loss scale of 1.
"""

import argparse
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from common import save_results
from output_gradient import largest_vocabulary

from altgrad_jax.report.statistics import BETTER, WORSE, Tested, decide, shared_differences
from altgrad_jax.tracking import read_metrics

FIRST_STEP = 1
GRADIENT = "quant/lm_head/gradient/underflow"
CONTROL = "e8m7"
VOCABULARIES = ("vocabulary-tiny", "e3m4-tiny")  # sweeps of one format in the output layer alone
SIZES = ("learning_rate", "width", "vocabulary", "batch")  # in which a condition and its base agree
BASE = {"recipe": "bf16", "optimizer": "adamw", "loss_scale": "1"}
SHOWN = ("recipe", "layers", "vocabulary", "batch", "loss_scale")


@dataclass(frozen=True)
class Run:
    """One condition with one seed.

    Attributes:
      sweep: its matrix.
      recipe: its name, `optimizer` and `layers` likewise.
      learning_rate: in the optimizer's unit.
      width: of the model.
      vocabulary: of the model, `batch` in windows a step, `loss_scale` as configured.
      seed: of weights and batches.
      status: how it ended.
      val_loss: the last; None where it is not finite.
      zeros: share of the output layer's gradient that the first step rounded to zero; None where it is not rounded.
    """

    sweep: str
    recipe: str
    optimizer: str
    layers: str
    learning_rate: float
    width: int
    vocabulary: int
    batch: int
    loss_scale: str
    seed: int
    status: str
    val_loss: float | None
    zeros: float | None


def read(folder: Path) -> Run:
    """A condition's folder."""
    summary = json.loads((folder / "summary.json").read_text())
    manifest = json.loads((folder / "manifest.json").read_text())
    facts, config = manifest["condition"], manifest["config"]
    loss = summary["final"].get("val/loss")
    records = [r for r in read_metrics(folder / "metrics.jsonl") if r["step"] == FIRST_STEP]
    zeros = [r[GRADIENT] for r in records if GRADIENT in r]
    return Run(
        **{key: facts[key] for key in ("recipe", "optimizer", "layers", "learning_rate", "seed")},
        sweep=facts["matrix"],
        width=config["model"]["n_embd"],
        vocabulary=config["model"]["vocab_size"],
        batch=config["train"]["batch_size"],
        loss_scale=config["train"]["loss_scale"],
        status=summary["status"],
        val_loss=loss if isinstance(loss, float) and math.isfinite(loss) else None,
        zeros=zeros[0] if zeros else None,
    )


def read_before(path: Path) -> tuple[list[str], list[Run]]:
    """Commands and runs of a file that this program wrote."""
    results = json.loads(path.read_text())["results"]
    return results["commands"], [Run(**run) for run in results["runs"]]


def losses(runs: Iterable[Run], **facts: Any) -> dict[int, float]:
    """Seed -> last validation loss, of the runs that have one and all of the facts.

    Raises:
      ValueError: two runs have one seed.
    """
    found: dict[int, float] = {}
    for run in runs:
        if run.val_loss is None or any(getattr(run, fact) != value for fact, value in facts.items()):
            continue
        if run.seed in found:
            raise ValueError(f"two runs of seed {run.seed} with {facts}")
        found[run.seed] = run.val_loss
    return found


def gaps(runs: list[Run], sweep: str) -> list[dict[str, Any]]:
    """Of a sweep's conditions with AdamW to BF16 on the same seeds, its own or else other sweeps'; one family."""
    own = [run for run in runs if run.sweep == sweep and run.optimizer == "adamw"]
    others = {(_facts(run), run.seed): run for run in reversed(runs) if _is_base(run)}  # the first sweep's that has it
    bases = [run for run in own if _is_base(run)] or list(others.values())
    rows, differences = [], []
    for like in {_facts(run): run for run in own if not _is_base(run)}.values():
        of_base = {fact: getattr(like, fact) for fact in SIZES}
        of_condition = [run for run in own if _facts(run) == _facts(like)]
        zeros = [run.zeros for run in of_condition if run.zeros is not None]
        rows.append({fact: getattr(like, fact) for fact in SHOWN} | {"zeros": mean(zeros) if zeros else None})
        differences.append(shared_differences(losses(of_condition), losses(bases, **of_base)))
    return [row | figures(tested) for row, tested in zip(rows, decide(differences), strict=True)]


def _facts(run: Run) -> tuple[Any, ...]:
    return tuple(getattr(run, fact) for fact in ("recipe", "layers", "loss_scale", *SIZES))


def _is_base(run: Run) -> bool:
    return all(getattr(run, fact) == value for fact, value in BASE.items())


def control(runs: list[Run]) -> dict[str, list[dict[str, Any]]]:
    """The tables registered in docs/results/formats8.md: gains of `relative` less the control's, and equivalences."""
    own = [run for run in runs if run.sweep == "control-tiny"]
    recipes = sorted({run.recipe for run in own if run.optimizer == "relative"})
    adamw = {recipe: losses(own, recipe=recipe, optimizer="adamw") for recipe in ("bf16", *recipes)}
    relative = {recipe: losses(own, recipe=recipe, optimizer="relative") for recipe in recipes}
    gain = {r: {seed: adamw[r][seed] - relative[r][seed] for seed in adamw[r] if seed in relative[r]} for r in recipes}

    nothing = dict.fromkeys(adamw["bf16"], 0.0)
    eight_bits = ("e3m4", "e4m3", "e5m2")
    return {
        "primary: gain of relative less the control's": table(gain, gain[CONTROL], "e3m4", gains=True),
        "secondary: gain of relative less the control's": table(gain, gain[CONTROL], "e4m3", "e5m2", gains=True),
        "gain of relative over AdamW": table(gain, nothing, *eight_bits, CONTROL, gains=True),
        "the control's gap to BF16 with AdamW": table(adamw, adamw["bf16"], CONTROL),
        "gap to BF16 with AdamW": table(adamw, adamw["bf16"], "e4m3", "e5m2"),
        "not registered: gap to BF16 with AdamW": table(adamw, adamw["bf16"], "e3m4"),
        "not registered: relative's gap to relative in the control": table(relative, relative[CONTROL], *eight_bits),
    }


def table(
    of: Mapping[str, Mapping[int, float]], reference: Mapping[int, float], *names: str, gains: bool = False
) -> list[dict[str, Any]]:
    """One family: the losses (or gains, which are better above zero) of each name less the reference, seed by seed."""
    tested = decide([shared_differences(of[name], reference) for name in names])
    rows = [{"recipe": name} | figures(one) for name, one in zip(names, tested, strict=True)]
    other = {WORSE: BETTER, BETTER: WORSE} if gains else {}
    return [row | {"verdict": other.get(row["verdict"], row["verdict"])} for row in rows]


def figures(tested: Tested) -> dict[str, Any]:
    """A comparison's figures."""
    found = {"n": tested.found.n, "mean": tested.found.mean, "low": tested.found.low, "high": tested.found.high}
    found |= {"p_holm": tested.p, "p_equivalent_holm": tested.p_equivalent, "family": tested.family}
    finite = {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in found.items()}
    return finite | {"verdict": tested.words}


def markdown(rows: list[dict[str, Any]]) -> str:
    """A table of comparisons."""
    heads = [key for key in rows[0] if key not in ("mean", "low", "high", "p_holm", "p_equivalent_holm", "verdict")]
    lines = [f"| {' | '.join([*heads, 'difference', 'p', 'p of equivalence', 'verdict'])} |"]
    lines.append("|" + "---|" * (len(heads) + 4))
    for one in rows:
        said = f"{one['mean']:+.3f}"
        said += "" if one["low"] is None else f" [{one['low']:+.3f}, {one['high']:+.3f}]"
        ps = ["-" if one[key] is None else f"{one[key]:.2g}" for key in ("p_holm", "p_equivalent_holm")]
        cells = [f"{one[key]:.3g}" if isinstance(one[key], float) else str(one[key]) for key in heads]
        lines.append(f"| {' | '.join([*cells, said, *ps, one['verdict']])} |")
    return "\n".join(lines)


PLACES = {
    "everywhere": ("", "all"),
    "in all blocks, output layer in 16 bits": ("", "blocks"),
    "x and w everywhere, g in 16 bits": ("-xw", "all"),
    "output layer alone": ("", "lm_head"),
    "output layer's gradient alone": ("-g", "lm_head"),
    "... with a scale for every 32 entries": ("-g-blocks", "lm_head"),
    "... rounded stochastically": ("-g-stochastic", "lm_head"),
}
COLOURS = {"e0m7": "#D55E00", "e2m5": "#0072B2", "e3m4": "#009E73"}


def plot(places: list[dict[str, Any]], vocabularies: list[dict[str, Any]], path: Path) -> None:
    """Gap to BF16 by where a format is used; and by vocabulary, over that from which 1 / V is rounded to zero."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10.4, 3.6), gridspec_kw={"width_ratios": (1.2, 1)})
    found = {(row["recipe"], row["layers"]): row for row in places}
    for shift, fmt in ((-0.14, "e0m7"), (0.14, "e2m5")):
        for y, (way, layers) in enumerate(PLACES.values()):
            _point(left, found[fmt + way, layers], y + shift, fmt, horizontal=True)
        left.plot([], [], "o", color=COLOURS[fmt], label=fmt)
    left.set_yticks(range(len(PLACES)), list(PLACES), fontsize=9)
    left.invert_yaxis()
    left.axvline(0, color="0.6", linewidth=1)
    left.set_xlabel("validation loss above BF16, nats (mean, 95 %)")
    left.legend(frameon=False, fontsize=9, loc="lower right")
    for fmt in COLOURS:
        rows = [row for row in [*vocabularies, *places] if (row["recipe"], row["layers"]) == (fmt, "lm_head")]
        rows.sort(key=lambda row: row["vocabulary"])
        xs = [row["vocabulary"] / largest_vocabulary(fmt) for row in rows]
        right.plot(xs, [row["mean"] for row in rows], color=COLOURS[fmt], linewidth=1)
        for x, row in zip(xs, rows, strict=True):
            _point(right, row, x, fmt, horizontal=False)
            right.annotate(str(row["vocabulary"]), (x, row["mean"]), (4, -11), textcoords="offset points", fontsize=7)
        right.plot([], [], "o-", color=COLOURS[fmt], label=f"{fmt}: {largest_vocabulary(fmt):.0f}")
    right.axvline(1, color="0.6", linewidth=1, linestyle="--")
    right.axhline(0, color="0.6", linewidth=1)
    right.set_xscale("log", base=2)
    right.set_xlabel("vocabulary (at the points), over that from which\n1/V is rounded to zero beside a 1 (legend)")
    right.set_ylabel("nats above BF16, format in the output layer alone", fontsize=8)
    right.legend(frameon=False, fontsize=9)
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=140)


def _point(axes: Any, row: dict[str, Any], at: float, fmt: str, *, horizontal: bool) -> None:
    half = row["high"] - row["mean"]
    x, y = (row["mean"], at) if horizontal else (at, row["mean"])
    error = {"xerr" if horizontal else "yerr": half}
    axes.errorbar(x, y, **error, fmt="o", color=COLOURS[fmt], capsize=3, markersize=5)


def main() -> None:
    """Reads, compares, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, help="work directories of sweeps")
    parser.add_argument("--before", type=Path, help="JSON file of earlier results, which are kept")
    parser.add_argument("--out", help="JSON file of the results")
    parser.add_argument("--picture", type=Path, help="PNG of the gaps by place and by vocabulary")
    given = parser.parse_args()
    commands, runs = read_before(given.before) if given.before else ([], [])
    runs += [read(path.parent) for folder in given.folders for path in sorted(folder.glob("*/summary.json"))]
    commands += [" ".join(json.loads((folder / "matrix.json").read_text())["command"]) for folder in given.folders]
    tables = {name: gaps(runs, name) for name in dict.fromkeys(run.sweep for run in runs) if "control" not in name}
    if any(run.sweep == "control-tiny" for run in runs):
        tables |= control(runs)
    for name, rows in tables.items():
        print(f"{name}\n\n{markdown(rows)}\n")
    if given.picture:
        plot(tables["output_layer-tiny"], [row for name in VOCABULARIES for row in tables.get(name, [])], given.picture)
    found = {"commands": commands, "comparisons": tables}
    save_results(given.out, found | {"runs": [asdict(run) for run in runs]})


if __name__ == "__main__":
    main()
