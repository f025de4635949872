"""Trains the conditions of one group together, each in a work directory of its own, as its own run would leave it.

The group has one folder of checkpoints: killed, it goes on from the newest, and no condition is begun anew. A lane that
diverges is a result like others: its folder is closed, and the rest go on.
"""

import logging
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from altgrad_jax import experiment, provenance
from altgrad_jax.checkpoint import Checkpoints, Restored
from altgrad_jax.data.corpus import open_corpus
from altgrad_jax.diagnose import name_answers, name_update
from altgrad_jax.diagnostics import attribution, wording
from altgrad_jax.diagnostics.questions import is_answered
from altgrad_jax.errors import UserError
from altgrad_jax.experiment import Experiment
from altgrad_jax.files import make_folder
from altgrad_jax.interrupt import GracefulStop
from altgrad_jax.kin import is_lost, refuse_lost
from altgrad_jax.loss_scale import all_finite
from altgrad_jax.machine import check_device
from altgrad_jax.meter import Meter
from altgrad_jax.precision.audit import Audit, audit
from altgrad_jax.precision.policy import Policy
from altgrad_jax.records import Extent, lower
from altgrad_jax.run_record import Progress, write_manifest, write_summary
from altgrad_jax.stability import DivergenceWatch, Record, event, no_step, unhealthy
from altgrad_jax.state import tree_sha256
from altgrad_jax.sweep.lanes import Lane, Lanes, language
from altgrad_jax.sweep.memory import free_bytes, needed_bytes
from altgrad_jax.sweep.requests import Member, ended
from altgrad_jax.tracking import MetricsFile, read_metrics
from altgrad_jax.workdir import Workdir

log = logging.getLogger(__name__)
_all_finite = jax.jit(jax.vmap(all_finite))  # of every lane
Tell = Callable[[str, int], None]
RUNNING = "running"


class TooLargeError(Exception):
    """The conditions do not fit into memory together; `fitting` of them would."""

    def __init__(self, fitting: int):
        super().__init__(f"{fitting} fit")
        self.fitting = fitting


class _BegunSinceError(UserError):
    """A checkpoint holds a condition that has been begun anew since."""


@dataclass
class _Place:
    """Where one lane's records go; what is known of it on the host."""

    member: Member
    exp: Experiment
    workdir: Workdir
    watch: DivergenceWatch
    identity: dict[str, Any]
    failures: attribution.Watch
    sink: MetricsFile | None = None
    run_id: str = ""
    best: float = math.nan
    status: str = RUNNING


def train_together(members: Sequence[Member], folder: Path, tell: Tell, restart: bool = False) -> str:
    """Trains conditions that `groups` has put together; returns "finished" or "interrupted".

    Args:
      members: the group's conditions; what has ended stays as it is, its lane runs on unseen.
      folder: of the group's checkpoints; removed when all have ended.
      tell: called with ("step", steps done) as they pass.
      restart: whether conditions whose checkpoint is lost begin anew.

    Raises:
      TooLargeError: they do not fit into memory together.
      UserError: anything the user can mend.
    """
    with ExitStack() as cleanup:
        check_device()
        cache = open_corpus(members[0].config)
        experiments = [experiment.build(member.config, cache) for member in members]
        places = []
        for member, exp in zip(members, experiments, strict=True):
            workdir = Workdir(member.folder)
            cleanup.callback(workdir.close)
            identity = provenance.identity(member.config, cache) | exp.policy.identity()
            watch = DivergenceWatch(member.config.stability.nan_patience)
            failures = attribution.Watch(attribution.training_of(member.config.optimizer))
            status = ended(member.folder) or RUNNING
            places.append(_Place(member, exp, workdir, watch, identity, failures, status=status))
        lanes = Lanes(experiments)
        make_folder(folder)
        checkpoints = Checkpoints(folder / "checkpoints", max_to_keep=1, committed=lambda: _note(places))
        cleanup.callback(checkpoints.close)
        run = _Group(places, lanes, checkpoints, tell)
        run.begin(cleanup, restart)
        with GracefulStop() as stop:
            status = run.run(stop)
            checkpoints.wait()
    if status == "finished":
        shutil.rmtree(folder, ignore_errors=True)
    return status


