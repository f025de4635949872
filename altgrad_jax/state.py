"""TrainState: every array that training carries from step to step, in one pytree."""

import hashlib
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from altgrad_jax.model import GPT, GPTConfig
from altgrad_jax.weights import unpack

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """What a step reads and replaces. Random keys are not carried: they follow from the seed and the step.

    Attributes:
      step: scalar int32, optimizer steps done.
      params: nested dict keyed as the model's attributes, of float32 arrays or of what `Weights` stores.
      opt_state: the optimizer's own state.
      nonfinite_steps: scalar int32, consecutive steps, up to this one, whose loss was NaN or Inf.
      quant: scaling state of the quantised layers (`Policy.init`); empty without any.
      loss_scale: state of a dynamic loss scale (`loss_scale.init`); empty where it is fixed.
      counters: int32 counts of what a step does beside training (`step.Counting.init`); empty where nothing is counted.
    """

    step: Array
    params: Any
    opt_state: Any
    nonfinite_steps: Array
    quant: Any = field(default_factory=dict)
    loss_scale: Any = field(default_factory=dict)
    counters: Any = field(default_factory=dict)


def model_structure(config: GPTConfig) -> Any:
    """The model without its arrays (nnx.GraphDef), for `nnx.merge` with a parameter dict."""
    return nnx.split(nnx.eval_shape(lambda: GPT(config, nnx.Rngs(0))))[0]


def init_params(config: GPTConfig, seed: int | Array) -> Any:
    """Freshly drawn parameters, a pure nested dict; `seed` is a number or the key that it stands for."""
    return nnx.to_pure_dict(nnx.state(GPT(config, nnx.Rngs(seed)), nnx.Param))


def init_state(
    params: Any,
    optimizer: optax.GradientTransformation,
    quant: Any = None,
    loss_scale: Any = None,
    counters: Any = None,
) -> TrainState:
    """The state before the first step; `quant`, `loss_scale`, `counters` as in TrainState, empty by default."""
    # Two zeros, not one: a state is donated to the step, and one buffer cannot be donated twice.
    step, nonfinite_steps = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
    return TrainState(
        step=step,
        params=params,
        opt_state=optimizer.init(unpack(params)),
        nonfinite_steps=nonfinite_steps,
        quant=quant or {},
        loss_scale=loss_scale or {},
        counters=counters or {},
    )


def leaf_names(tree: Any) -> list[str]:
    """Dotted names of a pytree's leaves, in `jax.tree.leaves` order: "params.blocks.3.attn.qkv.kernel"."""
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in paths]


def tree_sha256(tree: Any) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of all leaves: equal exactly when the trees are equal to the bit."""
    digest = hashlib.sha256()
    for name, leaf in zip(leaf_names(tree), jax.tree.leaves(tree), strict=True):
        array = np.asarray(leaf)
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
