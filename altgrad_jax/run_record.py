"""What a run leaves to be read by people and programs: manifest.json, the header, summary.json."""

import math
import resource
import secrets
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax

from altgrad_jax import provenance
from altgrad_jax.data.corpus import describe
from altgrad_jax.data.overlap import open_overlap
from altgrad_jax.diagnostics import attribution
from altgrad_jax.diagnostics.questions import is_of_one_layer
from altgrad_jax.experiment import Experiment
from altgrad_jax.layers import parameter_counts
from altgrad_jax.optimizers import describe_schedule
from altgrad_jax.optimizers.factory import OPTIONS, OWN_OPTIONS
from altgrad_jax.parallel import is_primary
from altgrad_jax.precision.audit import Audit
from altgrad_jax.precision.kernels.tiles_used import tiles_used
from altgrad_jax.records import Record, json_value, read_metrics
from altgrad_jax.stability import no_step
from altgrad_jax.tracking import wandb_mode
from altgrad_jax.weights import tree_bytes
from altgrad_jax.workdir import MANIFEST, Workdir


@dataclass(frozen=True)
class Progress:
    """How far a run has come.

    Attributes:
      step: optimizer steps done.
      seconds: wall time over all sessions.
      compile_seconds: time that compiling the training step took in this session.
      parameter_sha256: hash of the final parameters; None unless the run has finished.
      reason: why it has diverged; "" where it has not.
      best: the lowest validation loss of all sessions; NaN without one.
    """

    step: int
    seconds: float
    compile_seconds: float
    parameter_sha256: str | None
    reason: str = ""
    best: float = math.nan


def write_manifest(
    workdir: Workdir,
    exp: Experiment,
    identity: dict[str, Any],
    step: int,
    origin: str,
    audited: Audit | str,
    command: Sequence[str] | None = None,
    more: Mapping[str, Any] = MappingProxyType({}),
    run_id: str | None = None,
) -> dict[str, Any]:
    """Writes manifest.json and config.json as a session begins, and returns the manifest.

    The run's id and the list of its sessions go on from an earlier manifest of the same run.

    Args:
      workdir: the run's folder.
      exp: what is run.
      identity: `provenance.identity` of it.
      step: where the session begins.
      origin: where its state came from, for people.
      audited: what the compiled step multiplies, and in which types; or why that cannot be told.
      command: that would do the same; this process's own where it is not given.
      more: further entries.
      run_id: of the checkpoint that it goes on from, should there be no earlier manifest.
    """
    before = workdir.read_json("manifest.json")
    if before is not None and before.get("identity") != identity:
        before = None  # another run began here and never saved anything
    if before is not None:
        before = workdir.read_json("manifest.json", MANIFEST)
    sessions = before["sessions"] if before else []
    manifest = {
        "run_id": before["run_id"] if before else run_id or secrets.token_hex(4),
        "checkpointed": step > 0,
        "identity": identity,
        "config": provenance.config_dict(exp.config),
        "resolved": exp.resolved(),
        "schedule": describe_schedule(exp.config.optimizer, exp.config.train.steps),
        "layers": exp.policy.table(),
        "audit": {"problem": audited}
        if isinstance(audited, str)
        else audited.summary() | {"products": audited.lines()[:-1]},
        **_kernel_tiles(exp, audited),
        "task": exp.task.describe(),
        "parameters": parameter_counts(exp.model),
        "state_bytes": state_bytes(exp),
        "corpus": provenance.corpus(exp.cache, exp.eval_split),
        "sessions": [*sessions, provenance.session(step, command) | {"origin": origin}],
        **more,
    }
    if is_primary():
        workdir.write_json("manifest.json", manifest)
        workdir.write_json("config.json", manifest["config"])
    return manifest


def _kernel_tiles(exp: Experiment, audited: Audit | str) -> dict[str, Any]:
    """Where the tiles of the FP8 kernel came from, in runs that use it or were given a table."""
    if isinstance(audited, str):
        return {}
    used = tiles_used(audited, exp.policy.tiles)
    return {"kernel_tiles": used.as_json()} if used.line() else {}


def header(exp: Experiment, folder: Path, step: int, origin: str) -> dict[str, str]:
    """What the user is shown before the first step."""
    config, counts, cache = exp.config, parameter_counts(exp.model), exp.cache.header
    validation = exp.cache.split_header(exp.eval_split)
    floor = exp.cache.entropy_floor(exp.eval_split)
    resolved, shape = exp.resolved(), config.model
    mode, why = wandb_mode(config.tracking)
    overlap = open_overlap(exp.cache)
    shared = overlap.line() if overlap else ""
    gelu = ", exact GELU" if shape.gelu == "exact" else ""
    row, entropy = "examples", {}
    if not exp.task.labels:
        row, known = "windows", "" if floor is None else f", floor {floor:.4f} (no model can expect less)"
        entropy = {f"{exp.eval_split} entropy": f"unigram {validation.unigram_nats:.4f} nats per token{known}"}
    return {
        "work directory": str(folder),
        "model": f"{shape.n_layer} layers x {shape.n_embd}, {shape.n_head} heads, block {shape.block_size}{gelu},"
        f" vocabulary {shape.vocab_size}: {counts['total']:,} parameters ({counts['without_embeddings']:,} without"
        " embeddings)",
        "optimizer": _optimizer(exp),
        "learning rate": describe_schedule(config.optimizer, config.train.steps),
        "compute": f"{config.precision.compute}, {_quantised(exp)},"
        f" attention {resolved['attention']}, {resolved['devices']}",
        "corpus": describe(config.data, cache),
        "tokenizer": resolved["tokenizer"] + _unused_rows(exp),
        "tokens": ", ".join(f"{split.name} {split.tokens:,}" for split in cache.splits),
        **entropy,
        **({"two splits": shared} if shared else {}),
        **exp.task.lines(),
        "steps": f"{step} to {config.train.steps}, {config.train.batch_size} {row} each, from {origin}",
        "peak": "not known (config.runtime.peak_tflops): train/mfu is not logged"
        if exp.peak_flops is None
        else f"{exp.peak_flops / 1e12:g} TFLOP/s a device in 16 bits, assumed for train/mfu",
        "tracking": f"metrics.jsonl, W&B {mode}{f' ({why})' if why else ''}",
    }


