"""AdamW for weights that are stored in few bits, with no float32 copy beside them.

A step of Adam is often smaller than half an ulp of such weights; rounded to nearest it would be lost every time.
Rounded stochastically it is right on average: E[round(w + u)] = w + u (Gupta et al. 2015, arXiv 1502.02551).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from altgrad_jax.optimizers.draws import update_key
from altgrad_jax.optimizers.grids import Formats, Grids, map_with_grids, resolve_grids
from altgrad_jax.optimizers.moments import scale_by_adam_8bit

Array = jax.Array
MOMENTS = ("float32", "8bit")


class CountState(NamedTuple):
    """The number of updates done, int32: what the draws follow from."""

    steps: Array


def round_stochastically(formats: Formats, seed: int | Array = 0) -> optax.GradientTransformationExtraArgs:
    """Turns an update u of a weight w into round_stochastic(w + u) - w, on the grid that w is kept on.

    Apply the updates with `grids.apply_on_grids`. Parameters without a format are updated as they are.
    """

    def init(params):
        del params
        return CountState(jnp.zeros((), jnp.int32))

    def update(updates, state, params=None, *, grids: Grids | None = None, **extra: Any):
        del extra
        found = resolve_grids(formats, params, grids)

        def one(name, grid, u, w):
            if grid is None:
                return u
            return grid.fitted(w).round(w + u, "stochastic", update_key(seed, state.steps, name)) - w

        return map_with_grids(one, found, updates, params), CountState(state.steps + 1)

    return optax.GradientTransformationExtraArgs(init, update)


def adamw_sr(
    learning_rate: optax.ScalarOrSchedule,
    formats: Formats,
    *,
    moments: str = "float32",
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    mask: Any = None,
    seed: int | Array | Array = 0,
) -> optax.GradientTransformationExtraArgs:
    """AdamW whose result is rounded stochastically to each weight's format; other arguments as `optax.adamw`.

    Args:
      learning_rate: a number or a schedule.
      formats: of the parameters; "bfloat16" for 16-bit weights.
      moments: "float32", or "8bit" (see `moments`).
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second.
      weight_decay: decoupled.
      mask: of the parameters that decay.
      seed: of the stochastic rounding.

    Raises:
      ValueError: unknown kind of moments.
    """
    if moments not in MOMENTS:
        raise ValueError(f"moments={moments!r} is not one of {', '.join(MOMENTS)}")
    adam = scale_by_adam_8bit(b1, b2, eps, seed) if moments == "8bit" else optax.scale_by_adam(b1=b1, b2=b2, eps=eps)
    return optax.chain(
        adam,
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
        round_stochastically(formats, seed),
    )
