"""Formats and rounding from their definition, in NumPy float64, sharing nothing with the package but a format's fields.

For x with exponent e = max(floor(log2|x|), e_min) the spacing is 2^(e - M), and the n-th multiple of it has the
magnitude code (e - e_min) 2^M + n. Products of a float32 number and a power of two are exact in float64, so there is no
rounding here but the one that is meant.
"""

import ml_dtypes
import numpy as np
from gfloat import Domain, FormatInfo

from altgrad_jax.precision.formats import FloatFormat

FLOAT32_MAX = float(np.finfo(np.float32).max)
NATIVE = {
    **{f"e{rest}": getattr(ml_dtypes, f"float8_e{rest}") for rest in ("5m2", "4m3", "3m4", "4m3fn")},
    **{f"e{rest}": getattr(ml_dtypes, f"float8_e{rest}") for rest in ("5m2fnuz", "4m3fnuz", "4m3b11fnuz")},
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
}
# ml_dtypes has these too, XLA only some of them on some machines.
SMALL = {
    name: getattr(ml_dtypes, f"float{bits}_{name}") for name, bits in (("e3m2fn", 6), ("e2m3fn", 6), ("e2m1fn", 4))
}


def min_exponent(fmt: FloatFormat) -> int:
    """e_min: field 1 is the first normal binade; without exponent bits there is only field 0."""
    return (1 if fmt.exponent_bits else 0) - fmt.bias


def largest_code(fmt: FloatFormat) -> int:
    """Magnitude code of the largest finite value."""
    last = 2 ** (fmt.exponent_bits + fmt.mantissa_bits) - 1
    if fmt.nan == "ieee":  # all exponent bits set: infinity and NaNs
        return last - 2**fmt.mantissa_bits
    return last - (1 if fmt.nan == "top" else 0) - (1 if fmt.inf else 0)


def magnitudes(fmt: FloatFormat) -> np.ndarray:
    """The values of the finite magnitude codes that float32 reaches, ascending, float64; others are inf or 0."""
    code = np.arange(largest_code(fmt) + 1)
    field, fraction = np.divmod(code, 2**fmt.mantissa_bits)
    normal = (field > 0) & (fmt.exponent_bits > 0)
    significand = fraction + np.where(normal, 2.0**fmt.mantissa_bits, 0.0)
    with np.errstate(over="ignore", under="ignore"):
        return np.ldexp(significand, min_exponent(fmt) - fmt.mantissa_bits + np.where(normal, field - 1, 0))


def largest(fmt: FloatFormat) -> float:
    """The largest finite value that is a float32 number."""
    values = magnitudes(fmt)
    return float(values[values <= FLOAT32_MAX][-1])


def split(x, fmt: FloatFormat) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(n, part, e) of finite x: |x| = (n + part) 2^(e - M) with 0 <= part < 1."""
    with np.errstate(invalid="ignore"):
        x = np.abs(np.where(np.isfinite(x), x, 0).astype(np.float64))
    e = np.maximum(np.where(x == 0, -(10**6), np.frexp(x)[1] - 1), min_exponent(fmt))
    # Far below the smallest step any tiny part will do: one that float64 would lose is 2^-500 here.
    multiple = np.ldexp(x, np.where(x == 0, 0, np.clip(fmt.mantissa_bits - e, -500, 500)))
    n = np.floor(multiple)
    return n, multiple - n, e


def round_reference(x, fmt: FloatFormat, rounding: str = "nearest", overflow: str = "saturate") -> np.ndarray:
    """`round_to_format`, but for stochastic rounding; float64."""
    with np.errstate(invalid="ignore"):  # signalling NaNs
        x = np.asarray(x, np.float64)
    n, part, e = split(x, fmt)
    code = (e - min_exponent(fmt)).astype(np.int64) * 2**fmt.mantissa_bits + n.astype(np.int64)
    odd = code % 2 == 1
    up = (part > 0.5) | ((part == 0.5) & odd) if rounding == "nearest" else np.zeros(x.shape, bool)
    rounded = np.ldexp(n + up, e - fmt.mantissa_bits)
    rounded = np.where(np.isinf(x), np.inf, rounded)
    return _finish(x, rounded, fmt, rounding, overflow)


def neighbours(x, fmt: FloatFormat) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(nearer to zero, farther from zero, the share of the way from the one to the other), saturated, of finite x."""
    x = np.asarray(x, np.float64)
    n, part, e = split(x, fmt)
    low, high = (np.ldexp(k, e - fmt.mantissa_bits) for k in (n, n + (part > 0)))
    return *(_finish(x, v, fmt, "nearest", "saturate") for v in (low, high)), part


