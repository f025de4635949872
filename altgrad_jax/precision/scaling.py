"""How a tensor is brought into a format: scaled, rounded, and what its scale is multiplied back by.

q = round(x s), value q / s. The scale s is float32 and chosen so that the largest magnitude, amax, lands on the
format's largest value (or `margin` binades below). Everything carried from step to step is in `RoleState`.

A tensor that holds an infinity or NaN stays visibly spoilt, by one rule (`or_nan`): where amax is not finite, what q is
multiplied back by is NaN, and with it every value that shares the scale: the tensor, the vector, the block. So has OCP
MX 1.0 it for blocks. It holds whatever the format and `overflow`, natively too, and costs no pass over the tensor.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from altgrad_jax.precision.formats import FloatFormat
from altgrad_jax.precision.grid import Grid
from altgrad_jax.precision.largest import amax, amax_over_devices, block_amax
from altgrad_jax.precision.recipes import MX_BLOCK, RoleRecipe
from altgrad_jax.precision.rounding import has_native_cast, narrowed, native_cast, round_to_format
from altgrad_jax.precision.short_rounding import is_short, round_bfloat16
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
      history: amax of the last steps, newest first, [H]; 0 where there was none yet. None but for delayed scaling.
      mean: exponential moving average of amax, decay 0.9, scalar; for people to look at.
      grid: the format, where it is traced; None where the recipe's is built in.
    """

    history: Array | None
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
    history = jnp.zeros((role.history,), jnp.float32) if role.scaling == "delayed" else None
    return RoleState(history, jnp.zeros((), jnp.float32), traced_grid(role.fmt) if traced else None)


def traced_grid(fmt: FloatFormat) -> Grid:
    """A format's grid as arrays, of one structure for all formats with the same carrier: one program serves them.

    Raises:
      ValueError: bfloat16 holds the format, but float32 additions cannot round to it as they do to the others.
    """
    grid, narrow = Grid.of(fmt), carrier(fmt) == jnp.bfloat16
    if narrow and not grid.addable:
        raise ValueError(f"{fmt.name} reaches too far beyond the other formats to share their program")
    alike = replace(grid, carriers=("float32",), has_tiny_values=not narrow, addable=narrow)
    return jax.tree.map(jnp.asarray, alike)


def next_state(state: RoleState, amax: Array) -> RoleState:
    """With this step's amax, max-combined over microbatches and devices.

    One that is not finite changes nothing: the next scale follows from the last tensors that were numbers.
    """
    finite = jnp.isfinite(amax)
    history = state.history
    if history is not None:
        history = jnp.where(finite, jnp.concatenate([amax[None], history[:-1]]), history)
    mean = jnp.where(state.mean > 0, MEAN_DECAY * state.mean + (1 - MEAN_DECAY) * amax, amax)
    return RoleState(history, jnp.where(finite, mean, state.mean), state.grid)


def largest_target(fmt: FloatFormat) -> float:
    """Where amax is scaled to: the largest value, or 2^50 in formats that reach further."""
    return min(fmt.max, LARGEST_OPERAND)


def _target(role: RoleRecipe, grid: Grid | None) -> Array | float:
    """`largest_target` less the margin, for a format known or traced."""
    if grid is None:
        return largest_target(role.fmt) * 2.0**-role.margin
    largest = lax.bitcast_convert_type(jnp.asarray(grid.max_bits, jnp.uint32), jnp.float32)
    return jnp.minimum(largest, LARGEST_OPERAND) * np.float32(2.0**-role.margin)


def or_nan(factor: Array | float, largest: Array) -> Array:
    """What values with this amax are multiplied back by: the factor, or NaN where amax is not finite."""
    return jnp.where(jnp.isfinite(largest), factor, jnp.nan)


