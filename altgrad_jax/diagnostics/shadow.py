"""How far the gradient is from the float32 gradient at the same parameters, on the same batch.

Of a gradient g and its float32 shadow r, over a layer's elements or over all:

    cosine           <g, r> / (|g| |r|)
    relative_error   |g - r| / |r|
    snr_db           20 log10(|r| / |g - r|), infinite where they are equal

A layer whose shadow is zero has NaN for each, a layer whose gradient is zero the cosine NaN and relative error 1.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from altgrad_jax.state import leaf_names

Array = jax.Array
MEASURES = ("cosine", "relative_error", "snr_db")


def compare(grads: Any, shadow: Any) -> Array:
    """[leaves + 1, 3] float32: the measures of every parameter in leaf order, and of all together in the last row."""
    pairs = zip(jax.tree.leaves(grads), jax.tree.leaves(shadow), strict=True)
    # Rows of |g|^2, |r|^2, |g - r|^2 and <g, r>. Each leaf is brought to a largest magnitude of 1 before it is squared:
    # gradients near 1e-20 would have squares that float32 does not hold.
    found = [_sums(g.astype(jnp.float32), r.astype(jnp.float32)) for g, r in pairs]
    units, sums = jnp.stack([unit for unit, _ in found]), jnp.stack([row for _, row in found])
    together = jnp.sum(sums * ((units / jnp.max(units)) ** 2)[:, None], axis=0, keepdims=True)
    gg, rr, dd, gr = jnp.concatenate([sums, together]).T
    measures = jnp.stack([gr / (jnp.sqrt(gg) * jnp.sqrt(rr)), jnp.sqrt(dd / rr), 10 * jnp.log10(rr / dd)], axis=1)
    return jnp.where((rr > 0)[:, None], measures, jnp.nan)


def _sums(g: Array, r: Array) -> tuple[Array, Array]:
    """The largest magnitude in either, and the four sums of the two in units of it."""
    largest = jnp.maximum(jnp.max(jnp.abs(g)), jnp.max(jnp.abs(r)))
    usable = (largest > 0) & jnp.isfinite(largest)
    g, r = (x / jnp.where(usable, largest, 1.0) for x in (g, r))
    sums = jnp.stack([jnp.sum(g * g), jnp.sum(r * r), jnp.sum((g - r) ** 2), jnp.sum(g * r)])
    return jnp.where(usable, largest, 0.0), sums


def name(params: Any, values: npt.NDArray[np.float32]) -> dict[str, float]:
    """`grads/cosine` and so on of `compare`'s result, and `grads/<layer>/cosine` for every parameter.

    Args:
      params: the tree that was compared, of arrays or their shapes.
      values: from `compare`, on the host.
    """
    layers = [leaf.removesuffix(".kernel") for leaf in leaf_names(params)]
    record = {f"grads/{what}": float(value) for what, value in zip(MEASURES, values[-1], strict=True)}
    for layer, row in zip(layers, values[:-1], strict=True):
        record |= {f"grads/{layer}/{what}": float(value) for what, value in zip(MEASURES, row, strict=True)}
    return record