def _finish(x, rounded, fmt: FloatFormat, rounding: str, overflow: str) -> np.ndarray:
    """Overflow, signs and NaN."""
    top = largest(fmt)
    beyond = np.inf if fmt.inf else top if fmt.nan == "none" else np.nan
    if overflow == "saturate":
        limited = np.minimum(rounded, top)
    elif rounding == "toward_zero":
        limited = np.where(np.isinf(x), beyond, np.minimum(rounded, top))
    else:
        limited = np.where(rounded > top, beyond, rounded)
    signed = np.where(np.signbit(x), -limited, limited)
    if fmt.nan == "zero":  # the code of -0 is NaN
        signed = np.where(signed == 0, 0.0, signed)
    return np.where(np.isnan(x), np.nan, signed)


def telling_inputs(fmt: FloatFormat) -> np.ndarray:
    """Every value and midpoint (also beyond the largest), their float32 neighbours, special values; both signs."""
    values = magnitudes(fmt)
    values = values[values <= FLOAT32_MAX]
    last_gap = values[-1] - values[-2]
    points = np.concatenate([values, [values[-1] + last_gap, values[-1] + 2 * last_gap, 2 * values[-1]]])
    points = np.concatenate([points, (points[1:] + points[:-1]) / 2, values[1:2] / 4])
    with np.errstate(over="ignore", under="ignore"):
        points = np.unique(points.astype(np.float32))
        points = np.concatenate([np.nextafter(points, np.float32(to)) for to in (-np.inf, np.inf)] + [points])
    tiny = np.array([1, 2, 3, 0x7FFFFF, 0x800000, 0x800001, 0x7F7FFFFF, 0x7F800000, 0x7FC00000], np.uint32)
    points = np.unique(np.abs(np.concatenate([points, tiny.view(np.float32)])))
    return np.concatenate([points, -points])


def random_floats(seed: int, size: int) -> np.ndarray:
    """Random bits as float32: all exponents alike, subnormals, infinities and NaNs among them."""
    bits = np.random.default_rng(seed).integers(0, 2**32, size, dtype=np.uint32)
    return bits.view(np.float32)


def same_bits(actual, expected) -> np.ndarray:
    """Elementwise: the same float32 number to the bit, or both NaN."""
    actual, expected = np.asarray(actual, np.float32), np.asarray(expected, np.float32)
    return (actual.view(np.uint32) == expected.view(np.uint32)) | (np.isnan(actual) & np.isnan(expected))


def assert_same(actual, expected, x, what="") -> None:
    """All elements as in `same_bits`; otherwise says for which x not."""
    wrong = ~same_bits(actual, expected)
    if wrong.any():
        i = np.flatnonzero(wrong)[:5]
        actual, expected, x = (np.asarray(a, np.float64).reshape(-1)[i] for a in (actual, expected, x))
        raise AssertionError(f"{what}: {wrong.sum()} differ, such as {x} -> {actual}, not {expected}")


def in_gfloat(fmt: FloatFormat) -> FormatInfo | None:
    """The format as gfloat describes it; None where float64 does not hold all of it."""
    values = magnitudes(fmt)
    if not np.isfinite(values[-1]) or np.ldexp(1.0, min_exponent(fmt) - fmt.mantissa_bits) == 0:
        return None
    return FormatInfo(
        fmt.name,
        fmt.bits,
        fmt.mantissa_bits + 1,
        # gfloat counts the binade of subnormals as field 1.
        bias=fmt.bias + (fmt.exponent_bits == 0),
        is_signed=True,
        domain=Domain.Extended if fmt.inf else Domain.Finite,
        has_nz=fmt.nan != "zero",
        num_high_nans={"ieee": 2**fmt.mantissa_bits - 1, "top": 1}.get(fmt.nan, 0),
        has_subnormals=True,
        is_twos_complement=False,
    )
