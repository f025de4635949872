"""What one real update did to the weights, counted on the grids that their layers round them to.

Of a parameter of N elements, before (w) and after (w') the optimizer's own update d = w' - w, on its grid of spacings S
and codes c (`WeightGrid`; round(w) is what the layer multiplies by):

    updates           share of the weights whose float32 value changed; zero_updates = 1 - updates
    flips             share of all weights with round(w') != round(w)
    stall             1 - flips / updates, NaN where nothing was updated
    relative_update   |d| / |w|, L2 norms
    ulps_mean         mean of |d| / S(w) over the weights that were updated; of zero S is the smallest spacing there is
    ulps_q10 ... q99  its quantiles 0.1, 0.5, 0.9 and 0.99, to 7 significant bits (0.8 %), within 2^-40 ... 2^24
    distance          mean of |w' - round(w')| / S(w'): 0 on the grid, 0.25 spread evenly, more beyond the largest value
    stiffness_log2_mean, _std   of log2 S(w')
    stiffness_log2_min          its smallest value over the weights that are not 0
    stiffness         share of the weights with log2 S(w') at that value, 1 above it, ... 31 or more above it; zeros are
                      in the first
    position_mean, _std         of |c(w')| / largest code
    codes_used        share of the 2 largest_code + 1 codes that some weight has
    codes_entropy     -sum p log2 p over the shares of the codes, bits
    codes             the shares themselves; all three only of formats of up to 8 bits

The quantiles, and all from stiffness to codes, are of every k-th weight where there are more than 2^20: k as small as
leaves no more, and without a common factor with the last axis, so that all columns are seen. A share of 1 % is then
known to 0.01 %, and codes rarer than 1e-6 are missed. The other measures are of all weights. Counting adds into tables
by index: 6 ns an element on a CPU. A parameter without a grid has updates, zero_updates and relative_update alone.
"""

from collections.abc import Callable
from dataclasses import replace
from math import gcd
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax import lax

from altgrad_jax.precision.weight_grid import WeightGrid
from altgrad_jax.state import leaf_names

Array = jax.Array
QUANTILES = {"ulps_q10": 0.1, "ulps_q50": 0.5, "ulps_q90": 0.9, "ulps_q99": 0.99}
PLAIN = ("updates", "relative_update")  # of every parameter; the others need a grid
ON_GRID = (
    *("flips", "ulps_mean", *QUANTILES, "distance"),
    *("stiffness_log2_mean", "stiffness_log2_std", "stiffness_log2_min"),
    *("position_mean", "position_std", "codes_used", "codes_entropy"),
)
MEASURES = (*PLAIN, *ON_GRID)
UNITS_OF_UPDATES = ("ulps_mean", *QUANTILES)  # means over the weights that were updated, not over all
BINS = 32  # of the stiffness
LARGEST_COUNTED = 127  # code of the largest value that an 8-bit format can have
CODES = 256  # entries of the code table, by code + 127; the last stays empty
SAMPLE = 1 << 20  # most elements of a parameter that tables are made of
_ULP_BITS = 6  # bits of a mantissa that the quantiles keep, beside the leading one
_ULP_RANGE = (-40, 24)  # binades of their table


def measure(before: Any, after: Any, grids: Any) -> tuple[Array, Array, Array]:
    """Measures, stiffness and codes of every parameter, in leaf order.

    Args:
      before: parameters before the update, a tree of float32 arrays.
      after: and after it.
      grids: a tree of the same structure with a WeightGrid at every leaf, that of the step, or None.

    Returns:
      [leaves, MEASURES], [leaves, 32] and [leaves, 256], all float32; NaN where there is no grid.
    """
    return map_alike(_measure, before, after, grids)


def map_alike(function: Callable[..., Any], *trees: Any) -> Any:
    """function(leaf, leaf of the second tree, ...) of every leaf of the first tree, stacked in leaf order.

    Leaves of one shape are looked at one after the other by one piece of program: a network has many layers, and each
    would have to be compiled. The other trees may have None or subtrees where the first has a leaf.
    """
    treedef: Any = jax.tree.structure(trees[0])
    leaves = jax.tree.leaves(trees[0])
    arguments = list(zip(leaves, *(treedef.flatten_up_to(tree) for tree in trees[1:]), strict=True))
    alike: dict[Any, list[int]] = {}
    for i, argument in enumerate(arguments):
        arrays, structure = jax.tree.flatten(argument)
        alike.setdefault((structure, *(jnp.shape(x) for x in arrays)), []).append(i)
    results = []
    for members in alike.values():
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *(arguments[i] for i in members))
        results.append(lax.map(lambda argument: function(*argument), stacked))
    back = np.argsort([i for members in alike.values() for i in members])
    return jax.tree.map(lambda *parts: jnp.concatenate(parts)[back], *results)


