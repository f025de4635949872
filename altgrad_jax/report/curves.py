"""Curves thin enough for a page: the mean over seeds and their range, and the gap to the baseline with its interval.

Training losses are averaged over POINTS equal stretches of steps, which thins and smooths them at once; validation
losses stay as they are, but for every k-th where there are more. Step 0, which a logarithmic axis has no place for, is
left out.
"""

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from altgrad_jax.report.groups import Entry, Group
from altgrad_jax.report.runs import Run, is_number
from altgrad_jax.report.statistics import paired
from altgrad_jax.report.study import Study

POINTS = 150
DIGITS = 5  # significant, of what only a chart shows

Series = dict[int, float]  # step -> value
Clock = tuple[list[int], list[float]]  # steps, ascending, and seconds of training until then


def training_series(run: Run, last_step: int) -> Series:
    """Mean training loss of each of POINTS stretches, at the stretch's last step."""
    width = max(1, math.ceil(last_step / POINTS))
    found: dict[int, list[float]] = {}
    for record in run.records:
        if record["step"] > 0 and is_number(record.get("train/loss")):
            found.setdefault(math.ceil(record["step"] / width) * width, []).append(float(record["train/loss"]))
    return {min(step, last_step): sum(values) / len(values) for step, values in found.items()}


def validation_series(run: Run) -> Series:
    """The validation loss at the steps where it was evaluated, the last one among them."""
    found = {
        record["step"]: float(record["val/loss"])
        for record in run.records
        if record["step"] > 0 and is_number(record.get("val/loss"))
    }
    steps = sorted(found)
    kept = steps[:: -max(1, math.ceil(len(steps) / POINTS))]
    return {step: found[step] for step in reversed(kept)}


def seconds_at(run: Run) -> Series:
    """Step -> seconds of training until then: steps over the logged speeds; compiling and evaluation do not count."""
    batch, block = (run.identity.get(key) for key in ("train.batch_size", "model.block_size"))
    found: Series = {}
    if not (is_number(batch) and is_number(block)):
        return found
    seconds, before = 0.0, 0
    for record in run.records:
        speed = record.get("train/tokens_per_second")
        if is_number(speed) and math.isfinite(speed) and speed > 0 and record["step"] > before:
            seconds += (record["step"] - before) * batch * block / speed
            before = record["step"]
            found[before] = seconds
    return found


def _at(clock: Clock, step: int) -> float:
    """The seconds at a step, or at the last one before it that has any."""
    steps, seconds = clock
    place = bisect_right(steps, step)
    return seconds[place - 1] if place else math.nan


def _clocks(group: Group) -> list[Clock]:
    found = [seconds_at(entry.run) for entry in group.entries]
    return [(list(clock), list(clock.values())) for clock in found]


def tokens_to_reach(run: Run, loss: float) -> float:
    """Tokens until the validation loss, linear between evaluations, is `loss` or lower for good; NaN if not known.

    For good: a loss that is low for a moment and rises again has not got there. A loss falls steeply in the first
    steps, so a straight line from step 0 to the first evaluation does not say when it was where: what is reached by
    then is not known.
    """
    step_tokens = run.tokens / run.step if run.tokens and run.step else math.nan
    points = _evaluations(run)
    if not points or points[-1][1] > loss:
        return math.nan
    for (s0, l0), (s1, l1) in pairwise(reversed(points)):
        if l1 > loss:  # the last evaluation above it; the next one is not
            return (s1 + (s0 - s1) * (l1 - loss) / (l1 - l0)) * step_tokens
    return math.nan


def _evaluations(run: Run) -> list[tuple[int, float]]:
    """(step, finite validation loss) after step 0."""
    return [
        (record["step"], float(record["val/loss"]))
        for record in run.records
        if record["step"] > 0 and is_number(record.get("val/loss")) and math.isfinite(record["val/loss"])
    ]


def arrives_early(run: Run, loss: float) -> bool:
    """Whether a loss is reached for good before the first evaluation after step 0."""
    points = _evaluations(run)
    return bool(points) and all(found <= loss for _, found in points)


def loss_curves(study: Study) -> list[dict[str, Any]]:
    """Of each group and kind ("training", "validation"): columns step, tokens, seconds, loss, low, high, seeds."""
    last = max((entry.run.step for entry in study.compared), default=0)
    curves = []
    for group in study.groups:
        clocks = _clocks(group)
        for kind in ("training", "validation"):
            series = [
                training_series(e.run, last) if kind == "training" else validation_series(e.run) for e in group.entries
            ]
            steps = sorted({step for one in series for step in one})
            points = [_point(series, clocks, group.entries, step) for step in steps]
            curves.append(_described(group) | {"kind": kind} | _columns([p for p in points if p]))
    return curves


def _point(
    series: Sequence[Series], clocks: Sequence[Clock], entries: Sequence[Entry], step: int
) -> dict[str, float] | None:
    values = [one[step] for one in series if step in one and math.isfinite(one[step])]
    if not values:
        return None
    seconds = [found for clock in clocks if math.isfinite(found := _at(clock, step))]
    tokens = [e.run.tokens / e.run.step * step for e in entries if e.run.tokens and e.run.step]
    return {
        "step": step,
        "tokens": tokens[0] if tokens else math.nan,
        "seconds": sum(seconds) / len(seconds) if seconds else math.nan,
        "loss": sum(values) / len(values),
        "low": min(values),
        "high": max(values),
        "seeds": len(values),
    }


def gap_curves(study: Study) -> list[dict[str, Any]]:
    """Of each group: columns step, tokens, seconds, gap, low, high of validation losses, paired at each evaluation."""
    if study.baseline is None:
        return []
    base = {entry.seed: validation_series(entry.run) for entry in study.baseline.entries}
    curves = []
    for group in study.groups:
        if group is study.baseline:
            continue
        own = {entry.seed: validation_series(entry.run) for entry in group.entries}
        clocks = _clocks(group)
        points = []
        for step in sorted({s for one in own.values() for s in one}):
            here, there = ({seed: one[step] for seed, one in of.items() if step in one} for of in (own, base))
            found = paired(here, there)
            point = _point(list(own.values()), clocks, group.entries, step)
            if point and found.n:
                point |= {"gap": found.mean, "low": found.low, "high": found.high, "seeds": found.n}
                del point["loss"]
                points.append(point)
        curves.append(_described(group) | _columns(points))
    return curves


def _described(group: Group) -> dict[str, Any]:
    return {"condition": group.name, "curve": group.curve, "optimizer": group.optimizer}


def _columns(points: Sequence[Mapping[str, float]]) -> dict[str, list[float | None]]:
    """Columns of equal length; what is not finite is null."""
    names = list(points[0]) if points else []
    return {name: [rounded(point[name]) for point in points] for name in names}


def rounded(value: float, digits: int = DIGITS) -> float | None:
    """To a few significant digits, whole numbers as such; None of what is not finite."""
    if not math.isfinite(value):
        return None
    short = float(f"{value:.{digits}g}") if value != int(value) else value
    return int(short) if short == int(short) and abs(short) < 2**53 else short
