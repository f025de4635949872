"""The matrix product of every dense layer, with its own backward pass, in 16 bits or quantised.

A dense layer makes three products: y = x w forward, dx = g w^T and dw = x^T g backward. `matmul` takes operands in a
compute dtype; `quantised_matmul` rounds each of x, w and g to the format of its role first. Both accumulate in float32
and give dw in float32, the dtype of the weight it updates; plain autodiff would form dw in the operands' dtype, and
would cast the cotangents of an FP8 cast to FP8.

Every product is traced under a name, `gemm_scope`, that the compiled program keeps: the audit knows it again there.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from altgrad_jax.precision.kernels.tiles import TileTable
from altgrad_jax.precision.recipes import Recipe, RoleRecipe
from altgrad_jax.precision.rounding import straight_through
from altgrad_jax.precision.scaling import Operand, RoleState, quantise
from altgrad_jax.precision.statistics import RoleStats, empty_stats
from altgrad_jax.precision.target import on_cpu

Array = jax.Array
F32 = jnp.dtype(jnp.float32)


def gemm_scope(path: str, product: str) -> AbstractContextManager:
    """The name that a layer's product ("forward", "dx" or "dw") has in the compiled program."""
    return jax.named_scope(f"gemm:{path}:{product}")


def _dot(
    a: Array,
    b: Array,
    contract_a: int,
    contract_b: int,
    out_dtype: jnp.dtype = F32,
    precision: lax.Precision | None = None,
    kernel: TileTable | None = None,
) -> Array:
    """Two matrices, one contracted axis each, summed in float32.

    Args:
      a: the first.
      b: the second.
      contract_a: its axis that is summed over.
      contract_b: the other's.
      out_dtype: of the result. GPUs round to 16 bits on the way out, which saves writing and reading twice the bytes;
        XLA's CPU kernels are slow at it, so there the result is rounded afterwards.
      precision: of the sums; by default XLA's, but float32 operands are multiplied in float32, where GPUs would take
        TF32, with 10 mantissa bits.
      kernel: by our own kernel in these tiles, if both are of one type; `policy` sees to it that it is one that the
        kernel takes. None: by XLA.
    """
    if kernel is not None and a.dtype == b.dtype:
        # Imported here: Pallas takes a quarter of a second, and is not on every platform.
        from altgrad_jax.precision.kernels.fp8_matmul import fp8_matmul, product_of

        a_MK, b_NK = a if contract_a else a.T, b if contract_b else b.T
        return fp8_matmul(a_MK, b_NK, kernel.tiles(product_of(a_MK, b_NK)))
    if a.dtype == F32:
        precision = lax.Precision.HIGHEST
    asked = F32 if on_cpu() else out_dtype
    contracted = (((contract_a,), (contract_b,)), ((), ()))
    return lax.dot_general(a, b, contracted, precision=precision, preferred_element_type=asked).astype(out_dtype)


def _backward_precision(prepared: "Prepared") -> lax.Precision | None:
    """What tells XLA not to sum a gradient's FP8 products in the tensor cores' short accumulators (about 14 bits).

    Forward the short ones are used, which is faster: as in Transformer Engine and flax.
    """
    return lax.Precision.HIGHEST if prepared.native else None


def _padded(values_RC: Array) -> Array:
    """FP8 operands with zeros up to a multiple of 64 along axes that are no multiple of 16.

    cuBLASLt multiplies only multiples of 16. XLA would pad to the next of them, the weight in every chunk of the loss
    anew; here it is done once, and to lengths that fill the tiles: a vocabulary of 50257 becomes 50304.
    """
    if values_RC.dtype.itemsize > 1:
        return values_RC
    widths = [(0, -size % 64 if size % 16 else 0, 0) for size in values_RC.shape]
    return lax.pad(values_RC, np.zeros((), values_RC.dtype), widths)


@jax.custom_batching.custom_vmap
def _hidden_transpose(x_NI: Array) -> Array:
    """x^T behind a branch: that its condition always holds (no square is 2 modulo 4) XLA cannot know."""
    bits = lax.bitcast_convert_type(x_NI[0, 0], jnp.dtype(f"uint{8 * x_NI.dtype.itemsize}"))
    return lax.cond(bits * bits != 2, lambda x: x.T, lambda x: jnp.zeros(x.shape[::-1], x.dtype), x_NI)


@_hidden_transpose.def_vmap
def _batched_transpose(axis_size: int, in_batched: list[bool], x_BNI: Array) -> tuple[Array, bool]:
    # vmap would make a select of the branch. XLA folds a transpose through that into the product, but only after it has
    # seen that the product needs no conversion, and then cannot run it.
    del axis_size, in_batched
    return x_BNI.swapaxes(1, 2), True


@jax.custom_jvp
def _transposed_copy(x_NI: Array) -> Array:
    """x^T as an array of its own, which XLA cannot fold into the product that reads it (unless under vmap).

    XLA removes optimization barriers before it folds transposes into dots, and sees through every elementwise
    operation; a branch it must keep.
    """
    return _hidden_transpose(x_NI)


