"""Rounding to a format, and codes: bit-exact, under jit, vmap and grad, for formats known or traced.

Most of it is integer arithmetic on the bits of float32. A rounding mode cuts the low d bits of a magnitude, where d
follows from the exponent: 23 - M for numbers that the format holds with full precision, more below its smallest normal
number. The carry of a rounded-up mantissa runs into the exponent, which is what it should do.

To nearest there is a shorter way: add a number so large that the sum has the format's spacing, and take it away again.
CPUs and GPUs may flush subnormal operands to zero, and the sum must not overflow, so that is for formats well within
float32's range (`Grid.addable`), which are nearly all. Of bfloat16 nothing needs more than its own 16 bits, so that a
CPU's vectors hold twice as many: `round_bfloat16`, for formats of few mantissa bits.
"""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax import lax
from jax.typing import ArrayLike

from altgrad_jax.precision.codes import as_codes
from altgrad_jax.precision.formats import FloatFormat, FormatLike, get_format
from altgrad_jax.precision.grid import BIAS, INF, MANTISSA, QUIET_NAN, SIGN, Grid
from altgrad_jax.precision.operands import Float64, as_operand, to_float32, to_float64
from altgrad_jax.precision.short_rounding import is_short, round_bfloat16
from altgrad_jax.precision.target import on_cpu
from altgrad_jax.precision.threefry import random_bits

Array = jax.Array
ROUNDINGS = ("nearest", "toward_zero", "stochastic")
OVERFLOWS = ("saturate", "special")


def round_to_format(
    x: ArrayLike,
    fmt: FormatLike | Grid,
    rounding: str = "nearest",
    overflow: str = "saturate",
    key: Array | None = None,
) -> Array:
    """Rounds every element of x to a value of the format.

    The gradient is passed straight through: the cotangent of the result is that of x, everywhere.

    Args:
      x: float32, bfloat16, float16, or float64 (Python's floats and lists of them too), which is rounded once, with and
        without `jax_enable_x64`. Under `jax.jit` and `jax.vmap` without it, JAX makes float32 of an argument first.
      fmt: a format, its name, or a `Grid` whose numbers may be traced.
      rounding: "nearest" (ties to the even code), "toward_zero", or "stochastic" (up or down so that the expected
        value is x; needs `key`).
      overflow: what becomes of values that round beyond the largest: "saturate" makes them the largest (infinities
        too), "special" the format's inf, its NaN if it has no inf, and the largest if it has neither.
      key: PRNG key of the stochastic rounding.

    Returns:
      An array of x's shape and dtype; of float64, float32 where JAX has no float64. NaN stays NaN, in formats without
      NaN too: in this array it cannot be mistaken for a number.

    Raises:
      TypeError: fmt is neither a format, nor the name or dtype of one, nor a `Grid`.
      ValueError: unknown format, rounding or overflow; no key; a dtype that cannot hold the format's values, or float64
        and a format that reaches beyond float32.
    """
    _check(rounding, overflow, key)
    operand = as_operand(x)
    if not isinstance(operand, Float64):
        return _rounded(operand, fmt, rounding, overflow, key)
    narrow = to_float32(operand, _within_float32(fmt), rounding, key)
    rounded = _rounded(narrow, fmt, rounding, overflow, key)
    if jax.dtypes.canonicalize_dtype("float64") != "float64":
        return rounded
    return straight_through(jnp.asarray(x, "float64"), to_float64(rounded))


def _rounded(x: Array, fmt: FormatLike | Grid, rounding: str, overflow: str, key: Array | None) -> Array:
    """`round_to_format` of an array of a dtype in `CARRIERS`."""
    if rounding == "nearest" and not isinstance(fmt, Grid) and has_native_cast(fmt) and _native_is_faster():
        return straight_through(x, _native_round(lax.stop_gradient(x), get_format(fmt), overflow))
    grid = fmt if isinstance(fmt, Grid) else Grid.of(fmt)
    if x.dtype.name not in grid.carriers:
        name = "each of these formats" if isinstance(fmt, Grid) else get_format(fmt).name
        raise ValueError(f"{x.dtype} cannot hold every value of {name}; pass {' or '.join(grid.carriers)}")
    if x.dtype == jnp.bfloat16 and rounding == "nearest" and is_short(grid):
        return straight_through(x, round_bfloat16(lax.stop_gradient(x), grid, overflow))
    bits = _round_bits(_bits(lax.stop_gradient(x)), grid, rounding, overflow, key)
    return straight_through(x, _from_bits(bits, x.dtype))


