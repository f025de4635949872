"""The charts, as Altair makes them. The page brings their data ("curves", "gap_curves", ...) and Vega draws them.

What the reader can change is a parameter of the chart: `hidden_curves` and `hidden_optimizers` (lists of names),
`kind` (of losses). Colours of text and axes are `currentColor`, so that a chart follows the page into the dark and onto
paper; every chart is as wide as its place.
"""

from collections.abc import Sequence
from typing import Any

import altair as alt

from altgrad_jax.diagnostics.attribution import THRESHOLDS

# Okabe and Ito's colours, told apart by colour-blind readers too, with greys and browns after them.
COLOURS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#8C6D46", "#7A68C8", "#B03A48", "#5F8A3C"),
    *("#8A8A8A", "#2F9E9E", "#C77FE0", "#A08A00"),
)
DASHES = ([1, 0], [6, 3], [2, 2], [8, 3, 2, 3], [10, 4], [1, 3], [4, 1])
INK = "currentColor"
FONT = "system-ui, sans-serif"  # one that a canvas knows too: Vega measures texts there
HEAT = {
    # measure -> (domain, scheme, reversed, format): full colour where the threshold of failure is
    "energy lost": ((0.0, THRESHOLDS["underflow"]), "orangered", False, ".3~g"),
    "sum lost": ((0.0, THRESHOLDS["one-sided underflow"]), "orangered", False, ".3~g"),
    "underflow": ((0.0, 1.0), "orangered", False, ".3~g"),  # of elements: no share of them is a failure by itself
    "overflow": ((0.0, THRESHOLDS["overflow"]), "orangered", False, ".3~g"),
    "gradient cosine": ((THRESHOLDS["gradient"], 1.0), "orangered", True, ".4~g"),
    "stall": ((0.0, THRESHOLDS["stall"]), "orangered", False, ".3~g"),
}

Spec = dict[str, Any]


class Palette:
    """The colour of each curve and the dash of each optimizer, the same in every chart."""

    def __init__(self, curves: Sequence[str], optimizers: Sequence[str], baseline: str):
        """Colours in the order given; the baseline's is that of the text."""
        others = [curve for curve in curves if curve != baseline]
        self.curves = {baseline: INK} if baseline in curves else {}
        self.curves |= {curve: COLOURS[i % len(COLOURS)] for i, curve in enumerate(others)}
        self.dashes = {name: DASHES[i % len(DASHES)] for i, name in enumerate(optimizers)}

    def colour(self) -> alt.Color:
        """The encoding; the page has the legend."""
        scale = alt.Scale(domain=list(self.curves), range=list(self.curves.values()))
        return alt.Color("curve:N", scale=scale, legend=None)

    def dash(self) -> alt.StrokeDash:
        """Likewise."""
        scale = alt.Scale(domain=list(self.dashes), range=list(self.dashes.values()))
        return alt.StrokeDash("optimizer:N", scale=scale, legend=None)


def _theme(chart: Any) -> Spec:
    """The chart as JSON, in the page's own colours."""
    axis = alt.AxisConfig(
        labelColor=INK, titleColor=INK, domainColor=INK, tickColor=INK, gridColor=INK, gridOpacity=0.12, labelLimit=170,
        domainOpacity=0.4, tickOpacity=0.4, titleFontWeight="normal", labelFontSize=11, titleFontSize=11,
        labelOverlap="greedy",
    )  # fmt: skip
    legend = alt.LegendConfig(labelColor=INK, titleColor=INK, titleFontWeight="normal", labelFontSize=11)
    made = chart.configure(background="transparent", font=FONT, axis=axis, legend=legend)
    made = made.configure_view(stroke=None)
    spec: Spec = made.to_dict()
    return spec


def _shown(chart: Any) -> Any:
    """Only what the legend has not hidden."""
    return chart.transform_filter(
        "indexof(hidden_curves, datum.curve) < 0 && indexof(hidden_optimizers, datum.optimizer) < 0"
    )


def _hiding(chart: Any) -> Any:
    return chart.add_params(alt.param(name="hidden_curves", value=[]), alt.param(name="hidden_optimizers", value=[]))


def _bands() -> alt.Parameter:
    return alt.param(name="bands", value=True)


def _scale(**options: Any) -> alt.Scale:
    """A scale with those options that are not None."""
    return alt.Scale(**{name: value for name, value in options.items() if value is not None})