_transposed_copy.defjvp(lambda x, tangent: (_transposed_copy(*x), tangent[0].T))


def _weight_grad(
    x_NI: Array, g_NO: Array, precision: lax.Precision | None = None, kernel: TileTable | None = None
) -> Array:
    """x^T g in float32.

    XLA's CPU kernels multiply 16-bit operands only when the left one is contracted over its last axis, and otherwise
    convert both to float32, at half the speed. So there x is transposed beforehand; GPU and TPU kernels take either.
    """
    if on_cpu() and x_NI.dtype.itemsize == 2:
        return _dot(_transposed_copy(x_NI), g_NO, 1, 0)
    return _dot(x_NI, g_NO, 0, 0, F32, precision, kernel)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def matmul(x_NI: Array, w_IO: Array, compute_dtype: jnp.dtype, out_dtype: jnp.dtype, path: str = "") -> Array:
    """x w, multiplied in `compute_dtype` with float32 accumulation.

    Args:
      x_NI: activations, [N, I], any float dtype.
      w_IO: weights, [I, O], kept in float32 by the caller.
      compute_dtype: what both operands, and the gradient in the backward pass, are rounded to.
      out_dtype: dtype of the result; bfloat16 inside the network, float32 for logits.
      path: the layer's name, for the audit.

    Returns:
      [N, O] in `out_dtype`. The gradient of x has x's dtype, the gradient of w has w's.
    """
    return _matmul_forward(x_NI, w_IO, compute_dtype, out_dtype, path)[0]


def _matmul_forward(x_NI, w_IO, compute_dtype, out_dtype, path):
    x, w = x_NI.astype(compute_dtype), w_IO.astype(compute_dtype)
    # Empty arrays carry the caller's dtypes to the backward pass: residuals must be arrays.
    like = jnp.zeros((0,), x_NI.dtype), jnp.zeros((0,), w_IO.dtype)
    with gemm_scope(path, "forward"):
        return _dot(x, w, 1, 0, jnp.dtype(out_dtype)), (x, w, like)


def _matmul_backward(compute_dtype, out_dtype, path, residuals, g_NO):
    del out_dtype
    x, w, (like_x, like_w) = residuals
    g = g_NO.astype(compute_dtype)
    with gemm_scope(path, "dx"):
        dx_NI = _dot(g, w, 1, 1, like_x.dtype)
    with gemm_scope(path, "dw"):
        return dx_NI, _weight_grad(x, g).astype(like_w.dtype)


matmul.defvjp(_matmul_forward, _matmul_backward)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Probe:
    """The statistics of x and g of one layer: x's are known forward and g's backward, so both leave as a cotangent.

    A probe of zeros goes in; "the gradient with respect to it" is what was seen.
    """

    activation: RoleStats
    gradient: RoleStats


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Prepared:
    """A layer made ready for a step: its weight quantised, once, and what its other operands need.

    Attributes:
      forward: w [I, O], quantised for y = x w.
      backward: w [I, O], quantised for dx = g w^T; the same operand unless scales run along the contraction.
      activation: scaling state of x.
      gradient: scaling state of g.
      activation_key: PRNG key of its stochastic rounding, or None.
      gradient_key: likewise.
      path: the layer's name.
      shape: of its weight, (I, O); natively multiplied operands may be padded.
      recipe: how the operands are quantised.
      native: operands in the formats' own dtypes.
      kernel: products of two operands of one type by `kernels.fp8_matmul` in these tiles, not by an engine of XLA's;
        None: by XLA's.
      axis_name: axis over which current amaxes are combined, or None.
      collect: whether to gather all statistics, or only amax.
    """

    forward: Operand
    backward: Operand
    activation: RoleState
    gradient: RoleState
    activation_key: Array | None
    gradient_key: Array | None
    path: str = field(metadata={"static": True})
    shape: tuple[int, int] = field(metadata={"static": True})
    recipe: Recipe = field(metadata={"static": True})
    native: bool = field(metadata={"static": True})
    kernel: TileTable | None = field(metadata={"static": True})
    axis_name: str | None = field(metadata={"static": True})
    collect: bool = field(metadata={"static": True})

    def fold_keys(self, index: Array | int) -> "Prepared":
        """With keys of its own for one of several parts of a step: a device, a microbatch, a chunk."""

        def fold(key: Array | None) -> Array | None:
            return None if key is None else jax.random.fold_in(key, index)

        return replace(self, activation_key=fold(self.activation_key), gradient_key=fold(self.gradient_key))

    def probe(self) -> Probe:
        """Zeros of the structure of this layer's statistics."""
        return Probe(*(empty_stats(self.recipe.role(r).fmt, self.collect) for r in ("activation", "gradient")))


