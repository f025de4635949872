"""One number format: sign, exponent and mantissa bits, bias, and which codes are special.

Every format here is sign-magnitude: a code is a sign bit (if the format has one) over a magnitude code, and magnitude
codes are ordered as their values are. Below the smallest normal number the spacing stays as it is (subnormals), so a
format is a set of grids, one for each binade, with a largest value and a few codes that are no numbers.
"""

import math
from dataclasses import dataclass, fields
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

MAX_BITS = 16  # of a format that is not float32: its value table has 2^bits entries
NANS = ("none", "ieee", "top", "zero")
FLOAT32 = (8, 23, 127, True, "ieee", True, True)  # its fields from the exponent bits on


@jax.tree_util.register_static
@dataclass(frozen=True)
class FloatFormat:
    """One number format. Under `jax.jit` it is a constant, so that a jitted function may take it as an argument.

    Attributes:
      name: as `get_format` knows it, or one of your own.
      exponent_bits: E; with 0 the format is fixed point, k / 2^M.
      mantissa_bits: M.
      bias: an exponent field f >= 1 means 2^(f - bias).
      inf: whether it has infinities.
      nan: which codes are NaN. "none"; "ieee": those with all exponent bits set, but for the infinity among them;
        "top": the largest magnitude; "zero": the code that would be -0.
      signed: False: no sign bit, no negative values.
      has_zero: False: code 0 is the smallest power of two, as in e8m0fnu.
      dtype_name: the jax.numpy dtype of this format, "" if there is none.

    Raises:
      TypeError, ValueError: a field is of another type, or no format can be like this.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int
    inf: bool = False
    nan: str = "none"
    signed: bool = True
    has_zero: bool = True
    dtype_name: str = ""

    def __post_init__(self):
        for field in fields(self):
            value, kind = getattr(self, field.name), getattr(field.type, "__name__", field.type)
            if type(value) is not field.type:
                raise TypeError(f"FloatFormat: {field.name}={value!r} is of the wrong type; it must be of type {kind}")
        if why := self._impossible():
            raise ValueError(f"format {self.name} {why}")

    def _impossible(self) -> str | None:
        """Why no format is like this, None if one may be."""
        e_bits, m_bits = self.exponent_bits, self.mantissa_bits
        if min(e_bits, m_bits) < 0:
            return f"has exponent_bits={e_bits} and mantissa_bits={m_bits}; neither can be below 0"
        described = e_bits, m_bits, self.bias, self.inf, self.nan, self.signed, self.has_zero
        if not 2 <= self.bits <= MAX_BITS and described != FLOAT32:
            sign = " with its sign" if self.signed else ""
            return f"has {self.bits} bits{sign}; 2 to {MAX_BITS} are possible, and float32"
        if self.nan not in NANS:
            return f"has nan={self.nan!r}, which is not one of {', '.join(NANS)}"
        if self.nan == "ieee" and not (self.inf and e_bits and m_bits):
            return "cannot be: nan=ieee needs inf=1, an exponent and a mantissa bit"
        if self.nan == "zero" and not (self.signed and self.has_zero):
            return "cannot be: nan=zero needs a sign and a zero"
        if self.signed and not self.has_zero:
            return "cannot be: only formats without a sign can be without zero"
        if self.max_magnitude < 1:
            return "has no finite value but 0" if self.has_zero else "has no two finite values"
        if not self.max_exponent >= -126 or self.step_exponent > 127:
            return "has no value within float32's range"
        return self._wrong_dtype() if self.dtype_name else None

    def _wrong_dtype(self) -> str | None:
        """Why arrays of `dtype_name` hold no codes of this format, None if they do."""
        try:
            info = jnp.finfo(jnp.dtype(self.dtype_name))
        except (TypeError, ValueError):
            return f"has dtype_name={self.dtype_name!r}, which is no floating dtype"
        own = self.bits, self.mantissa_bits, self.max, self.min_positive
        if own != (info.bits, info.nmant, float(info.max), float(info.smallest_subnormal)):
            return f"is not that of its dtype_name={self.dtype_name!r}"
        return None

    @property
    def bits(self) -> int:
        """Width of a code."""
        return int(self.signed) + self.exponent_bits + self.mantissa_bits

    @property
    def code_dtype(self) -> np.dtype:
        """Smallest unsigned integer dtype that holds a code."""
        return np.dtype(np.uint8 if self.bits <= 8 else np.uint16 if self.bits <= 16 else np.uint32)

    @property
    def dtype(self) -> np.dtype | None:
        """The dtype in which arrays of this format can be stored natively, or None."""
        return jnp.dtype(self.dtype_name) if self.dtype_name else None

    @property
    def min_exponent(self) -> int:
        """e_min: below 2^e_min the spacing no longer shrinks."""
        smallest_field = 1 if self.exponent_bits and self.has_zero else 0
        return smallest_field - self.bias

    @property
    def step_exponent(self) -> int:
        """log2 of the smallest spacing, which is the smallest positive value where there is a zero."""
        return self.min_exponent - self.mantissa_bits

    @property
    def magnitudes(self) -> int:
        """Number of magnitude codes, special ones included."""
        return 1 << (self.exponent_bits + self.mantissa_bits)

    @property
    def min_magnitude(self) -> int:
        """Magnitude code of the smallest positive value."""
        return 1 if self.has_zero else 0

    @property
    def max_magnitude(self) -> int:
        """Magnitude code of the largest finite value."""
        if self.nan == "ieee":
            return self.magnitudes - (1 << self.mantissa_bits) - 1
        return self.magnitudes - 1 - int(self.inf) - int(self.nan == "top")

    @property
    def finite_count(self) -> int:
        """Number of different finite values; 0 and -0 are one."""
        positive = self.max_magnitude + 1 - self.min_magnitude
        return positive * (2 if self.signed else 1) + int(self.has_zero)

    @property
    def inf_code(self) -> int | None:
        """Code of +infinity, or None."""
        return self.max_magnitude + 1 if self.inf else None

    @property
    def nan_code(self) -> int | None:
        """The NaN code that `encode` writes, None without one. For "ieee" it is the quiet NaN."""
        if self.nan == "ieee":
            quiet = 1 << (self.mantissa_bits - 1)
            return self.max_magnitude + 1 + quiet
        return {"top": self.magnitudes - 1, "zero": self.magnitudes, "none": None}[self.nan]

    @property
    def negative_zero(self) -> bool:
        """Whether -0 has a code of its own."""
        return self.signed and self.has_zero and self.nan != "zero"

    def parts(self, magnitude: int) -> tuple[int, int]:
        """(k, e) with k 2^e the exact value of a finite magnitude code; Python integers, no limit of range."""
        if not 0 <= magnitude <= self.max_magnitude:
            raise ValueError(f"{self.name} has no finite magnitude code {magnitude}")
        field, mantissa = magnitude >> self.mantissa_bits, magnitude & ((1 << self.mantissa_bits) - 1)
        first_normal = 1 if self.has_zero else 0
        if field < first_normal:
            return mantissa, self.step_exponent
        return (1 << self.mantissa_bits) + mantissa, self.step_exponent + field - first_normal

    def value(self, code: int) -> float:
        """The value of a code, by the definition, one code at a time: the reference for the array functions.

        Values beyond float64's range come out as inf or 0; `parts` has them exactly.
        """
        if not 0 <= code < 1 << self.bits:
            raise ValueError(f"{self.name} has {1 << self.bits} codes; {code} is none of them")
        negative, magnitude = divmod(code, self.magnitudes)
        if self.nan == "zero" and code == self.nan_code:
            return math.nan
        if magnitude > self.max_magnitude:
            return (-math.inf if negative else math.inf) if self.inf and magnitude == self.inf_code else math.nan
        value = _ldexp(*self.parts(magnitude))
        return -value if negative else value

    @property
    def max(self) -> float:
        """Largest finite value (inf where it lies beyond float64)."""
        return self.value(self.max_magnitude)

    @property
    def min_positive(self) -> float:
        """Smallest positive value, subnormal where the format has subnormals."""
        return self.value(self.min_magnitude)

    @property
    def min_normal(self) -> float:
        """Smallest value with full precision, 2^e_min; of a fixed-point format, 1, which it does not reach."""
        return _ldexp(1, self.min_exponent)

    @property
    def max_exponent(self) -> int:
        """floor(log2) of the largest finite value."""
        k, e = self.parts(self.max_magnitude)
        return k.bit_length() - 1 + e

    def values(self) -> npt.NDArray[np.float64]:
        """The value of every code, in code order; float64, NaN and infinities included.

        Raises:
          ValueError: the format has too many codes, or values beyond float64.
        """
        if self.bits > MAX_BITS:
            raise ValueError(f"{self.name} has 2^{self.bits} codes; tables go up to 2^{MAX_BITS}")
        if self.max_exponent > 1023 or self.step_exponent < -1074:
            raise ValueError(
                f"{self.name} reaches from 2^{self.step_exponent} to 2^{self.max_exponent}, beyond float64; `parts`"
                " gives its values exactly"
            )
        return _value_table(self).copy()

    def finite_values(self) -> npt.NDArray[np.float64]:
        """All different finite values, ascending; zero once."""
        values = self.values()
        return np.unique(values[np.isfinite(values)])

    def ulp(self, x: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Spacing of the grid at x: 2^(max(floor(log2|x|), e_min) - M), float64; of 0, the smallest spacing.

        NaN where the grid has none: of NaN, of infinities, and beyond the largest finite value.
        """
        x = np.abs(np.asarray(x, np.float64))
        exponent = np.where(x == 0, self.min_exponent, np.frexp(x)[1] - 1)
        spacing = np.ldexp(1.0, np.maximum(exponent, self.min_exponent) - self.mantissa_bits)
        return np.where(x <= min(self.max, np.finfo(np.float64).max), spacing, np.nan)

    def values_per_binade(self) -> dict[int, int]:
        """Exponent e -> how many positive finite values lie in [2^e, 2^(e + 1)), for every e that has one."""
        counts: dict[int, int] = {}
        magnitude = self.min_magnitude
        while magnitude <= self.max_magnitude:
            # The first of its binade is a power of two, k steps; there are k more steps to the next.
            k, e = self.parts(magnitude)
            counts[k.bit_length() - 1 + e] = min(k, self.max_magnitude + 1 - magnitude)
            magnitude += k
        return counts

    def same_grid_factor(self, other: "FloatFormat") -> int | None:
        """k if this format's finite values are 2^k times the other's, else None.

        Under a free scale per tensor two such formats are one: e1m6 is four times e0m7, value for value.
        """
        if (self.max_magnitude, self.signed, self.has_zero) != (other.max_magnitude, other.signed, other.has_zero):
            return None
        shift = self.step_exponent - other.step_exponent
        same = all(
            _reduced(*self.parts(m)) == _reduced(*other.parts(m), shift) for m in range(1, self.max_magnitude + 1)
        )
        return shift if same else None


def _reduced(k: int, e: int, shift: int = 0) -> tuple[int, int]:
    """(k, e) with k odd."""
    zeros = (k & -k).bit_length() - 1
    return k >> zeros, e + zeros + shift


def _ldexp(k: int, e: int) -> float:
    try:
        return math.ldexp(k, e)
    except OverflowError:
        return math.inf


@cache
def _value_table(fmt: FloatFormat) -> npt.NDArray[np.float64]:
    return np.array([fmt.value(code) for code in range(1 << fmt.bits)])