class _Group:
    """One session's steps. Arrays live in `lanes`; everything else here is bookkeeping on the host."""

    def __init__(self, places: list[_Place], programs: Lanes, checkpoints: Checkpoints, tell: Tell):
        self._places, self._programs, self._checkpoints, self._tell = places, programs, checkpoints, tell
        self._first = places[0].exp
        self._steps = self._first.config.train.steps
        self._identity = {f"{place.member.name}.{k}": v for place in places for k, v in place.identity.items()}
        self.step, self._earlier_seconds = 0, 0.0
        self._last: list[Record] = []  # of each lane
        self.lanes: Lane

    def begin(self, cleanup: ExitStack, restart: bool) -> None:
        """Restores or draws the lanes, compiles, and opens every condition's folder.

        Raises:
          UserError: a condition's checkpoint is lost, or is of a run that has been begun anew since, and the sweep was
            not told to `restart` such ones.
        """
        began = time.monotonic()
        parallel = self._first.parallel
        restored = self._restored(restart)
        if restored is None:
            for place in self._active():
                if restart and is_lost(place.workdir):
                    place.workdir.set_aside()
                refuse_lost(place.workdir)
            self.lanes, saved = self._programs.fresh(), {}
        else:
            self.lanes, self.step = parallel.to_local(restored.state), restored.step
            self._earlier_seconds, saved = restored.manifest["seconds"], restored.manifest["conditions"]
        compiled = self._programs.compile_train(self.lanes)
        free, needed = free_bytes(parallel.devices[0]), needed_bytes(compiled)
        if free is not None and needed > free and len(self._places) > 1:
            raise TooLargeError(max(1, len(self._places) * free // needed))
        self._compile_seconds = time.monotonic() - began
        self._began = began
        text = compiled.as_text() or ""
        origin = f"the checkpoint of step {self.step}" if restored else "new weights"
        for place, policy in zip(self._places, self._programs.policies, strict=True):
            if place.status != RUNNING:
                continue
            extra = {"condition": place.member.facts | {"together": len(self._places)}}
            audited = _audited(text, policy, self._first)
            kept = saved.get(place.member.name, {})
            begins = self.step, origin, audited, place.member.command, extra, kept.get("run_id")
            place.run_id = write_manifest(place.workdir, place.exp, place.identity, *begins)["run_id"]
            place.best = math.nan if kept.get("best") is None else kept["best"]
            extent = Extent(**kept["records"]) if kept else None
            place.sink = MetricsFile(place.workdir.metrics, self.step, extent)
            cleanup.callback(place.sink.close, "")
            if place.sink.lost:
                place.sink.log(event(self.step, "records", place.sink.lost))
                log.warning("%s: %s", place.member.name, place.sink.lost)
            earlier = filter(is_answered, read_metrics(place.workdir.metrics))
            place.failures = attribution.Watch(attribution.training_of(place.exp.config.optimizer), earlier)
        tokens = self._first.config.train.batch_size * self._first.model.block_size
        self._meter = Meter(tokens * len(self._places), self.step)

    def _restored(self, restart: bool) -> Restored | None:
        """The group's checkpoint; None without one, or where it is of other runs and the sweep is to `restart` them."""
        like = self._first.parallel.to_global_abstract(self._programs.abstract())
        try:
            return self._checkpoints.restore_latest(like, self._identity, check=self._refuse_strangers)
        except _BegunSinceError:
            if not restart:
                raise
            return None

    def _refuse_strangers(self, sealed: Mapping[str, Any], where: Path) -> None:
        """Raises _BegunSinceError if a condition is another run than the one that a checkpoint holds."""
        for place in self._active():
            manifest = place.workdir.read_json("manifest.json", {"run_id?": str}) or {}
            saved = sealed["conditions"].get(place.member.name, {}).get("run_id")
            if manifest.get("run_id", saved) != saved:
                raise _BegunSinceError(
                    f"{place.member.name} has been begun anew since the checkpoint {where} was saved; go on with the"
                    " sweep that began it, or give --restart to begin the conditions of this group anew"
                )

    @property
    def _seconds(self) -> float:
        """Wall time of the group over all its sessions."""
        return self._earlier_seconds + time.monotonic() - self._began

    def run(self, stop: GracefulStop) -> str:
        """Steps until all have ended, or an interrupt."""
        config, programs = self._first.config, self._programs
        if self.step == 0:
            self._emit([{"step": 0} | record for record in self._evaluate()])
        batches = [place.exp.batches.from_step(self.step) for place in self._places]
        count, previous = config.train.steps_per_dispatch, None
        while self.step < self._steps and self._active():
            rows = [[next(source) for _ in range(count)] for source in batches]
            batch = programs.shard([np.stack(r) if count > 1 else r[0] for r in rows])
            answers, before = self._ask(batch)
            self.lanes, metrics = programs.run_train(self.lanes, batch)
            if previous is not None:
                self._log(*previous)
            self.step += count
            if before is not None:
                values = programs.measure_update(before, self.lanes)
                for i, place in enumerate(self._places):
                    answers[i] |= name_update(place.exp.abstract_params(), _lane(values, i))
            previous = (self.step, metrics, answers)
            last = self.step == self._steps
            evaluates = last or self.step % config.train.eval_every == 0
            evaluated = self._evaluate() if evaluates else None
            stops = stop.requested and not last  # looked at once: what leaves has been saved
            saves = stops or (not last and self.step % config.checkpoint.every == 0)
            if evaluates or saves:
                self._log(*previous, more=evaluated)
                previous = None
            if saves:
                self._save()
            self._tell("step", self.step)
            if stops:
                return "interrupted"
        finite = jax.device_get(_all_finite(self.lanes.state.params))
        for i, place in enumerate(self._places):
            if place.status == RUNNING:
                self._end(i, unhealthy(self._last[i], bool(finite[i])) or no_step(self._last[i]))
        return "finished"

    def _active(self) -> list[_Place]:
        return [place for place in self._places if place.status == RUNNING]

    def _ask(self, batch: jax.Array) -> tuple[list[Record], Any]:
        """Each lane's answers about the step to be taken on this batch; what to keep to ask what the step did."""
        questions = self._first.questions_at(self.step)
        answers: list[Record] = [{} for _ in self._places]
        if not questions:
            return answers, None
        with self._meter.paused():
            if asked := questions - {"weights"}:
                values = self._programs.diagnose(self.lanes, batch, asked)
                for i, place in enumerate(self._places):
                    policy = self._programs.policies[i]
                    answers[i] |= name_answers(policy, place.exp.abstract_params(), _lane(values, i))
            return answers, self._programs.keep(self.lanes) if "weights" in questions else None

    def _evaluate(self) -> list[Record]:
        with self._meter.paused():
            losses = self._programs.evaluate(self.lanes)
        return [language(place.exp).record(float(loss)) for place, loss in zip(self._places, losses, strict=True)]

    def _log(
        self, step: int, metrics: Mapping[str, jax.Array], answers: list[Record], more: list[Record] | None = None
    ) -> None:
        """Fetches and writes the records of a dispatch's steps, of which `step` is the last."""
        values = {name: np.asarray(value) for name, value in jax.device_get(metrics).items()}
        count = self._first.config.train.steps_per_dispatch
        rate = self._meter.rate(step)  # of all lanes together
        for j in range(count):
            records = []
            for i, place in enumerate(self._places):
                of_lane = {name: value[i].reshape(-1)[j].item() for name, value in values.items()}
                record = {"step": step - count + 1 + j} | of_lane | place.exp.speed_record(rate)
                record |= answers[i] if j == 0 else {}
                records.append(record | (more[i] if more and j == count - 1 else {}))
            self._emit(records)
        self._last = records

    def _emit(self, records: list[Record]) -> None:
        """Writes one record a lane, and closes the folders of those that have diverged."""
        for i, (place, record) in enumerate(zip(self._places, records, strict=True)):
            if place.status != RUNNING or place.sink is None:
                continue
            place.best = lower(place.best, record)
            diverged = place.watch.diverged(record) if "train/loss" in record else ""
            every = place.exp.config.train.log_every
            if record["step"] % every == 0 or "val/loss" in record or is_answered(record) or diverged:
                place.sink.log(record)
            if is_answered(record):
                self._warn(place, record)
            if place.exp.config.stability.skip_nonfinite and record.get("train/skipped"):
                place.sink.log(event(record["step"], "skip", "a loss or gradient that is not finite"))
            if diverged:
                self._end(i, diverged, record["step"])

    def _warn(self, place: _Place, record: Record) -> None:
        """Notes which thresholds of failure this record is the first to cross."""
        if (new := place.failures.add(record)) and place.sink is not None:
            place.sink.log(event(record["step"], "warning", wording.describe(new)))

    def _save(self) -> None:
        """Saves all lanes."""
        saved = {}
        for place in self._active():
            assert place.sink is not None
            place.sink.sync()
            best = None if math.isnan(place.best) else place.best
            saved[place.member.name] = {"run_id": place.run_id, "best": best, "records": place.sink.extent.as_json()}
        manifest = {"identity": self._identity, "seconds": self._seconds, "conditions": saved}
        self._checkpoints.save(
            self.step, self._first.parallel.to_global(self.lanes), {"next_step": self.step, "epoch": 0.0}, manifest
        )

    def _end(self, i: int, why_diverged: str, step: int | None = None) -> None:
        """Closes a condition's folder, finished or diverged; its share of the group's time is its wall time."""
        place, count = self._places[i], len(self._places)
        place.status = "diverged" if why_diverged else "finished"
        step = self.step if step is None else step
        assert place.sink is not None
        digest = None
        if why_diverged:
            place.sink.log(event(step, "diverged", why_diverged))
        else:
            digest = tree_sha256(jax.device_get(jax.tree.map(lambda x: x[i], self.lanes.state.params)))
        place.sink.sync()
        seconds, compile_seconds = self._seconds / count, self._compile_seconds / count
        progress = Progress(step, seconds, compile_seconds, digest, why_diverged, place.best)
        write_summary(place.workdir, place.exp, place.status, progress)


def _note(places: Sequence[_Place]) -> None:
    """Writes into the manifests of the conditions that run that they have a checkpoint."""
    for place in places:
        if place.status == RUNNING:
            place.workdir.note_checkpoint()


def _lane(values: Any, i: int) -> Any:
    return jax.tree.map(lambda x: x[i], values)


def _audited(text: str, policy: Policy, first: Experiment) -> Audit | str:
    """What the program of all lanes multiplies, as asked for by one of them; or why that cannot be told."""
    try:
        return audit(text, policy, first.config.precision.compute, first.config.train.steps_per_dispatch)
    except ValueError as e:
        return f"what the compiled step multiplies cannot be told: {e}"
