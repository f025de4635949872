"""The grid that a weight lives on: a format's values under the weight's own scale, and what can be asked of it.

A layer multiplies by round(w s) / s. What an update changes is therefore counted in units of that grid: its spacing at
a weight (one ulp, the stiffness S), the weight's place in the ordered list of values (its code), and whether the code
has changed at all. Formats may be traced: one compiled program serves them all.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from altgrad_jax.precision.formats import FloatFormat, get_format
from altgrad_jax.precision.grid import Grid
from altgrad_jax.precision.largest import amax
from altgrad_jax.precision.recipes import MX_BLOCK, RoleRecipe
from altgrad_jax.precision.rounding import magnitude_codes, magnitude_values, round_to_format
from altgrad_jax.precision.scaling import (
    LARGEST_OPERAND,
    RoleState,
    mx_exponent,
    power_of_two,
    power_of_two_below,
    scale_from_amax,
    tensor_scale,
)

Array = jax.Array
HEADROOM = 1  # binades left free above the largest weight where weights are kept on their grid: they grow


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class WeightGrid:
    """Values k / scale, k a finite value of a format.

    Attributes:
      grid: the format.
      scale: float32, positive, of a shape that broadcasts to the weight's.
      fixed: whether the scale is given once and for all, so that an optimizer must keep to it; static.
    """

    grid: Grid
    scale: Array | float
    fixed: bool = field(default=False, metadata={"static": True})

    def ulp(self, w: Array) -> Array:
        """Stiffness: S(w) = 2^(max(floor(log2|w s|), e_min) - M) / s, float32; of 0 the smallest spacing there is.

        Spacings under 2^-126, float32's smallest normal number, come out as that or 0.
        """
        binade = (_magnitude(w * self.scale) >> 23).astype(jnp.int32)
        largest = (jnp.asarray(self.grid.max_bits, jnp.uint32) >> 23).astype(jnp.int32)
        exponent = jnp.maximum(jnp.minimum(binade, largest) - 127, self.grid.min_exponent) - self.grid.mantissa_bits
        return power_of_two(jnp.maximum(exponent, -126)) / self.scale

    def round(self, w: Array, rounding: str = "nearest", key: Array | None = None) -> Array:
        """The value that stands for w, float32: saturating, but NaN for an infinity, which no value stands for."""
        rounded = round_to_format(w.astype(jnp.float32) * self.scale, self.grid, rounding, key=key) / self.scale
        return jnp.where(jnp.isinf(w), jnp.nan, rounded)

    def code(self, w: Array) -> Array:
        """The place of round(w) among the values, int32: 0 is zero, +-1 its neighbours, +-`largest_code` the ends."""
        bits = lax.bitcast_convert_type(round_to_format(w.astype(jnp.float32) * self.scale, self.grid), jnp.uint32)
        code = magnitude_codes(bits & np.uint32(0x7FFF_FFFF), self.grid).astype(jnp.int32)
        return jnp.where(bits >> 31 == 1, -code, code)

    def value(self, code: Array) -> Array:
        """The value at a place, float32; the inverse of `code`."""
        bits = magnitude_values(jnp.abs(code).astype(jnp.uint32), self.grid)
        sign = jnp.where(code < 0, np.uint32(0x8000_0000), np.uint32(0))
        return lax.bitcast_convert_type(bits | sign, jnp.float32) / self.scale

    @property
    def largest_code(self) -> Array:
        """Place of the largest value, int32."""
        return magnitude_codes(jnp.asarray(self.grid.max_bits, jnp.uint32), self.grid).astype(jnp.int32)

    def fitted(self, w: Array) -> "WeightGrid":
        """The grid that w is kept on: this one if it is fixed; else under a scale of a power of two from w's amax.

        The amax then lies in the second or third binade from the top, so that weights have room to grow. A power of
        two, so that growing changes the grid only at its ends.
        """
        if self.fixed:
            return self
        largest = lax.bitcast_convert_type(jnp.asarray(self.grid.max_bits, jnp.uint32), jnp.float32)
        target = jnp.minimum(largest, LARGEST_OPERAND) * np.float32(2.0**-HEADROOM)
        return replace(self, scale=power_of_two_below(scale_from_amax(amax(w), target)))


def _magnitude(x: Array) -> Array:
    return lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32) & np.uint32(0x7FFF_FFFF)


def grid_of(fmt: FloatFormat | Grid | str, w: Array, scale: Any = None) -> WeightGrid:
    """A weight's grid in a format: under a given scale, or under one from its amax.

    Raises:
      ValueError: no such format.
    """
    grid = fmt if isinstance(fmt, Grid) else Grid.of(get_format(fmt))
    if scale is not None:
        return WeightGrid(grid, jnp.asarray(scale, jnp.float32), fixed=True)
    return WeightGrid(grid, jnp.float32(1.0)).fitted(w)


def policy_grid(w: Array, role: RoleRecipe, state: RoleState, axis: int = 0) -> WeightGrid:
    """The grid on which a step rounds a layer's weight, by its recipe and state, for its forward product.

    Args:
      w: the weight, a matrix, float32.
      role: its recipe.
      state: its scaling state before the step.
      axis: the one contracted: 0 of a dense layer's weight, 1 of a table.
    """
    if axis == 1:
        flipped = policy_grid(w.T, role, state)
        return replace(flipped, scale=jnp.asarray(flipped.scale).T)
    grid = Grid.of(role.fmt) if state.grid is None else state.grid
    w_IO = w.astype(jnp.float32)
    if role.scaling != "mx":
        scale = tensor_scale(w_IO, role, state, 0, amax(w_IO), None)
        return WeightGrid(grid, scale, fixed=role.scaling in ("none", "static"))
    rows = w_IO.shape[0]
    blocks = jnp.pad(w_IO, ((0, -rows % MX_BLOCK), (0, 0))).reshape(-1, MX_BLOCK, w_IO.shape[1])
    k = jnp.minimum(mx_exponent(amax(blocks, 1), role, state.grid), 126)  # a scale of 2^-127 would be 0
    scale = power_of_two(-k)
    return WeightGrid(grid, jnp.broadcast_to(scale, blocks.shape).reshape(-1, w_IO.shape[1])[:rows])
