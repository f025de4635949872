"""What is asked of a step, as programs beside the training step: measuring cannot change what is measured.

One program answers what can be known before the step, of its batch and the weights it starts from: it repeats the
step's forward and backward pass, with the same operands and draws, and asks more of them. Others look at the weights
alone, on one device since all hold the same: at their spectra, and at what they were before and after the step, so that
flips and stalls are those of the real update. Between questions nothing runs.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
from jax import lax

from altgrad_jax.diagnostics import curvature, gradients, quantisation, sensitivity, shadow, spectra
from altgrad_jax.diagnostics import weights as weight_updates
from altgrad_jax.layers import layer_weights
from altgrad_jax.loss_scale import LossScale
from altgrad_jax.objectives import NEXT_TOKEN, Objective
from altgrad_jax.precision.policy import Policy
from altgrad_jax.state import TrainState
from altgrad_jax.step import AXIS, FLOAT32_WEIGHTS, step_keys, window_loss
from altgrad_jax.step import gradients as step_gradients
from altgrad_jax.weights import Weights, unpack

Array = jax.Array
Values = dict[str, Any]
LANCZOS_STREAM = 2**31 - 3  # of the curvature's starting vector, apart from the step's own draws


def make_diagnose_step(
    graphdef: Any,
    shadow_graphdef: Any,
    *,
    loss_chunk: int,
    seed: int | Array,
    policy: Policy,
    loss_scale: LossScale,
    weights: Weights = FLOAT32_WEIGHTS,
    windows: int = 0,
    tokens: int = 64,
    lanczos_steps: int = 6,
    objective: Objective = NEXT_TOKEN,
) -> Callable[..., Values]:
    """Builds diagnose(state, tokens_ABT1, **questions) -> values, for the step about to be taken on this batch.

    Questions are static booleans; the result has an entry for each that is true:

      quant        (measures, codes) of `diagnostics.quantisation.measure`
      shadow       `diagnostics.shadow.compare` with the gradient of `shadow_graphdef`, the model in float32, with the
                   same dropout
      gradients    `diagnostics.gradients.measure`, and the share of dead units
      curvature    `diagnostics.curvature`, of the float32 loss of the first `tokens` tokens of each device's batch
      sensitivity  `diagnostics.sensitivity`, likewise; of language models alone

    With `windows` the device's first so many windows stand for its batch in the first three; 0: all of them.
    """
    sensitive = sensitivity.make_sensitivity(shadow_graphdef, policy, tokens=tokens, axis_name=AXIS)

    def diagnose(state: TrainState, tokens_ABT1: Array, **questions: bool) -> Values:
        asked = {name for name, wanted in questions.items() if wanted}
        keys, params = step_keys(seed, state.step), unpack(state.params)
        values: Values = {}
        few_BT1 = objective.shortened(tokens_ABT1[0, :1], tokens)
        if asked & {"quant", "shadow", "gradients"}:
            values |= backward_pass(state, params, tokens_ABT1, keys, asked)
        if "curvature" in asked:
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), state.step), LANCZOS_STREAM)
            loss = partial(
                window_loss,
                shadow_graphdef,
                tokens_BT1=few_BT1,
                chunk=loss_chunk,
                dropout_key=None,
                objective=objective,
            )
            with jax.default_matmul_precision("float32"):  # not TF32, which GPUs take for it
                values["curvature"] = curvature.largest_eigenvalues(loss, params, key, lanczos_steps, axis_name=AXIS)
        if "sensitivity" in asked:
            held = tokens_ABT1.shape[0] * tokens_ABT1.shape[1]
            factor = loss_scale.factor(state.loss_scale)
            with jax.default_matmul_precision("float32"):
                values["sensitivity"] = sensitive(params, state.quant, tokens_ABT1[0], held, factor)
        return values

    def backward_pass(state: TrainState, params: Any, tokens_ABT1: Array, keys: Any, asked: set[str]) -> Values:
        quant = "quant" in asked
        prepared, weight_stats = policy.prepare(
            layer_weights(params), state.quant, key=keys.rounding, axis_name=AXIS, collect=quant
        )
        probes, factor = policy.probes(prepared), loss_scale.factor(state.loss_scale)
        measured_ABT1 = tokens_ABT1[:1, :windows] if windows else tokens_ABT1
        arguments = params, measured_ABT1, loss_chunk, keys.dropout
        held = tokens_ABT1.shape[0] * tokens_ABT1.shape[1]
        _, grads, seen = step_gradients(graphdef, *arguments, prepared, probes, factor, held, objective)
        values: Values = {}
        if quant:
            stats = policy.gather(weight_stats, seen, AXIS)
            values["quant"] = quantisation.measure(policy, stats, policy.update(state.quant, stats))
        if asked & {"shadow", "gradients"}:
            grads = lax.pmean(grads, AXIS)
        if "shadow" in asked:
            with jax.default_matmul_precision("highest"):
                _, reference, _ = step_gradients(shadow_graphdef, *arguments, {}, {}, 1.0, None, objective)
            values["shadow"] = shadow.compare(grads, lax.pmean(reference, AXIS))
        if "gradients" in asked:
            grids = grid_tree(params, weights.policy_grids(params, state.quant))
            values["gradients"] = gradients.measure(grads, params, grids)
            if "quiet" in state.counters:
                values["dead"] = gradients.dead_share(state.counters["quiet"])
        return values

    return diagnose


def grid_tree(params: Any, grids: Mapping[str, Any]) -> Any:
    """The grids as a tree like the parameters', None where a parameter has none."""

    def pick(path, leaf) -> Any:
        del leaf
        return grids.get(jax.tree_util.keystr(path, simple=True, separator="."))

    return jax.tree_util.tree_map_with_path(pick, params)


def measure_spectra(params: Any) -> Values:
    """`diagnostics.spectra.measure` of parameters as they are stored."""
    return {"spectra": spectra.measure(unpack(params))}


def make_update_measure(weights: Weights) -> Callable[[tuple[Any, Any], Any], Values]:
    """Builds measure((params, scaling state) before a step, params after it) -> values."""

    def measure(before: tuple[Any, Any], params: Any) -> Values:
        old, new = unpack(before[0]), unpack(params)
        return {"weights": weight_updates.measure(old, new, grid_tree(old, weights.policy_grids(old, before[1])))}

    return measure


def name_answers(policy: Policy, params: Any, values: Values) -> dict[str, float | str]:
    """Named scalars of what `diagnose` gave, on the host; `params` are the parameters' shapes."""
    record: dict[str, float | str] = {}
    if "quant" in values:
        record |= quantisation.name(policy, *values["quant"])
    if "shadow" in values:
        record |= shadow.name(params, values["shadow"])
    if "gradients" in values:
        record |= gradients.name(params, values["gradients"])
    if "dead" in values:
        record |= gradients.name_dead(gradients.init_counts(params), values["dead"])
    if "spectra" in values:
        record |= spectra.name(params, values["spectra"])
    if "curvature" in values:
        record |= curvature.name(values["curvature"])
    if "sensitivity" in values:
        record |= sensitivity.name(policy, *values["sensitivity"])
    return record


def name_update(params: Any, values: Values) -> dict[str, float | str]:
    """Named scalars of what the update measure gave, on the host."""
    return weight_updates.name(params, *values["weights"])
