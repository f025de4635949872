"""What a number is, and where it is rounded. Depends on jax and numpy alone, and can be used alone."""

from altgrad_jax.precision.formats import FloatFormat, family, get_format
from altgrad_jax.precision.grid import Grid, stack_grids
from altgrad_jax.precision.rounding import decode, encode, round_to_format

__all__ = ["FloatFormat", "Grid", "decode", "encode", "family", "get_format", "round_to_format", "stack_grids"]
