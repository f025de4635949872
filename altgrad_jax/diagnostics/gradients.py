"""How large each layer's gradients are, what they have to do with its weights' grids, and which units get none.

Of a parameter's gradient g, its weights w and their spacings S (`WeightGrid.ulp`):

    l2, linf           L2 norm and largest magnitude
    mean_abs           mean of |g|
    mean_over_std      mean of |g| over the standard deviation of g: 0.80 of a normal distribution, less with tails
    below_1e-8         share with |g| < 1e-8, zeros included
    zeros              share of exact zeros
    corr_stiffness     Pearson correlation of |g| and S(w), NaN where either is the same everywhere
    corr_weight        Pearson correlation of |g| and |w|, likewise
    mean_over_ulp      mean of |g| / S(w): gradients in spacings, as an SGD step of size 1 would move the weights

A parameter without a grid has NaN for corr_stiffness and mean_over_ulp. Sums are taken in units of the largest
magnitude: gradients near 1e-20 would have squares that float32 does not hold.

A unit is quiet in a step if all its |g| are below 1e-8, and dead after 100 quiet steps in a row. Units are the columns
of a matrix (a dense layer's outputs), the rows of the tables `wte` and `wpe`.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax import lax

from altgrad_jax.diagnostics.weights import map_alike
from altgrad_jax.precision.largest import amax
from altgrad_jax.precision.weight_grid import WeightGrid
from altgrad_jax.state import leaf_names

Array = jax.Array
TINY = 1e-8
DEAD_AFTER = 100  # quiet steps
TABLES = ("wte", "wpe")
MEASURES = (
    *("l2", "linf", "mean_abs", "mean_over_std", "below_1e-8", "zeros"),
    *("corr_stiffness", "corr_weight", "mean_over_ulp"),
)
LARGEST = ("l2", "linf")  # over all layers the largest; the others are means weighted by size


def measure(grads: Any, params: Any, grids: Any) -> Array:
    """The measures of every parameter, in leaf order.

    Args:
      grads: gradients, a tree of float32 arrays.
      params: the parameters, of the same structure.
      grids: a tree of the same structure with a WeightGrid at every leaf, or None.

    Returns:
      [leaves, MEASURES] float32.
    """
    return map_alike(_measure, grads, params, grids)


def _measure(g: Array, w: Array, grid: WeightGrid | None) -> Array:
    """`measure` of one parameter."""
    g, w = g.astype(jnp.float32), w.astype(jnp.float32)
    size, largest = jnp.abs(g), amax(g)
    unit = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1.0)
    scaled = g / unit
    magnitude = jnp.abs(scaled)
    mean = jnp.mean(magnitude)
    std = jnp.where(jnp.max(g) > jnp.min(g), jnp.sqrt(jnp.mean((scaled - jnp.mean(scaled)) ** 2)), 0.0)
    # By its bits: a subnormal number is not zero, though arithmetic may take it for that.
    zero = lax.bitcast_convert_type(g, jnp.uint32) << 1 == 0
    of_grid = jnp.full((2,), jnp.nan)
    if grid is not None:
        # In units in which the scale is 1, so that no spacing is too small a number for float32.
        scale = jnp.asarray(grid.scale, jnp.float32)
        spacing = WeightGrid(grid.grid, jnp.float32(1.0)).ulp(w * scale)
        mean_over_ulp = jnp.mean(magnitude * (scale / spacing)) * unit
        of_grid = jnp.stack([_correlation(magnitude, spacing / (scale / jnp.max(scale))), mean_over_ulp])
    shares = [jnp.mean(mask, dtype=jnp.float32) for mask in (size < TINY, zero)]
    norms = [unit * jnp.sqrt(jnp.sum(scaled**2)), largest, unit * mean, mean / std]
    return jnp.stack([*norms, *shares, of_grid[0], _correlation(magnitude, jnp.abs(w)), of_grid[1]])


def _correlation(x: Array, y: Array) -> Array:
    """Pearson's, of two arrays of numbers that are not negative."""
    x, y = (a / jnp.where(jnp.max(a) > 0, jnp.max(a), 1.0) for a in (x, y))
    # One number everywhere has no correlation; its computed mean may be off by a bit and pretend that it varies.
    varies = (jnp.max(x) > jnp.min(x)) & (jnp.max(y) > jnp.min(y))
    x, y = x - jnp.mean(x), y - jnp.mean(y)
    correlation = jnp.mean(x * y) / (jnp.sqrt(jnp.mean(x * x)) * jnp.sqrt(jnp.mean(y * y)))
    return jnp.where(varies, correlation, jnp.nan)


