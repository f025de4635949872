"""Steps along the grid: weights move by whole rungs, from one value of their format to another.

    v <- mu v + g + weight_decay w
    rungs = -round_stochastic(clip(scale v, +-rung_clip))
    w <- the value `rungs` places further in the format's ordered list, not beyond its ends

AltGrad's GridOptim. Values of a format are ordered as their codes are, so a step is integer arithmetic on codes. A rung
is an ulp: small near zero and large far from it, so a step is, away from zero, in proportion to the weight; but the
velocity is the plain gradient's, not divided by its size, so the scale must fit the gradients.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from altgrad_jax.optimizers.draws import update_key
from altgrad_jax.optimizers.grids import Formats, Grids, map_with_grids, resolve_grids
from altgrad_jax.precision.weight_grid import WeightGrid

Array = jax.Array


class GridState(NamedTuple):
    """What `grid` carries: the number of updates done, int32, and the velocity v of every parameter, float32."""

    steps: Array
    velocity: Any


def grid(
    scale: optax.ScalarOrSchedule,
    formats: Formats,
    *,
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
    rung_clip: float = 10.0,
    seed: int | Array = 0,
) -> optax.GradientTransformationExtraArgs:
    """The rule above, for parameters that all have a format; combine it with another by `optax.partition`.

    Weights are read off the grid if they are not on it (to nearest), so the first step of others also snaps them;
    `grids.snap_to_grids` does that beforehand. Apply the updates with `grids.apply_on_grids`.

    Args:
      scale: rungs a step for a velocity of 1; a number or a schedule (AltGrad: 6, falling by a cosine).
      formats: of the parameters.
      momentum: mu.
      weight_decay: added to the gradient, as in SGD; not decoupled.
      rung_clip: most rungs a step.
      seed: of the stochastic rounding.
    """

    def init(params):
        return GridState(jnp.zeros((), jnp.int32), jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params))

    def update(updates, state, params=None, *, grids: Grids | None = None, **extra: Any):
        del extra
        found = resolve_grids(formats, params, grids)
        factor = scale(state.steps) if callable(scale) else scale

        def velocity(v, g, w):
            new = momentum * v + g.astype(jnp.float32) + weight_decay * w
            # One gradient that is no number must not stop a weight for ever.
            return jnp.where(jnp.isfinite(new), new, v)

        def move(name, on, v, w):
            if on is None:
                raise ValueError(f"grid: parameter {name} has no format; give it one, or another optimizer")
            return _move(on.fitted(w), w, jnp.clip(factor * v, -rung_clip, rung_clip), name)

        def _move(on: WeightGrid, w: Array, rungs: Array, name: str) -> Array:
            draws = jax.random.uniform(update_key(seed, state.steps, name), w.shape)
            whole = jnp.floor(rungs + draws).astype(jnp.int32)
            code = jnp.clip(on.code(w) - whole, -on.largest_code, on.largest_code)
            return on.value(code) - w

        velocities = jax.tree.map(velocity, state.velocity, updates, params)
        moves = map_with_grids(move, found, velocities, params)
        return moves, GridState(state.steps + 1, velocities)

    return optax.GradientTransformationExtraArgs(init, update)
