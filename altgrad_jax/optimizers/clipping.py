"""Gradient clipping that grants each format what its range can take.

    f = log2(range of the format) / log2(range of E5M2),   range = largest / smallest positive value
    g <- g min(1, threshold / |g / f|)

with |g / f| the norm over all parameters, each divided by its own f: with one format for all, its threshold is f times
the configured one; with E5M2 everywhere, or no format, this is clipping by the global norm. AltGrad took the ratio of
the largest values, and clipped after the optimizer's step, where it changes nothing.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from altgrad_jax.optimizers.grids import Formats, Grids, map_with_grids, resolve_grids
from altgrad_jax.precision.grid import Grid

Array = jax.Array


def log2_range(grid: Grid) -> Array:
    """log2 of the largest over the smallest positive value of a format, float32."""
    bits = jnp.asarray(grid.max_bits, jnp.uint32)
    largest = jnp.log2(lax.bitcast_convert_type(bits, jnp.float32))
    return largest - (jnp.asarray(grid.min_exponent) - jnp.asarray(grid.mantissa_bits)).astype(jnp.float32)


def clip_by_format_range(threshold: float, formats: Formats) -> optax.GradientTransformationExtraArgs:
    """Clipping as above, before any optimizer; the direction of the gradient is kept."""

    def update(updates, state, params=None, *, grids: Grids | None = None, **extra: Any):
        del extra
        found = resolve_grids(formats, params, grids)
        reference = log2_range(Grid.of("e5m2"))

        def weighted(name, grid, g):
            del name
            return g if grid is None else g * (reference / log2_range(grid.grid))

        norm = optax.tree.norm(map_with_grids(weighted, found, updates))
        factor = jnp.minimum(1.0, threshold / jnp.maximum(norm, jnp.finfo(jnp.float32).tiny))
        return jax.tree.map(lambda g: (g * factor).astype(g.dtype), updates), state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)