def _x() -> alt.X:
    axis = alt.Axis(grid=False, tickCount=6)
    return alt.X("step:Q", title="step", scale=_scale(type="linear", nice=False), axis=axis)


def _where() -> list[alt.Tooltip]:
    return [
        alt.Tooltip("condition:N"),
        alt.Tooltip("step:Q", format=","),
        alt.Tooltip("tokens:Q", format=","),
        alt.Tooltip("seconds:Q", format=",.1f", title="training time, s"),
    ]


def loss_chart(palette: Palette, top: float | None) -> Spec:
    """Losses of data "curves" over x, the range of the seeds as a band.

    Args:
      palette: colours and dashes.
      top: where the loss axis ends; None: with the data.
    """
    y_scale = _scale(type="log", nice=False, domainMax=top)
    y = alt.Y("loss:Q", title="loss, nats per token", scale=y_scale, axis=alt.Axis(tickCount=6))
    base = alt.Chart(alt.NamedData(name="curves")).transform_filter("datum.kind === kind")
    base = _shown(base)
    band = base.mark_area(opacity=alt.ExprRef("bands ? 0.15 : 0"), clip=True).encode(
        x=_x(), y=alt.Y("low:Q", scale=y_scale), y2="high:Q", color=palette.colour(), detail="condition:N"
    )
    line = base.mark_line(strokeWidth=1.6, clip=True).encode(
        x=_x(), y=y, color=palette.colour(), strokeDash=palette.dash(), detail="condition:N"
    )
    tips = [
        *_where(),
        alt.Tooltip("loss:Q", format=".4f", title="loss (mean)"),
        alt.Tooltip("low:Q", format=".4f", title="lowest seed"),
        alt.Tooltip("high:Q", format=".4f", title="highest seed"),
        alt.Tooltip("seeds:Q"),
    ]
    points = _hover(base, y, palette, tips)
    chart = alt.layer(band, line, points).add_params(_bands(), alt.param(name="kind", value="validation"))
    return _theme(_hiding(chart).properties(width="container", height=340))


def gap_chart(palette: Palette, low: float | None, high: float | None) -> Spec:
    """Gaps of data "gap_curves" over x with their intervals; the axis ends at `low` and `high`, where given."""
    scale = _scale(zero=True, nice=False, domainMin=low, domainMax=high)
    y = alt.Y("gap:Q", title="gap to the baseline, nats", scale=scale, axis=alt.Axis(tickCount=6))
    base = _shown(alt.Chart(alt.NamedData(name="gap_curves")))
    band = base.mark_area(opacity=alt.ExprRef("bands ? 0.12 : 0"), clip=True).encode(
        x=_x(), y=alt.Y("low:Q", scale=scale), y2="high:Q", color=palette.colour(), detail="condition:N"
    )
    line = base.mark_line(strokeWidth=1.6, clip=True).encode(
        x=_x(), y=y, color=palette.colour(), strokeDash=palette.dash(), detail="condition:N"
    )
    tips = [
        *_where(),
        alt.Tooltip("gap:Q", format="+.4f"),
        alt.Tooltip("low:Q", format="+.4f", title="95 % from"),
        alt.Tooltip("high:Q", format="+.4f", title="to"),
        alt.Tooltip("seeds:Q"),
    ]
    chart = alt.layer(band, line, _hover(base, y, palette, tips)).add_params(_bands())
    return _theme(_hiding(chart).properties(width="container", height=280))


def _hover(base: Any, y: alt.Y, palette: Palette, tips: list[alt.Tooltip]) -> Any:
    """Points that appear under the pointer."""
    near = alt.selection_point(on="pointerover", nearest=True, empty=False, clear="pointerout", name="near")
    return (
        base.mark_point(size=50, filled=True, clip=True)
        .encode(
            x=_x(),
            y=y,
            color=palette.colour(),
            opacity=alt.condition(near, alt.value(1), alt.value(0)),
            tooltip=tips,
        )
        .add_params(near)
    )


