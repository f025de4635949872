"""What the formats did to each layer's operands in one step: counted on the very conversions of that step.

    underflow    of the elements that were not zero, the share that became zero
    energy_lost  of the sum of squares, the share of what became zero: the cosine to what the tensor was is the root of
                 the rest
    sum_lost     the sum of what became zero, without its sign, over the sum of magnitudes: near 0 where signs are
                 mixed and errors average out; large where what is lost pulls one way, as in a softmax's gradient
    overflow     share of the elements beyond the largest value, by more than half a step, that were finite before
    nan          share of the elements that are NaN after it
    nonfinite    share of the elements that were infinite or NaN before it: one spoils all that share its scale
    amax         largest magnitude before scaling; amax_mean its moving average (decay 0.9)
    scale        what the operand was multiplied by; the mean, where blocks or vectors have scales of their own
    codes_used   share of the format's finite codes that occur (formats of up to 8 bits)
    codes        which codes occur: hexadecimal, one bit a code, the lowest code first

"none" scaling has scale 1. A recipe's rates over all layers are plain means, its amax the largest.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from altgrad_jax.precision.formats import FloatFormat
from altgrad_jax.precision.policy import LayerState, Policy
from altgrad_jax.precision.statistics import RoleStats

Array = jax.Array
MEASURES = ("underflow", "overflow", "nan", "nonfinite", "amax", "amax_mean", "scale", "energy_lost", "sum_lost")
RATES = ("underflow", "overflow", "nan", "nonfinite", "energy_lost", "sum_lost", "codes_used")
CODES = 256


def measure(policy: Policy, stats: Mapping[str, Mapping[str, RoleStats]], state: Mapping[str, LayerState]) -> Any:
    """The measures and the code shares of every layer and role, in the policy's order.

    Returns:
      [rows, MEASURES] float32 and [rows, 256] float32, the second zero for formats without counted codes.
    """
    measures, codes = [], []
    for layer, role in rows(policy):
        seen = stats[layer][role]
        assert seen.shares is not None and seen.scale is not None and seen.sums is not None, "were gathered"
        nonzero, underflow, overflow, nan, nonfinite = seen.shares
        of_x, gone, energy, energy_gone = seen.sums
        lost = _part(energy_gone, energy), _part(jnp.abs(gone), of_x)
        rate = _part(underflow, nonzero)
        mean = state[layer][role].mean
        measures.append(jnp.stack([rate, overflow, nan, nonfinite, seen.amax, mean, seen.scale, *lost]))
        found = jnp.zeros((0,)) if seen.codes is None else seen.codes
        codes.append(jnp.pad(found, (0, CODES - found.size)))
    return jnp.stack(measures), jnp.stack(codes)


def _part(part: Array, whole: Array) -> Array:
    """part / whole, 0 of nothing; NaN of a whole that is not finite."""
    return jnp.where(whole == 0, 0.0, part / jnp.where(whole == 0, 1.0, whole))


def rows(policy: Policy) -> list[tuple[str, str]]:
    """(layer, role) of every row."""
    return [(plan.path, role) for plan in policy.plans for role in plan.roles]


def name(policy: Policy, measures: npt.NDArray, codes: npt.NDArray) -> dict[str, float | str]:
    """`quant/<layer>/<role>/<what>` of `measure`'s result, and `quant/<role>/<what>` over all layers."""
    formats = {(plan.path, role): plan.recipe.role(role).fmt for plan in policy.plans for role in plan.roles}
    record: dict[str, float | str] = {}
    found: dict[tuple[str, str], list[float]] = {}
    for (layer, role), values, shares in zip(rows(policy), measures, codes, strict=True):
        here: dict[str, float] = dict(zip(MEASURES, map(float, values), strict=True))
        if shares.any():
            here["codes_used"] = codes_used(formats[layer, role], shares)
            record[f"quant/{layer}/{role}/codes"] = bitmap(shares > 0, formats[layer, role])
        for what, value in here.items():
            record[f"quant/{layer}/{role}/{what}"] = value
            found.setdefault((role, what), []).append(value)
    totals = {
        f"quant/{role}/{what}": float(np.mean(values) if what in RATES else np.max(values))
        for (role, what), values in found.items()
        if what in (*RATES, "amax")
    }
    return totals | record


def codes_used(fmt: FloatFormat, shares: npt.NDArray) -> float:
    """Share of the finite codes that occur at all; the two zeros count as one."""
    values = fmt.values()
    finite = np.isfinite(values)
    used = shares[: values.size] > 0
    return np.unique(values[finite & used]).size / np.unique(values[finite]).size


def bitmap(used: Iterable[bool], fmt: FloatFormat) -> str:
    """One bit a code as hexadecimal digits, the lowest code in the highest bit of the first."""
    bits = np.asarray(list(used))[: 1 << fmt.bits]
    return np.packbits(bits).tobytes().hex()
