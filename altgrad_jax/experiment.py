"""From a configuration to everything a run is made of: data, model, optimizer, and the steps on their devices.

The training loop, the benchmarks and the audit all start here, so what they run is the same program.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax
from ml_collections import ConfigDict

from altgrad_jax.config import check_devices
from altgrad_jax.data.batches import TrainBatches, evaluation_batches, validation_split
from altgrad_jax.data.cache import TokenCache
from altgrad_jax.diagnose import make_diagnose_step, make_update_measure, measure_spectra, name_answers, name_update
from altgrad_jax.diagnostics.questions import parse_questions
from altgrad_jax.errors import UsageError
from altgrad_jax.loss_scale import LossScale, parse_loss_scale
from altgrad_jax.model import GPTConfig, attention_implementation, gpt_config, layer_shapes
from altgrad_jax.optimizers import make_optimizer, make_schedule
from altgrad_jax.optimizers.factory import KEEP_TO_GRIDS, needs_formats
from altgrad_jax.parallel import DataParallel, RunDiagnose, RunEval, RunTrain, RunUpdateMeasure
from altgrad_jax.precision.policy import Policy, resolve
from altgrad_jax.stability import Record
from altgrad_jax.state import TrainState, init_params, init_state, model_structure
from altgrad_jax.step import Counting, make_eval_step, make_train_step
from altgrad_jax.weights import Weights


@dataclass(frozen=True)
class Experiment:
    """What `config` describes, ready to run. Holds no state that changes with training.

    Attributes:
      config: the configuration, validated.
      cache: the corpus as tokens.
      model: the network's shape.
      graphdef: its structure, for `nnx.merge`.
      policy: which layers are quantised, and how.
      weights: what grids parameters live on, and how they are stored.
      counting: what a step counts beside training.
      loss_scale: what gradients are multiplied by while they are rounded.
      optimizer: the gradient transformation.
      parallel: the devices.
      batches: training batches of this host, by step.
      eval_batches: the fixed validation windows, on the devices.
      eval_split: the split they are from.
      run_train: (state, sharded batch) -> (state, metrics).
      run_eval: (state, sharded batch) -> mean nats per token.
      run_diagnose: (state, sharded batch, **questions) -> values, see `make_diagnose_step`.
      run_update_measure: (before, parameters after) -> values, see `make_update_measure`.
    """

    config: ConfigDict
    cache: TokenCache
    model: GPTConfig
    graphdef: Any
    policy: Policy
    weights: Weights
    counting: Counting
    loss_scale: LossScale
    optimizer: optax.GradientTransformation
    parallel: DataParallel
    batches: TrainBatches
    eval_batches: list[jax.Array]
    eval_split: str
    run_train: RunTrain
    run_eval: RunEval
    run_diagnose: RunDiagnose
    run_update_measure: RunUpdateMeasure

    def fresh_state(self, params: Any = None) -> TrainState:
        """The state before the first step, on the devices; `params` (consumed) instead of newly drawn ones if given."""

        # Built where it will live: no copy of it ever exists on the host.
        return jax.jit(self._initial, out_shardings=self.parallel.replicated, donate_argnums=0)(params)

    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the state, without its arrays."""
        return self.parallel.abstract(jax.eval_shape(self._initial, None))

    def abstract_params(self) -> Any:
        """Shapes of the float32 parameters, however they are stored, for weights of other runs."""
        return self.parallel.abstract(jax.eval_shape(lambda: init_params(self.model, self.config.seed)))

    def _initial(self, params: Any) -> TrainState:
        if params is None:
            params = init_params(self.model, self.config.seed)
        counters = self.counting.init(params)
        stored = self.weights.stored(params)
        return init_state(stored, self.optimizer, self.policy.init(), self.loss_scale.init(), counters)

    def shard(self, batch: npt.NDArray[np.int32]) -> jax.Array:
        """Puts a training batch of this host on its devices, cut into microbatches."""
        return self.parallel.shard(batch, self.config.train.grad_accumulation)

    def evaluate(self, state: TrainState) -> float:
        """Mean loss over the validation windows, nats per token."""
        return float(np.mean(jax.device_get([self.run_eval(state, batch) for batch in self.eval_batches])))

    def questions_at(self, step: int) -> frozenset[str]:
        """What is asked about the step about to be taken, the first being step 0."""
        every = self.config.diagnostics
        intervals = {"quant": every.quant_every, "shadow": every.shadow_every} | parse_questions(every.questions)
        if not self.policy.plans:
            intervals |= {"quant": 0, "sensitivity": 0}  # no layer is rounded
        return frozenset(name for name, steps in intervals.items() if steps and step % steps == 0)

    def diagnose(self, state: TrainState, batch: jax.Array, questions: frozenset[str]) -> Record:
        """The answers about the step to be taken on this batch, named; waits for them."""
        if not questions:
            return {}
        values: dict[str, Any] = {}
        if of_step := sorted(questions - {"spectra"}):
            values |= self.run_diagnose(state, batch, **dict.fromkeys(of_step, True))
        if "spectra" in questions:
            values |= _spectra(self.parallel.on_one_device(state.params))
        return name_answers(self.policy, self.abstract_params(), jax.device_get(values))

    def keep(self, state: TrainState) -> Any:
        """A copy of what `measure_update` compares a later state with; a step consumes its own."""
        return _copied(self.parallel.on_one_device((state.params, state.quant)))

    def measure_update(self, before: Any, state: TrainState) -> Record:
        """What the step between `keep` and this state did to the weights, named; waits for it."""
        values = self.run_update_measure(before, self.parallel.on_one_device(state.params))
        return name_update(self.abstract_params(), jax.device_get(values))

    def resolved(self) -> dict[str, str]:
        """Choices left to the program ("auto"), as they came out; stored with the run."""
        return {
            "attention": attention_implementation(self.model),
            "corpus": self.cache.header.source.name,
            "tokenizer": f"{self.cache.header.tokenizer.kind} ({self.cache.vocab_size} tokens)",
            "devices": f"{len(self.parallel.devices)} x {self.parallel.devices[0].device_kind}",
        }


