"""The main job around the loop: what is checked and opened before the first step, and what is said after the last.

work directory, token cache -> experiment -> where it begins (`start`) -> the compiled step -> `loop.Loop` -> summary.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from types import MappingProxyType
from typing import Any

import jax
from ml_collections import ConfigDict
from rich.console import Console

from altgrad_jax import checkpoint, experiment, provenance
from altgrad_jax.config import check_devices
from altgrad_jax.console import ConsoleSink, make_console, print_header, print_lines
from altgrad_jax.data.corpus import open_corpus, refuse_another_meaning
from altgrad_jax.diagnostics import attribution, wording
from altgrad_jax.errors import UserError
from altgrad_jax.hosts import agree
from altgrad_jax.interrupt import GracefulStop, ending_at_once
from altgrad_jax.kin import refuse_lost, refuse_strangers
from altgrad_jax.loop import Loop
from altgrad_jax.machine import check_device, check_memory, memory_errors
from altgrad_jax.parallel import is_primary
from altgrad_jax.precision.audit import Audit
from altgrad_jax.precision.kernels.tiles_used import tiles_used
from altgrad_jax.precision.target import why_no_fp8
from altgrad_jax.profiling import StepTrace
from altgrad_jax.program import WHAT_SAVES_MEMORY, compile_audited, make_policy
from altgrad_jax.run_record import Progress, header, state_bytes, write_manifest, write_summary
from altgrad_jax.stability import event
from altgrad_jax.start import (
    Start,
    before_restoring,
    before_training,
    find_start,
    is_recorded_as_finished,
    refuse_ended,
    set_aside,
)
from altgrad_jax.state import tree_sha256
from altgrad_jax.tracking import MetricsFile, Sink, Wandb, read_metrics, require_login, wandb_mode
from altgrad_jax.workdir import Workdir


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
            refuse_ended(workdir)
        cache = open_corpus(config)
        refuse_another_meaning(config.data, cache.header, workdir.read_json("manifest.json"), workdir.path)
        exp = experiment.build(config, cache)
        check_memory(state_bytes(exp), len(exp.parallel.devices))
        if restart:
            set_aside(workdir, primary)
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
        agree("data", before_restoring(exp, checkpoints, run_identity))
        known, source = workdir.read_json("manifest.json", {"run_id?": str}), config.checkpoint.restore_from
        with memory_errors(WHAT_SAVES_MEMORY):
            start = find_start(exp, checkpoints, run_identity, check=partial(refuse_strangers, known, source))
        agree("state", before_training(exp, start))

        console = make_console(quiet=not primary)
        if start.step >= config.train.steps and is_recorded_as_finished(workdir, start.step):
            console.print(f"already finished: {workdir.path} is at step {start.step} of {config.train.steps}")
            return 0
        facts = header(exp, workdir.path, start.step, start.origin)
        print_header(console, f"altgrad_jax {config.tracking.name}", facts)
        print_lines(console, exp.policy.lines() if exp.policy.plans else ())
        stop = GracefulStop(last_words=f"stopped without saving; to go on: {_shown(command)}")
        audited, compile_seconds = _compiled(exp, start, console, stop, workdir)
        more = {**more, "ancestor": start.ancestor}
        manifest = write_manifest(
            workdir, exp, run_identity, start.step, start.origin, audited, command, more, start.run_id
        )
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


def _compiled(
    exp: experiment.Experiment, start: Start, console: Console, stop: GracefulStop, workdir: Workdir
) -> tuple[Audit | str, float]:
    """Compiles the step; returns what it multiplies, or why that cannot be told, and the seconds it took.

    A signal ends the process at once, for there is nothing to save; except where other hosts have to end with it.
    """
    alone = ending_at_once("stopped while compiling; there was nothing to save", workdir.close)
    with stop if exp.parallel.hosts > 1 else alone:
        console.print("  compiling")
        audited, seconds = compile_audited(exp, start.state)
    if isinstance(audited, str):
        print_lines(console, [audited])
    else:
        found = [audited.headline(why_no_fp8()), tiles_used(audited, exp.policy.tiles).line()]
        print_lines(console, filter(None, found))
    return audited, seconds


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