def _within_float32(fmt: FormatLike | Grid) -> Grid:
    """The grid of a format to which float64 can be rounded. Raises ValueError."""
    grid = fmt if isinstance(fmt, Grid) else Grid.of(fmt)
    if grid.has_tiny_values or not (isinstance(fmt, Grid) or get_format(fmt).max_exponent <= BIAS):
        name = "one of these formats" if isinstance(fmt, Grid) else get_format(fmt).name
        raise ValueError(f"float64 is not rounded to {name}, which reaches beyond float32's range; pass float32")
    return grid


def narrowed(x: Array, dtype: jnp.dtype) -> Array:
    """x.astype(dtype), for float32 values that the dtype holds: to bfloat16 without the work of rounding them.

    NaN must be quiet, as the result of every operation is.
    """
    return _from_bits(_bits(x), dtype) if x.dtype == jnp.float32 else x.astype(dtype)


def encode(
    x: ArrayLike,
    fmt: FormatLike,
    rounding: str = "nearest",
    overflow: str = "saturate",
    key: Array | None = None,
) -> Array:
    """The codes of x rounded to the format: uint8, uint16 or uint32, arguments as in `round_to_format`.

    NaN becomes the format's NaN code of the same sign, as in ml_dtypes, where the format has one of each. A format
    without NaN gets the code of -0 (of 0 without one): count NaNs before encoding.
    """
    _check(rounding, overflow, key)
    fmt = get_format(fmt)
    grid, operand = Grid.of(fmt), as_operand(x)
    if isinstance(operand, Float64):
        operand = to_float32(operand, _within_float32(fmt), rounding, key)
    bits = _round_bits(_bits(operand), grid, rounding, overflow, key)
    sign, magnitude = bits >> 31, bits & ~SIGN
    code = magnitude_codes(magnitude, grid)
    if fmt.inf_code is not None:
        code = jnp.where(magnitude == INF, np.uint32(fmt.inf_code), code)
    nan_code = fmt.nan_code if fmt.nan_code is not None else fmt.magnitudes if fmt.negative_zero else 0
    code = jnp.where(magnitude > INF, np.uint32(nan_code), code)
    one_nan = (magnitude > INF) & (fmt.nan in ("zero", "none"))
    return jnp.where(one_nan, code, code | (sign << (fmt.bits - 1))).astype(fmt.code_dtype)


def magnitude_codes(magnitude: Array, grid: Grid) -> Array:
    """Codes of finite magnitudes on the grid, given as float32 bits without sign; uint32, ordered as values are."""
    exponent, lsb_exponent, significand = _split(magnitude, grid)
    # Of float32's subnormals fewer bits may be left than the format has.
    surplus = jnp.maximum(exponent, grid.min_exponent) - grid.mantissa_bits - lsb_exponent
    steps = _shifted_right(significand, surplus)
    binade = jnp.maximum(exponent - grid.min_exponent, 0).astype(jnp.uint32)
    bits = jnp.asarray(grid.mantissa_bits).astype(jnp.uint32)
    return jnp.where(magnitude == 0, np.uint32(0), steps + (binade << bits))


def magnitude_values(codes: Array, grid: Grid) -> Array:
    """The inverse of `magnitude_codes`: finite magnitudes as float32 bits; of those below float32's range, 0."""
    mantissa_bits = jnp.asarray(grid.mantissa_bits).astype(jnp.uint32)
    field, mantissa = codes >> mantissa_bits, codes & ((np.uint32(1) << mantissa_bits) - 1)
    normal = field > 0
    significand = jnp.where(normal, mantissa | (np.uint32(1) << mantissa_bits), mantissa)
    # significand 2^lsb, its leading one brought to where float32 has its own.
    lsb = jnp.maximum(field.astype(jnp.int32), 1) - 1 + jnp.asarray(grid.min_exponent) - mantissa_bits.astype(jnp.int32)
    width = 31 - lax.clz(significand).astype(jnp.int32)
    exponent = lsb + width + BIAS
    fraction = (significand << (MANTISSA - jnp.maximum(width, 0)).astype(jnp.uint32)) & np.uint32((1 << MANTISSA) - 1)
    bits = (exponent.astype(jnp.uint32) << MANTISSA) | fraction
    return jnp.where((significand > 0) & (exponent > 0), bits, np.uint32(0))


