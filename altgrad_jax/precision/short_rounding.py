"""Rounding bfloat16 to nearest in 16-bit integers.

Nothing that becomes of a bfloat16 needs more than its own 16 bits, and a CPU's vectors hold twice as many of them as of
float32. For formats of few mantissa bits: their subnormal binades are gone through one by one, and from five of them
on, adding in float32 (`rounding`) is faster.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from altgrad_jax.precision.grid import BIAS, INF, Grid, power_bits

Array = jax.Array
BFLOAT16_MANTISSA = 7
SHORT_MANTISSA = 4


def is_short(grid: Grid) -> bool:
    """Whether the format is known, and of a kind that `round_bfloat16` takes."""
    known = isinstance(grid.mantissa_bits, np.integer)
    # With the last, blocks may be scaled by 2^k, |k| <= 127, without overflow of the thresholds.
    return known and grid.mantissa_bits <= SHORT_MANTISSA and grid.addable and grid.step_bits <= power_bits(2)


def round_bfloat16(x: Array, grid: Grid, overflow: str = "saturate", exponent: Array | int = 0) -> Array:
    """2^k times x 2^-k rounded to nearest, in 16-bit integers: bfloat16, without gradient.

    Args:
      x: bfloat16; subnormal numbers count as 0 where k is not 0.
      grid: a format that `is_short`.
      overflow: as in `round_to_format`.
      exponent: k, int32, of a shape that broadcasts to x's; no further from 0 than 127, and such that no finite x 2^-k
        is 2^128 or more.
    """
    signed = lax.bitcast_convert_type(x, jnp.int16)
    magnitude = signed & np.int16(0x7FFF)
    step, half_step, largest, beyond = (
        np.int16(bits >> 16) for bits in (grid.step_bits, grid.half_step_bits, grid.max_bits, grid.overflow_bits)
    )
    saturates = overflow == "saturate" or beyond == largest
    top = largest if saturates else largest + np.int16(1 << BFLOAT16_MANTISSA)
    shift = (jnp.asarray(exponent) << BFLOAT16_MANTISSA).astype(jnp.int16)
    # What is less than half a step becomes 0 in the end, so that here it may be anything.
    unscaled = _nearest_on_short_grid(jnp.clip(magnitude - shift, step, top), grid)
    rounded = unscaled + shift if saturates else jnp.where(unscaled > largest, beyond, unscaled + shift)
    largest_subnormal = np.int16((1 << BFLOAT16_MANTISSA) - 1)
    rounded = jnp.where(magnitude > jnp.maximum(half_step + shift, largest_subnormal), rounded, np.int16(0))
    rounded = jnp.where(magnitude > np.int16(INF >> 16), magnitude, rounded)
    sign = signed & np.int16(-0x8000)
    return lax.bitcast_convert_type((sign if grid.signed_zero else jnp.where(rounded == 0, 0, sign)) | rounded, x.dtype)


def _nearest_on_short_grid(magnitude: Array, grid: Grid) -> Array:
    """bfloat16 magnitudes, as int16 bits, from one step up; as if the format had no largest value."""
    m, e_min = int(grid.mantissa_bits), int(grid.min_exponent)
    # Mask of what is cut: one bit more in every binade below the smallest normal number.
    rest = jnp.full_like(magnitude, (1 << (BFLOAT16_MANTISSA - m)) - 1)
    for below in range(m):
        binade_end = np.int16((e_min - below + BIAS) << BFLOAT16_MANTISSA)
        rest = jnp.where(magnitude < binade_end, np.int16((2 << (BFLOAT16_MANTISSA - m + below)) - 1), rest)
    # In binades of one value the lowest exponent bit has to tell whether the code is odd. The smallest step's, 1, is.
    parity = e_min - m + BIAS + 1 if grid.tie == 2 else BIAS + int(grid.tie)
    told = magnitude ^ np.int16((parity & 1) << BFLOAT16_MANTISSA)
    odd = jnp.minimum(told & (rest + np.int16(1)), np.int16(1))
    return (magnitude + (rest >> 1) + odd) & ~rest