def _measure(w: Array, new: Array, grid: WeightGrid | None) -> tuple[Array, Array, Array]:
    """`measure` of one parameter."""
    w, new = w.astype(jnp.float32), new.astype(jnp.float32)
    # Norms in units of the largest magnitude: squares of small numbers are no float32 numbers.
    change, norm = _norm(new - w), _norm(w)
    changed = new != w
    updates = _count(changed)
    plain = jnp.stack([updates / w.size, change / norm])
    if grid is None:
        of_grid, stiffness, codes = (jnp.full((size,), jnp.nan) for size in (len(ON_GRID), BINS, CODES))
        return jnp.concatenate([plain, of_grid]), stiffness, codes
    # In units in which the scale is 1, so that no spacing is too small a number for float32.
    scale, unit = jnp.asarray(grid.scale, jnp.float32), replace(grid, scale=jnp.float32(1.0))
    scaled, rescaled = w * scale, new * scale
    flips = _count(unit.round(scaled) != unit.round(rescaled))
    ulps = jnp.abs((new - w) * scale) / unit.ulp(scaled)
    mean = jnp.sum(jnp.where(changed, ulps, 0.0)) / updates  # 0 / 0 is NaN, as it should be
    distance = jnp.mean(jnp.abs(rescaled - unit.round(rescaled)) / unit.ulp(rescaled))
    some, scale = _sample(rescaled), _sample(jnp.broadcast_to(scale, w.shape)) if scale.size > 1 else scale
    of_stiffness, stiffness = _stiffness(some, scale.reshape(-1), unit)
    of_codes, codes = _codes(some, unit)
    quantiles = _quantiles(_sample(ulps), _sample(changed))
    of_grid = jnp.stack([flips / w.size, mean, *quantiles, distance, *of_stiffness, *of_codes])
    return jnp.concatenate([plain, of_grid]), stiffness, codes


def _sample(x: Array) -> Array:
    """Every k-th element, flat: at most 2^20."""
    stride = -(-x.size // SAMPLE)
    while gcd(stride, x.shape[-1] if x.ndim else 1) > 1:
        stride += 1
    return x.reshape(-1)[::stride]


def _count(mask: Array) -> Array:
    return jnp.sum(mask, dtype=jnp.int32).astype(jnp.float32)


def _norm(x: Array) -> Array:
    largest = jnp.max(jnp.abs(x))
    unit = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1.0)
    return unit * jnp.sqrt(jnp.sum((x / unit) ** 2))


def _histogram(index: Array, size: int) -> Array:
    """How often 0 ... size - 1 occur, float32; other indices are left out."""
    return jnp.zeros((size,), jnp.int32).at[index.reshape(-1)].add(1, mode="drop").astype(jnp.float32)


def _quantiles(ulps: Array, changed: Array) -> list[Array]:
    """The value, to 7 significant bits, below or at which each of QUANTILES of those changed lie.

    A float32's upper bits, sign gone, count its binades and the parts of a binade: they are the table's index.
    """
    drop = 23 - _ULP_BITS
    first, last = ((binade + 127) << _ULP_BITS for binade in _ULP_RANGE)
    bits = lax.bitcast_convert_type(ulps, jnp.uint32) + np.uint32(1 << (drop - 1))  # to the nearest
    index = jnp.clip((bits >> drop).astype(jnp.int32), first, last - 1) - first
    counts = _histogram(jnp.where(changed, index, last - first), last - first)
    below = jnp.cumsum(counts)
    wanted = jnp.stack([jnp.sum(below < q * below[-1]) for q in QUANTILES.values()]).astype(jnp.uint32)
    values = lax.bitcast_convert_type((wanted + np.uint32(first)) << drop, jnp.float32)
    return list(jnp.where(below[-1] > 0, values, jnp.nan))


def _stiffness(scaled: Array, scale: Array, unit: WeightGrid) -> tuple[list[Array], Array]:
    """Mean, standard deviation and smallest of log2 S, and the shares [32] above that."""
    field = lax.bitcast_convert_type(unit.ulp(scaled), jnp.uint32) >> 23  # a power of two is all exponent
    log2 = (field.astype(jnp.int32) - 127).astype(jnp.float32) - jnp.log2(scale)
    mean = jnp.mean(log2)
    std = jnp.sqrt(jnp.mean((log2 - mean) ** 2))
    smallest = jnp.min(jnp.where(scaled != 0, log2, jnp.inf))
    smallest = jnp.where(jnp.isfinite(smallest), smallest, jnp.min(log2))
    index = jnp.clip(jnp.round(log2 - smallest).astype(jnp.int32), 0, BINS - 1)
    return [mean, std, smallest], _histogram(index, BINS) / scaled.size


