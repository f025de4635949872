"""What rounding needs to know of a number format: a few numbers, which may be known, traced or batched."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np

from altgrad_jax.precision.formats import FloatFormat, FormatLike, get_format

SIGN = np.uint32(0x8000_0000)
INF = np.uint32(0x7F80_0000)
MANTISSA = 23  # bits of float32's
BIAS = 127  # of float32's exponent
QUIET_NAN = np.uint32(0x7FC0_0000)
# Dtypes that can be rounded -> the most mantissa bits and the largest value of a format they can take: whatever is
# rounded is on the dtype's own grid, so rounding it to fewer bits never needs a smaller subnormal.
CARRIERS = {"float32": (23, np.inf), "bfloat16": (7, np.inf), "float16": (10, 65504.0)}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Grid:
    """What rounding needs to know of a format, as numbers that may be traced or batched.

    "The bits of" a value are those of its float32.

    Attributes:
      mantissa_bits: M, int32.
      min_exponent: e_min, int32.
      step_bits: the bits of the smallest positive value, uint32; 0 where it is below float32's smallest.
      half_step_bits: the bits of half of that, likewise.
      max_bits: the bits of the largest finite value within float32, uint32.
      overflow_bits: the bits of what lies beyond it where that is not saturated, uint32: inf, NaN, or the largest value
        in formats with neither.
      tie: uint32, which neighbour has the even code where no mantissa bit tells, that is in binades of one value. 2:
        the one above (the subnormal binade of one step, with code 1 below it); else M = 0, and the lower neighbour
        2^e is even if e + tie is.
      signed_zero: bool, whether -0 stays -0.
      carriers: names of the dtypes that hold every value of the format within their range; static.
      has_tiny_values: whether e_min lies below that of float32, whose subnormals then have to be normalised; static.
      addable: whether half the smallest step is a normal float32 and 2^(25 - M) times the largest value is finite, so
        that float32 additions can round to nearest; static.
    """

    mantissa_bits: Any
    min_exponent: Any
    step_bits: Any
    half_step_bits: Any
    max_bits: Any
    overflow_bits: Any
    tie: Any
    signed_zero: Any
    carriers: tuple[str, ...] = field(metadata={"static": True})
    has_tiny_values: bool = field(metadata={"static": True})
    addable: bool = field(metadata={"static": True})

    @staticmethod
    def of(fmt: FormatLike) -> "Grid":
        """The grid of a format, as NumPy scalars.

        Raises:
          TypeError: it is neither a format, nor the name or dtype of one.
          ValueError: an unknown name, or a format without sign or zero, which numbers are not rounded to here.
        """
        fmt = get_format(fmt)
        if not fmt.has_zero:
            raise ValueError(f"{fmt.name} holds only powers of two, no sign and no zero: it is for block scales")
        if not fmt.signed:
            raise ValueError(f"{fmt.name} has no sign: its values can be shown, and numbers are not rounded to it")
        largest = np.uint32(_largest_within_float32(fmt).view(np.uint32))
        beyond = INF if fmt.inf else largest if fmt.nan == "none" else QUIET_NAN
        return Grid(
            mantissa_bits=np.int32(fmt.mantissa_bits),
            min_exponent=np.int32(fmt.min_exponent),
            step_bits=power_bits(fmt.step_exponent),
            half_step_bits=power_bits(fmt.step_exponent - 1),
            max_bits=largest,
            overflow_bits=beyond,
            tie=np.uint32(2 if fmt.mantissa_bits else (1 - fmt.min_exponent) % 2),
            signed_zero=np.bool_(fmt.negative_zero),
            carriers=tuple(n for n, (m, top) in CARRIERS.items() if fmt.mantissa_bits <= m and fmt.max <= top),
            has_tiny_values=fmt.min_exponent < 1 - BIAS,
            addable=fmt.step_exponent - 1 >= 1 - BIAS and fmt.max_exponent + 25 - fmt.mantissa_bits <= BIAS,
        )


def stack_grids(formats: Sequence[FormatLike]) -> Grid:
    """The grids of several formats with a leading axis, for `vmap`. Raises as `Grid.of`, and for no formats."""
    if isinstance(formats, str) or not formats:
        raise ValueError(f"stack_grids takes a list of one or more formats, not {formats!r}")
    grids = [Grid.of(fmt) for fmt in formats]
    carriers = tuple(name for name in CARRIERS if all(name in grid.carriers for grid in grids))
    tiny = any(grid.has_tiny_values for grid in grids)
    addable = all(grid.addable for grid in grids)
    alike = [replace(grid, carriers=carriers, has_tiny_values=tiny, addable=addable) for grid in grids]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *alike)


def _largest_within_float32(fmt: FloatFormat) -> np.float32:
    """The format's largest finite value that float32 holds."""
    if fmt.max_exponent > BIAS:
        return np.float32(2.0**BIAS * (2.0 - 2.0**-fmt.mantissa_bits))
    return np.float32(fmt.max)


def power_bits(exponent: int) -> np.uint32:
    """The float32 bits of 2^exponent, subnormals included; 0 below them."""
    if exponent >= 1 - BIAS:
        return np.uint32((exponent + BIAS) << MANTISSA)
    return np.uint32((1 << (exponent + 149)) if exponent >= -149 else 0)