def decode(codes: ArrayLike, fmt: FormatLike) -> Array:
    """The values of codes, float32; those that float32 cannot hold become inf or 0.

    Args:
      codes: integers of any width, or an array of the format's own dtype, of which the bits are taken. Traced integers
        cannot be looked at: they must be of the format's `code_dtype`, and those that are no codes become NaN.
      fmt: the format, its name, or its dtype.

    Raises:
      TypeError, ValueError: no such format; codes of another dtype, or that the format has not.
    """
    fmt = get_format(fmt)
    codes = as_codes(codes, fmt)
    if fmt.bits == 32:
        return lax.bitcast_convert_type(codes, jnp.float32)
    return jnp.asarray(_float32_table(fmt)).at[codes.astype(jnp.uint32)].get(mode="fill", fill_value=jnp.nan)


@cache
def _float32_table(fmt: FloatFormat) -> npt.NDArray[np.float32]:
    with np.errstate(over="ignore", under="ignore"):
        return np.array([fmt.value(code) for code in range(1 << fmt.bits)]).astype(np.float32)


def has_native_cast(fmt: FormatLike) -> bool:
    """Whether `x.astype` to this format's own dtype rounds to it as `round_to_format` does."""
    fmt = get_format(fmt)
    return fmt.dtype is not None and fmt.bits <= 8 and fmt.signed


def native_cast(x: Array, fmt: FloatFormat, overflow: str = "saturate") -> Array:
    """x in the format's own dtype, to nearest even; see `round_to_format` for `overflow`. No gradient.

    XLA's casts do not saturate, so the values are clipped first. NaN stays NaN.
    """
    if overflow == "saturate":
        x = jnp.clip(x, -fmt.max, fmt.max)
    return x.astype(fmt.dtype)


def _native_is_faster() -> bool:
    """Whether casting to float8 and back beats the general path: not on CPUs, which take three times as long for it."""
    return not on_cpu()


def _native_round(x: Array, fmt: FloatFormat, overflow: str) -> Array:
    return native_cast(x, fmt, overflow).astype(x.dtype)


def _check(rounding: str, overflow: str, key: Array | None) -> None:
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding={rounding!r} is not one of {', '.join(ROUNDINGS)}")
    if overflow not in OVERFLOWS:
        raise ValueError(f"overflow={overflow!r} is not one of {', '.join(OVERFLOWS)}")
    if rounding == "stochastic" and key is None:
        raise ValueError("rounding='stochastic' needs key=, a PRNG key")


@jax.custom_jvp
def straight_through(x: Array, rounded: Array) -> Array:
    """`rounded`, with the derivative of x: the straight-through estimator (Bengio et al. 2013, arXiv 1308.3432)."""
    del x
    return rounded


straight_through.defjvp(lambda primals, tangents: (primals[1], tangents[0]))


def _bits(x: Array) -> Array:
    """The bits of x as float32, uint32; bfloat16 without arithmetic, which would flush its subnormals."""
    if x.dtype == jnp.bfloat16:
        return lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32) << 16
    return lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)


def _from_bits(bits: Array, dtype: jnp.dtype) -> Array:
    """The inverse of `_bits` for values that the dtype holds."""
    if dtype == jnp.bfloat16:
        return lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
    return _floats(bits).astype(dtype)


def _split(magnitude: Array, grid: Grid) -> tuple[Array, Array, Array]:
    """(e, l, s) with value s 2^l and 2^e <= value < 2^(e + 1): exponent and lsb exponent int32, significand uint32.

    Of float32's subnormals e is only known to be at most -126, unless the grid has normal numbers down there.
    """
    field = (magnitude >> MANTISSA).astype(jnp.int32)
    fraction = magnitude & np.uint32((1 << MANTISSA) - 1)
    significand = jnp.where(field > 0, fraction | np.uint32(1 << MANTISSA), fraction)
    lsb_exponent = jnp.maximum(field, 1) - (BIAS + MANTISSA)
    exponent = lsb_exponent + MANTISSA
    if grid.has_tiny_values:
        exponent = jnp.where(field > 0, exponent, 31 - lax.clz(magnitude).astype(jnp.int32) + lsb_exponent)
    return exponent, lsb_exponent, significand


def _round_bits(bits: Array, grid: Grid, rounding: str, overflow: str, key: Array | None) -> Array:
    """`round_to_format` on float32 bits."""
    sign = bits & SIGN
    magnitude = bits ^ sign
    # The largest value is on the grid, so what is no larger stays so. A binade above it nothing rounds to it.
    top = grid.max_bits if overflow == "saturate" else grid.max_bits + np.uint32(1 << MANTISSA)
    bounded = jnp.minimum(magnitude, top)
    if rounding == "nearest" and grid.addable:
        rounded = _nearest_by_adding(bounded, grid)
    else:
        rounded = _round_by_cutting(bounded, grid, rounding, key)
    rounded = _limit(rounded, magnitude, grid, rounding, overflow)
    sign = jnp.where((rounded == 0) & ~jnp.asarray(grid.signed_zero), np.uint32(0), sign)
    return sign | rounded


