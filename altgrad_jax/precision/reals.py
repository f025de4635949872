"""Settings as arithmetic sees them: reals in float32, where subnormal numbers may become 0; seeds in uint32."""

import math

import numpy as np

SMALLEST = float(np.finfo(np.float32).smallest_normal)
LARGEST = float(np.finfo(np.float32).max)


def float32_fault(value: float, inverse: bool = False) -> str | None:
    """Why a setting cannot have this value, as what follows "must"; None if it can.

    Args:
      value: the number as it was written.
      inverse: whether arithmetic also multiplies by 1 / value.
    """
    size = abs(value)
    if not math.isfinite(size):
        return "be finite"
    if size > LARGEST:
        return f"be finite in float32, whose largest number is {LARGEST:.3g}"
    if 0 < size < SMALLEST:
        return f"be 0 or at least {SMALLEST:.3g}, below which float32 may be taken for 0"
    if inverse and size > 1 / SMALLEST:
        return f"be at most {1 / SMALLEST:.3g}, so that its inverse is not 0 in float32"
    return None


def seed_fault(seed: int, largest: int = 2**32 - 1) -> str | None:
    """Why a seed is none, None if it is one: JAX's keys have 32 bits of it, so that others repeat one of these."""
    if 0 <= seed <= largest:
        return None
    return f"must lie between 0 and {largest} (2^{(largest + 1).bit_length() - 1} - 1); other seeds would repeat these"
