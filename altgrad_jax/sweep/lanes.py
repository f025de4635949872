"""Several conditions in one compiled program: the training step under `jax.vmap`, a lane for each.

A lane is a run's state with what makes it another run than its neighbours: its seed, the optimizer's settings that
differ, and, in the state, the grids of its formats. Everything else is built in, as in a run of its own. Lanes share
nothing, so each takes the steps that its run would take; lanes of one seed start from the same weights and see the same
batches. Devices divide each lane's batch, as they do a run's.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax

from altgrad_jax.diagnose import make_diagnose_step, make_update_measure, measure_spectra
from altgrad_jax.evaluation import LanguageEvaluation
from altgrad_jax.experiment import Experiment, copied
from altgrad_jax.optimizers import make_optimizer, make_schedule
from altgrad_jax.program import make_policy, make_weights
from altgrad_jax.state import TrainState, init_params, init_state, model_structure
from altgrad_jax.step import make_eval_step, make_train_step, several

Array = jax.Array
# What `config.optimizer` may differ in between lanes: numbers that enter the update as they are. Not b1 and b2, whose
# 1 - b is that of a double in a run alone; nor max_scale, which the state begins with.
TRACED_OPTIONS = (
    *("learning_rate", "other_learning_rate", "min_lr_ratio", "eps", "weight_decay"),
    *("momentum", "rung_clip", "max_stiffness", "update_clip"),
)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Lane:
    """One condition's state, or, with a leading axis K, that of K conditions.

    Attributes:
      state: what training carries.
      seed: int32, of dropout and of stochastic rounding.
      options: float32, those of `TRACED_OPTIONS` in which the lanes differ.
    """

    state: TrainState
    seed: Array
    options: dict[str, Array]


def language(exp: Experiment) -> LanguageEvaluation:
    """How a language model is judged: the only task that lanes learn."""
    assert isinstance(exp.evaluation, LanguageEvaluation)
    return exp.evaluation


class Lanes:
    """The programs of K conditions that differ in nothing but seeds, formats of one carrier and `TRACED_OPTIONS`.

    Attributes:
      experiments: of each condition, as it would be run alone.
      policies: of each, with its formats in the state where the lanes' formats differ.
      run_train: (lanes, batch of [D, K, A, B, T + 1]) -> (lanes, metrics of [K]); the lanes passed in are donated.
      run_eval: (lanes, validation batch of [D, B, T + 1]) -> losses of [K].
      run_diagnose: (lanes, batch, **questions) -> values of [K, ...].
    """

    def __init__(self, experiments: Sequence[Experiment]):
        self.experiments = list(experiments)
        configs = [exp.config for exp in experiments]
        formats = [exp.policy.identity() for exp in experiments]
        traced = any(other != formats[0] for other in formats)
        self.policies = [make_policy(c, traced=True) for c in configs] if traced else [e.policy for e in experiments]
        first, policy = experiments[0], self.policies[0]
        config, self._parallel = first.config, first.parallel
        self._weights = [make_weights(c, p) for c, p in zip(configs, self.policies, strict=True)]
        weights = self._weights[0]
        self._options = tuple(key for key in TRACED_OPTIONS if len({c.optimizer[key] for c in configs}) > 1)
        steps = config.train.steps_per_dispatch

        shared: dict[str, Any] = {"loss_chunk": first.loss_chunk, "loss_scale": first.loss_scale}
        shared |= {"policy": policy, "weights": weights}

        def train_step(lane: Lane, tokens: Array) -> tuple[Lane, dict[str, Array]]:
            optimizer, schedule = self._optimizer(lane.options, lane.seed), self._schedule(lane.options)
            step = make_train_step(
                first.graphdef, optimizer, schedule, seed=lane.seed, counting=first.counting, **shared
            )
            state, metrics = several(step, steps)(lane.state, tokens)
            return replace(lane, state=state), metrics

        evaluate = make_eval_step(first.graphdef, loss_chunk=first.loss_chunk, policy=policy)
        shadow = model_structure(replace(first.model, compute_dtype="float32", attention="auto"))
        asked = config.diagnostics

        def diagnose(lane: Lane, tokens: Array, **questions: bool) -> dict[str, Any]:
            step = make_diagnose_step(
                first.graphdef,
                shadow,
                seed=lane.seed,
                windows=asked.windows,
                tokens=asked.tokens,
                lanczos_steps=asked.lanczos_steps,
                **shared,
            )
            return step(lane.state, tokens, **questions)

        parallel = self._parallel
        self.run_train = parallel.train_step(jax.vmap(train_step))
        self.run_eval = parallel.eval_step(jax.vmap(lambda lane, tokens: evaluate(lane.state, tokens), (0, None)))
        self.run_diagnose = parallel.diagnose_step(
            lambda lanes, tokens, **questions: jax.vmap(lambda *x: diagnose(*x, **questions))(lanes, tokens)
        )
        self._spectra = jax.jit(jax.vmap(measure_spectra))
        self._update_measure = jax.jit(jax.vmap(make_update_measure(weights)))

    def _settings(self, options: dict[str, Array]) -> Any:
        """`config.optimizer` with the lane's own numbers."""
        return SimpleNamespace(**self.experiments[0].config.optimizer.to_dict() | options)

    def _optimizer(self, options: dict[str, Array], seed: Array | int) -> optax.GradientTransformation:
        config = self.experiments[0].config
        return make_optimizer(
            self._settings(options),
            config.train.steps,
            self._weights[0].formats,
            seed,
            config.stability.relative_clip,
        )

    def _schedule(self, options: dict[str, Array]) -> optax.Schedule:
        return make_schedule(self._settings(options), self.experiments[0].config.train.steps)

    def fresh(self) -> Lane:
        """Every lane before its first step, on the devices."""
        first = self.experiments[0]

        # One program for all, run once a lane: how numbers are drawn and rounded must not depend on the neighbours.
        @jax.jit
        def initial(seed: Array, quant: Any) -> TrainState:
            weights, params = self._weights[0], init_params(first.model, jax.random.key(seed))
            snapped = weights.snap(params, quant)
            stored = weights.pack(snapped, snapped, quant)
            optimizer = self._optimizer({}, seed)
            counters = first.counting.init(params)
            return init_state(stored, optimizer, quant, first.loss_scale.init(), counters)

        lanes = [
            Lane(
                initial(jnp.int32(exp.config.seed), policy.init()),
                jnp.int32(exp.config.seed),
                {key: jnp.float32(exp.config.optimizer[key]) for key in self._options},
            )
            for exp, policy in zip(self.experiments, self.policies, strict=True)
        ]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *lanes)
        return jax.device_put(stacked, self._parallel.replicated)

    def abstract(self) -> Lane:
        """Shapes, dtypes and shardings of `fresh`."""
        return self._parallel.abstract(jax.eval_shape(self.fresh))

    def compile_train(self, lanes: Lane) -> jax.stages.Compiled:
        """The training step, compiled for lanes like these; `run_train` then runs it."""
        shape = self.experiments[0].abstract_batch().shape
        batch = np.zeros((shape[0], len(self.experiments), *shape[1:]), np.int32)
        return self.run_train.compile(lanes, self._parallel.place(batch))

    def shard(self, batches: Sequence[npt.NDArray[np.int32]]) -> Array:
        """Batches [B, T + 1] or [steps, B, T + 1], one a lane, on the devices: [D, K, (steps,) A, B / D, T + 1]."""
        return self._parallel.shard(np.stack(batches), self.experiments[0].config.train.grad_accumulation)

    def evaluate(self, lanes: Lane) -> npt.NDArray[np.float32]:
        """Mean validation loss of every lane, nats per token, [K]."""
        losses = jax.device_get([self.run_eval(lanes, batch) for batch in language(self.experiments[0]).batches])
        return np.mean(np.asarray(losses), axis=0)

    def diagnose(self, lanes: Lane, batch: Array, questions: frozenset[str]) -> dict[str, Any]:
        """The answers about the (first) step to be taken on this batch, [K, ...], on the host."""
        if self.experiments[0].config.train.steps_per_dispatch > 1:
            batch = batch[:, :, 0]
        values: dict[str, Any] = {}
        if of_step := sorted(questions - {"spectra"}):
            values |= self.run_diagnose(lanes, batch, **dict.fromkeys(of_step, True))
        if "spectra" in questions:
            values |= self._spectra(self._parallel.on_one_device(lanes.state.params))
        return jax.device_get(values)

    def keep(self, lanes: Lane) -> Any:
        """A copy of what `measure_update` compares later lanes with."""
        return copied(self._parallel.on_one_device((lanes.state.params, lanes.state.quant)))

    def measure_update(self, before: Any, lanes: Lane) -> dict[str, Any]:
        """What the step between `keep` and these lanes did to the weights, [K, ...], on the host."""
        return jax.device_get(self._update_measure(before, self._parallel.on_one_device(lanes.state.params)))
