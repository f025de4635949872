"""Where each format fails first: what crossed a threshold, layers over time, which format a layer could have."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from altgrad_jax.diagnostics.attribution import THRESHOLDS, Failure, first_failures, training_of
from altgrad_jax.report.aliases import formats_of
from altgrad_jax.report.cells import MISSING, Cell, Row, Table, number, share, text
from altgrad_jax.report.conditions import ADAMW
from altgrad_jax.report.curves import rounded
from altgrad_jax.report.groups import Group
from altgrad_jax.report.results import numbers
from altgrad_jax.report.runs import Run, is_number
from altgrad_jax.report.study import Study

COLUMNS = 24  # of a heat map
CELLS = 400_000  # of all heat maps together
DIGITS = 3
ROLES = ("weight", "activation", "gradient", "update")
# What heat maps show.
MEASURES = ("energy lost", "sum lost", "underflow", "overflow", "gradient cosine", "stall")
SENSITIVE = 0.01  # nats that rounding one operand of one layer may cost

Place = tuple[str, str]  # layer, role


def place_of(key: str) -> tuple[str, Place] | None:
    """(measure, (layer, role)) of a metric's name, None of one that no heat map shows."""
    match key.split("/"):
        case ["quant", layer, role, ("underflow" | "overflow") as measure]:
            return measure, (layer, role)
        case ["quant", layer, role, ("energy_lost" | "sum_lost") as measure]:
            return measure.replace("_", " "), (layer, role)
        case ["grads", layer, "cosine"]:
            return "gradient cosine", (layer, "gradient")
        case ["weights", layer, "stall"]:
            return "stall", (layer, "update")
    return None


def measured(run: Run) -> dict[str, dict[Place, dict[int, float]]]:
    """measure -> place -> step -> value."""
    found: dict[str, dict[Place, dict[int, float]]] = {}
    known: dict[str, tuple[str, Place] | None] = {}
    for record in run.records:
        for key, value in record.items():
            if key not in known:
                known[key] = place_of(key)
            if (place := known[key]) is not None and is_number(value):
                found.setdefault(place[0], {}).setdefault(place[1], {})[record["step"]] = float(value)
    return found


def network_order(places: Iterable[Place]) -> list[Place]:
    """Places from the network's input to its output, and within a layer as a step goes."""

    def order(place: Place) -> tuple:
        layer, role = place
        parts = layer.split(".")
        block = int(parts[1]) if parts[0] == "blocks" and len(parts) > 2 and parts[1].isdecimal() else -1
        within = [n for n in ("norm_1", "attn.qkv", "attn.proj", "norm_2", "mlp.up", "mlp.down") if n in layer]
        part = ("norm_1", "attn.qkv", "attn.proj", "norm_2", "mlp.up", "mlp.down").index(within[0]) if within else 9
        first = 0 if layer in ("wte", "wpe") else 1 if block >= 0 else 2
        return first, block, part, layer, ROLES.index(role) if role in ROLES else len(ROLES), role

    return sorted(places, key=order)


