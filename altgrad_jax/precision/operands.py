"""What may be rounded, brought to where rounding takes place without being rounded twice.

Rounding works on float32 bits. A float64 that went through float32 to nearest could land on a tie that it was not on:
431.99999999999994 is nearer to 416 than to 448, and float32 makes 432 of it, the tie. So it is rounded *to odd* first
(Boldo and Melquiond 2008, Emulation of FMA and correctly rounded sums): cut, and the last bit set if anything was cut
off. Rounding that to a format of at most 21 mantissa bits gives what rounding the float64 gives, in every mode but
stochastic. There the first rounding is stochastic too: two unbiased steps to the two neighbours are one.

All of it is done in 32-bit integers, so it is the same with and without `jax_enable_x64`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from altgrad_jax.precision.grid import CARRIERS, INF, MANTISSA, QUIET_NAN, SIGN, Grid
from altgrad_jax.precision.threefry import random_bits

Array = jax.Array
ROUNDED = ("float64", *CARRIERS)
EXACT_IN_FLOAT64 = 2**53  # integers up to here are
FROM_FLOAT64 = 1023 - 127  # difference of the two exponents' biases
LARGEST = INF - np.uint32(1)  # the bits of float32's largest finite value
ODD_MANTISSA = 21  # most mantissa bits of a format to which rounding to odd first changes nothing
FRACTION = np.uint32((1 << MANTISSA) - 1)
INFINITE = np.uint32(0x7FF0_0000)  # the upper word of float64's infinity


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Float64:
    """Float64 values as two words of 32 bits.

    Attributes:
      high: sign, exponent, and the upper 20 bits of the mantissa, uint32.
      low: the rest of the mantissa, uint32.
    """

    high: Array
    low: Array


def as_operand(x: Any) -> Array | Float64:
    """A value to be rounded: an array of a dtype in `CARRIERS`, or the words of float64, which Python floats are too.

    Raises:
      ValueError: it is of another dtype, or a list in which numbers would be rounded before they are looked at.
    """
    if isinstance(x, list | tuple):
        x = _from_sequence(x)
    if isinstance(x, jax.Array) or hasattr(x, "__jax_array__"):
        x = jnp.asarray(x)
        return _words(lax.bitcast_convert_type(_known(x), jnp.uint32)) if x.dtype == "float64" else _known(x)
    x = _known(np.asarray(x))
    if x.dtype.name != "float64":
        return jnp.asarray(x if x.dtype.isnative else x.astype(x.dtype.newbyteorder("=")))
    low_high = x.astype("<f8")[..., None].view("<u4")
    return _words(jnp.asarray(low_high.astype(np.uint32)))


def _words(low_high: Array) -> Float64:
    return Float64(low_high[..., 1], low_high[..., 0])


def _known(x):
    """x itself. Raises ValueError if its dtype is none that is rounded."""
    if x.dtype.name not in ROUNDED:
        raise ValueError(f"x has dtype {x.dtype}; rounding takes {', '.join(ROUNDED)}")
    return x


def _from_sequence(x: Sequence) -> Array | np.ndarray:
    """Lists of numbers, or of arrays, as an array of a dtype that holds all of them."""
    leaves = jax.tree.leaves(x)
    if any(isinstance(leaf, jax.Array) for leaf in leaves):
        if not all(isinstance(leaf, jax.Array) for leaf in leaves):
            raise ValueError("x mixes JAX arrays with other numbers; make one array of it first")
        for leaf in leaves:
            _known(leaf)
        return jnp.asarray(x)
    for leaf in leaves:
        numbers = np.asarray(leaf)
        if numbers.dtype.kind not in "iu":
            _known(numbers)
        elif numbers.size and max(abs(int(numbers.max())), abs(int(numbers.min()))) > EXACT_IN_FLOAT64:
            raise ValueError(f"x has the integer {leaf}, beyond 2^53, which float64 cannot hold exactly")
    return np.asarray(x)


@partial(jax.jit, static_argnames="rounding", inline=True)
def to_float32(x: Float64, grid: Grid, rounding: str, key: Array | None) -> Array:
    """float32 that rounds to the grid as x does; x of any size, the grid within float32's range."""
    cut, fraction = _cut(x)
    magnitude = x.high & ~SIGN
    # float32 itself is the one format with so many bits: what is rounded to it is rounded here, and may become inf.
    to_itself = jnp.asarray(grid.mantissa_bits) > ODD_MANTISSA
    if rounding == "stochastic":
        assert key is not None, "callers check"
        rounded = cut + (random_bits(jax.random.fold_in(key, 1), cut.shape) < fraction)
    elif rounding == "toward_zero":
        rounded, to_itself = jnp.where(to_itself, cut, cut | (fraction != 0)), jnp.bool_(False)
    else:
        nearest = cut + ((fraction | (cut & 1)) > np.uint32(1 << 31))
        rounded = jnp.where(to_itself, nearest, cut | (fraction != 0))
    rounded = jnp.minimum(rounded, jnp.where(to_itself, INF, LARGEST))
    is_nan = (magnitude > INFINITE) | ((magnitude == INFINITE) & (x.low != 0))
    rounded = jnp.where(magnitude >= INFINITE, jnp.where(is_nan, QUIET_NAN, INF), rounded)
    return lax.bitcast_convert_type((x.high & SIGN) | rounded, jnp.float32)