def _codes(scaled: Array, unit: WeightGrid) -> tuple[list[Array], Array]:
    """Mean and standard deviation of the position, share of the codes used, entropy; and the shares [256]."""
    code, largest = unit.code(scaled), unit.largest_code
    position = jnp.abs(code).astype(jnp.float32) / largest.astype(jnp.float32)
    mean = jnp.mean(position)
    std = jnp.sqrt(jnp.mean((position - mean) ** 2))
    shares = _histogram(code + LARGEST_COUNTED, CODES) / code.size
    used = jnp.sum(shares > 0) / (2 * largest + 1)
    entropy = -jnp.sum(jnp.where(shares > 0, shares * jnp.log2(jnp.where(shares > 0, shares, 1.0)), 0.0))
    counted = largest <= LARGEST_COUNTED
    used, entropy, shares = (jnp.where(counted, x, jnp.nan) for x in (used, entropy, shares))
    return [mean, std, used, entropy], shares


def name(params: Any, measures: npt.NDArray, stiffness: npt.NDArray, codes: npt.NDArray) -> dict[str, float | str]:
    """`weights/<layer>/<what>` of `measure`'s results, and `weights/<what>` over all layers.

    Over layers: stall is of the sums of flips and updates; relative_update is the largest, stiffness_log2_min the
    smallest; ulps are means weighted by the number of weights updated; all else is weighted by the number of elements.
    Layers without a value, for want of a grid, are left out of both.

    Args:
      params: the tree that was measured, of arrays or their shapes.
      measures: from `measure`, on the host, as are the others.
      stiffness: shares of spacings.
      codes: shares of codes.
    """
    layers = [leaf.removesuffix(".kernel") for leaf in leaf_names(params)]
    sizes = np.array([leaf.size for leaf in jax.tree.leaves(params)], np.float64)
    columns = dict(zip(MEASURES, np.asarray(measures, np.float64).T, strict=True))
    columns = _with_stall(columns)
    record: dict[str, float | str] = {f"weights/{what}": _together(what, columns, sizes) for what in columns}
    gridded = ~np.isnan(columns["flips"])
    for i, layer in enumerate(layers):
        known = columns if gridded[i] else ("updates", "zero_updates", "relative_update")
        record |= {f"weights/{layer}/{what}": float(columns[what][i]) for what in known}
        if gridded[i]:
            record[f"weights/{layer}/stiffness"] = percentages(stiffness[i])
        if np.isfinite(codes[i]).all():
            record[f"weights/{layer}/codes"] = code_percentages(codes[i])
    return record


def _with_stall(columns: dict[str, npt.NDArray]) -> dict[str, npt.NDArray]:
    """`columns` with the two measures that follow from others."""
    updates = columns["updates"]
    with np.errstate(divide="ignore", invalid="ignore"):
        stall = np.where(updates > 0, 1 - columns["flips"] / updates, np.nan)
    return {"updates": updates, "zero_updates": 1 - updates, "stall": stall} | columns


def _together(what: str, columns: dict[str, npt.NDArray], sizes: npt.NDArray) -> float:
    """One measure over all layers; see `name`."""
    values = columns[what]
    plain = what in (*PLAIN, "zero_updates")
    # Where a layer is NaN though there is something to measure, so is the whole.
    known = np.ones(values.shape, bool) if plain else ~np.isnan(columns["flips"])
    if what in ("stall", *UNITS_OF_UPDATES):
        sizes = sizes * columns["updates"]
        known &= sizes > 0
    if what in ("codes_used", "codes_entropy"):  # wide formats have none
        known &= ~np.isnan(values)
    if not known.any():
        return float("nan")
    if what in ("relative_update", "stiffness_log2_min"):
        return float(np.max(values[known]) if plain else np.min(values[known]))
    return float(np.average(values[known], weights=sizes[known]))


def percentages(shares: npt.NDArray) -> str:
    """Shares as percentages of 3 digits with commas between."""
    return ",".join(f"{100 * share:.3g}" for share in shares)


def code_percentages(shares: npt.NDArray) -> str:
    """`percentages` of codes -k ... k, k the largest magnitude that occurs; zero is the one in the middle."""
    k = int(np.max(np.abs(np.flatnonzero(shares) - LARGEST_COUNTED), initial=0))
    return percentages(shares[LARGEST_COUNTED - k : LARGEST_COUNTED + k + 1])
