"""From a configuration to the program that trains: model, precision, optimizer, and the step on its devices.

It needs no data, and the devices need not be there: this is what the audit compiles, and what training runs.
"""

import time
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from altgrad_jax.diagnostics.questions import parse_questions
from altgrad_jax.errors import UsageError, UserError
from altgrad_jax.flops import peak_of
from altgrad_jax.layers import layer_shapes
from altgrad_jax.loss_scale import LossScale, parse_loss_scale
from altgrad_jax.machine import memory_errors
from altgrad_jax.model import GPTConfig, gpt_config
from altgrad_jax.optimizers import make_optimizer, make_schedule
from altgrad_jax.optimizers.factory import KEEP_TO_GRIDS, needs_formats
from altgrad_jax.parallel import DataParallel, DeviceStep
from altgrad_jax.precision.audit import Audit, audit
from altgrad_jax.precision.kernels.tiles import BY_SIZE, load_tiles
from altgrad_jax.precision.policy import Policy, resolve
from altgrad_jax.precision.target import on_cpu
from altgrad_jax.state import TrainState, init_params, init_state, model_structure
from altgrad_jax.step import Counting, make_train_step, several
from altgrad_jax.task import LANGUAGE, Task
from altgrad_jax.weights import Weights

WHAT_SAVES_MEMORY = (
    "set config.train.remat='block', raise config.train.grad_accumulation, or lower config.train.batch_size"
)


@dataclass(frozen=True)
class Program:
    """The training step that `config` describes, and the state that it takes.

    Attributes:
      config: the configuration, validated.
      task: what is learned.
      model: the network's shape.
      graphdef: its structure, for `nnx.merge`.
      policy: which layers are quantised, and how.
      weights: what grids parameters live on, and how they are stored.
      counting: what a step counts beside training.
      loss_scale: what gradients are multiplied by while they are rounded.
      optimizer: the gradient transformation.
      parallel: the devices.
      loss_chunk: most tokens a device whose logits exist at once.
      peak_flops: 16-bit operations a second that one device is taken to be capable of; None if that is not known.
      run_train: (state, sharded batch) -> (state, metrics), of `config.train.steps_per_dispatch` steps.
    """

    config: ConfigDict
    task: Task
    model: GPTConfig
    graphdef: Any
    policy: Policy
    weights: Weights
    counting: Counting
    loss_scale: LossScale
    optimizer: optax.GradientTransformation
    parallel: DataParallel
    loss_chunk: int
    peak_flops: float | None
    run_train: DeviceStep

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
        if params is None or params.keys() != self.abstract_params().keys():
            # Of weights of another task, what this one needs beside them is drawn.
            drawn = self.task.begin(init_params(self.model, self.config.seed))
            params = drawn | (params or {})
        counters = self.counting.init(params)
        stored = self.weights.stored(params)
        return init_state(stored, self.optimizer, self.policy.init(), self.loss_scale.init(), counters)

    def abstract_batch(self) -> jax.ShapeDtypeStruct:
        """Shape of a dispatch's batch as `shard` lays it out: [D, A, B, W], or [D, K, A, B, W] of K steps.

        W is the width of the objective's rows: T + 1 for windows of tokens.
        """
        train, devices = self.config.train, len(self.parallel.devices)
        parts = devices * jax.process_count() * train.grad_accumulation
        steps = (train.steps_per_dispatch,) if train.steps_per_dispatch > 1 else ()
        step = (train.grad_accumulation, train.batch_size // parts, self.task.objective.width(self.model.block_size))
        return self.parallel.abstract_batch((devices, *steps, *step))

    def compile_train(self, options: dict[str, Any] | None = None) -> jax.stages.Compiled:
        """The training step, compiled for the shapes it is run with; `run_train` then runs this very program.

        With XLA `options` of its own it is another program, to be looked at.
        """
        return self.run_train.compile(self.abstract_state(), self.abstract_batch(), options=options)


def make_policy(config: ConfigDict, labels: int = 0, traced: bool = False) -> Policy:
    """The precision rules applied to the model's layers, on this machine; a classifier's if there are `labels`.

    Formats are in the state with `traced`, and where `config.stability.fallback` may change them.

    Raises:
      UsageError: a rule is malformed, decides no layer, or cannot be run as `backend` and `strict` ask; or the table of
        tiles is malformed.
    """
    precision = config.precision
    shapes = layer_shapes(gpt_config(config.model, precision.compute, labels=labels))
    try:
        tiles = load_tiles(precision.kernel_tiles) if precision.kernel_tiles else BY_SIZE
    except ValueError as e:
        raise UsageError(f"config.precision.kernel_tiles: {e}") from e
    try:
        return resolve(
            precision.rules,
            shapes,
            backend=precision.backend,
            strict=precision.strict,
            traced=traced or config.stability.fallback,
            kernel=precision.kernel,
            tiles=tiles,
        )
    except ValueError as e:
        raise UsageError(f"config.precision: {e}") from e


def build_program(config: ConfigDict, devices: list[jax.Device] | None = None, task: Task = LANGUAGE) -> Program:
    """Assembles the program; nothing is compiled yet.

    Args:
      config: validated.
      devices: to compile for instead of this host's, which need not be there.
      task: what is learned, see `make_task`.
    """
    model = gpt_config(config.model, config.precision.compute, config.train.remat, task.labels)
    graphdef = model_structure(model)
    policy, loss_scale = make_policy(config, task.labels), parse_loss_scale(config.train.loss_scale)
    weights = make_weights(config, policy)
    optimizer = make_optimizer(
        config.optimizer, config.train.steps, weights.formats, config.seed, config.stability.relative_clip
    )
    skips = config.stability.skip_nonfinite or loss_scale.fixed is None
    counting = Counting(skips, "gradients" in parse_questions(config.diagnostics.questions))
    parallel = DataParallel(config.parallel.devices, devices)
    # Small chunks save memory where it is slow to fault in, large ones keep an accelerator busy.
    chunk = config.train.loss_chunk or (256 if on_cpu() else 4096)
    return Program(
        config=config,
        task=task,
        model=model,
        graphdef=graphdef,
        policy=policy,
        weights=weights,
        counting=counting,
        loss_scale=loss_scale,
        optimizer=optimizer,
        parallel=parallel,
        loss_chunk=chunk,
        peak_flops=peak_of(parallel.devices[0].device_kind, config.runtime.peak_tflops),
        run_train=parallel.train_step(
            several(
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
                    objective=task.objective,
                ),
                config.train.steps_per_dispatch,
            )
        ),
    )


