"""The pure training and evaluation steps: no I/O, no lookups by string.

A step sees one device's share of the batch, tokens_ABT1: A microbatches of B windows of T + 1 tokens, of which the
first T are read and the last T predicted; or B rows of what another objective reads. The axis name "data" spans all
devices of all hosts.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax

from altgrad_jax.diagnostics.gradients import init_counts, quiet_steps
from altgrad_jax.layers import layer_weights
from altgrad_jax.loss_scale import LossScale, all_finite
from altgrad_jax.model import UNQUANTISED, Quantised
from altgrad_jax.objectives import NEXT_TOKEN, Objective, pooled_logits
from altgrad_jax.precision.dot import Prepared, Probe
from altgrad_jax.precision.policy import Policy
from altgrad_jax.precision.statistics import over_parts
from altgrad_jax.state import TrainState
from altgrad_jax.weights import Weights, unpack

Array = jax.Array
AXIS = "data"
ROUNDING_STREAM = 2**31 - 1  # folded into a step's key where devices fold in their index
UNQUANTISED_POLICY = Policy()
UNSCALED = LossScale()
FLOAT32_WEIGHTS = Weights()


@dataclass(frozen=True)
class Counting:
    """What a step does and counts beside training; nothing by default.

    Attributes:
      skips: leave out updates of steps with a loss or gradient that is not finite, and count them; so does a dynamic
        loss scale.
      quiet_units: count for how many steps each unit has had no gradient (`diagnostics.gradients.quiet_steps`).
    """

    skips: bool = False
    quiet_units: bool = False

    def init(self, params: Any) -> dict[str, Any]:
        """The counters before the first step, int32: `skipped`, `skipped_in_a_row`, `quiet`; those that are kept."""
        counters: dict[str, Any] = {}
        if self.skips:
            counters |= {"skipped": jnp.zeros((), jnp.int32), "skipped_in_a_row": jnp.zeros((), jnp.int32)}
        if self.quiet_units:
            counters["quiet"] = init_counts(params)
        return counters


NO_COUNTING = Counting()


def window_loss(
    graphdef: Any,
    params: Any,
    tokens_BT1: Array,
    chunk: int,
    dropout_key: Array | None,
    quantised: Quantised = UNQUANTISED,
    loss_scale: Array | float = 1.0,
    objective: Objective = NEXT_TOKEN,
) -> Array:
    """Mean loss of a batch of rows, as `objective` reads them, in nats, float32; its gradient times `loss_scale`."""
    # copy=True: the merged Variables must belong to the trace of the function being differentiated.
    model = nnx.merge(graphdef, params, copy=True)
    return objective.loss(model, tokens_BT1, chunk, dropout_key, quantised, loss_scale)


def make_train_step(
    graphdef: Any,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    loss_chunk: int,
    seed: int | Array,
    policy: Policy = UNQUANTISED_POLICY,
    loss_scale: LossScale = UNSCALED,
    weights: Weights = FLOAT32_WEIGHTS,
    counting: Counting = NO_COUNTING,
    objective: Objective = NEXT_TOKEN,
) -> Callable[[TrainState, Array], tuple[TrainState, dict[str, Array]]]:
    """Builds train_step(state, tokens_ABT1) -> (state, metrics), to be run under an axis named "data".

    Gradients are averaged over microbatches, then over devices; metrics are float32 scalars of the whole batch:
    `train/loss` (nats per token), `train/grad_norm` (before clipping), `train/learning_rate`, and the int32
    `train/nonfinite_steps` of the state; with a dynamic loss scale also `train/loss_scale`, and with that or
    `counting.skips` `train/skipped`, 1 for a step that was left out, because something was not finite or, under a
    dynamic scale, saturated; with the latter the counters `train/skipped_steps` and `train/skipped_in_a_row`.
    """

    def train_step(state: TrainState, tokens_ABT1: Array) -> tuple[TrainState, dict[str, Array]]:
        keys = step_keys(seed, state.step)
        params, factor = unpack(state.params), loss_scale.factor(state.loss_scale)
        prepared, weight_stats = policy.prepare(layer_weights(params), state.quant, key=keys.rounding, axis_name=AXIS)
        quantised = prepared, policy.probes(prepared)
        loss, grads, probes = gradients(
            graphdef, params, tokens_ABT1, loss_chunk, keys.dropout, *quantised, factor, objective=objective
        )
        loss, grads = lax.pmean((loss, grads), AXIS)
        grids = weights.grids(params, state.quant)
        given = {} if grids is None else {"grids": grids}
        updates, opt_state = optimizer.update(grads, state.opt_state, params, **given)
        nonfinite = jnp.where(jnp.isfinite(loss), 0, state.nonfinite_steps + 1)
        stats = policy.gather(weight_stats, probes, AXIS)
        metrics = {
            "train/loss": loss,
            "train/grad_norm": optax.tree.norm(grads),
            "train/learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
            "train/nonfinite_steps": nonfinite,
        }
        new = replace(
            state,
            step=state.step + 1,
            params=weights.pack(weights.apply(params, updates, grids), params, state.quant),
            opt_state=opt_state,
            nonfinite_steps=nonfinite,
            quant=policy.update(state.quant, stats),
        )
        if counting.quiet_units:
            new = replace(new, counters=new.counters | {"quiet": quiet_steps(state.counters["quiet"], grads)})
        if loss_scale.fixed is None or counting.skips:
            good = all_finite(grads) & jnp.isfinite(loss)
            if loss_scale.fixed is None:
                good &= ~jnp.asarray(policy.overflowed(state.quant, stats))
            metrics["train/skipped"] = jnp.where(good, 0.0, 1.0)
            before, after = (state.params, state.opt_state), (new.params, new.opt_state)
            kept_params, opt_state = jax.tree.map(partial(jnp.where, good), after, before)
            new = replace(new, params=kept_params, opt_state=opt_state)
        if loss_scale.fixed is None:
            metrics["train/loss_scale"] = factor
            new = replace(new, loss_scale=loss_scale.next(state.loss_scale, good))
        if counting.skips:
            skipped = {
                "skipped": jnp.where(good, 0, 1) + state.counters["skipped"],
                "skipped_in_a_row": jnp.where(good, 0, 1 + state.counters["skipped_in_a_row"]),
            }
            metrics["train/skipped_steps"] = skipped["skipped"]
            metrics["train/skipped_in_a_row"] = skipped["skipped_in_a_row"]
            new = replace(new, counters=new.counters | skipped)
        return new, metrics

    return train_step


def several(train_step: Callable[[TrainState, Array], tuple[TrainState, dict[str, Array]]], steps: int) -> Callable:
    """The step as it is; or for more than one (state, tokens_KABT1) -> (state, metrics of [K]): K steps, one dispatch.

    For models so small that the host would take longer to start a step than the device to run it.
    """
    if steps == 1:
        return train_step
    return lambda state, tokens_KABT1: lax.scan(train_step, state, tokens_KABT1)


class StepKeys(NamedTuple):
    """A step's PRNG keys: one a device for dropout, one for all devices for stochastic rounding."""

    dropout: Array
    rounding: Array


