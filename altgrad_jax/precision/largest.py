"""The largest magnitude of a tensor, infinite where the tensor holds an infinity or NaN.

XLA's maximum of floats loses NaN on CPUs, in reductions of many elements and between devices, so NaN counts as an
infinity here. Within blocks magnitudes are compared as integers of their bits, which are in the same order: over few
elements that is the faster way on a CPU, over many the slower one.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Array = jax.Array


def amax(x: Array, axis: int | None = None) -> Array:
    """Largest magnitude, float32, infinite where there is a NaN: a scalar, or kept dimensions along one axis."""
    return jnp.max(_without_nan(jnp.abs(x)), axis=axis, keepdims=axis is not None).astype(jnp.float32)


def block_amax(x: Array, axis: int) -> Array:
    """Largest magnitude along an axis of few elements, float32, dimensions kept; NaN where there is a NaN."""
    short = x.dtype == jnp.bfloat16
    bits = lax.bitcast_convert_type(x, jnp.int16) & np.int16(0x7FFF) if short else _bits(x.astype(jnp.float32))
    largest = jnp.max(bits, axis, keepdims=True)
    return lax.bitcast_convert_type(largest, jnp.bfloat16 if short else jnp.float32).astype(jnp.float32)


def amax_over_devices(largest: Array, axis_name: str) -> Array:
    """The largest of the amaxes of the devices along a mapped axis, float32."""
    return lax.pmax(_without_nan(largest), axis_name)


def _without_nan(magnitude: Array) -> Array:
    return jnp.where(magnitude <= jnp.finfo(magnitude.dtype).max, magnitude, jnp.asarray(jnp.inf, magnitude.dtype))


def _bits(x: Array) -> Array:
    """Of float32, without the sign, int32."""
    return lax.bitcast_convert_type(x, jnp.int32) & np.int32(0x7FFF_FFFF)
