"""How a tensor is brought into a format: scaled, rounded, and what its scale is multiplied back by.

q = round(x s), value q / s. The scale s is float32 and chosen so that the largest magnitude, amax, lands on the
format's largest value (or `margin` binades below). Everything carried from step to step is in `RoleState`.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from altgrad_jax.precision.formats import FloatFormat
from altgrad_jax.precision.recipes import MX_BLOCK, RoleRecipe
from altgrad_jax.precision.rounding import Grid, has_native_cast, native_cast, round_to_format
from altgrad_jax.precision.statistics import RoleStats, count

Array = jax.Array

# Two values of this size can be multiplied, and 2^20 such products summed, within float32.
LARGEST_OPERAND = 2.0**50
MEAN_DECAY = 0.9  # of the moving average of amax


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RoleState:
    """What is carried for one operand of one layer, in float32.

    Attributes:
      history: amax of the last steps, newest first, [H]; 0 where there was none yet. H = 0 but for delayed scaling.
      mean: exponential moving average of amax, decay 0.9, scalar; for people to look at.
      grid: the format, where it is traced; None where the recipe's is built in.
    """

    history: Array
    mean: Array
    grid: Grid | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Operand:
    """A quantised matrix: its value is `values * inverse_scale`.

    Attributes:
      values: [R, C] in the format's own dtype, or in the narrowest of bfloat16 and float32 that holds it.
      inverse_scale: float32, scalar, or [R, 1] or [1, C] with one for every vector along the contraction.
    """

    values: Array
    inverse_scale: Array


def initial_state(role: RoleRecipe, traced: bool = False) -> RoleState:
    """Before the first step; `traced` puts the format's grid into the state."""
    length = role.history if role.scaling == "delayed" else 0
    grid = jax.tree.map(jnp.asarray, Grid.of(role.fmt)) if traced else None
    return RoleState(jnp.zeros((length,), jnp.float32), jnp.zeros((), jnp.float32), grid)


def next_state(state: RoleState, amax: Array) -> RoleState:
    """With this step's amax, max-combined over microbatches and devices; one that is not finite is left out."""
    known = jnp.where(jnp.isfinite(amax), amax, 0.0)
    history = jnp.concatenate([known[None], state.history])[: state.history.shape[0]]
    mean = jnp.where(state.mean > 0, MEAN_DECAY * state.mean + (1 - MEAN_DECAY) * known, known)
    return RoleState(history, mean, state.grid)


def largest_target(fmt: FloatFormat) -> float:
    """Where amax is scaled to: the largest value, or 2^50 in formats that reach further."""
    return min(fmt.max, LARGEST_OPERAND)


def _target(role: RoleRecipe, grid: Grid | None) -> Array | float:
    """`largest_target` less the margin, for a format known or traced."""
    if grid is None:
        return largest_target(role.fmt) * 2.0**-role.margin
    largest = lax.bitcast_convert_type(jnp.asarray(grid.max_bits, jnp.uint32), jnp.float32)
    return jnp.minimum(largest, LARGEST_OPERAND) * np.float32(2.0**-role.margin)


def amax(x: Array, axis: int | None = None) -> Array:
    """Largest magnitude, float32: a scalar, or kept dimensions along one axis."""
    return jnp.max(jnp.abs(x), axis=axis, keepdims=axis is not None).astype(jnp.float32)


def scale_from_amax(largest: Array, target: Array | float) -> Array:
    """target / amax; 1 where amax is 0 or not finite, so that a spoilt tensor shows as what it is."""
    usable = (largest > 0) & jnp.isfinite(largest)
    # amax may be so small that the quotient is no float32; the scale then stops at 2^126.
    quotient = jnp.asarray(target, jnp.float32) / jnp.where(usable, largest, 1.0)
    return jnp.where(usable, jnp.minimum(quotient, np.float32(2.0**126)), 1.0)


def tensor_scale(x: Array, role: RoleRecipe, state: RoleState, axis: int, now: Array) -> Array:
    """The scale s of a tensor that is not scaled by blocks.

    Args:
      x: the tensor.
      role: its recipe.
      state: its history.
      axis: the contraction, along which "channel" scales are shared.
      now: the tensor's amax, combined over devices.
    """
    if role.scaling in ("none", "static"):
        return jnp.float32(role.scale if role.scaling == "static" else 1.0)
    target = _target(role, state.grid)
    if role.granularity == "channel":
        return scale_from_amax(amax(x, axis), target)
    if role.scaling == "delayed":
        remembered = jnp.max(state.history)
        now = jnp.where(remembered > 0, remembered, now)
    return scale_from_amax(now, target)


