"""What a number format is: sign, exponent and mantissa bits, bias, and which codes are special.

Every format here is sign-magnitude: a code is a sign bit (if the format has one) over a magnitude code, and magnitude
codes are ordered as their values are. Below the smallest normal number the spacing stays as it is (subnormals), so a
format is a set of grids, one for each binade, with a largest value and a few codes that are no numbers.

Names: ml_dtypes' (`e5m2`, `e4m3fn`, `e8m0fnu`, ...) mean its types. Any other `e{E}m{M}` is the format with those
widths in which every code is finite, as is `e{E}m{M}:inf=0,nan=0` where ml_dtypes has taken the plain name.
`binary8p1` to `binary8p7` are IEEE P3109's. Anything else: `get_format("e3m4:bias=1,inf=0,nan=0")`.
"""

import difflib
import math
import re
from dataclasses import dataclass
from functools import cache

import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

MAX_BITS = 16  # of a format that is not float32: its value table has 2^bits entries


@dataclass(frozen=True)
class FloatFormat:
    """One number format.

    Attributes:
      name: as `get_format` knows it.
      exponent_bits: E; with 0 the format is fixed point, k / 2^M.
      mantissa_bits: M.
      bias: an exponent field f >= 1 means 2^(f - bias).
      inf: whether it has infinities.
      nan: which codes are NaN. "none"; "ieee": those with all exponent bits set, but for the infinity among them;
        "top": the largest magnitude; "zero": the code that would be -0.
      signed: False: no sign bit, no negative values.
      has_zero: False: code 0 is the smallest power of two, as in e8m0fnu.
      dtype_name: the jax.numpy dtype of this format, "" if there is none.
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
        """Spacing of the grid at x: 2^(max(floor(log2|x|), e_min) - M), float64; of 0, the smallest spacing."""
        exponent = np.frexp(np.abs(np.asarray(x, np.float64)))[1] - 1
        exponent = np.where(np.asarray(x) == 0, self.min_exponent, exponent)
        return np.ldexp(1.0, np.maximum(exponent, self.min_exponent) - self.mantissa_bits)

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


def default_bias(exponent_bits: int) -> int:
    """2^(E-1) - 1, and 0 for E <= 1."""
    return max(0, (1 << exponent_bits >> 1) - 1)


def _ml_dtypes() -> list[FloatFormat]:
    """The small floats that ml_dtypes defines, as described in its README and in the OCP FP8 and MX specifications."""

    def named(name: str, e: int, m: int, bias: int, *, inf: bool = False, nan: str, number_line: bool = True):
        dtype = f"float8_{name}"
        return FloatFormat(name, e, m, bias, inf, nan, signed=number_line, has_zero=number_line, dtype_name=dtype)

    return [
        named("e5m2", 5, 2, 15, inf=True, nan="ieee"),
        named("e4m3", 4, 3, 7, inf=True, nan="ieee"),
        named("e3m4", 3, 4, 3, inf=True, nan="ieee"),
        named("e4m3fn", 4, 3, 7, nan="top"),
        named("e5m2fnuz", 5, 2, 16, nan="zero"),
        named("e4m3fnuz", 4, 3, 8, nan="zero"),
        named("e4m3b11fnuz", 4, 3, 11, nan="zero"),
        named("e8m0fnu", 8, 0, 127, nan="top", number_line=False),
        # XLA has no arrays of these on every backend; they are rounded to by the general path.
        FloatFormat("e3m2fn", 3, 2, 3),
        FloatFormat("e2m3fn", 2, 3, 1),
        FloatFormat("e2m1fn", 2, 1, 1),
    ]


def _p3109() -> list[FloatFormat]:
    """IEEE P3109 binary8 with precision 1 to 7: one NaN in place of -0, infinities, bias 2^(7 - p)."""
    return [FloatFormat(f"binary8p{p}", 8 - p, p - 1, 1 << (7 - p), inf=True, nan="zero") for p in range(1, 8)]


def all_finite(exponent_bits: int, mantissa_bits: int) -> FloatFormat:
    """The sign-magnitude format with these widths in which every code is finite."""
    plain = f"e{exponent_bits}m{mantissa_bits}"
    taken = any(fmt.name == plain for fmt in _ml_dtypes())
    name = f"{plain}:inf=0,nan=0" if taken else plain
    return FloatFormat(name, exponent_bits, mantissa_bits, default_bias(exponent_bits))


def family(bits: int) -> tuple[FloatFormat, ...]:
    """All formats of `bits` magnitude bits in which every code is finite: family(7) is e0m7, e1m6, ... e7m0."""
    return tuple(all_finite(e, bits - e) for e in range(bits + 1))


@cache
def registry() -> dict[str, FloatFormat]:
    """Every named format, by name."""
    formats = [
        *_ml_dtypes(),
        *_p3109(),
        FloatFormat("float16", 5, 10, 15, inf=True, nan="ieee", dtype_name="float16"),
        FloatFormat("bfloat16", 8, 7, 127, inf=True, nan="ieee", dtype_name="bfloat16"),
        FloatFormat("float32", 8, 23, 127, inf=True, nan="ieee", dtype_name="float32"),
        *family(7),
        *family(15),
    ]
    return {fmt.name: fmt for fmt in formats}


ALIASES = {"bf16": "bfloat16", "fp16": "float16", "f16": "float16", "fp32": "float32", "f32": "float32"}


def get_format(name: str | FloatFormat) -> FloatFormat:
    """The format of a name; a FloatFormat is returned as it is.

    Args:
      name: a name of `registry()`, an alias (`bf16`, `float8_e5m2`), or widths with options,
        "e{E}m{M}[:bias=INT][,inf=0|1][,nan=0|1|ieee|top|zero]". With inf=1, nan=1 means "ieee"; without, "top".

    Raises:
      ValueError: no format has this name (the nearest is named), or the widths and options contradict each other.
    """
    if isinstance(name, FloatFormat):
        return name
    plain = name.removeprefix("float8_").removeprefix("float6_").removeprefix("float4_")
    plain = ALIASES.get(plain, plain)
    if plain in registry():
        return registry()[plain]
    widths, _, options = plain.partition(":")
    match = re.fullmatch(r"e(\d+)m(\d+)", widths)
    if match is None:
        nearest = difflib.get_close_matches(plain, [*registry(), *ALIASES], 1, cutoff=0.0)[0]
        raise ValueError(f"unknown format {name!r}: did you mean {nearest!r}?")
    return _user_format(int(match[1]), int(match[2]), options)


def _user_format(exponent_bits: int, mantissa_bits: int, options: str) -> FloatFormat:
    """A format by its widths and "bias=1,inf=0,nan=0"."""
    plain = f"e{exponent_bits}m{mantissa_bits}"
    given = dict(option.partition("=")[::2] for option in options.split(",") if option)
    if len(given) < options.count(",") + bool(options):
        raise ValueError(f"format {plain}:{options}: an option is empty or given twice")
    if unknown := sorted(given.keys() - {"bias", "inf", "nan"}):
        raise ValueError(f"format {plain}:{options}: unknown option {unknown[0]!r}; there are bias, inf and nan")
    total = 1 + exponent_bits + mantissa_bits
    if not 2 <= total <= MAX_BITS:
        raise ValueError(f"format {plain} has {total} bits with its sign; 2 to {MAX_BITS} are possible")
    inf, nan = given.get("inf", "0"), given.get("nan", "0")
    if inf not in ("0", "1") or nan not in ("0", "1", "ieee", "top", "zero"):
        raise ValueError(f"format {plain}:{options}: inf is 0 or 1, nan is 0, 1, ieee, top or zero")
    kind = {"0": "none", "1": "ieee" if inf == "1" else "top"}.get(nan, nan)
    bias_text = given.get("bias", str(default_bias(exponent_bits)))
    if not re.fullmatch(r"-?\d+", bias_text):
        raise ValueError(f"format {plain}:{options}: bias={bias_text!r} is no integer")
    if kind == "ieee" and (inf == "0" or exponent_bits == 0 or mantissa_bits == 0):
        raise ValueError(f"format {plain}:{options}: nan=ieee needs inf=1, an exponent and a mantissa bit")
    # One spelling for one format, so that equal formats have equal names.
    bias = int(bias_text)
    name = f"{plain}:bias={bias},inf={inf},nan={'0' if kind == 'none' else kind}"
    fmt = FloatFormat(name, exponent_bits, mantissa_bits, bias, inf == "1", kind)
    if fmt.max_magnitude < 1:
        raise ValueError(f"format {plain}:{options} has no finite value but 0")
    if not fmt.max_exponent >= -126 or fmt.step_exponent > 127:
        raise ValueError(f"format {plain}:{options} has no value within float32's range")
    for known in registry().values():
        if (known.exponent_bits, known.mantissa_bits, known.bias, known.inf, known.nan, known.signed) == (
            *(exponent_bits, mantissa_bits, bias, fmt.inf, kind, True),
        ):
            return known
    return fmt
