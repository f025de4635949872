"""The model's matrices by name: what precision rules can name, and which parameter each of them is."""

import math
from functools import cache
from typing import Any

import jax
import numpy as np
from flax import nnx

from altgrad_jax.model import GPT, GPTConfig

Array = jax.Array


def layer_weights(params: Any) -> dict[str, Array]:
    """The matrices that precision rules can name, by path: dense layers as [inputs, outputs], then the tables.

    `params` is the model's dict, of arrays or of their shapes.
    """
    weights: dict[str, Array] = {}
    for i, block in params["blocks"].items():
        for part, names in (("attn", ("qkv", "proj")), ("mlp", ("up", "down"))):
            weights |= {f"blocks.{i}.{part}.{name}": block[part][name]["kernel"] for name in names}
    if "classifier" in params:
        weights["classifier"] = params["classifier"]["kernel"]
    else:
        weights["lm_head"] = params["lm_head"] if "lm_head" in params else params["wte"].T
    return weights | {"wte": params["wte"], "wpe": params["wpe"]}


def layer_of_parameter(name: str, tied: bool) -> str:
    """The path of the layer whose weight a parameter is, as precision rules name it; "" for one that is none's.

    A tied table is named as the output layer, for whose product it is rounded. A classifier's is not tied to anything.
    """
    if name in ("wte", "wpe", "lm_head"):
        return "lm_head" if name == "wte" and tied else name
    path, _, last = name.rpartition(".")
    return path if last == "kernel" else ""


def layer_shapes(config: GPTConfig) -> dict[str, tuple[int, int]]:
    """Path -> shape of every matrix in `layer_weights`."""
    return dict(_layer_shapes(config))


@cache
def _layer_shapes(config: GPTConfig) -> tuple[tuple[str, tuple[int, int]], ...]:
    # A sweep asks for those of one model hundreds of times.
    def build() -> Any:
        return nnx.to_pure_dict(nnx.state(GPT(config, nnx.Rngs(0)), nnx.Param))

    params = jax.eval_shape(build)
    names = list(layer_weights(jax.tree.map(lambda x: np.zeros((1, 1)), params)))
    shapes = jax.eval_shape(layer_weights, params)
    return tuple((name, (shapes[name].shape[0], shapes[name].shape[1])) for name in names)  # in the network's order


def parameter_counts(config: GPTConfig) -> dict[str, int]:
    """Number of parameters, `total` and `without_embeddings` (neither wte, wpe nor lm_head)."""
    shapes = nnx.state(nnx.eval_shape(lambda: GPT(config, nnx.Rngs(0))), nnx.Param)
    flat = {".".join(map(str, path)): math.prod(leaf.get_value().shape) for path, leaf in nnx.to_flat_state(shapes)}
    embeddings = sum(size for path, size in flat.items() if path.split(".")[0] in ("wte", "wpe", "lm_head"))
    total = sum(flat.values())
    return {"total": total, "without_embeddings": total - embeddings}
