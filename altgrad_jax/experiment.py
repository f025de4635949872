"""From a configuration and a corpus to everything a run is made of: the program, its batches and its measurements.

The training loop and the benchmarks start here, so what they run is the same program.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from ml_collections import ConfigDict

from altgrad_jax.config import check_devices
from altgrad_jax.data.batches import TrainBatches, evaluation_batches, validation_split
from altgrad_jax.data.cache import TokenCache
from altgrad_jax.data.corpus import name_of
from altgrad_jax.data.examples import ExampleBatches
from altgrad_jax.diagnose import make_diagnose_step, make_update_measure, measure_spectra, name_answers, name_update
from altgrad_jax.diagnostics.questions import parse_questions
from altgrad_jax.evaluation import Evaluation, LanguageEvaluation, label_evaluation
from altgrad_jax.flops import model_flops_per_token
from altgrad_jax.loss_scale import all_finite
from altgrad_jax.model import attention_implementation
from altgrad_jax.parallel import RunDiagnose, RunUpdateMeasure
from altgrad_jax.program import Program, build_program
from altgrad_jax.stability import Record
from altgrad_jax.state import TrainState, model_structure
from altgrad_jax.step import make_eval_step, make_logits_step
from altgrad_jax.task import Classification, make_task


@dataclass(frozen=True)
class Experiment(Program):
    """A program and its data, ready to run. Holds no state that changes with training.

    Attributes:
      cache: the corpus as tokens.
      batches: training batches of this host, by step.
      evaluation: judges a state.
      eval_split: the split it does so on.
      run_diagnose: (state, sharded batch, **questions) -> values, see `make_diagnose_step`.
      run_update_measure: (before, parameters after) -> values, see `make_update_measure`.
    """

    cache: TokenCache
    batches: TrainBatches | ExampleBatches
    evaluation: Evaluation
    eval_split: str
    run_diagnose: RunDiagnose
    run_update_measure: RunUpdateMeasure

    def next_batch(self, batches: Iterator[npt.NDArray[np.int32]]) -> jax.Array:
        """The batch of the next dispatch, on the devices: of one step, or of several, stacked."""
        steps = self.config.train.steps_per_dispatch
        return self.shard(next(batches) if steps == 1 else np.stack([next(batches) for _ in range(steps)]))

    def shard(self, batch: npt.NDArray[np.int32]) -> jax.Array:
        """Puts a training batch of this host on its devices, cut into microbatches."""
        return self.parallel.shard(batch, self.config.train.grad_accumulation)

    def speed_record(self, tokens_per_second: float) -> Record:
        """What is logged of a speed: tokens a second, and the share of the devices' peak, where that is known."""
        record: Record = {"train/tokens_per_second": tokens_per_second}
        if self.peak_flops is not None:
            operations = tokens_per_second * model_flops_per_token(self.model)
            record["train/mfu"] = operations / (self.peak_flops * self.parallel.device_count)
        return record

    def finite_weights(self, state: TrainState) -> bool:
        """Whether all weights are numbers."""
        return bool(_all_finite(self.parallel.on_one_device(state.params)))

    def evaluate(self, state: TrainState) -> Record:
        """What `evaluation` says of a state, `val/loss` among it."""
        return self.evaluation.validate(state)

    def questions_at(self, step: int) -> frozenset[str]:
        """What is asked about the step about to be taken, the first being step 0."""
        every = self.config.diagnostics
        intervals = {"quant": every.quant_every, "shadow": every.shadow_every} | parse_questions(every.questions)
        if not self.policy.plans:
            intervals |= {"quant": 0, "sensitivity": 0}  # no layer is rounded
        return frozenset(name for name, steps in intervals.items() if steps and step % steps == 0)

    def diagnose(self, state: TrainState, batch: jax.Array, questions: frozenset[str]) -> Record:
        """The answers about the (first) step to be taken on this batch, named; waits for them."""
        if not questions:
            return {}
        if self.config.train.steps_per_dispatch > 1:
            batch = batch[:, 0]
        values: dict[str, Any] = {}
        if of_step := sorted(questions - {"spectra"}):
            values |= self.run_diagnose(state, batch, **dict.fromkeys(of_step, True))
        if "spectra" in questions:
            values |= _spectra(self.parallel.on_one_device(state.params))
        return name_answers(self.policy, self.abstract_params(), jax.device_get(values))

    def keep(self, state: TrainState) -> Any:
        """A copy of what `measure_update` compares a later state with; a step consumes its own."""
        return copied(self.parallel.on_one_device((state.params, state.quant)))

    def measure_update(self, before: Any, state: TrainState) -> Record:
        """What the step between `keep` and this state did to the weights, named; waits for it."""
        values = self.run_update_measure(before, self.parallel.on_one_device(state.params))
        return name_update(self.abstract_params(), jax.device_get(values))

    def resolved(self) -> dict[str, str]:
        """Choices left to the program ("auto"), as they came out; stored with the run."""
        return {
            "attention": attention_implementation(self.model),
            "corpus": self.cache.header.source.name,
            "data.name": name_of(self.cache.header.source.name),
            "tokenizer": f"{self.cache.header.tokenizer.kind} ({self.cache.vocab_size} tokens)",
            "devices": f"{len(self.parallel.devices)} x {self.parallel.devices[0].device_kind}",
        }


