"""The page: one HTML file with its data, its charts and one copy of Vega in it, that asks the network for nothing."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib import resources
from typing import Any

import altair
import jinja2
import vl_convert

from altgrad_jax.report import charts
from altgrad_jax.report.answer import answer, question
from altgrad_jax.report.cells import Table
from altgrad_jax.report.charts import Palette
from altgrad_jax.report.curves import gap_curves, loss_curves, rounded
from altgrad_jax.report.facts import facts
from altgrad_jax.report.failures import heat_maps
from altgrad_jax.report.groups import shortened
from altgrad_jax.report.results import other_windows, same_grids
from altgrad_jax.report.study import Comparison, Study

LOST_MAPS = {"energy lost", "underflow"}  # what a condition that rounds has, and one in 16 bits has not
EXPORTS = "window.altgrad = {embed: vegaEmbed};"


@dataclass(frozen=True)
class Document:
    """What the page, the Markdown and the CSV all say.

    Attributes:
      study: the runs in order.
      tables: by their keys.
      command: that made it.
    """

    study: Study
    tables: dict[str, Table]
    command: str


def render(document: Document) -> str:
    """The page's HTML."""
    study = document.study
    specs, data = _charts(study)
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_packaged), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    curves, optimizers = _names(study)
    palette = _palette(study)
    return environment.get_template("page.html.jinja").render(
        title=_title(study),
        question=question(study),
        answer=answer(study),
        facts=facts(study),
        study=study,
        missing=shortened(study.missing),
        tables=document.tables,
        notes=[*study.merged, *same_grids(study), *other_windows(study)],
        charts=specs,
        legend_curves=[(name, palette.curves.get(name, charts.INK)) for name in curves],
        legend_optimizers=[(name, " ".join(map(str, palette.dashes[name]))) for name in optimizers],
        heat_conditions=list(data["heat"]),
        heat_first=next((name for name, maps in data["heat"].items() if LOST_MAPS & maps.keys()), ""),
        runs_compared=[entry.number for entry in study.compared],
        css=_packaged("page.css"),
        script=_packaged("page.js"),
        vega=_vega(),
        payload=embedded({"specs": specs, "data": data}),
        command=document.command,
        made=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _packaged(name: str) -> str:
    return (resources.files("altgrad_jax.report") / name).read_text()


@cache
def _vega() -> str:
    """Vega, Vega-Lite and Vega-Embed in one script, of the version that Altair writes for."""
    wanted = ".".join(altair.SCHEMA_VERSION.lstrip("v").split(".")[:2])
    version = wanted if wanted in vl_convert.get_vegalite_versions() else None
    bundle: str = vl_convert.javascript_bundle(EXPORTS, vl_version=version)
    return bundle.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def embedded(value: Any) -> str:
    """JSON that can stand in a <script> of HTML whatever its texts are."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"), ensure_ascii=True)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _title(study: Study) -> str:
    names = [matrix.name for matrix in study.matrices]
    if names:
        return ", ".join(names)
    seeds = f"{study.seeds} seed" + ("s" if study.seeds != 1 else "")
    return f"{len(study.groups)} conditions, {seeds}"


def _names(study: Study) -> tuple[list[str], list[str]]:
    """(curves, optimizers), each once, in order."""
    return (
        list(dict.fromkeys(group.curve for group in study.groups)),
        list(dict.fromkeys(group.optimizer for group in study.groups)),
    )


def _palette(study: Study) -> Palette:
    curves, optimizers = _names(study)
    return Palette(curves, optimizers, study.baseline.curve if study.baseline else "")


def _charts(study: Study) -> tuple[dict[str, Any], dict[str, Any]]:
    """(name -> Vega-Lite specification, name -> data). A chart without data is left out."""
    curves, optimizers = _names(study)
    palette = _palette(study)
    losses, gaps = [c for c in loss_curves(study) if c.get("loss")], [c for c in gap_curves(study) if c.get("gap")]
    specs: dict[str, Any] = {}
    data: dict[str, Any] = {"curves": losses, "gap_curves": gaps, "heat": heat_maps(study)}
    if losses:
        specs["losses"] = charts.loss_chart(palette, _top(losses))
    if gaps:
        specs["gaps"] = charts.gap_chart(palette, *_bounds(gaps))
    data["final_gaps"] = _points(study.gaps)
    if data["final_gaps"]:
        shown = [name for name in curves if any(p["curve"] == name for p in data["final_gaps"])]
        specs["final_gaps"] = charts.interval_chart(
            "final_gaps", "gap to the baseline, nats per token", shown, optimizers
        )
    data["gains"] = _points(study.gains, -1.0)
    if data["gains"]:
        shown = [name for name in curves if any(p["curve"] == name for p in data["gains"])]
        others = [name for name in optimizers if any(p["optimizer"] == name for p in data["gains"])]
        specs["gains"] = charts.interval_chart("gains", "gain over AdamW, nats per token", shown, others)
    data["matrix"] = _matrix(study)
    if len(optimizers) > 1 and len(curves) > 1:
        sizes = sorted(abs(cell["gap"]) for cell in data["matrix"] if cell["gap"] is not None)
        # Coloured in full at the 80th percentile: one format that does not train leaves the others their colours.
        top = sizes[int(0.8 * (len(sizes) - 1))] if sizes else 0.0
        specs["matrix"] = charts.matrix_chart(curves, optimizers, top or 1.0)
    measures = {measure for maps in data["heat"].values() for measure in maps}
    specs |= {f"heat {m}": charts.heat_chart(m) for m in charts.HEAT if m in measures}
    return specs, data


def _top(losses: Sequence[dict[str, Any]]) -> float | None:
    """Where the loss axis ends: a little above the first losses; None if none goes beyond."""
    starts = sorted(curve["loss"][0] for curve in losses if curve["loss"][0] is not None)
    highest = max(v for curve in losses for v in curve["high"] if v is not None)
    top = 1.15 * starts[len(starts) // 2]
    return rounded(top) if highest > top else None


def _bounds(gaps: Sequence[dict[str, Any]]) -> tuple[float | None, float | None]:
    """Where the gap axis ends: with the gaps themselves, whose intervals of two seeds may be ten times as wide."""
    means = [0.0, *(v for curve in gaps for v in curve["gap"] if v is not None)]
    margin = 0.15 * max(max(means) - min(means), 1e-6)
    return rounded(min(means) - margin), rounded(max(means) + margin)


def _points(comparisons: Sequence[Comparison], sign: float = 1.0) -> list[dict[str, Any]]:
    points = []
    for c in comparisons:
        d = c.difference
        if math.isnan(d.mean):
            continue
        ends = sorted((sign * d.low, sign * d.high)) if d.has_interval else (math.nan, math.nan)
        points.append(
            {
                "condition": c.group.name, "curve": c.group.curve, "optimizer": c.group.optimizer, "seeds": d.n,
                "mean": rounded(sign * d.mean), "low": rounded(ends[0]), "high": rounded(ends[1]),
                "p": rounded(c.p_holm),
            }
        )  # fmt: skip
    return points


def _matrix(study: Study) -> list[dict[str, Any]]:
    cells = []
    for group in study.groups:
        d = study.gap(group)
        known = not math.isnan(d.mean)
        baseline = group is study.baseline
        short = "0" if baseline else format(d.mean, "+.3f").replace("-", "−") if known else group.status
        ends = f" [{d.low:+.4f}, {d.high:+.4f}]" if d.has_interval else ""
        cells.append(
            {
                "condition": group.name, "curve": group.curve, "optimizer": group.optimizer, "status": group.status,
                "gap": rounded(d.mean) if known else 0 if baseline else None, "short": short,
                "label": "baseline" if baseline else f"{d.mean:+.4f}{ends}" if known else "no loss",
            }
        )  # fmt: skip
    return cells
