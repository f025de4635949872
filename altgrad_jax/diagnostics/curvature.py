"""The largest and smallest eigenvalues of the Hessian of a loss, by the Lanczos method.

From a random unit vector q_1, with the Hessian H met only in products H q:

    w = H q_j - b_(j-1) q_(j-1),   a_j = <w, q_j>,   w -= a_j q_j,   b_j = |w|,   q_(j+1) = w / b_j

Eigenvalues of H, at both ends of its spectrum first, are near those of the tridiagonal T with diagonal a and
off-diagonal b: of T's eigenpair (t, s), H has an eigenvalue within |b_k| |s_k| of t, where s_k is the last component
(Lanczos 1950; Parlett, The Symmetric Eigenvalue Problem, 1998, ch. 13).

A product H v is the derivative of the gradient along v, forward over reverse: jvp of grad. `step.window_loss` of the
float32 model can be given as it is: its `custom_vjp` functions take no forward mode, but the inner reverse pass has
replaced them by their rules, which are plain JAX. (A model that rounds has a gradient with steps, and no Hessian.)

Memory: with the basis kept, `iterations` vectors of the parameters' size (30 M parameters, 8 iterations: 1 GB), against
which every new vector is orthogonalised. Without it three vectors, at a price: rounding errors bring eigenvectors
that were found already back as copies. Largest and smallest stay right, but the second largest may be the largest once
more, after 10 iterations already where the largest stands well apart (tests/diagnostics/test_curvature.py).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax import lax
from jax.flatten_util import ravel_pytree

Array = jax.Array
ROW = 4096  # vectors of all parameters are kept in rows of this length, the last padded with zeros
EXHAUSTED = 1e-5  # of |T|: a smaller b is rounding error, and there is nothing left to find


def largest_eigenvalues(
    loss_fn: Callable[[Any], Array],
    params: Any,
    key: Array,
    iterations: int,
    *,
    axis_name: str | None = None,
    keep_basis: bool = True,
) -> tuple[Array, Array]:
    """Eigenvalues of the Hessian of `loss_fn` at `params`, the largest (not in magnitude) first.

    One loop, whose body is compiled once.

    Args:
      loss_fn: params -> scalar.
      params: a pytree of float32 arrays.
      key: of the vector to begin with; the same on all devices.
      iterations: k, Hessian-vector products.
      axis_name: mapped axis over which products are averaged: the Hessian is that of the mean loss.
      keep_basis: whether to hold k vectors of the parameters' size and orthogonalise against them; without, trust
        only the first and the last eigenvalue.

    Returns:
      The eigenvalues found, descending, float32 [k], and for each a bound on its distance from a true one, [k]. NaN at
      the end where fewer than k steps exhausted what can be reached from the first vector.
    """
    flat_P, unravel = ravel_pytree(params)
    size = flat_P.size

    def in_rows(v_P: Array) -> Array:
        return jnp.pad(v_P.astype(jnp.float32), (0, -size % ROW)).reshape(-1, ROW)

    def hessian_times(v_RC: Array) -> Array:
        direction = unravel(v_RC.reshape(-1)[:size])
        product_P, _ = ravel_pytree(jax.jvp(jax.grad(loss_fn), (params,), (direction,))[1])
        return in_rows(product_P if axis_name is None else lax.pmean(product_P, axis_name))

    first_RC = in_rows(jax.random.normal(key, (size,), jnp.float32))
    with jax.default_matmul_precision("highest"):
        return _ends(*_lanczos(hessian_times, first_RC / _norm(first_RC), iterations, keep_basis))


def _dot(a_RC: Array, b_RC: Array) -> Array:
    """<a, b>, row by row: in one sum of 30 million float32 numbers digits would be lost."""
    return jnp.sum(jnp.sum(a_RC * b_RC, axis=1))


def _norm(a_RC: Array) -> Array:
    return jnp.sqrt(_dot(a_RC, a_RC))


def _lanczos(times: Callable[[Array], Array], first_RC: Array, count: int, keep_basis: bool) -> tuple[Array, Array]:
    """The diagonal a and the off-diagonal b of T, [k] each; the last b leads out of it."""

    def step(j: Array, carry: tuple) -> tuple:
        basis_KRC, before_RC, q_RC, beta, a, b = carry
        w_RC = times(q_RC) - beta * before_RC
        alpha = _dot(w_RC, q_RC)
        w_RC = w_RC - alpha * q_RC
        if keep_basis:
            basis_KRC = lax.dynamic_update_index_in_dim(basis_KRC, q_RC, j, 0)
            # The recurrence leaves little to take away, so once through is enough.
            w_RC = lax.fori_loop(0, j + 1, lambda i, w_RC: w_RC - _dot(basis_KRC[i], w_RC) * basis_KRC[i], w_RC)
        beta = _norm(w_RC)
        return basis_KRC, q_RC, w_RC / jnp.where(beta > 0, beta, 1.0), beta, a.at[j].set(alpha), b.at[j].set(beta)

    basis_KRC = jnp.zeros((count if keep_basis else 0, *first_RC.shape), jnp.float32)
    zero, zeros = jnp.zeros((), jnp.float32), jnp.zeros((count,), jnp.float32)
    *_, a, b = lax.fori_loop(0, count, step, (basis_KRC, jnp.zeros_like(first_RC), first_RC, zero, zeros, zeros))
    return a, b


def _ends(a: Array, b: Array) -> tuple[Array, Array]:
    """T's eigenvalues, descending, and their residual bounds."""
    largest = jnp.max(jnp.abs(jnp.concatenate([a, b])))
    # Rows behind the first b that is nothing but rounding error are cut off: put below all others, then left out.
    used = jnp.cumprod(jnp.concatenate([jnp.ones((1,)), b[:-1] > EXHAUSTED * largest])) > 0
    inner = jnp.where(used[1:], b[:-1], 0.0)
    t = jnp.diag(jnp.where(used, a, -4 * largest)) + jnp.diag(inner, 1) + jnp.diag(inner, -1)
    eigenvalues, vectors = jnp.linalg.eigh(t)
    last = jnp.sum(used) - 1
    bounds = jnp.abs(b[last] * vectors[last])
    keep = jnp.arange(a.size) <= last
    return jnp.where(keep, eigenvalues[::-1], jnp.nan), jnp.where(keep, bounds[::-1], jnp.nan)


def name(values: tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]) -> dict[str, float]:
    """`curvature/largest_eigenvalue` and so on of `largest_eigenvalues`' result, on the host.

    `curvature/residual` is the bound for the largest. The second is NaN where there is one alone.
    """
    eigenvalues, bounds = (np.asarray(x, np.float64) for x in values)
    return {
        "curvature/largest_eigenvalue": float(eigenvalues[0]),
        "curvature/second_eigenvalue": float(eigenvalues[1]) if eigenvalues.size > 1 else float("nan"),
        "curvature/smallest_eigenvalue": float(np.fmin.reduce(eigenvalues)),
        "curvature/residual": float(bounds[0]),
    }
