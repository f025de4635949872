"""The training loop, top to bottom.

token cache -> batches -> train_step on every device -> metrics, fetched one step late so that the device never waits
for the host -> one record -> metrics.jsonl, console, W&B. Everything that decides the bits of a run is in the
TrainState, the seed and the step number, so a run killed anywhere and started again ends where a run never killed ends.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict
from rich.console import Console

from altgrad_jax import checkpoint, experiment, provenance
from altgrad_jax.checkpoint_files import ancestor
from altgrad_jax.config import check_devices
from altgrad_jax.console import ConsoleSink, make_console, print_header, print_lines
from altgrad_jax.data.corpus import open_corpus, refuse_another_meaning
from altgrad_jax.diagnostics import attribution, wording
from altgrad_jax.diagnostics.questions import is_answered
from altgrad_jax.errors import UserError
from altgrad_jax.hosts import agree
from altgrad_jax.interrupt import GracefulStop, ending_at_once
from altgrad_jax.kin import refuse_lost, refuse_strangers
from altgrad_jax.machine import check_device, check_memory, memory_errors
from altgrad_jax.meter import Meter
from altgrad_jax.parallel import any_host_stops, is_primary
from altgrad_jax.precision.kernels.tiles_used import tiles_used
from altgrad_jax.precision.target import why_no_fp8
from altgrad_jax.profiling import StepTrace
from altgrad_jax.program import WHAT_SAVES_MEMORY, compile_audited, make_policy
from altgrad_jax.records import Extent, lower
from altgrad_jax.run_record import Progress, header, state_bytes, write_manifest, write_summary
from altgrad_jax.stability import DivergenceWatch, event, make_fallback, no_step, unhealthy
from altgrad_jax.state import TrainState, tree_sha256
from altgrad_jax.task import HEAD
from altgrad_jax.tracking import MetricsFile, Record, Sink, Wandb, read_metrics, require_login, wandb_mode
from altgrad_jax.workdir import SUMMARY, Workdir

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """Where a session begins.

    Attributes:
      state: on the devices.
      step: optimizer steps done.
      seconds: wall time of earlier sessions.
      origin: where the state came from, for people.
      skipped_batches: how many batches more than steps lie behind it, passed over by rewinds.
      measured_on: `provenance.measured_on` of the session that saved it; empty where that is not known.
      run_id: of the run that a checkpoint belongs to.
      ancestor: of a run that began with another's weights, which they were: see `checkpoint_files.ancestor`.
      extent: how far the records went when the checkpoint was saved; None at the beginning.
      best: lowest validation loss up to there, NaN for none.
      rewinds: events of those that the run had behind it.
    """

    state: TrainState
    step: int
    seconds: float
    origin: str
    skipped_batches: int = 0
    measured_on: Mapping[str, Any] = field(default_factory=dict)
    run_id: str | None = None
    ancestor: dict[str, Any] | None = None
    extent: Extent | None = None
    best: float = math.nan
    rewinds: tuple[Record, ...] = ()


def train(
    config: ConfigDict,
    workdir_path: str,
    command: Sequence[str] | None = None,
    more: Mapping[str, Any] = MappingProxyType({}),
    restart: bool = False,
) -> int:
    """Trains as `config` says in a work directory, resuming what is there; returns the process's exit status.

    0 finished, 1 diverged, 130 / 143 interrupted. The configuration has been validated. A sweep gives the `command`
    that would do the same, and `more` entries of the manifest. To `restart` is to begin anew where a run has been.

    Raises:
      UserError: anything the user can mend; nothing of an earlier session is lost.
    """
    with ExitStack() as cleanup:
        check_device()
        primary = is_primary()
        check_devices(config, jax.local_device_count(), jax.process_count())
        # A mistake in the rules shows before any corpus is prepared, which says how many labels there are.
        make_policy(config, labels=1 if config.task == "classify" else 0)
        if primary:
            require_login(config.tracking)
        workdir = Workdir(workdir_path, lock=primary)
        cleanup.callback(workdir.close)
        if not restart:
            _refuse_ended(workdir)
        cache = open_corpus(config)
        refuse_another_meaning(config.data, cache.header, workdir.read_json("manifest.json"), workdir.path)
        exp = experiment.build(config, cache)
        check_memory(state_bytes(exp), len(exp.parallel.devices))
        if restart:
            _set_aside(workdir, primary)
        checkpoints = checkpoint.Checkpoints(
            workdir.checkpoints,
            max_to_keep=config.checkpoint.max_to_keep,
            every=config.checkpoint.every,
            committed=workdir.note_checkpoint,
        )
        cleanup.callback(checkpoints.close)
        if not checkpoints.steps():
            refuse_lost(workdir)
        run_identity = provenance.identity(config, exp.cache) | exp.policy.identity() | exp.task.identity()
        agree("data", _before_restoring(exp, checkpoints, run_identity))
        known, source = workdir.read_json("manifest.json", {"run_id?": str}), config.checkpoint.restore_from
        with memory_errors(WHAT_SAVES_MEMORY):
            start = _start(exp, checkpoints, run_identity, check=partial(refuse_strangers, known, source))
        agree("state", _before_training(exp, start))

        console = make_console(quiet=not primary)
        if start.step >= config.train.steps and _is_recorded_as_finished(workdir, start.step):
            console.print(f"already finished: {workdir.path} is at step {start.step} of {config.train.steps}")
            return 0
        facts = header(exp, workdir.path, start.step, start.origin)
        print_header(console, f"altgrad_jax {config.tracking.name}", facts)
        print_lines(console, exp.policy.lines() if exp.policy.plans else ())
        stop = GracefulStop(last_words=f"stopped without saving; to go on: {_shown(command)}")
        with (
            stop
            if exp.parallel.hosts > 1
            else ending_at_once("stopped while compiling; there was nothing to save", workdir.close)
        ):
            console.print("  compiling")
            audited, compile_seconds = compile_audited(exp, start.state)
        if isinstance(audited, str):
            print_lines(console, [audited])
        else:
            found = [audited.headline(why_no_fp8()), tiles_used(audited, exp.policy.tiles).line()]
            print_lines(console, filter(None, found))
        begins = start.step, start.origin, audited, command, {**more, "ancestor": start.ancestor}, start.run_id
        manifest = write_manifest(workdir, exp, run_identity, *begins)
        sinks = _sinks(workdir, console, config, start, manifest) if primary else []
        trace = StepTrace(workdir.path / "profile" if config.profile else None)
        cleanup.callback(trace.close)
        earlier = read_metrics(workdir.metrics) if primary else []
        loop = Loop(exp, checkpoints, sinks, start, run_identity, manifest["run_id"], earlier, compile_seconds, trace)
        loop.mark_other_measurements(start, earlier)
        try:
            with stop, memory_errors(WHAT_SAVES_MEMORY):
                status = loop.run(stop)
                checkpoints.wait()
        except BaseException:
            # On a full disk these fail too; the error to report is the one that ended the run.
            with suppress(UserError, OSError):
                _end(workdir, loop, sinks, "failed")
            raise
        _end(workdir, loop, sinks, status)
        _print_end(console, workdir, loop, status)
        if status == "interrupted":
            console.print(f"to go on: {_shown(command)}", soft_wrap=True)
        return {"finished": 0, "interrupted": stop.exit_code}.get(status, 1)


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
        start = _start(self.exp, self._checkpoints, self._identity, lambda step: step % every == 0)
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


def _before_restoring(
    exp: experiment.Experiment, checkpoints: checkpoint.Checkpoints, run_identity: dict[str, Any]
) -> dict[str, Any]:
    """What hosts must have alike before they read a checkpoint together."""
    found = provenance.devices()
    facts = {"devices of a host": f"{len(exp.parallel.devices)} x {found['kind']}"}
    facts |= {"checkpoints in --workdir": ", ".join(map(str, checkpoints.steps())) or "none"}
    return facts | run_identity


def _before_training(exp: experiment.Experiment, start: Start) -> dict[str, Any]:
    """What hosts must have alike before the first step; nothing where there is one, for hashing takes time."""
    if exp.parallel.hosts == 1:
        return {}
    weights = tree_sha256(exp.parallel.on_one_device(start.state.params))
    return {"first step": start.step, "batches passed over": start.skipped_batches, "weights": weights[:12]}


def _shown(command: Sequence[str] | None) -> str:
    return provenance.to_go_on(provenance.command_line(command))


def _sinks(workdir: Workdir, console: Console, config: ConfigDict, start: Start, manifest: dict) -> list[Sink]:
    """Where this run's records go."""
    file = MetricsFile(workdir.metrics, start.step, start.extent, start.rewinds)
    sinks: list[Sink] = [file]
    earlier = read_metrics(workdir.metrics)
    if wandb_mode(config.tracking)[0] != "disabled":
        tags = (manifest["resolved"]["data.name"],)
        sinks.append(Wandb(config.tracking, workdir.path, manifest["run_id"], manifest["config"], earlier, tags))
    sinks.append(ConsoleSink(console, start.step, config.train.steps, start.best))
    if file.lost:
        for sink in sinks:
            sink.log(event(start.step, "records", file.lost))
    return sinks