def make_weights(config: ConfigDict, policy: Policy) -> Weights:
    """How this run's parameters are kept."""
    optimizer = config.optimizer
    return Weights(
        policy,
        tied=config.model.tie_embeddings and config.task == "lm",
        storage=optimizer.weights,
        on_grid=optimizer.name in KEEP_TO_GRIDS,
        reads_grids=needs_formats(optimizer) or config.stability.relative_clip,
    )


def compile_audited(program: Program, state: TrainState) -> tuple[Audit | str, float]:
    """Compiles the training step, before anything is written; what it multiplies, and the seconds that took.

    In place of what it multiplies, why that cannot be told: another version of XLA may write its programs otherwise.

    The state is the one to begin with, and is kept: among several processes pmap traces arrays, and no mere shapes.

    Raises:
      UserError: memory does not suffice; or `precision.strict`, and a product asked for in FP8 is not multiplied in
        FP8, or cannot be told to be.
    """
    began = time.monotonic()
    with memory_errors(WHAT_SAVES_MEMORY):
        shape = program.abstract_batch().shape
        batch = program.parallel.place(np.zeros(shape, np.int32))
        text = program.run_train.compile(state, batch).as_text() or ""
    config = program.config
    audited: Audit | str
    try:
        audited = audit(text, program.policy, config.precision.compute, config.train.steps_per_dispatch)
        shortfall = audited.shortfall()
    except ValueError as e:
        audited = shortfall = f"what the compiled step multiplies cannot be told: {e}"
    if config.precision.strict and shortfall:
        raise UserError(
            f"precision.strict: {shortfall}; see python -m altgrad_jax.audit, or use precision.strict=False to run it"
        )
    return audited, time.monotonic() - began
