"""Where a session begins: at a checkpoint, at another run's weights, or at new ones; and what forbids it to begin."""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jax.experimental import multihost_utils

from altgrad_jax import checkpoint, experiment, provenance
from altgrad_jax.checkpoint_files import ancestor
from altgrad_jax.errors import UserError
from altgrad_jax.records import Extent, Record
from altgrad_jax.state import TrainState, tree_sha256
from altgrad_jax.task import HEAD
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


def find_start(
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


def before_restoring(
    exp: experiment.Experiment, checkpoints: checkpoint.Checkpoints, run_identity: dict[str, Any]
) -> dict[str, Any]:
    """What hosts must have alike before they read a checkpoint together."""
    found = provenance.devices()
    facts = {"devices of a host": f"{len(exp.parallel.devices)} x {found['kind']}"}
    facts |= {"checkpoints in --workdir": ", ".join(map(str, checkpoints.steps())) or "none"}
    return facts | run_identity


def before_training(exp: experiment.Experiment, start: Start) -> dict[str, Any]:
    """What hosts must have alike before the first step; nothing where there is one, for hashing takes time."""
    if exp.parallel.hosts == 1:
        return {}
    weights = tree_sha256(exp.parallel.on_one_device(start.state.params))
    return {"first step": start.step, "batches passed over": start.skipped_batches, "weights": weights[:12]}


def set_aside(workdir: Workdir, primary: bool) -> None:
    """Makes room for a run that begins anew: one process for all."""
    moved = workdir.set_aside() if primary else None
    multihost_utils.sync_global_devices("set aside an earlier run")
    if moved is not None:
        log.warning("the earlier run in %s is now in %s", workdir.path, moved)


def refuse_ended(workdir: Workdir) -> None:
    """Raises UserError if the run in this work directory has diverged: repeating it would diverge again."""
    summary = workdir.read_json("summary.json", SUMMARY)
    if summary is not None and summary["status"] == "diverged":
        raise UserError(
            f"the run in {workdir.path} diverged at step {summary['step']}; change the settings and use a new"
            f" --workdir, from its last good weights with --config.checkpoint.restore_from={workdir.path}; or begin"
            " anew with --restart"
        )


def is_recorded_as_finished(workdir: Workdir, step: int) -> bool:
    """Whether the summary says so; a run killed after its last checkpoint has still to write it."""
    summary = workdir.read_json("summary.json", SUMMARY)
    return summary is not None and summary["status"] == "finished" and summary["step"] == step
