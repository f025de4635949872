"""The matrix product of every dense layer, with its own backward pass.

A dense layer makes three products: y = x w forward, dx = g w^T and dw = x^T g backward. Plain autodiff would form dw
in the compute dtype; here all three take `compute_dtype` operands, accumulate in float32, and dw leaves in float32,
the dtype of the weight it updates. Owning the backward also lets it be laid out for the machine (see `_weight_grad`).
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


def _dot(a: Array, b: Array, contract_a: int, contract_b: int) -> Array:
    """Two matrices, one contracted axis each, float32 result."""
    return lax.dot_general(a, b, (((contract_a,), (contract_b,)), ((), ())), preferred_element_type=jnp.float32)


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


def _weight_grad(x_NI: Array, g_NO: Array) -> Array:
    """x^T g in float32.

    XLA's CPU kernels multiply 16-bit operands only when the left one is contracted over its last axis, and otherwise
    convert both to float32, at half the speed. So there x is transposed beforehand; GPU and TPU kernels take either.
    """
    if jax.default_backend() == "cpu" and x_NI.dtype.itemsize == 2:
        return _dot(_transposed_copy(x_NI), g_NO, 1, 0)
    return _dot(x_NI, g_NO, 0, 0)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def matmul(x_NI: Array, w_IO: Array, compute_dtype: jnp.dtype, out_dtype: jnp.dtype) -> Array:
    """x w, multiplied in `compute_dtype` with float32 accumulation.

    Args:
      x_NI: activations, [N, I], any float dtype.
      w_IO: weights, [I, O], kept in float32 by the caller.
      compute_dtype: what both operands, and the gradient in the backward pass, are rounded to.
      out_dtype: dtype of the result; bfloat16 inside the network, float32 for logits.

    Returns:
      [N, O] in `out_dtype`. The gradient of x has x's dtype, the gradient of w has w's.
    """
    return _matmul_forward(x_NI, w_IO, compute_dtype, out_dtype)[0]


def _matmul_forward(x_NI, w_IO, compute_dtype, out_dtype):
    x, w = x_NI.astype(compute_dtype), w_IO.astype(compute_dtype)
    # Empty arrays carry the caller's dtypes to the backward pass: residuals must be arrays.
    like = jnp.zeros((0,), x_NI.dtype), jnp.zeros((0,), w_IO.dtype)
    return _dot(x, w, 1, 0).astype(out_dtype), (x, w, like)


def _matmul_backward(compute_dtype, out_dtype, residuals, g_NO):
    del out_dtype
    x, w, (like_x, like_w) = residuals
    g = g_NO.astype(compute_dtype)
    return _dot(g, w, 1, 1).astype(like_x.dtype), _weight_grad(x, g).astype(like_w.dtype)


matmul.defvjp(_matmul_forward, _matmul_backward)