def _cut(x: Float64) -> tuple[Array, Array]:
    """(bits, fraction): |x| toward zero as float32 bits, and what was cut off as a share of the last bit, in 2^-32.

    Of a share that takes more than 32 bits the last bit stands for the rest. Beyond float32 the bits are inf's.
    """
    exponent = ((x.high & ~SIGN) >> 20).astype(jnp.int32) - FROM_FLOAT64
    # 53 bits: the 24 that a normal float32 keeps, and 29 behind them.
    kept = (((x.high << 3) | (x.low >> 29)) & FRACTION) | np.uint32(1 << MANTISSA)
    behind = x.low << 3
    normal = (jnp.clip(exponent, 0, 255).astype(jnp.uint32) << MANTISSA) | (kept & FRACTION)
    # A subnormal float32 keeps `down` bits fewer.
    down = jnp.maximum(1 - exponent, 1)
    near, far = jnp.minimum(down, 31).astype(jnp.uint32), jnp.clip(down - 32, 0, 31).astype(jnp.uint32)
    share = jnp.where(down < 32, (kept << (32 - near)) | (behind >> near), kept >> far)
    is_zero = ((x.high & ~SIGN) | x.low) == 0
    lost = jnp.where(down < 32, (behind & ((np.uint32(1) << near) - 1)) != 0, ~is_zero)
    share = jnp.where(is_zero, np.uint32(0), share | lost)
    is_normal = exponent >= 1
    return jnp.where(is_normal, normal, kept >> near), jnp.where(is_normal, behind, share)


@partial(jax.jit, inline=True)
def to_float64(x: Array) -> Array:
    """float32 as float64, exactly, subnormals too, where arithmetic may flush them. Needs `jax_enable_x64`."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    magnitude = bits & ~SIGN
    width = 31 - lax.clz(jnp.maximum(magnitude, 1)).astype(jnp.int32)
    up = jnp.maximum(MANTISSA - width, 0)  # of subnormals, to where the leading bit belongs
    is_subnormal = magnitude < np.uint32(1 << MANTISSA)
    field = jnp.where(is_subnormal, 1 - up, (magnitude >> MANTISSA).astype(jnp.int32)) + FROM_FLOAT64
    field = jnp.where(magnitude >= INF, 2047, jnp.where(magnitude == 0, 0, field)).astype(jnp.uint32)
    fraction = jnp.where(is_subnormal, magnitude << up.astype(jnp.uint32), magnitude) & FRACTION
    high = (bits & SIGN) | (field << 20) | (fraction >> 3)
    return lax.bitcast_convert_type(jnp.stack([fraction << 29, high], axis=-1), jnp.float64)