def carrier(fmt: FloatFormat) -> jnp.dtype:
    """The narrowest dtype that matrix units take and that holds every value: bfloat16 or float32."""
    fits = fmt.mantissa_bits <= 7 and fmt.step_exponent >= -126
    return jnp.dtype(jnp.bfloat16 if fits else jnp.float32)


def round_scaled(scaled: Array, role: RoleRecipe, grid: Grid | None, native: bool, key: Array | None) -> Array:
    """Rounds x s (float32) as the recipe says, into the dtype in which it is multiplied."""
    if native:
        if role.rounding == "nearest":
            return native_cast(scaled, role.fmt, role.overflow)
        return round_to_format(scaled, role.fmt, role.rounding, role.overflow, key).astype(role.fmt.dtype)
    rounded = round_to_format(scaled, role.fmt if grid is None else grid, role.rounding, role.overflow, key)
    return rounded.astype(carrier(role.fmt))


def quantise(
    x_RC: Array,
    role: RoleRecipe,
    state: RoleState,
    axis: int,
    *,
    native: bool = False,
    key: Array | None = None,
    axis_name: str | None = None,
    collect: bool = False,
) -> tuple[Operand, RoleStats]:
    """A matrix as an operand of a product contracted over `axis`, and what the conversion did.

    Args:
      x_RC: float32 or bfloat16.
      role: format, scaling, rounding.
      state: its history, for delayed scaling.
      axis: 0 or 1.
      native: give the format's own dtype rather than a wider one that holds its values.
      key: for stochastic rounding.
      axis_name: mapped axis (of devices) over which a tensor's amax is combined.
      collect: gather all statistics, or amax alone.
    """
    x_RC = x_RC.astype(jnp.float32)
    largest = amax(x_RC)
    if axis_name is not None and role.scaling in ("current", "delayed"):
        largest = lax.pmax(largest, axis_name)
    if role.scaling == "mx":
        scale = 1.0 / mx_scales(x_RC, role, axis, state.grid)
    else:
        scale = tensor_scale(x_RC, role, state, axis, largest)
    scaled = x_RC * scale
    rounded = round_scaled(scaled, role, state.grid, native, key)
    stats = count(largest, scaled, rounded, scale, role.fmt, state.grid) if collect else RoleStats(largest)
    if role.scaling == "mx":
        # An element has few mantissa bits and its scale is a power of two: their product is exact in bfloat16, down to
        # that type's smallest normal number.
        return Operand((rounded.astype(jnp.float32) / scale).astype(rounded.dtype), jnp.float32(1.0)), stats
    return Operand(rounded, 1.0 / scale), stats


def mx_scales(x_RC: Array, role: RoleRecipe, axis: int, grid: Grid | None = None) -> Array:
    """The scale 2^k of every element's block of 32 along `axis`, float32, x's shape.

    OCP MX 1.0, section 6.3: k = floor(log2 amax) - emax, with emax the exponent of the format's largest value, within
    the range of e8m0 (but for 2^-127, which is no normal float32). A block of zeros has k = 0. Where 32 does not divide
    the axis the last block is shorter.
    """
    moved = jnp.moveaxis(x_RC, axis, -1)
    length = moved.shape[-1]
    padded = jnp.pad(jnp.abs(moved), ((0, 0), (0, -length % MX_BLOCK)))
    amax_RB = jnp.max(padded.reshape(moved.shape[0], -1, MX_BLOCK), axis=-1)
    largest = Grid.of(role.fmt).max_bits if grid is None else grid.max_bits
    field = (lax.bitcast_convert_type(amax_RB, jnp.uint32) >> 23).astype(jnp.int32)
    k = jnp.clip(field - (jnp.asarray(largest, jnp.uint32) >> 23).astype(jnp.int32), -126, 127)
    k = jnp.where((field == 0) | (field == 255), 0, k)
    scale_RB = lax.bitcast_convert_type(((k + 127) << 23).astype(jnp.uint32), jnp.float32)
    return jnp.moveaxis(jnp.repeat(scale_RB, MX_BLOCK, axis=-1)[:, :length], -1, axis)


def runs_natively(role: RoleRecipe) -> bool:
    """Whether XLA has this operand's dtype and takes its scale outside a product."""
    return role.scaling != "mx" and has_native_cast(role.fmt)