def scale_from_amax(largest: Array, target: Array | float) -> Array:
    """target / amax; 1 where amax is 0, NaN where it is not finite."""
    # The last always holds. It gives the divisor the target's shape where formats are batched: a tensor divided by one
    # number XLA multiplies with the number's inverse, which is an ulp off.
    usable = (largest > 0) & jnp.isfinite(largest) & (target > 0)
    # amax may be so small that the quotient is no float32, or so large that it is subnormal and taken for 0; the scale
    # stops where it and its inverse are normal numbers.
    quotient = jnp.asarray(target, jnp.float32) / jnp.where(usable, largest, 1.0)
    scale = jnp.where(usable, jnp.clip(quotient, np.float32(2.0**-126), np.float32(2.0**126)), 1.0)
    return or_nan(scale, largest)


def tensor_scale(x: Array, role: RoleRecipe, state: RoleState, axis: int, now: Array, axis_name: str | None) -> Array:
    """The scale s of a tensor that is not scaled by blocks.

    Args:
      x: the tensor.
      role: its recipe.
      state: its history.
      axis: the contraction, along which "channel" scales are shared.
      now: the tensor's amax, combined over devices.
      axis_name: mapped axis of the devices, over which rows are spread; or None.
    """
    if role.scaling in ("none", "static"):
        return jnp.float32(role.scale if role.scaling == "static" else 1.0)
    target = _target(role, state.grid)
    if role.granularity == "channel":
        of_vectors = amax(x, axis)
        if axis == 0 and axis_name is not None:  # of a vector along the rows each device has a part
            of_vectors = amax_over_devices(of_vectors, axis_name)
        return _floored(scale_from_amax(of_vectors, target), role)
    if role.scaling == "delayed":
        assert state.history is not None, "initial_state made one"
        remembered = jnp.max(state.history)
        now = jnp.where(remembered > 0, remembered, now)
    return _floored(scale_from_amax(now, target), role)


def _floored(scale: Array, role: RoleRecipe) -> Array:
    """The scale, or the power of two at or below it where the recipe wants one."""
    return power_of_two_below(scale) if role.pow2 else scale


def power_of_two_below(scale: Array) -> Array:
    """The largest power of two that is not above a positive normal float32; NaN of NaN."""
    bits = lax.bitcast_convert_type(scale, jnp.uint32) & np.uint32(0x7F80_0000)
    return jnp.where(jnp.isnan(scale), scale, lax.bitcast_convert_type(bits, jnp.float32))


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
    return narrowed(_emulated(scaled, role, grid, key), carrier(role.fmt))


def _emulated(scaled: Array, role: RoleRecipe, grid: Grid | None, key: Array | None) -> Array:
    """Rounds x s into float32."""
    # Not by way of the format's own dtype, where XLA has it: on a CPU its cast is slower than the general path.
    return round_to_format(scaled, Grid.of(role.fmt) if grid is None else grid, role.rounding, role.overflow, key)


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
    if role.scaling == "mx":
        return _quantise_blocks(x_RC, role, state, axis, key, collect)
    x_RC = x_RC.astype(jnp.float32)
    largest = amax(x_RC)
    if axis_name is not None and role.scaling in ("current", "delayed"):
        largest = amax_over_devices(largest, axis_name)
    scale = tensor_scale(x_RC, role, state, axis, largest, axis_name)
    scaled = x_RC * scale
    rounded = round_scaled(scaled, role, state.grid, native, key)
    inverse = 1.0 / scale
    if role.per_tensor:  # the scale of a vector is its own amax's
        inverse = or_nan(inverse, largest)
    operand = Operand(rounded, inverse)
    if not collect:
        return operand, RoleStats(largest)
    became, scale = (jnp.where(jnp.isnan(inverse), inverse, of.astype(jnp.float32)) for of in (rounded, scale))
    return operand, count(x_RC, largest, scaled, became, scale, role.fmt, state.grid)


