"""How parameters are kept between steps: as float32, in 16 bits, or as codes of the format they live in.

What a step computes with is always a tree of float32 arrays; what the TrainState carries may be narrower. Which format
a parameter lives in follows from the precision policy: a dense layer's is that of its weight role, a tied embedding's
that of the output layer.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from altgrad_jax.layers import layer_of_parameter, layer_weights
from altgrad_jax.optimizers.grids import apply_on_grids, map_with_grids, snap_to_grids
from altgrad_jax.precision.formats import FloatFormat, get_format
from altgrad_jax.precision.grid import Grid
from altgrad_jax.precision.largest import amax
from altgrad_jax.precision.policy import Policy
from altgrad_jax.precision.scaling import or_nan
from altgrad_jax.precision.weight_grid import WeightGrid

Array = jax.Array
STORAGES = ("float32", "bfloat16", "format")
UNQUANTISED_POLICY = Policy()


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PackedWeight:
    """A parameter as codes.

    Attributes:
      codes: the place of each value in the format's ordered list, 0 for zero (`WeightGrid.code`); int8 or int16.
      scale: float32 scalar: the values are those of the format over it; NaN where one of them is infinite or NaN.
      fmt: the format's name; static.
    """

    codes: Array
    scale: Array
    fmt: str = field(metadata={"static": True})

    def unpack(self) -> Array:
        """The values, float32."""
        return WeightGrid(Grid.of(self.fmt), self.scale).value(self.codes.astype(jnp.int32))


@dataclass(frozen=True)
class Weights:
    """What the parameters of a run live on, and how they are stored.

    Attributes:
      policy: the precision rules, resolved.
      tied: whether the embedding is also the output layer.
      storage: "float32"; "bfloat16" (matrices); or "format": codes, of parameters that a rule quantises.
      on_grid: whether the optimizer keeps parameters on the grid of their storage or format.
      reads_grids: whether the optimizer wants the policy's grids in each update.
    """

    policy: Policy = UNQUANTISED_POLICY
    tied: bool = True
    storage: str = "float32"
    on_grid: bool = False
    reads_grids: bool = False

    def formats(self, name: str) -> FloatFormat | None:
        """The format that a parameter lives in, by name."""
        if self.storage == "bfloat16":
            return get_format("bfloat16") if layer_of_parameter(name, self.tied) else None
        plans = {plan.path: plan for plan in self.policy.plans}
        plan = plans.get(layer_of_parameter(name, self.tied)) or plans.get(name)
        return plan.recipe.weight.fmt if plan else None

    def policy_grids(self, params: Any, quant: Mapping[str, Any]) -> dict[str, WeightGrid]:
        """Parameter -> the grid that the step about to be taken rounds it to; of all that a rule quantises."""
        layers = self.policy.weight_grids(layer_weights(params), quant)
        found = {}
        for path, _ in jax.tree_util.tree_leaves_with_path(params):
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            layer = layer_of_parameter(name, self.tied)
            if layer == "lm_head" and name == "wte" and layer in layers:
                grid = layers[layer]  # the output layer reads the transposed table
                found[name] = replace(grid, scale=jnp.asarray(grid.scale).T)
            elif (known := layer if layer in layers else name) in layers:
                found[name] = layers[known]
        return found

    def grids(self, params: Any, quant: Mapping[str, Any]) -> dict[str, WeightGrid] | None:
        """What the optimizer is given in each update; None if it asks for nothing or keeps to formats of its own."""
        if not self.reads_grids or self.storage == "bfloat16":
            return None
        return self.policy_grids(params, quant)

    def apply(self, params: Any, updates: Any, grids: Mapping[str, WeightGrid] | None) -> Any:
        """The parameters after an update, float32."""
        if self.on_grid:
            return apply_on_grids(params, updates, self.formats, grids)
        return optax.apply_updates(params, updates)

    def snap(self, params: Any, quant: Mapping[str, Any]) -> Any:
        """Initial parameters, float32, brought onto the grid that they are kept on."""
        return snap_to_grids(params, self.formats, self.grids(params, quant)) if self.on_grid else params

    def stored(self, params: Any) -> Any:
        """Fresh parameters as they are stored."""
        quant = self.policy.init()
        snapped = self.snap(params, quant)
        return self.pack(snapped, snapped, quant)

    def pack(self, params: Any, before: Any, quant: Mapping[str, Any]) -> Any:
        """float32 parameters as they are stored; no value changes if they are on the grid fitted to `before`."""
        if self.storage == "float32":
            return params
        if self.storage == "bfloat16":
            return map_with_grids(
                lambda name, _, w: w if self.formats(name) is None else w.astype(jnp.bfloat16), {}, params
            )
        grids = self.policy_grids(before, quant)

        def one(name: str, grid: WeightGrid | None, w: Array, old: Array) -> Any:
            fmt = self.formats(name)
            if grid is None or fmt is None:
                return w
            kept = grid.fitted(old)
            dtype = np.int8 if fmt.max_magnitude <= 127 else np.int16
            # No code stands for an infinity or NaN: the scale does.
            scale = or_nan(jnp.asarray(kept.scale, jnp.float32), amax(w))
            return PackedWeight(kept.code(w).astype(dtype), scale, fmt.name)

        return map_with_grids(one, grids, params, before)


def unpack(stored: Any) -> Any:
    """The float32 parameters of what the TrainState carries."""
    packed = lambda leaf: isinstance(leaf, PackedWeight)  # noqa: E731
    return jax.tree.map(lambda x: x.unpack() if packed(x) else x.astype(jnp.float32), stored, is_leaf=packed)


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays of a tree, of arrays or of their shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