_spectra = jax.jit(measure_spectra)


@jax.jit
def _copied(tree: Any) -> Any:
    return jax.tree.map(jnp.copy, tree)


def make_policy(config: ConfigDict) -> Policy:
    """The precision rules applied to the model's layers, on this machine.

    Raises:
      UsageError: a rule is malformed, decides no layer, or cannot be run as `backend` and `strict` ask.
    """
    precision = config.precision
    shapes = layer_shapes(gpt_config(config.model, precision.compute))
    try:
        traced = config.stability.fallback
        return resolve(precision.rules, shapes, backend=precision.backend, strict=precision.strict, traced=traced)
    except ValueError as e:
        raise UsageError(f"config.precision: {e}") from e


def build(config: ConfigDict, cache: TokenCache) -> Experiment:
    """Assembles an experiment; nothing is compiled yet.

    Raises:
      UserError: the batch does not divide over the devices, or the corpus is too small for it.
    """
    check_devices(config, jax.local_device_count(), jax.process_count())
    model = gpt_config(config.model, config.precision.compute)
    graphdef = model_structure(model)
    policy, loss_scale = make_policy(config), parse_loss_scale(config.train.loss_scale)
    weights = make_weights(config, policy)
    optimizer = make_optimizer(
        config.optimizer, config.train.steps, weights.formats, config.seed, config.stability.relative_clip
    )
    counting = Counting(config.stability.skip_nonfinite, "gradients" in parse_questions(config.diagnostics.questions))
    parallel = DataParallel(config.parallel.devices)
    batch_size, hosts = config.train.batch_size, jax.process_count()
    split = validation_split(cache)
    windows = evaluation_batches(cache, split, model.block_size, batch_size, config.train.eval_batches)
    mine = slice(jax.process_index() * batch_size // hosts, (jax.process_index() + 1) * batch_size // hosts)
    # Small chunks save memory where it is slow to fault in, large ones keep an accelerator busy.
    chunk = config.train.loss_chunk or (256 if jax.default_backend() == "cpu" else 4096)
    return Experiment(
        config=config,
        cache=cache,
        model=model,
        graphdef=graphdef,
        policy=policy,
        weights=weights,
        counting=counting,
        loss_scale=loss_scale,
        optimizer=optimizer,
        parallel=parallel,
        batches=TrainBatches(cache, model.block_size, batch_size, config.seed, jax.process_index(), hosts),
        eval_batches=[parallel.shard(rows[mine]) for rows in windows],
        eval_split=split,
        run_train=parallel.train_step(
            make_train_step(
                graphdef,
                optimizer,
                make_schedule(config.optimizer, config.train.steps),
                loss_chunk=chunk,
                seed=config.seed,
                policy=policy,
                loss_scale=loss_scale,
                weights=weights,
                counting=counting,
            )
        ),
        run_eval=parallel.eval_step(make_eval_step(graphdef, loss_chunk=chunk, policy=policy)),
        run_diagnose=parallel.diagnose_step(
            make_diagnose_step(
                graphdef,
                model_structure(replace(model, compute_dtype="float32", attention="auto")),
                loss_chunk=chunk,
                seed=config.seed,
                policy=policy,
                loss_scale=loss_scale,
                weights=weights,
                windows=config.diagnostics.windows,
                tokens=config.diagnostics.tokens,
                lanczos_steps=config.diagnostics.lanczos_steps,
            )
        ),
        run_update_measure=jax.jit(make_update_measure(weights)),
    )


def make_weights(config: ConfigDict, policy: Policy) -> Weights:
    """How this run's parameters are kept."""
    optimizer = config.optimizer
    return Weights(
        policy,
        tied=config.model.tie_embeddings,
        storage=optimizer.weights,
        on_grid=optimizer.name in KEEP_TO_GRIDS,
        reads_grids=needs_formats(optimizer) or config.stability.relative_clip,
    )
