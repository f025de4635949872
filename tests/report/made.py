"""Work directories written by hand: what a run of given losses, format, optimizer and seed would have left, quickly."""

import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from altgrad_jax.records import json_value

BLOCK, BATCH, STEPS = 32, 8, 100
LAYERS = ("blocks.0.attn.qkv", "blocks.0.mlp.up", "blocks.1.attn.qkv", "blocks.1.mlp.up", "lm_head")
FORMATS = ("e0m7", "e1m6", "e2m5", "e3m4:inf=0,nan=0", "e4m3:inf=0,nan=0", "e5m2:inf=0,nan=0", "e6m1", "e7m0")
OPTIMIZERS = {
    "adamw": {"name": "adamw"},
    "relative": {"name": "manifold_adamw", "placement": "after", "form": "relative"},
    "grid": {"name": "grid"},
    "madam": {"name": "madam"},
}
COMMAND = ["python", "-m", "altgrad_jax.main", "--config=configs/format.py:e5m2,quick", "--workdir=a b"]

Curve = Callable[[int], float]


def falling(end: float, start: float = 6.0, steps: int = STEPS) -> Curve:
    """A loss that falls from `start` at step 0 to `end` at the last."""
    return lambda step: end + (start - end) * (math.exp(-5 * step / steps) - math.exp(-5)) / (1 - math.exp(-5))


def make_run(
    folder: Path,
    curve: Curve | None = None,
    recipe: str = "bf16",
    optimizer: str = "adamw",
    seed: int = 1,
    *,
    steps: int = STEPS,
    logged: int | None = None,
    status: str | None = "finished",
    reason: str = "",
    measured: bool = True,
    underflow: float = 0.01,
    cosine: float = 0.99,
    identity: Mapping[str, Any] = {},
    condition: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] = {},
    summary: Mapping[str, Any] = {},
    layers: Sequence[str] = LAYERS,
    every: int = 10,
) -> Path:
    """Writes a work directory.

    Args:
      folder: where.
      curve: step -> loss, of training and validation.
      recipe: of all dense layers; "bf16": no rules.
      optimizer: of OPTIMIZERS.
      seed: of the run.
      steps: that the run was to take.
      logged: steps that it took; None: all.
      status: in its summary; None: it has written none.
      reason: of a run that diverged or failed.
      measured: whether it has diagnostics.
      underflow: of its gradients in the last layer, rising to that over the run; a tenth of it elsewhere.
      cosine: of its gradients.
      identity, condition, config, summary: what is different in the manifest and the summary.
      layers: of the model.
      every: steps between evaluations and diagnostics.
    """
    curve = curve or falling(3.0)
    logged = steps if logged is None else logged
    folder.mkdir(parents=True)
    settings = OPTIMIZERS[optimizer] | {"learning_rate": 3e-3}
    rules = [] if recipe == "bf16" else [[r"blocks\..*|lm_head", recipe]]
    known = {
        "seed": seed,
        "data.sha256": "a" * 64,
        "model.n_layer": 2,
        "model.n_embd": 32,
        "model.block_size": BLOCK,
        "train.batch_size": BATCH,
        "optimizer.schedule": "cosine",
        "optimizer.decay_steps": steps,
        "optimizer.warmup_steps": 5,
        **{f"optimizer.{key}": value for key, value in settings.items()},
    }
    shape = {"n_layer": 2, "n_embd": 32, "n_head": 2, "block_size": BLOCK, "vocab_size": 300}
    manifest = {
        "identity": known | dict(identity),
        "config": {
            "seed": seed, "train": {"eval_batches": 20}, "model": shape, "optimizer": settings,
            "precision": {"compute": "bfloat16", "rules": rules},
        }
        | dict(config),
        "audit": {"fp8_asked": 15 if rules else 0, "fp8_got": 0, "fp8_share": 0.0, "engines": {"XLA, bfloat16": 15}},
        "corpus": {"source": "embedded", "description": "acts of law", "sha256": "a" * 64},
        "parameters": {"total": 35360},
        "sessions": [
            {
                "started": "2026-11-25T19:00:00+00:00", "command": COMMAND,
                "versions": {"python": "3.11.7", "jax": "0.10.2"},
                "devices": {"kind": "cpu", "global": 1, "hosts": 1, "machine": "x86_64", "cores": 2},
                "git": {"commit": "0123456789abcdef", "modified": False},
            }
        ],
    }  # fmt: skip
    if condition is not None:
        manifest["condition"] = dict(condition)
    records = _records(curve, bool(rules) and measured, measured, logged, steps, underflow, cosine, layers, seed, every)
    lines = [json.dumps({key: json_value(value) for key, value in record.items()}) + "\n" for record in records]
    (folder / "metrics.jsonl").write_text("".join(lines))
    (folder / "manifest.json").write_text(json.dumps(manifest))
    if status:
        made = {"status": status, "step": logged, "seconds": 12.5, "compile_seconds": 3.0, **dict(summary)}
        made["peak_memory_bytes"] = {"host": 1_000_000_000}
        (folder / "summary.json").write_text(json.dumps(made | ({"reason": reason} if reason else {})))
    return folder