def _unused_rows(exp: Experiment) -> str:
    """How many rows of the output layer no token of the tokenizer uses, where a language model has some."""
    unused = exp.config.model.vocab_size - exp.cache.vocab_size
    return f", {unused:,} of the model's {exp.config.model.vocab_size:,} are never used" if unused else ""


def state_bytes(exp: Experiment) -> dict[str, int]:
    """Bytes of what training carries from step to step on every device, by what it is for."""
    state = exp.abstract_state()
    parts = {"parameters": state.params, "optimizer": state.opt_state, "scaling": (state.quant, state.loss_scale)}
    return {name: tree_bytes(tree) for name, tree in (parts | {"counters": state.counters}).items()}


def memory_lines(exp: Experiment, compiled: Any) -> list[str]:
    """For people: what a device holds from step to step, and what the compiled step adds.

    Args:
      exp: what is run.
      compiled: `memory_analysis()` of its step; None where the backend has none.
    """
    parts = state_bytes(exp)
    total = sum(parts.values())
    held = ", ".join(f"{name} {_megabytes(size)}" for name, size in parts.items() if size >= 0.01 * total)
    lines = [f"memory of a device: state {_megabytes(total)} ({held})"]
    if compiled is None:
        return [*lines, "what the step adds is not told by this backend"]
    peak = compiled.argument_size_in_bytes + compiled.output_size_in_bytes - compiled.alias_size_in_bytes
    peak += compiled.temp_size_in_bytes
    return [
        *lines,
        f"the compiled step adds {_megabytes(compiled.temp_size_in_bytes)} of temporary arrays: about"
        f" {_megabytes(peak)} at its peak, by the compiler's count; evaluations and diagnostics have programs of"
        " their own",
    ]


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f} MB" if size >= 1e8 else f"{size / 1e6:.3g} MB"


def _optimizer(exp: Experiment) -> str:
    """Its name and what it does, and what the state takes."""
    optimizer = exp.config.optimizer
    own = [f"{key} {optimizer[key]}" for key in OPTIONS[optimizer.name] if key in OWN_OPTIONS]
    memory = state_bytes(exp)
    sizes = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in memory.items() if size >= 1e5)
    return f"{', '.join([optimizer.name, *own])}; state: {sizes}"


def _quantised(exp: Experiment) -> str:
    """How many layers are quantised, and on what they run."""
    plans = exp.policy.plans
    if not plans:
        return "no layer quantised"
    native = sum(plan.native for plan in plans)
    kinds = f"{native} native" if native == len(plans) else f"{native} native, {len(plans) - native} emulated"
    return f"{len(plans)} of {len(exp.policy.shapes)} matrices quantised ({kinds})"


def write_summary(workdir: Workdir, exp: Experiment, status: str, progress: Progress) -> None:
    """Writes summary.json: how the run stands. Final values are the last logged of each name."""
    records, training = read_metrics(workdir.metrics), attribution.training_of(exp.config.optimizer)
    taken = any("train/loss" in r and not no_step(r) for r in records)
    final: Record = {}
    for record in records:
        if "event" not in record:
            final |= {key: value for key, value in record.items() if not is_of_one_layer(key)}
    workdir.write_json(
        "summary.json",
        {
            "status": status,
            **({"reason": progress.reason} if progress.reason else {}),
            "step": progress.step,
            "final": {key: json_value(value) for key, value in final.items()},
            "best_val_loss": json_value(progress.best if taken else math.nan),
            "events": [{key: json_value(v) for key, v in record.items()} for record in records if "event" in record],
            "failures": attribution.as_json(attribution.first_failures(records, training)),
            "tokens_seen": progress.step * exp.config.train.batch_size * exp.model.block_size,
            "seconds": round(progress.seconds, 3),
            "compile_seconds": round(progress.compile_seconds, 3),
            "peak_memory_bytes": peak_memory_bytes(),
            "parameter_sha256": progress.parameter_sha256,
        },
    )


def peak_memory_bytes() -> dict[str, int]:
    """Most memory used so far: of this process on the host, and of the first device where it keeps count."""
    # Linux counts ru_maxrss in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    memory = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        memory["device"] = stats["peak_bytes_in_use"]
    return memory
