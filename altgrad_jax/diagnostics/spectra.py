"""How many directions a weight matrix still uses, from its singular values s_1 >= s_2 >= ...

    spectral_norm    s_1
    stable_rank      |W|_F^2 / s_1^2, that is sum s_i^2 / s_1^2
    effective_rank   exp(-sum p_i log p_i) with p_i = s_i / sum s (Roy and Vetterli 2007)
    rank_99          the smallest k whose s_1 ... s_k have 99 % of sum s^2

Not from the eigenvalues of the Gram matrix W^T W, though that is the cheaper way. In float32 its small eigenvalues are
noise of about 1e-7 s_1^2, so singular values below some 3e-4 s_1 are lost, or made up. That does no harm to a matrix as
it is drawn, but to one that is collapsing, which is what this is for: with s_i = 1/i^2 (384 of them) the effective
rank comes out 3.6 % too high, with 1/i^3 14 %. LAPACK's singular values are right to about 1e-6 s_1, and the effective
rank in these two cases to 1e-5 of itself.

A rank has fallen in a way worth a warning when it is 30 % below its first record; 15 % in the output layer and the
projections back into the residual stream.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from altgrad_jax.diagnostics.weights import map_alike
from altgrad_jax.state import leaf_names

Array = jax.Array
MEASURES = ("spectral_norm", "stable_rank", "effective_rank", "rank_99")
RANKS = ("effective_rank", "stable_rank")
FALL, STRICT_FALL = 0.30, 0.15


def measure(params: Any) -> Array:
    """[matrices, 4] float32: the measures of every 2-D parameter, in leaf order; NaN of one that is not finite.

    A matrix of zeros has norm 0 and NaN ranks.
    """
    matrices = [leaf for leaf in jax.tree.leaves(params) if len(leaf.shape) == 2]
    return map_alike(_measure, matrices)  # one after the other: LAPACK has threads of its own


def singular_values(w_RC: Array) -> Array:
    """Of a matrix of finite numbers, descending, float32 [min(R, C)]."""
    # Tall: LAPACK then begins with a QR decomposition, and the rest is of the smaller size.
    tall = w_RC if w_RC.shape[0] >= w_RC.shape[1] else w_RC.T
    return jnp.linalg.svd(tall, compute_uv=False)


def _measure(w: Array) -> Array:
    """`measure` of one matrix."""
    w = w.astype(jnp.float32)
    largest = jnp.max(jnp.abs(w))
    finite = jnp.isfinite(largest)
    unit = jnp.where((largest > 0) & finite, largest, 1.0)  # no square is too small or large for float32
    s = singular_values(jnp.where(finite, w / unit, 0.0))
    square = s * s
    p = s / jnp.sum(s)
    entropy = -jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1.0)), 0.0))
    # What is left after k of them, summed from the small end, where float32 loses nothing.
    left = jnp.cumsum(square[::-1])[::-1]
    rank_99 = jnp.sum(left > 0.01 * left[0]).astype(jnp.float32)
    ranks = jnp.stack([jnp.sum(square) / square[0], jnp.exp(entropy), rank_99])
    ranks = jnp.where(s[0] > 0, ranks, jnp.nan)
    return jnp.where(finite, jnp.concatenate([(s[0] * unit)[None], ranks]), jnp.nan)


def name(params: Any, values: npt.NDArray[np.float32]) -> dict[str, float]:
    """`spectra/<layer>/spectral_norm` and so on of `measure`'s result, and `spectra/<what>` over all layers.

    Over layers: the largest spectral norm, the mean of the others.

    Args:
      params: the tree that was measured, of arrays or their shapes.
      values: from `measure`, on the host.
    """
    leaves = zip(leaf_names(params), jax.tree.leaves(params), strict=True)
    layers = [leaf.removesuffix(".kernel") for leaf, w in leaves if len(w.shape) == 2]
    record: dict[str, float] = {}
    for layer, row in zip(layers, values, strict=True):
        record |= {f"spectra/{layer}/{what}": float(value) for what, value in zip(MEASURES, row, strict=True)}
    for what, column in zip(MEASURES, np.asarray(values, np.float64).T, strict=True):
        record[f"spectra/{what}"] = float(np.max(column) if what == "spectral_norm" else np.mean(column))
    return record