def _records(
    curve: Curve,
    quantised: bool,
    measured: bool,
    logged: int,
    steps: int,
    underflow: float,
    cosine: float,
    layers: Sequence[str],
    seed: int,
    every: int,
) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = [{"step": 0, "val/loss": curve(0)}]
    draw = random.Random(seed)
    for step in range(1, logged + 1):
        noise = draw.gauss(0, 0.02)
        record = {"step": step, "train/loss": curve(step) + noise, "train/tokens_per_second": 5000.0 + step}
        if step % every == 0:
            record["val/loss"] = curve(step)
        if measured and step % every == 1:
            record |= {"grads/cosine": cosine, "weights/stall": 0.5, "spectra/effective_rank": 30 - 3 * step / steps}
            for layer in layers:
                record |= {f"grads/{layer}/cosine": cosine, f"weights/{layer}/stall": 0.4}
                if quantised:
                    lost = underflow * (step / steps) * (1.0 if layer == layers[-1] else 0.1)
                    for role in ("activation", "weight", "gradient"):
                        of_role = lost if role == "gradient" else 0.0
                        record |= {f"quant/{layer}/{role}/underflow": of_role, f"quant/{layer}/{role}/overflow": 0.0}
                        record |= {f"quant/{layer}/{role}/{what}": of_role / 2 for what in ("energy_lost", "sum_lost")}
            if quantised:
                record |= {"quant/gradient/underflow": underflow * step / steps, "quant/gradient/overflow": 0.0}
        records.append(record)
    return records


def make_matrix(
    folder: Path,
    formats: Sequence[str] = FORMATS,
    optimizers: Sequence[str] = ("adamw", "relative", "grid", "madam"),
    seeds: Sequence[int] = (1, 2, 3),
    missing: Sequence[str] = (),
    **options: Any,
) -> Path:
    """A sweep's folder of formats, and bf16, times optimizers times seeds, with its matrix.json.

    A format's gap is 0.02 a place in the list; "relative" takes 0.015 off it; seeds differ by 0.1. The last format with
    "madam" diverges. Conditions named in `missing` are expected and not there.
    """
    draw = random.Random(0)
    expected = []
    for place, recipe in enumerate(("bf16", *formats)):
        for optimizer in optimizers:
            for seed in seeds:
                name = f"{recipe.partition(':')[0]}-{optimizer}-{seed}"
                condition = {
                    "matrix": "formats8", "recipe": recipe, "optimizer": optimizer, "seed": seed,
                    "learning_rate": 0.003, "layers": "all", "together": 4,
                }  # fmt: skip
                expected.append({"name": name} | condition)
                if name in missing:
                    continue
                end = 3 + 0.02 * place + 0.1 * seed - (0.015 if optimizer == "relative" else 0) + draw.gauss(0, 0.002)
                lost = recipe == formats[-1] and optimizer == "madam"
                ended = {"logged": 40, "status": "diverged", "reason": "loss is NaN"} if lost else {}
                underflow = 0.6 if place == 1 else 0.02
                of_run = {"condition": condition, "underflow": underflow, "cosine": 0.999 - 0.02 * place}
                make_run(folder / name, falling(end), recipe, optimizer, seed, **(of_run | ended | options))
    question = "Which 8-bit formats train as bf16 does, and do optimizers that know the grid help?"
    (folder / "matrix.json").write_text(
        json.dumps(
            {
                "name": "formats8", "question": question, "created": "2026-11-25T18:00:00+00:00",
                "command": ["python", "-m", "altgrad_jax.sweep", "--config=configs/matrix.py:quick"],
                "conditions": expected,
            }
        )
    )  # fmt: skip
    return folder
