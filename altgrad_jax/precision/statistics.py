"""What a conversion did to a tensor, counted on the conversion itself and not guessed from ranges."""

from dataclasses import dataclass, fields

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from altgrad_jax.precision import largest
from altgrad_jax.precision.formats import FloatFormat
from altgrad_jax.precision.grid import Grid
from altgrad_jax.precision.rounding import encode

Array = jax.Array
SHARES = ("nonzero", "underflow", "overflow", "nan", "nonfinite")
COUNTED_BITS = 8  # codes are counted in formats up to this width


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RoleStats:
    """One operand of one layer in one step.

    Attributes:
      amax: largest magnitude, float32 scalar.
      scale: s, float32 scalar: the mean of the scales where there are several; NaN where one of them is that of
        values with an infinity or NaN among them. None where it was not asked for, as are the others.
      shares: of all elements, float32 [5]: those not zero, those not zero that became zero, those finite that lay
        beyond the largest value and more than half a step away from it, those that became NaN or were it, and those
        that were infinite or NaN before.
      codes: share of the elements in each code, float32 [2^bits]; formats up to 8 bits.
      sums: means over all elements, float32 [4]: of |x|; of x, sign and all, where it became zero, else 0; of
        (x / amax)^2; of that where it became zero, else 0.
    """

    amax: Array
    scale: Array | None = None
    shares: Array | None = None
    codes: Array | None = None
    sums: Array | None = None


def empty_stats(fmt: FloatFormat, collect: bool) -> RoleStats:
    """Zeros of the structure that `count` gives; what a probe is made of."""
    zero = jnp.zeros((), jnp.float32)
    if not collect:
        return RoleStats(zero)
    codes = jnp.zeros((1 << fmt.bits,), jnp.float32) if fmt.bits <= COUNTED_BITS else None
    return RoleStats(zero, zero, jnp.zeros((len(SHARES),), jnp.float32), codes, jnp.zeros((4,), jnp.float32))


def count(
    x: Array, amax: Array, scaled: Array, rounded: Array, scale: Array, fmt: FloatFormat, grid: Grid | None
) -> RoleStats:
    """Statistics of one conversion.

    Args:
      x: the tensor, float32.
      amax: its largest magnitude, combined over devices.
      scaled: the tensor times its scale, float32; 0 or infinite where float32 cannot hold it.
      rounded: what it became, any float dtype; NaN where it shares its scale with an infinity or NaN.
      scale: its scale, or its scales, NaN likewise.
      fmt: the format.
      grid: the format where it is traced, else None.
    """
    rounded = rounded.astype(jnp.float32)
    magnitude, gone = jnp.abs(scaled), (x != 0) & (rounded == 0)
    shares = [
        x != 0,
        gone,
        (magnitude > saturates_above(fmt, grid)) & jnp.isfinite(x),
        jnp.isnan(rounded),
        ~jnp.isfinite(x),
    ]
    means = jnp.stack([jnp.mean(share, dtype=jnp.float32) for share in shares])
    codes = None
    if fmt.bits <= COUNTED_BITS:
        # Under a traced format the codes of another would be counted, so there they are left out.
        code = encode(rounded, fmt, overflow="special").reshape(-1).astype(jnp.int32)
        codes = jnp.zeros((1 << fmt.bits,), jnp.float32)
        if grid is None:
            codes = jnp.zeros((1 << fmt.bits,), jnp.int32).at[code].add(1).astype(jnp.float32) / code.size
    energy = jnp.square(x / jnp.where(amax == 0, 1.0, amax))  # in a unit in which no square is too small or too large
    sums = [jnp.abs(x), jnp.where(gone, x, 0.0), energy, jnp.where(gone, energy, 0.0)]
    means_of = jnp.stack([jnp.mean(of, dtype=jnp.float32) for of in sums])
    unit = largest.amax(scale)  # in which the sum of scales near 2^127 is finite
    unit = jnp.where(unit == 0, 1.0, unit)
    return RoleStats(amax, jnp.mean(scale / unit) * unit, means, codes, means_of)


def saturates_above(fmt: FloatFormat, grid: Grid | None) -> Array | np.float32:
    """The largest value and half a step, of a format known or traced."""
    if grid is None:
        return np.float32(fmt.max + fmt.ulp(fmt.max) / 2) if fmt.max_exponent < 127 else np.float32(np.inf)
    largest = lax.bitcast_convert_type(jnp.asarray(grid.max_bits, jnp.uint32), jnp.float32)
    exponent = (jnp.asarray(grid.max_bits, jnp.uint32) >> 23).astype(jnp.int32) - 127
    spacing = jnp.maximum(exponent, grid.min_exponent) - grid.mantissa_bits
    return largest + jnp.ldexp(jnp.float32(1), spacing - 1)  # exp2 is off by some ulps


def over_parts(stats: RoleStats) -> RoleStats:
    """Statistics with a leading axis of equal parts (microbatches, chunks), combined: amax is the largest."""
    return _combined(stats, lambda x: largest.amax(x, 0)[0], lambda x: jnp.mean(x, axis=0))


def over_devices(stats: RoleStats, axis_name: str) -> RoleStats:
    """Statistics of all devices, combined."""
    return _combined(stats, lambda x: largest.amax_over_devices(x, axis_name), lambda x: lax.pmean(x, axis_name))


def _combined(stats, amax_of, mean) -> RoleStats:
    amax = amax_of(stats.amax)
    rest = {f.name: getattr(stats, f.name) for f in fields(stats) if f.name != "amax"}
    if stats.sums is not None:
        unit = jnp.square(stats.amax / jnp.where(amax == 0, 1.0, amax))  # each part's squares are in a unit of its own
        rest["sums"] = stats.sums * jnp.stack([jnp.ones_like(unit), jnp.ones_like(unit), unit, unit], axis=-1)
    return RoleStats(amax, **{name: None if x is None else mean(x) for name, x in rest.items()})
