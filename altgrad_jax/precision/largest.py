"""The largest magnitude of a tensor: NaN where the tensor holds one, else infinite where it holds an infinity.

Taken on bits: without their sign, floats are integers of the same order, with NaN the largest. XLA's maximum of floats
loses NaN on CPUs, in reductions of many elements and between devices; and there integers are faster besides.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Array = jax.Array


def amax(x: Array, axis: int | None = None) -> Array:
    """Largest magnitude, float32: a scalar, or kept dimensions along one axis."""
    short = x.dtype == jnp.bfloat16
    bits = lax.bitcast_convert_type(x, jnp.int16) & np.int16(0x7FFF) if short else _bits(x.astype(jnp.float32))
    largest = jnp.max(bits, axis, keepdims=axis is not None)
    return lax.bitcast_convert_type(largest, jnp.bfloat16 if short else jnp.float32).astype(jnp.float32)


def amax_over_devices(largest: Array, axis_name: str) -> Array:
    """The largest of the amaxes of the devices along a mapped axis, float32."""
    return lax.bitcast_convert_type(lax.pmax(_bits(largest), axis_name), jnp.float32)


def _bits(x: Array) -> Array:
    """Of float32, without the sign, int32."""
    return lax.bitcast_convert_type(x, jnp.int32) & np.int32(0x7FFF_FFFF)