def step_keys(seed: int | Array, step: Array) -> StepKeys:
    """The keys of a step; they follow from the run's seed and the step, and are not carried."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    return StepKeys(jax.random.fold_in(key, lax.axis_index(AXIS)), jax.random.fold_in(key, ROUNDING_STREAM))


def gradients(
    graphdef: Any,
    params: Any,
    tokens_ABT1: Array,
    loss_chunk: int,
    dropout_key: Array,
    prepared: Mapping[str, Prepared],
    probes: Mapping[str, Probe],
    loss_scale: Array | float,
    windows: int | None = None,
    objective: Objective = NEXT_TOKEN,
) -> tuple[Array, Any, dict[str, Probe]]:
    """Loss, gradients (unscaled) and statistics of this device's share, over its microbatches.

    The weights were quantised before, so that all microbatches use the same. Gradients are rounded at the size they
    have in the mean over the step's whole batch: however that is cut up, scales and underflow are the same. `windows`
    is the number that this device has of it, where the tokens are not all of them.
    """
    microbatches, rows = tokens_ABT1.shape[:2]
    share = loss_scale * (rows / ((windows or microbatches * rows) * lax.axis_size(AXIS)))

    def loss_and_grad(tokens_BT1, key, layers):
        def loss(params, probes):
            quantised = {path: (layer, probes.get(path)) for path, layer in layers.items()}
            return window_loss(graphdef, params, tokens_BT1, loss_chunk, key, quantised, share, objective)

        value, (grads, seen) = jax.value_and_grad(loss, argnums=(0, 1))(params, dict(probes))
        return (value, grads), seen

    if microbatches == 1:
        (loss, grads), seen = loss_and_grad(tokens_ABT1[0], dropout_key, prepared)
    else:

        def add(total, microbatch):
            tokens_BT1, key, index = microbatch
            layers = {path: layer.fold_keys(index) for path, layer in prepared.items()}
            part, seen = loss_and_grad(tokens_BT1, key, layers)
            return jax.tree.map(jnp.add, total, part), seen

        zero = jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, params)
        keys_A = jax.random.split(dropout_key, microbatches)
        total, parts = lax.scan(add, zero, (tokens_ABT1, keys_A, jnp.arange(microbatches)))
        loss, grads = total[0] / microbatches, total[1]
        seen = {path: Probe(over_parts(p.activation), over_parts(p.gradient)) for path, p in parts.items()}
    unscale = share * microbatches
    if not (isinstance(unscale, float) and unscale == 1.0):
        grads = jax.tree.map(lambda g: g / unscale, grads)
    return loss, grads, seen


def make_eval_step(
    graphdef: Any, *, loss_chunk: int, policy: Policy = UNQUANTISED_POLICY
) -> Callable[[TrainState, Array], Array]:
    """Builds eval_step(state, tokens_BT1) -> mean nats per token over all devices' windows.

    Weights and activations are quantised as in training.
    """

    def eval_step(state: TrainState, tokens_BT1: Array) -> Array:
        params = unpack(state.params)
        quantised = _evaluated(policy, params, state)
        return lax.pmean(window_loss(graphdef, params, tokens_BT1, loss_chunk, None, quantised), AXIS)

    return eval_step


def make_logits_step(graphdef: Any, *, policy: Policy = UNQUANTISED_POLICY) -> Callable[[TrainState, Array], Array]:
    """Builds logits_step(state, inputs_BT1) -> a classifier's logits of all devices' rows, [rows, labels] float32.

    The inputs are `objectives.LabelLoss`'s without the labels; weights and activations are quantised as in training.
    """

    def logits_step(state: TrainState, inputs_BT1: Array) -> Array:
        params = unpack(state.params)
        quantised = _evaluated(policy, params, state)
        logits_BL = pooled_logits(nnx.merge(graphdef, params, copy=True), inputs_BT1, None, quantised)
        return lax.all_gather(logits_BL, AXIS, tiled=True)

    return logits_step


def _evaluated(policy: Policy, params: Any, state: TrainState) -> Quantised:
    """The quantised layers, as evaluation has them."""
    prepared, _ = policy.prepare(layer_weights(params), state.quant, axis_name=AXIS)
    probes = policy.probes(prepared)
    return {path: (layer, probes.get(path)) for path, layer in prepared.items()}
