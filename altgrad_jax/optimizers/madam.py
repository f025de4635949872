"""Multiplicative updates: steps in the logarithm of the weights, the natural ones for formats of powers of two.

    v <- b v + (1 - b) g^2,   u = clip(g / sqrt(v / (1 - b^t)), +-update_clip)
    w <- clip(w exp(-learning_rate sign(w) u), +-max_scale rms(w_0))

Madam, Bernstein et al. 2020, arXiv 2006.14560, algorithm 1 (rate 0.01, bound 10 on u, three times the initial root mean
square as the largest weight); LNS-Madam, Zhao et al. 2021, arXiv 2106.13914, trains with it in a logarithmic number
system. A weight keeps its sign for ever, and a weight of zero stays zero.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

Array = jax.Array


class MadamState(NamedTuple):
    """What `madam` carries: updates done, int32; v, float32; the largest magnitude allowed, float32 scalars."""

    steps: Array
    second_moment: Any
    largest: Any


def madam(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b: float = 0.999,
    update_clip: float = 10.0,
    max_scale: float = 3.0,
) -> optax.GradientTransformation:
    """The rule above.

    Args:
      learning_rate: relative change of a weight for u = 1; a number or a schedule.
      b: decay of the second moment.
      update_clip: bound on u.
      max_scale: bound on the weights, in units of the parameter's initial root mean square.
    """

    def init(params):
        return MadamState(
            jnp.zeros((), jnp.int32),
            jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params),
            jax.tree.map(lambda p: max_scale * jnp.sqrt(jnp.mean(jnp.square(p.astype(jnp.float32)))), params),
        )

    def update(updates, state, params=None):
        if params is None:
            raise ValueError("madam needs params: call update(grads, state, params)")
        rate = learning_rate(state.steps) if callable(learning_rate) else learning_rate
        count = state.steps + 1
        corrected = 1 - jnp.float32(b) ** count
        moments = jax.tree.map(lambda v, g: b * v + (1 - b) * jnp.square(g), state.second_moment, updates)

        def move(w, g, v, largest):
            # 0 / 0 where there never was a gradient: no step.
            u = jnp.where(v > 0, g / jnp.sqrt(jnp.where(v > 0, v / corrected, 1.0)), 0.0)
            u = jnp.clip(u, -update_clip, update_clip)
            return jnp.clip(w * jnp.exp(-rate * jnp.sign(w) * u), -largest, largest) - w

        moves = jax.tree.map(move, params, updates, moments, state.largest)
        return moves, MadamState(count, moments, state.largest)

    return optax.GradientTransformation(init, update)
