"""Loss scaling: gradients made larger before they are rounded, and smaller again before they are used.

Gradients of a mean loss are tiny; a format without a scale of its own sees zeros. A factor on the loss lifts all of
them at once (Micikevicius et al. 2018, arXiv 1710.03740). "dynamic" finds it: halved, and the step left out, when a
gradient is not finite, or was saturated under a scale that does not follow it; doubled after 1000 steps in a row in
which none was.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from altgrad_jax.errors import UsageError
from altgrad_jax.precision.reals import float32_fault

Array = jax.Array
DYNAMIC = "dynamic"
INITIAL = 2.0**16
LARGEST = 2.0**24
SMALLEST = 1.0
GROWTH_STEPS = 1000


@dataclass(frozen=True)
class LossScale:
    """A loss scale as configured.

    Attributes:
      fixed: the factor; None: dynamic.
    """

    fixed: float | None = 1.0

    def init(self) -> dict[str, Array]:
        """The state before the first step: `scale` (float32) and `good_steps` (int32); empty if fixed."""
        if self.fixed is not None:
            return {}
        return {"scale": jnp.asarray(INITIAL, jnp.float32), "good_steps": jnp.zeros((), jnp.int32)}

    def factor(self, state: dict[str, Array]) -> Array | float:
        """What the loss is multiplied by in this step."""
        return state["scale"] if self.fixed is None else self.fixed

    def next(self, state: dict[str, Array], fitted: Array) -> dict[str, Array]:
        """The state after a step whose gradients all fitted into their formats and were finite, or not."""
        if self.fixed is not None:
            return {}
        good = jnp.where(fitted, state["good_steps"] + 1, 0)
        grown = jnp.minimum(state["scale"] * 2, LARGEST)
        kept = jnp.where(good == GROWTH_STEPS, grown, state["scale"])
        scale = jnp.where(fitted, kept, jnp.maximum(state["scale"] / 2, SMALLEST))
        return {"scale": scale, "good_steps": jnp.where(good == GROWTH_STEPS, 0, good)}


def parse_loss_scale(text: str) -> LossScale:
    """From `config.train.loss_scale`: a number or "dynamic".

    Raises:
      UsageError: it is neither, or not above 0, or float32 lacks it or its inverse.
    """
    if text == DYNAMIC:
        return LossScale(None)
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value > 0:
        raise UsageError(f"config.train.loss_scale={text!r} is neither a number above 0 nor {DYNAMIC!r}")
    if why := float32_fault(value, inverse=True):
        raise UsageError(f"config.train.loss_scale={text!r} must {why}")
    return LossScale(value)


def all_finite(tree: Any) -> Array:
    """Whether no leaf has a NaN or Inf, scalar bool."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))
