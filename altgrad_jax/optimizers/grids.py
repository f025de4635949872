"""Which parameter lives on which grid, for transformations that are given parameters as a tree.

Parameters are named by their path in the tree ("blocks.0.attn.qkv.kernel"). Their formats are fixed when an optimizer
is made; their grids, scale included, may be handed to every `update` as `grids={name: WeightGrid}`. Where they are not,
a scale is taken from each parameter's largest magnitude.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from altgrad_jax.precision.formats import FloatFormat, get_format
from altgrad_jax.precision.weight_grid import WeightGrid, grid_of

Array = jax.Array
Formats = FloatFormat | str | Callable[[str], FloatFormat | str | None]
Grids = Mapping[str, WeightGrid]


def parameter_name(path: tuple) -> str:
    """The dotted name of a leaf, from its path in the tree."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def parameter_format(formats: Formats, name: str, leaf: Any) -> FloatFormat | None:
    """A parameter's format, or None; one format for all means all matrices."""
    found = formats(name) if callable(formats) else formats if leaf.ndim >= 2 else None
    return None if found is None else get_format(found)


def labels(formats: Formats, tree: Any) -> Any:
    """A tree of "grid" and "rest" for `optax.partition`."""

    def label(path, leaf) -> str:
        return "rest" if parameter_format(formats, parameter_name(path), leaf) is None else "grid"

    return jax.tree_util.tree_map_with_path(label, tree)


def resolve_grids(formats: Formats, params: Any, grids: Grids | None) -> dict[str, WeightGrid]:
    """The grid of every parameter that has one, by name: those given, else under scales from the parameters.

    Raises:
      ValueError: there are no parameters to take scales from.
    """
    if params is None:
        raise ValueError("this transformation needs params: call update(grads, state, params)")
    if grids is not None:
        return dict(grids)
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = parameter_name(path)
        if (fmt := parameter_format(formats, name, leaf)) is not None:
            found[name] = grid_of(fmt, leaf)
    return found


def map_with_grids(function: Callable[..., Any], grids: Grids, tree: Any, *rest: Any) -> Any:
    """`jax.tree.map` with the leaf's name and grid (or None) before the leaves."""

    def call(path, *leaves):
        name = parameter_name(path)
        return function(name, grids.get(name), *leaves)

    return jax.tree_util.tree_map_with_path(call, tree, *rest)


def snap_to_grids(params: Any, formats: Formats, grids: Grids | None = None) -> Any:
    """Every parameter rounded to the grid that it is kept on; others as they are. For initial weights."""
    found = resolve_grids(formats, params, grids)
    return map_with_grids(lambda _, grid, w: w if grid is None else grid.fitted(w).round(w), found, params)


def apply_on_grids(params: Any, updates: Any, formats: Formats, grids: Grids | None = None) -> Any:
    """`optax.apply_updates` for weights that are kept on a grid: the sum is put on the grid that the update meant.

    A transformation returns differences, and float32 cannot always hold the difference of two values of a format, so
    that the sum may be off by an ulp of float32.
    """
    found = resolve_grids(formats, params, grids)

    def apply(name, grid, w, update):
        del name
        moved = w + update.astype(w.dtype)
        return moved if grid is None else grid.fitted(w).round(moved)

    return map_with_grids(apply, found, params, updates)