def _set_aside(workdir: Workdir, primary: bool) -> None:
    """Makes room for a run that begins anew: one process for all."""
    moved = workdir.set_aside() if primary else None
    multihost_utils.sync_global_devices("set aside an earlier run")
    if moved is not None:
        log.warning("what was in %s is now in %s", workdir.path, moved)


def _refuse_ended(workdir: Workdir) -> None:
    """Raises UserError if the run in this work directory has diverged: repeating it would diverge again."""
    summary = workdir.read_json("summary.json", SUMMARY)
    if summary is not None and summary["status"] == "diverged":
        raise UserError(
            f"the run in {workdir.path} diverged at step {summary['step']}; change the settings and use a new"
            f" --workdir, from its last good weights with --config.checkpoint.restore_from={workdir.path}; or begin"
            " anew with --restart"
        )


def _is_recorded_as_finished(workdir: Workdir, step: int) -> bool:
    """Whether the summary says so; a run killed after its last checkpoint has still to write it."""
    summary = workdir.read_json("summary.json", SUMMARY)
    return summary is not None and summary["status"] == "finished" and summary["step"] == step


def _start(
    exp: experiment.Experiment,
    checkpoints: checkpoint.Checkpoints,
    run_identity: dict[str, Any],
    wanted: Callable[[int], bool] = lambda step: True,
    check: Callable[[dict[str, Any], Path], None] = lambda manifest, where: None,
) -> Start:
    """The newest whole checkpoint of the steps wanted, or the beginning."""
    like = exp.parallel.to_global_abstract(exp.abstract_state())
    restored = checkpoints.restore_latest(like, run_identity, wanted, check)
    if restored is not None:
        state, manifest = exp.parallel.to_local(restored.state), restored.manifest
        skipped = restored.iterator["next_step"] - restored.step
        if skipped < 0:
            raise UserError(f"checkpoint {restored.step} continues at batch {restored.iterator['next_step']}")
        return Start(
            state,
            restored.step,
            manifest["seconds"],
            f"the checkpoint of step {restored.step}",
            skipped,
            manifest["measured_on"],
            manifest["run_id"],
            manifest["ancestor"],
            Extent(**manifest["records"]),
            math.nan if manifest["best"] is None else manifest["best"],
            tuple(manifest["rewinds"]),
        )
    source = exp.config.checkpoint.restore_from
    if not source:
        return Start(exp.fresh_state(), 0, 0.0, f"new weights from seed {exp.config.seed}")
    # A classifier may begin with the trunk of a language model: its own output layer is then drawn.
    like, optional = exp.abstract_params(), (HEAD,) if exp.task.labels else ()
    params, step, where = checkpoint.read_params(source, like, optional)
    origin = f"the weights of step {step} in {where.parent}"
    return Start(exp.fresh_state(params), 0, 0.0, origin, ancestor=ancestor(f"{where.parent}@{step}"))


def _end(workdir: Workdir, loop: Loop, sinks: list[Sink], status: str) -> None:
    """Closes the trackers and writes the summary."""
    for sink in sinks:
        sink.close(status)
    if is_primary():
        digest = tree_sha256(loop.state.params) if status == "finished" else None
        reason = loop.why_diverged if status == "diverged" else ""
        progress = Progress(loop.step, loop.seconds, loop.compile_seconds, digest, reason, loop.best)
        write_summary(workdir, loop.exp, status, progress)


def _print_end(console: Console, workdir: Workdir, loop: Loop, status: str) -> None:
    """The last line."""
    minutes, seconds = divmod(int(loop.seconds), 60)
    training = attribution.training_of(loop.exp.config.optimizer)
    failures = attribution.first_failures(read_metrics(workdir.metrics), training)
    for line in wording.table(failures) if failures or status != "diverged" else ():
        console.print(line, highlight=False, soft_wrap=True)
    saved = checkpoint.committed_steps(workdir.checkpoints)
    console.print(
        f"{status} at step {loop.step} after {minutes}:{seconds:02d};"
        f" checkpoints {', '.join(map(str, saved)) or 'none'}; metrics in {workdir.metrics}"
    )
