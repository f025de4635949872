"""The loop: steps, what is logged and saved between them, and what is done when one fails.

train_step on every device -> metrics, fetched one step late so that the device never waits for the host -> one record
-> metrics.jsonl, console, W&B. Everything that decides the bits of a run is in the TrainState, the seed and the step
number, so a run killed anywhere and started again ends where a run never killed ends.
"""

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from altgrad_jax import checkpoint, experiment, provenance
from altgrad_jax.diagnostics import attribution, wording
from altgrad_jax.diagnostics.questions import is_answered
from altgrad_jax.interrupt import GracefulStop
from altgrad_jax.meter import Meter
from altgrad_jax.parallel import any_host_stops
from altgrad_jax.profiling import StepTrace
from altgrad_jax.records import Record, lower
from altgrad_jax.stability import DivergenceWatch, event, make_fallback, no_step, unhealthy
from altgrad_jax.start import Start, find_start
from altgrad_jax.tracking import MetricsFile, Sink

log = logging.getLogger(__name__)


class Loop:
    """One session's steps. Arrays live in `state`; everything else here is bookkeeping on the host."""

    def __init__(
        self,
        exp: experiment.Experiment,
        checkpoints: checkpoint.Checkpoints,
        sinks: list[Sink],
        start: Start,
        run_identity: dict[str, Any],
        run_id: str = "",
        earlier: Sequence[Record] = (),
        compile_seconds: float = 0.0,
        trace: StepTrace | None = None,
    ):
        self.exp, self.state, self.step = exp, start.state, start.step
        self.compile_seconds, self._stepped = compile_seconds, False
        self._skipped_batches = start.skipped_batches
        self._rewinds, self._rewinds_left = start.rewinds, exp.config.stability.rewinds - len(start.rewinds)
        self.best, self._ancestor, self._run_id = start.best, start.ancestor, run_id
        self._answered = [record for record in earlier if is_answered(record)]
        self._failures = self._watched()
        self._checkpoints, self._sinks = checkpoints, sinks
        self._identity = run_identity
        self._began, self._earlier_seconds = time.monotonic() - compile_seconds, start.seconds
        self._watch = DivergenceWatch(exp.config.stability.nan_patience)
        self.why_diverged = ""
        self._fallback = make_fallback(exp.config.stability)
        self._trace = trace or StepTrace(None)
        self._meter = Meter(exp.config.train.batch_size * exp.model.block_size, start.step)

    def mark_other_measurements(self, start: Start, earlier: Sequence[Record]) -> None:
        """Notes that diagnostics are asked of other parts of a batch than before, once."""
        now, before = provenance.measured_on(self.exp.config), start.measured_on
        changed = [f"{key}: {before[key]} -> {now[key]}" for key in now if before.get(key, now[key]) != now[key]]
        reason = f"from here on diagnostics are asked of other parts of a batch: {'; '.join(changed)}"
        marked = event(start.step, "measured", reason)
        if changed and marked not in earlier:
            self._emit(marked)

    @property
    def seconds(self) -> float:
        """Wall time of this run over all its sessions."""
        return self._earlier_seconds + time.monotonic() - self._began

    def run(self, stop: GracefulStop) -> str:
        """Steps until the end, an interrupt or divergence; returns "finished", "interrupted" or "diverged"."""
        status = self._run(stop)
        while status == "diverged" and self._rewinds_left > 0:
            self._rewind()
            status = self._run(stop)
        if status == "diverged":
            self._emit(event(self.step, "diverged", self.why_diverged))
        return status

    def _run(self, stop: GracefulStop) -> str:
        config, exp = self.exp.config, self.exp
        if self.step == 0 and not self._skipped_batches:
            self._emit({"step": 0, **exp.evaluate(self.state)})
        if stop.requested and not self._stepped and exp.parallel.hosts == 1:
            return "interrupted"  # before this session's first step: there is nothing to save
        batches = exp.batches.from_step(self.step + self._skipped_batches)
        previous: tuple[int, dict[str, jax.Array], Record] | None = None
        while self.step < config.train.steps:
            batch = exp.next_batch(batches)
            answers, before = self._ask(batch)
            self._trace.before()
            self.state, metrics = exp.run_train(self.state, batch)
            if self._trace.after(metrics):
                self._meter.restart(self.step)
            if not self._stepped:
                self._stepped = True
                self._meter.restart(self.step)
            # While the devices work on this step, the host sees to the one before.
            if previous is not None and self._log(*self._fetch(*previous)):
                return "diverged"
            self.step += config.train.steps_per_dispatch
            if before is not None:
                jax.block_until_ready(self.state)  # the step's own time is not part of the pause
                with self._meter.paused():
                    answers |= exp.measure_update(before, self.state)
            previous = (self.step, metrics, answers)

            last = self.step == config.train.steps
            evaluates = last or self.step % config.train.eval_every == 0
            stops = any_host_stops(self.step, stop)
            saves = last or self.step % config.checkpoint.every == 0 or stops
            # What gives way does so right after its step, so that no later step depends on when metrics were fetched.
            if not (evaluates or saves or self._fallback):
                continue
            *passed, record = self._fetch(*previous)
            previous = None
            with self._meter.paused():
                if evaluates:
                    record |= exp.evaluate(self.state)
                if last:
                    record |= exp.evaluation.conclude(self.state, record)
                if self._log(*passed, record):
                    return "diverged"
                if self._fallback:
                    self._fall_back(record, batch)
                # Asked again, since an evaluation takes long enough to be interrupted.
                stops = stops or (evaluates and any_host_stops(self.step, stop))
                if saves or stops:
                    spoilt = unhealthy(record, self.exp.finite_weights(self.state))
                    if last and (why := spoilt or no_step(record)):
                        self.why_diverged = why
                        return "diverged"
                    self._save(spoilt)
            if stops and not last:
                return "interrupted"
        return "finished"

    def _ask(self, batch: jax.Array) -> tuple[Record, Any]:
        """Answers about the step to be taken on this batch; what to keep of the state, to ask what the step did."""
        questions = self.exp.questions_at(self.step)
        if not questions:
            return {}, None
        jax.block_until_ready(self.state)  # the step in flight belongs to training, not to the pause
        with self._meter.paused():
            before = self.exp.keep(self.state) if "weights" in questions else None
            return self.exp.diagnose(self.state, batch, questions - {"weights"}), before

    def _fall_back(self, record: Record, batch: jax.Array) -> None:
        """Gives layers that have failed in this step another format."""
        assert self._fallback is not None
        policy = self.exp.policy
        blamed = self._fallback.stalled(record, policy)
        if self._fallback.due_by_skips(record):
            answers = self.exp.diagnose(self.state, batch, frozenset({"quant"}))
            blamed |= self._fallback.spoilt(answers, policy)
        if blamed:
            quant, events = self._fallback.apply(self.state.quant, policy, blamed, self.step)
            self.state = replace(self.state, quant=quant)
            for done in events:
                self._emit(done)

    def _rewind(self) -> None:
        """Goes back to the last regular checkpoint, or the start, and on with the batches after those that failed."""
        failed = self.step
        # Those of an interrupt are not gone back to: where a run continues must not depend on where it was stopped.
        every = self.exp.config.checkpoint.every
        start = find_start(self.exp, self._checkpoints, self._identity, lambda step: step % every == 0)
        self.best = start.best
        # What lies after it did not happen, and must not be resumed from.
        self._checkpoints.discard(lambda step: step <= start.step and step % every == 0)
        self.state, self.step = start.state, start.step
        self._skipped_batches += failed - start.step
        self._rewinds_left -= 1
        self._meter.restart(self.step)
        self._answered = [record for record in self._answered if record["step"] <= self.step]
        self._failures = self._watched()
        for sink in self._sinks:
            sink.rewind(self.step)
        reason = f"diverged at step {failed}; batches of {failed - start.step} steps passed over"
        done = event(self.step, "rewind", reason, failed_step=failed, skipped_batches=self._skipped_batches)
        self._rewinds = (*(earlier for earlier in self._rewinds if earlier["step"] <= self.step), done)
        self._emit(done)

    def _fetch(self, step: int, metrics: dict[str, jax.Array], answers: Record) -> list[Record]:
        """Records of a dispatch's steps, of which `step` is the last; what was asked was asked about the first.

        Waits for them to end: the only copy from the devices in most steps.
        """
        values = {name: np.atleast_1d(value) for name, value in jax.device_get(metrics).items()}
        speed = self.exp.speed_record(self._meter.rate(step))
        count = self.exp.config.train.steps_per_dispatch
        records = [
            {"step": step - count + 1 + i} | {name: value[i].item() for name, value in values.items()} | speed
            for i in range(count)
        ]
        records[0] |= answers
        return records

    def _log(self, *records: Record) -> bool:
        """Sends out those records that are due; returns whether the run has diverged, at the first that says so."""
        return any(self._log_one(record) for record in records)

    def _log_one(self, record: Record) -> bool:
        train = self.exp.config.train
        diverged = self._watch.diverged(record)
        due = record["step"] % train.log_every == 0 or record["step"] == train.steps
        if due or diverged or "val/loss" in record or is_answered(record):
            self._emit(record)
        if is_answered(record):
            self._warn(record)
        if self.exp.config.stability.skip_nonfinite and record["train/skipped"]:
            self._emit(event(record["step"], "skip", "a loss or gradient that is not finite"))
        if diverged:
            self.step, self.why_diverged = record["step"], diverged
        return bool(diverged)

    def _warn(self, record: Record) -> None:
        """Says which thresholds of failure this record is the first to cross."""
        self._answered.append(record)
        if new := self._failures.add(record):
            self._emit(event(record["step"], "warning", wording.describe(new)))

    def _watched(self) -> attribution.Watch:
        return attribution.Watch(attribution.training_of(self.exp.config.optimizer), self._answered)

    def _emit(self, record: Record) -> None:
        self.best = lower(self.best, record)
        for sink in self._sinks:
            sink.log(record)

    def _save(self, spoilt: str) -> None:
        """Saves the state, unless it is spoilt."""
        if spoilt:
            log.warning("no checkpoint at step %d: %s", self.step, spoilt)
            return
        for sink in self._sinks:
            sink.sync()
        batch = self.step + self._skipped_batches
        iterator = {"next_step": batch, "epoch": self.exp.batches.epoch_of(batch)}
        files = [sink for sink in self._sinks if isinstance(sink, MetricsFile)]  # none where another host writes
        manifest = {
            "identity": self._identity,
            "seconds": self.seconds,
            "measured_on": provenance.measured_on(self.exp.config),
            "run_id": self._run_id,
            "ancestor": self._ancestor,
            "records": files[0].extent.as_json() if files else {},
            "best": None if math.isnan(self.best) else self.best,
            "rewinds": list(self._rewinds),
        }
        self._checkpoints.save(self.step, self.exp.parallel.to_global(self.state), iterator, manifest)
