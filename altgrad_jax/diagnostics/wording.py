"""Crossed thresholds in words: what was measured, in its unit, where the limit lies, and what may be done about it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from altgrad_jax.diagnostics.attribution import SIGNS, Failure


@dataclass(frozen=True)
class Kind:
    """How one kind of failure is told.

    Attributes:
      measured: what its value is.
      share: whether that is a share, told in percent.
      advice: what may be done about it.
    """

    measured: str
    share: bool
    advice: str


KINDS = {
    "spoilt": Kind(
        "share of the operand that came in as infinity or NaN",
        True,
        "another format or scale where something overflows, or in the first layer named; the others pass it on",
    ),
    "nan": Kind("values that are NaN", True, "leave such steps out (config.stability.skip_nonfinite=True)"),
    "overflow": Kind("values beyond the largest", True, "scaling=current, a larger margin, or more exponent bits"),
    "underflow": Kind(
        "share of the magnitude that became zero", True, "more exponent bits, finer scales, or a loss scale"
    ),
    "gradient": Kind("cosine to the float32 gradient", False, "more mantissa bits or stochastic rounding in gradients"),
    "stall": Kind(
        "updates that move no weight", True, "a larger learning rate, stochastic rounding, or float32 weights"
    ),
    "blow-up": Kind("length of the update over the weight's", False, "a lower learning rate or a longer warm-up"),
    "rank": Kind("share of the effective rank that is lost", True, "a lower learning rate, or more bits in this layer"),
    "loss": Kind("loss that is not finite", False, "a lower learning rate, or config.stability; docs/stability.md"),
}


def value_text(kind: str, value: float) -> str:
    """A value in its unit: "26.2 %", "0.31"."""
    return f"{100 * value:.3g} %" if KINDS[kind].share and math.isfinite(value) else f"{value:.4g}"


def limit_text(failure: Failure) -> str:
    """ "> 1 %", "< 0.9"."""
    if failure.kind == "loss":
        return "not finite"
    return f"{SIGNS.get(failure.kind, '>')} {value_text(failure.kind, failure.threshold)}"


def describe(failures: Sequence[Failure]) -> str:
    """One line: of every kind the limit, how many layers crossed it, the first three with their values, and advice."""
    parts = []
    for kind in dict.fromkeys(failure.kind for failure in failures):
        found = [failure for failure in failures if failure.kind == kind]
        named = [f"{' '.join(filter(None, (f.layer, f.role)))} {value_text(kind, f.value)}".strip() for f in found[:3]]
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        limit = "" if kind == "loss" else f" {limit_text(found[0])}"
        told = KINDS[kind]
        parts.append(f"{kind}, {told.measured}{limit}: {', '.join(named)}{more}; try {told.advice}")
    return ". ".join(parts)


def table(failures: Sequence[Failure]) -> list[str]:
    """Lines for people: a row each, aligned, and what may be done about each kind; or that there are none."""
    if not failures:
        return ["no diagnostic crossed its threshold"]
    rows = [("step", "layer", "role", "kind", "value", "limit")]
    for f in failures:
        row = (str(f.step), f.layer or "-", f.role or "-", f.kind, value_text(f.kind, f.value), limit_text(f))
        rows.append(row)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    align = (str.rjust, str.ljust, str.ljust, str.ljust, str.rjust, str.ljust)
    cells = [[put(cell, width) for put, cell, width in zip(align, row, widths, strict=True)] for row in rows]
    kinds = dict.fromkeys(failure.kind for failure in failures)
    told = [f"{kind}: {KINDS[kind].measured}; try {KINDS[kind].advice}" for kind in kinds]
    return ["  ".join(row).rstrip() for row in cells] + told