def init_counts(params: Any) -> dict[str, Array]:
    """Layer -> zeros, int32 [units], of every matrix: the `counts` before the first step."""
    return {name: jnp.zeros(leaf.shape[_unit_axis(name)], jnp.int32) for name, leaf in _matrices(params)}


def quiet_steps(counts: Mapping[str, Array], grads: Any) -> dict[str, Array]:
    """How many steps up to this one each unit has been quiet, in a row; a gradient that is NaN is not quiet.

    Args:
      counts: from the step before, or `init_counts`.
      grads: the step's gradients, over the whole batch.

    Returns:
      The new counts, int32 [units] a layer.
    """

    def next_count(name: str, g: Array) -> Array:
        loudest = jnp.max(jnp.abs(g), axis=1 - _unit_axis(name))
        return jnp.where(loudest < TINY, counts[name] + 1, 0)

    return {name: next_count(name, g) for name, g in _matrices(grads)}


def dead_share(counts: Mapping[str, Array]) -> Array:
    """Share of the units quiet for at least 100 steps: [layers + 1] float32, by layer name, and of all in the last."""
    dead = [counts[name] >= DEAD_AFTER for name in sorted(counts)]
    return jnp.stack([jnp.mean(x, dtype=jnp.float32) for x in (*dead, jnp.concatenate(dead))])


def _matrices(tree: Any) -> list[tuple[str, Array]]:
    names = (leaf.removesuffix(".kernel") for leaf in leaf_names(tree))
    return [(name, leaf) for name, leaf in zip(names, jax.tree.leaves(tree), strict=True) if len(leaf.shape) == 2]


def _unit_axis(name: str) -> int:
    return 0 if name.split(".")[-1] in TABLES else 1


def name(params: Any, values: npt.NDArray[np.float32]) -> dict[str, float]:
    """`grads/<layer>/l2` and so on of `measure`'s result, and `grads/l2` over all layers.

    Over layers: l2 and linf are the largest; all else is the mean weighted by the number of elements, of the layers
    that have a value.

    Args:
      params: the tree that was measured, of arrays or their shapes.
      values: from `measure`, on the host.
    """
    layers = [leaf.removesuffix(".kernel") for leaf in leaf_names(params)]
    sizes = np.array([leaf.size for leaf in jax.tree.leaves(params)], np.float64)
    table = np.asarray(values, np.float64)
    record = {f"grads/{what}": _together(what, of, sizes) for what, of in zip(MEASURES, table.T, strict=True)}
    for layer, row in zip(layers, table, strict=True):
        record |= {f"grads/{layer}/{what}": float(value) for what, value in zip(MEASURES, row, strict=True)}
    return record


def _together(what: str, values: npt.NDArray[np.float64], sizes: npt.NDArray[np.float64]) -> float:
    """One measure over all layers; see `name`."""
    if what in LARGEST:
        return float(np.max(values))
    known = ~np.isnan(values)
    return float(np.average(values[known], weights=sizes[known])) if known.any() else float("nan")


def name_dead(layers: Mapping[str, Any], shares: npt.NDArray[np.float32]) -> dict[str, float]:
    """`grads/<layer>/dead` and `grads/dead` of `dead_share`'s result; `layers` are the keys of its counts."""
    record = {"grads/dead": float(shares[-1])}
    return record | {f"grads/{layer}/dead": float(x) for layer, x in zip(sorted(layers), shares[:-1], strict=True)}