def _round_by_cutting(magnitude: Array, grid: Grid, rounding: str, key: Array | None) -> Array:
    """Magnitudes on the grid as if it had no largest value. Any format, any rounding."""
    exponent, lsb_exponent, significand = _split(magnitude, grid)
    spacing_exponent = jnp.maximum(exponent, grid.min_exponent) - grid.mantissa_bits
    # Where more than 23 bits would be cut the magnitude is below one step, which is looked after separately.
    cut = jnp.clip(spacing_exponent - lsb_exponent, 0, MANTISSA).astype(jnp.uint32)
    rest = (np.uint32(1) << cut) - np.uint32(1)  # mask of what is cut
    if rounding == "nearest":
        # In a binade of one value there is no mantissa bit to tell which neighbour's code is even.
        lone = jnp.where(grid.tie == 2, np.uint32(1), exponent.astype(jnp.uint32) + grid.tie)
        kept = jnp.where(spacing_exponent == exponent, lone, magnitude >> cut)
        rounded = (magnitude + (rest >> 1) + (kept & rest & 1)) & ~rest
        below_step = jnp.where(magnitude > grid.half_step_bits, grid.step_bits, np.uint32(0))
    elif rounding == "toward_zero":
        rounded = magnitude & ~rest
        below_step = jnp.zeros_like(magnitude)
    else:
        assert key is not None, "callers check"
        random = random_bits(key, magnitude.shape)
        rounded = (magnitude + (random & rest)) & ~rest
        below_step = jnp.where(random < _step_fraction(significand, lsb_exponent, grid), grid.step_bits, np.uint32(0))
    return jnp.where(magnitude < grid.step_bits, below_step, rounded)


def _nearest_by_adding(magnitude: Array, grid: Grid) -> Array:
    """What `_round_by_cutting` gives, to nearest, of magnitudes up to twice the largest value.

    In the binade of 2^e the sum with 2^(e + 23 - M) lies in that number's binade, where float32's spacing is the
    format's, and it is rounded to an even multiple of it: to the even code.
    """
    smallest = (jnp.asarray(grid.min_exponent) + BIAS).astype(jnp.uint32) << MANTISSA
    power = jnp.maximum(magnitude & INF, smallest)
    # Without mantissa bits the lower neighbour is always the odd multiple, 1. Where its code is even, ties are made a
    # little less than ties.
    even_below = ~((power >> MANTISSA) - np.uint32(BIAS) + grid.tie) & np.uint32(1)
    magnitude = magnitude - jnp.where(grid.tie == 2, np.uint32(0), even_below)
    large = _floats(power + ((MANTISSA - jnp.asarray(grid.mantissa_bits)).astype(jnp.uint32) << MANTISSA))
    return _bits((_floats(magnitude) + large) - large)


def _floats(bits: Array) -> Array:
    return lax.bitcast_convert_type(bits, jnp.float32)


def _step_fraction(significand: Array, lsb_exponent: Array, grid: Grid) -> Array:
    """2^32 times value / step for values below one step, uint32: the chance of rounding up, to 2^-32."""
    return _shifted_right(significand, grid.min_exponent - grid.mantissa_bits - lsb_exponent - 32)


def _shifted_right(bits: Array, by: Array) -> Array:
    """bits 2^-by, rounded down; `by` of either sign."""
    left, right = (jnp.clip(distance, 0, 31).astype(jnp.uint32) for distance in (-by, by))
    return jnp.where(by < 0, bits << left, bits >> right)


def _limit(rounded: Array, magnitude: Array, grid: Grid, rounding: str, overflow: str) -> Array:
    """Magnitudes beyond the largest value as `overflow` has it; a quiet NaN where there was one."""
    if overflow == "saturate":  # they were bounded before
        limited = rounded
    elif rounding == "toward_zero":  # what is finite stays finite
        beyond = jnp.where(magnitude == INF, grid.overflow_bits, grid.max_bits)
        limited = jnp.where(rounded > grid.max_bits, beyond, rounded)
    else:
        limited = jnp.where(rounded > grid.max_bits, grid.overflow_bits, rounded)
    return jnp.where(magnitude > INF, QUIET_NAN, limited)