def operand_pair(
    x_RC: Array,
    role: RoleRecipe,
    state: RoleState,
    axes: tuple[int, int],
    native: bool,
    key: Array | None,
    axis_name: str | None,
    collect: bool,
) -> tuple[Operand, Operand, RoleStats]:
    """A matrix as the operand of its two products, contracted over `axes`, and what the (first) conversion did.

    With one scale a tensor both are the same array, rounded once. Native operands may be padded.
    """
    quantised = partial(quantise, x_RC, role, state, native=native, axis_name=axis_name)
    first, stats = quantised(axes[0], key=key, collect=collect)
    first = replace(first, values=_padded(first.values))
    if role.per_tensor:
        return first, first, stats
    other_key = None if key is None else jax.random.fold_in(key, 1)
    second = quantised(axes[1], key=other_key, collect=False)[0]
    return first, replace(second, values=_padded(second.values)), stats


def product_forward(x_NI: Array, prepared: Prepared) -> tuple[Array, Operand, RoleStats]:
    """y = x w: [N, O] in float32, x as the operand that the backward pass needs, and the statistics of x."""
    p = prepared
    x, x_backward, stats = operand_pair(
        x_NI, p.recipe.activation, p.activation, (1, 0), p.native, p.activation_key, p.axis_name, p.collect
    )
    with gemm_scope(p.path, "forward"):
        product = _dot(x.values, p.forward.values, 1, 0, kernel=p.kernel)[: x_NI.shape[0], : p.shape[1]]
        y_NO = product * x.inverse_scale * p.forward.inverse_scale
    return y_NO, x_backward, stats


def product_backward(g_NO: Array, x: Operand, prepared: Prepared) -> tuple[Array, Array, RoleStats]:
    """dx = g w^T [N, I] and dw = x^T g [I, O], float32, and the statistics of g."""
    p = prepared
    precision = _backward_precision(p)
    g, g_backward, stats = operand_pair(
        g_NO, p.recipe.gradient, p.gradient, (1, 0), p.native, p.gradient_key, p.axis_name, p.collect
    )
    with gemm_scope(p.path, "dx"):
        product = _dot(g.values, p.backward.values, 1, 1, F32, precision, p.kernel)[: g_NO.shape[0], : p.shape[0]]
        dx_NI = product * g.inverse_scale * p.backward.inverse_scale.T
    with gemm_scope(p.path, "dw"):
        product = _weight_grad(x.values, g_backward.values, precision, p.kernel)[: p.shape[0], : p.shape[1]]
        dw_IO = product * x.inverse_scale.T * g_backward.inverse_scale
    return dx_NI, dw_IO, stats


def dequantised_table(table_VC: Array, prepared: Prepared) -> Array:
    """An embedding table with its rows rounded, float32, the gradient passed straight through to the table."""
    rounded = prepared.forward.values.astype(jnp.float32) * prepared.forward.inverse_scale
    return straight_through(table_VC, lax.stop_gradient(rounded))


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def quantised_matmul(
    x_NI: Array, w_IO: Array, bias_O: Array | None, prepared: Prepared, probe: Probe, out_dtype: jnp.dtype
) -> Array:
    """x w + b with x, w and, in the backward pass, g rounded to the formats of their roles.

    Rounding is passed straight through: the gradients are those of the product of the rounded operands.

    Args:
      x_NI: activations, [N, I].
      w_IO: the weight, [I, O] float32, whose gradient is wanted; what is multiplied is `prepared.forward`.
      bias_O: float32, added before the result is rounded to `out_dtype`; or None.
      prepared: the layer's quantised weight, scales and keys.
      probe: `prepared.probe()`; its cotangent is the statistics of x and g.
      out_dtype: dtype of the result.

    Returns:
      [N, O] in `out_dtype`.
    """
    return _quantised_forward(x_NI, w_IO, bias_O, prepared, probe, out_dtype)[0]


def _quantised_forward(x_NI, w_IO, bias_O, prepared, probe, out_dtype):
    del probe
    y_NO, x, stats = product_forward(x_NI, prepared)
    if bias_O is not None:
        y_NO = y_NO + bias_O
    like = jnp.zeros((0,), x_NI.dtype), jnp.zeros((0,), w_IO.dtype), None if bias_O is None else bias_O[:0]
    return y_NO.astype(out_dtype), (x, prepared, stats, like)


def _quantised_backward(out_dtype, residuals, g_NO):
    del out_dtype
    x, prepared, x_stats, (like_x, like_w, like_bias) = residuals
    dx_NI, dw_IO, g_stats = product_backward(g_NO, x, prepared)
    dbias_O = None if like_bias is None else jnp.sum(g_NO, axis=0, dtype=jnp.float32).astype(like_bias.dtype)
    return dx_NI.astype(like_x.dtype), dw_IO.astype(like_w.dtype), dbias_O, None, Probe(x_stats, g_stats)


quantised_matmul.defvjp(_quantised_forward, _quantised_backward)
