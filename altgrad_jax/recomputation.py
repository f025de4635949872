"""Computing a function again in the backward pass, on a CPU.

`jax.checkpoint` keeps its recomputation apart from the first computation by optimization barriers. XLA's CPU compiler
removes those before it merges equal operations, and so merges the two: everything is kept after all, and nothing saved.
Here the recomputation starts from its input behind a branch, as XLA must keep it, whose condition hangs on the gradient
that arrives: it differs from the first computation, and cannot begin before the backward pass is there.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


def recomputed_backward(run: Callable[..., Array]) -> Callable[..., Array]:
    """The function, of which only the arguments are kept for its gradient.

    Args:
      run: of (params, x, probes, *others), arrays or trees of them, giving one array. Gradients are those of the first
        three; the others, keys and what has no gradient, get none.
    """
    wrapped = jax.custom_vjp(run)

    def forward(params: Any, x: Array, probes: Any, *others: Any) -> tuple[Array, Any]:
        # Through vjp, whose residuals nobody reads: what `run` calls may have a backward pass of its own, and only
        # where that has taken its place can the whole be differentiated again, forward over reverse.
        result, _ = jax.vjp(lambda *differentiated: run(*differentiated, *others), params, x, probes)
        return result, (params, x, probes, *others)

    def backward(arguments: Any, gradient: Array) -> tuple[Any, ...]:
        params, x, probes, *others = arguments
        x = _held_back(x, gradient)
        _, back = jax.vjp(lambda *differentiated: run(*differentiated, *others), params, x, probes)
        return *back(gradient), *(None for _ in others)

    wrapped.defvjp(forward, backward)
    return wrapped


def _held_back(x: Array, gradient: Array) -> Array:
    """x, but not before the gradient is there: XLA cannot know that no square is 2 modulo 4."""
    bits = lax.bitcast_convert_type(gradient.ravel()[0], jnp.dtype(f"uint{8 * gradient.dtype.itemsize}"))
    return lax.cond(bits * bits != 2, lambda x: x, jnp.zeros_like, x)
