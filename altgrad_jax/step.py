"""The pure training and evaluation steps: no I/O, no lookups by string.

A step sees one device's share of the batch, tokens_ABT1: A microbatches of B windows of T + 1 tokens, of which the
first T are read and the last T predicted. The axis name "data" spans all devices of all hosts.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax

from altgrad_jax.losses import token_cross_entropy
from altgrad_jax.state import TrainState

Array = jax.Array
AXIS = "data"


def window_loss(graphdef: Any, params: Any, tokens_BT1: Array, chunk: int, dropout_key: Array | None) -> Array:
    """Mean next-token cross entropy of a batch of windows, in nats, float32."""
    # copy=True: the merged Variables must belong to the trace of the function being differentiated.
    model = nnx.merge(graphdef, params, copy=True)
    hidden_BTC = model.hidden(tokens_BT1[:, :-1], dropout_key)
    hidden_NC = hidden_BTC.reshape(-1, hidden_BTC.shape[-1])
    return token_cross_entropy(
        hidden_NC, model.head_weight_CV(), tokens_BT1[:, 1:].reshape(-1), model.config.dtype, chunk
    )


def make_train_step(
    graphdef: Any,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    loss_chunk: int,
    seed: int,
) -> Callable[[TrainState, Array], tuple[TrainState, dict[str, Array]]]:
    """Builds train_step(state, tokens_ABT1) -> (state, metrics), to be run under an axis named "data".

    Gradients are averaged over microbatches, then over devices; metrics are float32 scalars of the whole batch:
    `train/loss` (nats per token), `train/grad_norm` (before clipping), `train/learning_rate`, and the int32
    `train/nonfinite_steps` of the state.
    """

    def loss_and_grad(params, tokens_BT1, key):
        return jax.value_and_grad(lambda p: window_loss(graphdef, p, tokens_BT1, loss_chunk, key))(params)

    def train_step(state: TrainState, tokens_ABT1: Array) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), state.step), lax.axis_index(AXIS))
        microbatches = tokens_ABT1.shape[0]
        if microbatches == 1:
            loss, grads = loss_and_grad(state.params, tokens_ABT1[0], key)
        else:
            loss, grads = _accumulate(loss_and_grad, state.params, tokens_ABT1, jax.random.split(key, microbatches))
        loss, grads = lax.pmean((loss, grads), AXIS)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        nonfinite = jnp.where(jnp.isfinite(loss), 0, state.nonfinite_steps + 1)
        metrics = {
            "train/loss": loss,
            "train/grad_norm": optax.tree.norm(grads),
            "train/learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
            "train/nonfinite_steps": nonfinite,
        }
        params = optax.apply_updates(state.params, updates)
        return replace(
            state, step=state.step + 1, params=params, opt_state=opt_state, nonfinite_steps=nonfinite
        ), metrics

    return train_step


def _accumulate(loss_and_grad, params, tokens_ABT1: Array, keys_A: Array):
    """Mean loss and gradient over the microbatches, one at a time."""

    def add(total, microbatch):
        tokens_BT1, key = microbatch
        return jax.tree.map(jnp.add, total, loss_and_grad(params, tokens_BT1, key)), None

    zero = jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, params)
    total, _ = lax.scan(add, zero, (tokens_ABT1, keys_A))
    return jax.tree.map(lambda x: x / tokens_ABT1.shape[0], total)


def make_eval_step(graphdef: Any, *, loss_chunk: int) -> Callable[[Any, Array], Array]:
    """Builds eval_step(params, tokens_BT1) -> mean nats per token over all devices' windows."""

    def eval_step(params: Any, tokens_BT1: Array) -> Array:
        return lax.pmean(window_loss(graphdef, params, tokens_BT1, loss_chunk, None), AXIS)

    return eval_step
