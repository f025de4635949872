"""From a configuration to everything a run is made of: data, model, optimizer, and the steps on their devices.

The training loop, the benchmarks and the audit all start here, so what they run is the same program.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
import numpy.typing as npt
import optax
from ml_collections import ConfigDict

from altgrad_jax.config import check_devices
from altgrad_jax.data.batches import TrainBatches, evaluation_batches, validation_split
from altgrad_jax.data.cache import TokenCache
from altgrad_jax.diagnostics import quantisation, shadow
from altgrad_jax.errors import UsageError
from altgrad_jax.loss_scale import LossScale, parse_loss_scale
from altgrad_jax.model import GPTConfig, attention_implementation, gpt_config, layer_shapes
from altgrad_jax.optimizers import make_optimizer, make_schedule
from altgrad_jax.parallel import DataParallel, RunDiagnose, RunEval, RunTrain
from altgrad_jax.precision.policy import Policy, resolve
from altgrad_jax.state import TrainState, init_params, init_state, model_structure
from altgrad_jax.step import make_diagnose_step, make_eval_step, make_train_step


@dataclass(frozen=True)
class Experiment:
    """What `config` describes, ready to run. Holds no state that changes with training.

    Attributes:
      config: the configuration, validated.
      cache: the corpus as tokens.
      model: the network's shape.
      graphdef: its structure, for `nnx.merge`.
      policy: which layers are quantised, and how.
      loss_scale: what gradients are multiplied by while they are rounded.
      optimizer: the gradient transformation.
      parallel: the devices.
      batches: training batches of this host, by step.
      eval_batches: the fixed validation windows, on the devices.
      eval_split: the split they are from.
      run_train: (state, sharded batch) -> (state, metrics).
      run_eval: (state, sharded batch) -> mean nats per token.
      run_diagnose: (state, sharded batch, quant=, shadow=) -> values, see `make_diagnose_step`.
    """

    config: ConfigDict
    cache: TokenCache
    model: GPTConfig
    graphdef: Any
    policy: Policy
    loss_scale: LossScale
    optimizer: optax.GradientTransformation
    parallel: DataParallel
    batches: TrainBatches
    eval_batches: list[jax.Array]
    eval_split: str
    run_train: RunTrain
    run_eval: RunEval
    run_diagnose: RunDiagnose

    def fresh_state(self, params: Any = None) -> TrainState:
        """The state before the first step, on the devices; `params` (consumed) instead of newly drawn ones if given."""

        # Built where it will live: no copy of it ever exists on the host.
        return jax.jit(self._initial, out_shardings=self.parallel.replicated, donate_argnums=0)(params)

    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the state, without its arrays."""
        return self.parallel.abstract(jax.eval_shape(self._initial, None))

    def _initial(self, params: Any) -> TrainState:
        if params is None:
            params = init_params(self.model, self.config.seed)
        return init_state(params, self.optimizer, self.policy.init(), self.loss_scale.init())

    def shard(self, batch: npt.NDArray[np.int32]) -> jax.Array:
        """Puts a training batch of this host on its devices, cut into microbatches."""
        return self.parallel.shard(batch, self.config.train.grad_accumulation)

    def evaluate(self, state: TrainState) -> float:
        """Mean loss over the validation windows, nats per token."""
        return float(np.mean(jax.device_get([self.run_eval(state, batch) for batch in self.eval_batches])))

    def diagnoses(self, step: int) -> dict[str, bool]:
        """Which questions are asked of the step about to be taken, the first being step 0."""
        every = self.config.diagnostics
        return {
            "quant": bool(every.quant_every and self.policy.plans) and step % every.quant_every == 0,
            "shadow": bool(every.shadow_every) and step % every.shadow_every == 0,
        }

    def diagnose(self, state: TrainState, batch: jax.Array, questions: dict[str, bool]) -> dict[str, float | str]:
        """The answers, named; waits for them."""
        values = jax.device_get(self.run_diagnose(state, batch, **questions))
        record: dict[str, float | str] = {}
        if questions["quant"]:
            record |= quantisation.name(self.policy, values["measures"], values["codes"])
        if questions["shadow"]:
            record |= shadow.name(state.params, values["shadow"])
        return record

    def resolved(self) -> dict[str, str]:
        """Choices left to the program ("auto"), as they came out; stored with the run."""
        return {
            "attention": attention_implementation(self.model),
            "corpus": self.cache.header.source.name,
            "tokenizer": f"{self.cache.header.tokenizer.kind} ({self.cache.vocab_size} tokens)",
            "devices": f"{len(self.parallel.devices)} x {self.parallel.devices[0].device_kind}",
        }


def make_policy(config: ConfigDict) -> Policy:
    """The precision rules applied to the model's layers, on this machine.

    Raises:
      UsageError: a rule is malformed, decides no layer, or cannot be run as `backend` and `strict` ask.
    """
    precision = config.precision
    shapes = layer_shapes(gpt_config(config.model, precision.compute))
    try:
        return resolve(precision.rules, shapes, backend=precision.backend, strict=precision.strict)
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
    optimizer = make_optimizer(config.optimizer, config.train.steps)
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
                windows=config.diagnostics.windows,
            )
        ),
    )