def _quantise_blocks(
    x_RC: Array, role: RoleRecipe, state: RoleState, axis: int, key: Array | None, collect: bool
) -> tuple[Operand, RoleStats]:
    """`quantise` with a scale for every block of 32 along `axis`; the last is shorter where 32 does not divide it."""
    length = x_RC.shape[axis]
    padding = [(0, -length % MX_BLOCK if i == axis else 0) for i in (0, 1)]
    padded_RC = jnp.pad(x_RC, padding)
    shape = padded_RC.shape

    def whole(blocks: Array) -> Array:
        return lax.slice_in_dim(blocks.reshape(shape), 0, length, axis=axis)

    # [R, C / 32, 32] or [R / 32, 32, C]: no element moves.
    blocks = padded_RC.reshape(*shape[:axis], -1, MX_BLOCK, *shape[axis + 1 :])
    largest = block_amax(blocks, axis + 1)
    exponent = mx_exponent(largest, role, state.grid)
    scaled = times_power_of_two(blocks.astype(jnp.float32), -exponent)
    # An element has few mantissa bits and its scale is a power of two: their product is exact in bfloat16, down to that
    # type's smallest normal number.
    if _rounds_in_16_bits(x_RC, role, state):
        values = round_bfloat16(blocks, Grid.of(role.fmt), role.overflow, exponent)
        rounded = times_power_of_two(values.astype(jnp.float32), -exponent)
    else:
        rounded = _emulated(scaled, role, state.grid, key)
        values = narrowed(times_power_of_two(rounded, exponent), carrier(role.fmt))
    operand = Operand(whole(or_nan(values, largest)), jnp.float32(1.0))
    if not collect:
        return operand, RoleStats(amax(largest))
    x_RC, scale = x_RC.astype(jnp.float32), or_nan(power_of_two(-exponent), largest)
    rounded = whole(or_nan(rounded, largest))
    return operand, count(x_RC, amax(largest), whole(scaled), rounded, scale, role.fmt, state.grid)


def _rounds_in_16_bits(x: Array, role: RoleRecipe, state: RoleState) -> bool:
    """Whether a tensor is rounded in its own 16 bits, which is faster and gives the same."""
    known = state.grid is None and role.rounding == "nearest"
    return known and x.dtype == jnp.bfloat16 and is_short(Grid.of(role.fmt))


def mx_exponent(largest: Array, role: RoleRecipe, grid: Grid | None = None) -> Array:
    """k of the scale 2^k that a block's elements are divided by, int32, from the block's amax, float32.

    OCP MX 1.0, section 6.3: k = floor(log2 amax) - emax, with emax the exponent of the format's largest value, within
    the range of e8m0, -127 to 127. A block of zeros, or of numbers below float32's normal ones, which CPUs take for
    zeros, has k = 0, and so has one with an infinity or NaN. This rule lets a block's largest elements saturate: those
    between the format's largest value and the next power of two. With `margin` = 1, k is one more and none does, at the
    price of the lowest binade.
    """
    max_bits = jnp.asarray(Grid.of(role.fmt).max_bits if grid is None else grid.max_bits, jnp.uint32)
    field = (lax.bitcast_convert_type(largest, jnp.uint32) >> 23).astype(jnp.int32)
    k = jnp.clip(field - (max_bits >> 23).astype(jnp.int32) + role.margin, -127, 127)
    return jnp.where((field == 0) | (field == 255), 0, k)


def power_of_two(exponent: Array) -> Array:
    """2^exponent, float32, for exponents of normal numbers, -126 to 127; 0 for -127."""
    return lax.bitcast_convert_type(((exponent + 127) << 23).astype(jnp.uint32), jnp.float32)


def times_power_of_two(x: Array, exponent: Array) -> Array:
    """x 2^exponent, float32, for exponents from -127 to 127: in two factors, since 2^-127 is no normal number."""
    half = exponent >> 1
    return x * power_of_two(half) * power_of_two(exponent - half)


def runs_natively(role: RoleRecipe) -> bool:
    """Whether XLA has this operand's dtype and takes its scale outside a product."""
    return role.scaling != "mx" and has_native_cast(role.fmt)
