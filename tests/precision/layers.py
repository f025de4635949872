"""One quantised layer for tests: a recipe's text and arrays in, the products and what the probe saw out."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from altgrad_jax.precision.dot import Prepared, Probe, operand_pair, quantised_matmul
from altgrad_jax.precision.recipes import ROLES, parse_recipe
from altgrad_jax.precision.scaling import RoleState, initial_state

F32 = jnp.dtype("float32")


@dataclass
class Results:
    """What one layer gave."""

    y: Any
    dx: Any
    dw: Any
    dbias: Any
    seen: Probe


def states(text: str, histories: Sequence[Sequence[float]] = ((), (), ())) -> dict[str, RoleState]:
    """The state of every role; with an amax history where one is given."""
    recipe = parse_recipe(text)
    found = {}
    for role, history in zip(ROLES, histories, strict=True):
        state = initial_state(recipe.role(role))
        found[role] = replace(state, history=jnp.asarray(history, jnp.float32)) if len(history) else state
    return found


def prepare(
    w,
    text: str,
    by_role: dict[str, RoleState] | None = None,
    *,
    native: bool = False,
    key=None,
    axis_name: str | None = None,
    collect: bool = False,
) -> Prepared:
    """A layer ready for a step; `key` makes three, one for every role."""
    recipe, by_role = parse_recipe(text), by_role or states(text)
    keys = (None, None, None) if key is None else tuple(jax.random.split(key, 3))
    forward, backward, _ = operand_pair(w, recipe.weight, by_role["weight"], (0, 1), native, keys[1], None, collect)
    operands = forward, backward, by_role["activation"], by_role["gradient"], keys[0], keys[2]
    named = {"path": "layer", "shape": w.shape, "recipe": recipe}
    return Prepared(*operands, **named, native=native, kernel=None, axis_name=axis_name, collect=collect)


def run(x, w, bias, g, text: str, by_role=None, out_dtype=F32, **options) -> Results:
    """Forward and backward of one layer at the gradient g of its result."""
    prepared = prepare(jnp.asarray(w), text, by_role, **options)

    def layer(x, w, bias, probe):
        return quantised_matmul(x, w, bias, prepared, probe, out_dtype)

    bias = None if bias is None else jnp.asarray(bias)
    y, back = jax.vjp(layer, jnp.asarray(x), jnp.asarray(w), bias, prepared.probe())
    return Results(y, *back(jnp.asarray(g, out_dtype)))


def integers(seed: int, *shape: int) -> np.ndarray:
    """Whole numbers up to 1000: most are in no 8-bit format, and sums of their products are exact in float32."""
    return np.random.default_rng(seed).integers(-1000, 1001, shape).astype(np.float32)


def normal(seed: int, *shape: int, size: float = 1.0) -> np.ndarray:
    return (size * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)