def heat_maps(study: Study) -> dict[str, dict[str, dict[str, Any]]]:
    """condition -> measure -> {"rows": places, "steps": last step of each column, "values": [rows][columns]}.

    Values are means over the seeds and over the records that fall into a column.
    """
    found = {group.name: [measured(entry.run) for entry in group.entries] for group in study.groups}
    lines = sum(len({p for run in runs for p in run.get(m, {})}) for runs in found.values() for m in MEASURES)
    columns = max(4, min(COLUMNS, CELLS // max(1, lines)))
    return {
        name: maps
        for name, runs in found.items()
        if (maps := {m: one for m in MEASURES if (one := _heat_map([run.get(m, {}) for run in runs], columns))})
    }


def _heat_map(runs: Sequence[dict[Place, dict[int, float]]], columns: int) -> dict[str, Any] | None:
    steps = sorted({step for run in runs for series in run.values() for step in series})
    if not steps:
        return None
    width = math.ceil(len(steps) / columns)
    ends = [steps[min(i + width, len(steps)) - 1] for i in range(0, len(steps), width)]
    column = {step: i // width for i, step in enumerate(steps)}
    places = network_order({place for run in runs for place in run})
    values = []
    for place in places:
        cells: dict[int, list[float]] = defaultdict(list)
        for run in runs:
            for step, value in run.get(place, {}).items():
                if math.isfinite(value):
                    cells[column[step]].append(value)
        means = [sum(cells[i]) / len(cells[i]) if i in cells else math.nan for i in range(len(ends))]
        values.append([rounded(value, DIGITS) for value in means])
    kept = [i for i, row in enumerate(values) if any(value is not None for value in row)]
    names = [" · ".join(places[i]) for i in kept]
    return {"rows": names, "steps": ends, "values": [values[i] for i in kept]} if kept else None


def run_failures(run: Run) -> list[Failure]:
    """The first crossings of a run, in the order in which they happened."""
    config = run.manifest.get("config")
    optimizer = config.get("optimizer") if isinstance(config, dict) else None
    return first_failures(run.records, training_of(optimizer if isinstance(optimizer, dict) else {}))


def first_failure_table(study: Study) -> Table:
    """Of each group what crossed a threshold first, in the run where it came earliest, and how many crossed at all."""
    rows = []
    for group in study.groups:
        by_run = [(entry, run_failures(entry.run)) for entry in group.entries]
        failed = [(first.step, entry.number, first) for entry, found in by_run for first in found[:1]]
        kinds = Counter(kind for _, found in by_run for kind in {f.kind for f in found})
        if failed:
            step, _, first = min(failed, key=lambda one: one[:2])
            sign = "not finite" if first.kind == "loss" else f"{first.threshold:g}"
            cells = (
                number(float(step), ",.0f"),
                text(first.layer),
                text(first.role),
                text(first.kind),
                number(first.value, ".4g"),
                text(sign),
            )
        else:
            cells = (Cell(MISSING),) * 6
        summary = ", ".join(f"{kind} {n}/{len(group.entries)}" for kind, n in sorted(kinds.items())) or "none"
        rows.append(Row(group.name, (*cells, text(summary)), numbers(group.entries)))
    columns = ("step", "layer", "role", "kind", "value", "threshold", "kinds seen (runs)")
    limits = ", ".join(f"{kind} {limit:g}" for kind, limit in THRESHOLDS.items() if math.isfinite(limit))
    note = (
        "The first crossing of a threshold in any seed, by step and then in the order of a step (weight, activation,"
        f" gradient, update). Thresholds: {limits}; gradient is a cosine and fails below; underflow is judged by what"
        " a tensor loses to zero, of its energy or, one-sided, of its sum; a stall counts after warm-up,"
        " and only of weights that the optimizer keeps on the grid. “None” means that nothing measured crossed:"
        " what was not measured is not named."
    )
    return Table("first_failures", "What crossed a threshold first", "condition", columns, tuple(rows), note)


def attribution_table(study: Study, most: int = 12) -> Table:
    """Every kind of failure of every group: how many layers, where it began, over all seeds."""
    rows = []
    for group in study.groups:
        found = [(f, entry) for entry in group.entries for f in run_failures(entry.run)]
        for kind in dict.fromkeys(f.kind for f, _ in found):
            alike = sorted(((f, e) for f, e in found if f.kind == kind), key=lambda pair: pair[0].step)
            first = alike[0][0]
            places = list(dict.fromkeys(" ".join(filter(None, (f.layer, f.role))) or "loss" for f, _ in alike))
            more = f" and {len(places) - most} more" if len(places) > most else ""
            cells = (
                text(group.name),
                text(kind),
                number(float(first.step), ",.0f"),
                number(float(len(places)), ".0f"),
                number(float(len({e.number for _, e in alike})), ".0f"),
                text(", ".join(places[:most]) + more),
            )
            linked = tuple(dict.fromkeys(e.number for _, e in alike))
            rows.append(Row(f"{group.name}: {kind}", cells, linked))
    columns = ("condition", "kind", "first step", "places", "runs with it", "in the order in which they crossed")
    note = "Per kind of failure: the layers and roles that crossed its threshold in any seed, earliest first."
    return Table("attribution", "Failure attribution", "failure", columns, tuple(rows), note, folded=True)


@dataclass(frozen=True)
class Evidence:
    """What one format did in one layer: the worst over roles and seeds of the last records; NaN where not measured.

    `energy_lost` and `sum_lost` are what became zero, as `diagnostics.quantisation` has it.
    """

    group: Group
    bits: int
    mantissa_bits: int
    energy_lost: float
    sum_lost: float
    overflow: float
    cosine: float
    sensitivity: float
    lost_runs: int

    @property
    def objection(self) -> str:
        """The first threshold that it fails; "" if it passes those measured."""
        if self.lost_runs:
            return "a run was lost"
        if self.energy_lost > THRESHOLDS["underflow"]:
            return f"energy lost {self.energy_lost:.2g}"
        if self.sum_lost > THRESHOLDS["one-sided underflow"]:
            return f"sum lost {self.sum_lost:.2g}"
        if self.overflow > THRESHOLDS["overflow"]:
            return f"overflow {self.overflow:.2g}"
        if self.cosine < THRESHOLDS["gradient"]:
            return f"cosine {self.cosine:.3f}"
        if self.sensitivity > SENSITIVE:
            return f"sensitivity {self.sensitivity:.2g} nats"
        if all(math.isnan(v) for v in (self.energy_lost, self.sum_lost, self.overflow, self.cosine, self.sensitivity)):
            return "not measured"
        return ""


def layer_evidence(study: Study) -> dict[str, list[Evidence]]:
    """layer -> the evidence of each group that has it in a format, with AdamW where AdamW was tried."""
    candidates = [group for group in study.groups if formats_of(group.text)]
    plain = [group for group in candidates if group.optimizer == ADAMW]
    found: dict[str, list[Evidence]] = defaultdict(list)
    for group in plain or candidates:
        formats = formats_of(group.text).values()
        bits = max(fmt.bits for fmt in formats)
        mantissa = min(fmt.mantissa_bits for fmt in formats)
        worst: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for entry in group.entries:
            for layer, what, value in _last_of_layers(entry.run):
                worst[layer][what].append(value)
        for layer, values in worst.items():
            if "energy_lost" not in values and "overflow" not in values and "sensitivity" not in values:
                continue  # the layer is not in a format
            found[layer].append(
                Evidence(
                    group,
                    bits,
                    mantissa,
                    max(values.get("energy_lost", [math.nan])),
                    max(values.get("sum_lost", [math.nan])),
                    max(values.get("overflow", [math.nan])),
                    min(values.get("cosine", [math.nan])),
                    max(values.get("sensitivity", [math.nan])),
                    group.lost,
                )
            )
    return {layer: found[layer] for layer, _ in network_order((layer, "weight") for layer in found)}


def _last_of_layers(run: Run) -> list[tuple[str, str, float]]:
    """(layer, what, last value) of what a layer's format is judged by."""
    last: dict[str, float] = {}
    for record in run.records:
        last.update({k: float(v) for k, v in record.items() if k.count("/") >= 2 and is_number(v)})
    found: list[tuple[str, str, float]] = []
    for key, value in last.items():
        if math.isnan(value):
            continue
        match key.split("/"):
            case ["quant", layer, _, "overflow"]:
                found.append((layer, "overflow", value))
            case ["quant", layer, _, ("energy_lost" | "sum_lost") as what]:
                found.append((layer, what, value))
            case ["grads", layer, "cosine"]:
                found.append((layer, "cosine", value))
            case ["sensitivity", layer, _]:
                found.append((layer, "sensitivity", value))
    return found


def sweet_spots(study: Study) -> Table:
    """Of each layer the narrowest, then most faithful format whose evidence passes every threshold."""
    rows = []
    for layer, evidence in layer_evidence(study).items():
        passing = [e for e in evidence if not e.objection]
        # Among formats as wide, the one whose gradients are nearest to float32's; then the one that loses less.
        passing.sort(key=lambda e: (e.bits, -_or(e.cosine, -1.0), _or(e.energy_lost, 1.0)))
        best = passing[0] if passing else None
        rejected = [f"{e.group.curve}: {e.objection}" for e in evidence if e.objection]
        cells = (
            text(best.group.curve if best else "none of those tried"),
            number(float(best.bits), ".0f") if best else Cell(MISSING),
            number(best.cosine) if best else Cell(MISSING),
            share(best.energy_lost) if best else Cell(MISSING),
            share(best.sum_lost) if best else Cell(MISSING),
            share(best.overflow) if best else Cell(MISSING),
            number(best.sensitivity, "+.4f") if best else Cell(MISSING),
            text(", ".join(e.group.curve for e in passing[1:])),
            text("; ".join(rejected)),
        )
        entries = best.group.entries if best else tuple(entry for e in evidence for entry in e.group.entries)
        rows.append(Row(layer, cells, numbers(entries)))
    limits = ", ".join(
        (
            f"energy lost at most {THRESHOLDS['underflow']:g}",
            f"sum lost at most {THRESHOLDS['one-sided underflow']:g}",
            f"overflow at most {THRESHOLDS['overflow']:g}",
            f"cosine of the layer's gradient at least {THRESHOLDS['gradient']:g}",
            f"sensitivity at most {SENSITIVE:g} nats, no run lost",
        )
    )
    note = (
        f"The format with the fewest bits whose evidence passes ({limits}); of several the one with the highest cosine."
        " Evidence is the worst over roles and seeds in the last record; what was not measured does not count against a"
        " format. Where all layers were rounded together, a layer's cosine also carries what the others did to the"
        " gradient: it is evidence, no proof that the layer alone would do as well."
    )
    columns = (
        "format",
        "bits",
        "cosine",
        "energy lost",
        "sum lost",
        "overflow",
        "sensitivity",
        "also pass",
        "do not pass",
    )
    return Table("sweet_spots", "A format for each layer", "layer", columns, tuple(rows), note)


def _or(value: float, otherwise: float) -> float:
    return otherwise if math.isnan(value) else value