def interval_chart(data: str, title: str, rows: Sequence[str], groups: Sequence[str]) -> Spec:
    """Means with intervals, a row a format, an optimizer's offset within it; of data with mean, low, high.

    Args:
      data: the data's name.
      title: of the axis.
      rows: formats, in order.
      groups: optimizers, in order.
    """
    y = alt.Y("curve:N", sort=list(rows), title=None, axis=alt.Axis(grid=True))
    offset = alt.YOffset("optimizer:N", sort=list(groups))
    scale = alt.Scale(domain=list(groups), range=[COLOURS[i % len(COLOURS)] for i in range(len(groups))])
    legend = alt.Legend(orient="top", title=None, columns=3)
    colour = alt.Color("optimizer:N", scale=scale, legend=legend)
    shape = alt.Shape("optimizer:N", scale=alt.Scale(domain=list(groups)), legend=legend)
    tips = [
        alt.Tooltip("condition:N"),
        alt.Tooltip("mean:Q", format="+.4f"),
        alt.Tooltip("low:Q", format="+.4f", title="95 % from"),
        alt.Tooltip("high:Q", format="+.4f", title="to"),
        alt.Tooltip("seeds:Q"),
        alt.Tooltip("p:Q", format=".4f", title="p (Holm)"),
    ]
    base = _shown(alt.Chart(alt.NamedData(name=data)))
    zero = (
        alt.Chart(alt.InlineData(values=[{"x": 0}]))
        .mark_rule(strokeDash=[3, 3], opacity=0.6, color=INK)
        .encode(x="x:Q")
    )
    spans = base.mark_rule(strokeWidth=1.6).encode(
        x=alt.X("low:Q", title=title, axis=alt.Axis(tickCount=6)), x2="high:Q", y=y, yOffset=offset, color=colour
    )
    points = base.mark_point(filled=True, size=55, opacity=1).encode(
        x="mean:Q", y=y, yOffset=offset, color=colour, shape=shape, tooltip=tips
    )
    height = max(120, len(rows) * (16 + 9 * max(1, len(groups))))
    return _theme(_hiding(alt.layer(zero, spans, points)).properties(width="container", height=height))


def matrix_chart(rows: Sequence[str], columns: Sequence[str], top: float) -> Spec:
    """Format x optimizer, coloured by the gap: orange above the baseline, blue below; full at +- `top`."""
    base = alt.Chart(alt.NamedData(name="matrix"))
    above = alt.Axis(orient="top", labelAngle=0, domain=False, ticks=False)
    x = alt.X("optimizer:N", sort=list(columns), title=None, axis=above)
    y = alt.Y("curve:N", sort=list(rows), title=None, axis=alt.Axis(domain=False, ticks=False))
    scale = alt.Scale(domain=[-top, 0, top], range=["#3E8FC4", "#8A8A8A22", "#E0752D"], clamp=True, interpolate="rgb")
    tips = [
        alt.Tooltip("condition:N"),
        alt.Tooltip("label:N", title="gap, nats"),
        alt.Tooltip("status:N"),
    ]
    colour = alt.Color("gap:Q", scale=scale, legend=None)
    cells = base.mark_rect(cornerRadius=3).encode(x=x, y=y, color=colour, tooltip=tips)
    labels = base.mark_text(color=INK, fontSize=11).encode(x=x, y=y, text="short:N", tooltip=tips)
    return _theme(_hiding(alt.layer(cells, labels)).properties(width="container", height=max(80, 30 * len(rows) + 24)))


def heat_chart(measure: str) -> Spec:
    """Layer x time of data "cells" (row, column, from, to, value), one of `failures.MEASURES`."""
    (low, high), scheme, backward, form = HEAT[measure]
    scale = _scale(domain=[low, high], scheme=scheme, clamp=True, reverse=backward)
    legend = alt.Legend(orient="top", title=measure, titleLimit=0, gradientLength=160, format=form)
    chart = (
        alt.Chart(alt.NamedData(name="cells"))
        .mark_rect()
        .encode(
            x=alt.X("step:O", title="step", axis=alt.Axis(labelAngle=0, labelOverlap="greedy", format=",")),
            y=alt.Y("place:N", sort=None, title=None, axis=alt.Axis(labelLimit=150, labelFontSize=10)),
            color=alt.Color("value:Q", scale=scale, legend=legend),
            tooltip=[
                alt.Tooltip("place:N", title="layer · role"),
                alt.Tooltip("step:O", title="up to step"),
                alt.Tooltip("value:Q", title=measure, format=form),
            ],
        )
        .properties(width="container", height=200)  # the page knows how many rows there are
    )
    return _theme(chart)