_spectra = jax.jit(measure_spectra)
_all_finite = jax.jit(all_finite)


@jax.jit
def copied(tree: Any) -> Any:
    """Arrays of their own, which a step that consumes its state leaves alone."""
    return jax.tree.map(jnp.copy, tree)


def build(config: ConfigDict, cache: TokenCache) -> Experiment:
    """Assembles an experiment; nothing is compiled yet.

    Raises:
      UserError: the batch does not divide over the devices, or the corpus is too small for it.
    """
    check_devices(config, jax.local_device_count(), jax.process_count())
    task = make_task(config, cache)
    program = build_program(config, task=task)
    model, policy, parallel, chunk = program.model, program.policy, program.parallel, program.loss_chunk
    return Experiment(
        **vars(program),
        cache=cache,
        batches=task.batches(config, cache, jax.process_index(), jax.process_count()),
        evaluation=_evaluation(program, cache),
        eval_split=validation_split(cache),
        run_diagnose=parallel.diagnose_step(
            make_diagnose_step(
                program.graphdef,
                model_structure(replace(model, compute_dtype="float32", attention="auto")),
                loss_chunk=chunk,
                seed=config.seed,
                policy=policy,
                loss_scale=program.loss_scale,
                weights=program.weights,
                windows=config.diagnostics.windows,
                tokens=config.diagnostics.tokens,
                lanczos_steps=config.diagnostics.lanczos_steps,
                objective=task.objective,
            )
        ),
        run_update_measure=jax.jit(make_update_measure(program.weights)),
    )


def _evaluation(program: Program, cache: TokenCache) -> Evaluation:
    """How this program's states are judged."""
    config, parallel, policy, graphdef = program.config, program.parallel, program.policy, program.graphdef
    batch_size, hosts = config.train.batch_size, jax.process_count()
    mine = slice(jax.process_index() * batch_size // hosts, (jax.process_index() + 1) * batch_size // hosts)
    if isinstance(program.task, Classification):
        run = parallel.eval_step(make_logits_step(graphdef, policy=policy))
        return label_evaluation(program.task, run, parallel, batch_size, mine)
    split = validation_split(cache)
    windows = evaluation_batches(cache, split, config.model.block_size, batch_size, config.train.eval_batches)
    run = parallel.eval_step(make_eval_step(graphdef, loss_chunk=program.loss_chunk, policy=policy))
    return LanguageEvaluation(run, [parallel.shard(rows[mine]) for rows in windows], cache.entropy_floor(split))
