"""Runs as a reader finds them: finished or not, whole or torn, with or without every measurement.

Nothing here stops at a defect of a run: what is missing or broken is named in `Run.problems`, and the rest is used.
"""

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from altgrad_jax import files
from altgrad_jax.diagnostics.questions import is_answered
from altgrad_jax.errors import UsageError, UserError
from altgrad_jax.records import NOT_FINITE, Record, is_number

# What must be equal for the losses of two runs to be compared: the data, the model's task, how long it was learned, and
# the windows that it was judged on.
MUST_AGREE = (
    "task",
    "classify.labels_sha256",
    "classify.long_documents",
    "classify.max_windows",
    "data.sha256",
    "model.n_layer",
    "model.n_embd",
    "model.n_head",
    "model.block_size",
    "model.vocab_size",
    "model.tie_embeddings",
    "model.gelu",
    "train.batch_size",
    "train.eval_batches",
    "optimizer.schedule",
    "optimizer.decay_steps",
    "optimizer.warmup_steps",
    "optimizer.min_lr_ratio",
)
_LINES = "\u2028\u2029\x1c\x1d\x1e\x1f\x85\x0b\x0c"  # that are spaces to Python, and end a line elsewhere


@dataclass(frozen=True)
class Run:
    """One run's records and what is known of it.

    Attributes:
      path: its folder.
      name: the folder's name, made visible.
      records: of metrics.jsonl, ascending in step; events among them.
      manifest: manifest.json; empty if there is none.
      summary: summary.json; empty if there is none.
      problems: what is missing or broken, for people.
    """

    path: Path
    name: str
    records: tuple[Record, ...]
    manifest: dict[str, Any]
    summary: dict[str, Any]
    problems: tuple[str, ...] = ()
    identity: dict[str, Any] = field(default_factory=dict)

    @property
    def step(self) -> int:
        """The last step that was logged."""
        return max((record["step"] for record in self.records), default=0)

    @property
    def status(self) -> str:
        """ "finished", "interrupted", "diverged", "failed"; "unfinished" if it has written no summary."""
        return str(self.summary.get("status", "unfinished"))

    @property
    def tokens(self) -> int | None:
        """Tokens seen up to the last step that was logged."""
        batch, block = self.identity.get("train.batch_size"), self.identity.get("model.block_size")
        return self.step * batch * block if isinstance(batch, int) and isinstance(block, int) else None

    def last(self, name: str) -> float:
        """The last value of a metric, NaN if it was never logged; a run that diverged may end in NaN too."""
        return next((float(r[name]) for r in reversed(self.records) if is_number(r.get(name))), math.nan)

    def highest(self, prefix: str, suffix: str) -> float:
        """The largest last value of metrics called prefix/.../suffix, such as quant/<role>/overflow."""
        names = {key for r in self.records for key in r if key.startswith(f"{prefix}/") and key.endswith(f"/{suffix}")}
        values = [self.last(name) for name in names if name.count("/") == 2]
        return max((value for value in values if not math.isnan(value)), default=math.nan)


def read_run(path: Path) -> Run:
    """Reads a work directory.

    Raises:
      UserError: it is none.
    """
    problems: list[str] = []
    if not (path / "metrics.jsonl").exists() and not (path / "manifest.json").exists():
        raise UsageError(f"{path} is no work directory: it has neither metrics.jsonl nor manifest.json")
    manifest, summary = (_read_json(path / name, problems) for name in ("manifest.json", "summary.json"))
    records = _read_records(path / "metrics.jsonl", problems)
    if not records:
        problems.append("no step was logged")
    identity = manifest.get("identity")
    if not isinstance(identity, dict):
        identity = {}
        problems.append("manifest.json does not say what was run")
    if identity:
        identity = _judged_on(manifest) | identity
    return Run(path, visible(path.resolve().name), tuple(records), manifest, summary, tuple(problems), identity)


def _judged_on(manifest: dict[str, Any]) -> dict[str, Any]:
    """How many batches of windows val/loss is of, from the configuration: identities of older runs do not have it."""
    config = manifest.get("config")
    train = config.get("train") if isinstance(config, dict) and config.get("task", "lm") == "lm" else None
    batches = train.get("eval_batches") if isinstance(train, dict) else None
    return {} if batches is None else {"train.eval_batches": batches}


def visible(text: str) -> str:
    """Text that shows what it holds: no control character moves a cursor, no bidi control reorders what is read.

    Spaces of every kind become spaces, all else that has no shape "?".
    """
    return "".join(" " if c.isspace() and c not in _LINES else c if c.isprintable() else "?" for c in text)


def cleaned(value: Any) -> Any:
    """A JSON value with all its texts and keys made visible."""
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, dict):
        return {visible(key): cleaned(one) for key, one in value.items()}
    return [cleaned(one) for one in value] if isinstance(value, list) else value


def speed(run: Run) -> float:
    """Median of the logged tokens/s; NaN without any. Steps with evaluations or diagnostics count if no others do."""
    logged = [r for r in run.records if is_number(r.get("train/tokens_per_second"))]
    plain = [r for r in logged if "val/loss" not in r and not is_answered(r)]
    return statistics.median(r["train/tokens_per_second"] for r in plain or logged) if logged else math.nan


def _read_records(path: Path, problems: list[str]) -> list[Record]:
    """The records of a metrics file in order of their steps: numbers, and what is said of events.

    Lines that hold none are named and left out.

    A last line without its end is no defect: the run was killed, or is still going on.
    """
    try:
        lines = (files.read_bytes(path) or b"").split(b"\n")
    except UserError as e:
        problems.append(visible(str(e)))
        return []
    records, bad = [], []
    for number, line in enumerate(lines, 1):
        try:
            record = files.parse_json(line) if line else None
        except ValueError:
            record = ()
        if isinstance(record, dict) and type(record.get("step")) is int and 0 <= record["step"] < 2**53:
            restored = {k: NOT_FINITE.get(v, v) if isinstance(v, str) else v for k, v in record.items()}
            kept = {k: v for k, v in restored.items() if is_number(v) or k.startswith("event")}
            records.append(cleaned(kept))
        elif line and number < len(lines):
            bad.append(number)
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        problems.append(f"{path.name}: no record in line {', '.join(map(str, bad[:3]))}{more}; left out")
    return sorted(records, key=lambda record: record["step"])


def _read_json(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        found = files.read_json(path, way_out="it is left out")
    except UserError as e:
        problems.append(visible(str(e)))
        return {}
    if found is None:
        problems.append(f"no {path.name}")
        return {}
    return cleaned(found)


def read_runs(paths: Iterable[str]) -> list[Run]:
    """Reads work directories, and those in folders of work directories, in the order given.

    Raises:
      UserError: a path is neither.
    """
    runs: list[Run] = []
    for text in paths:
        path = Path(text).expanduser()
        if not path.is_dir():
            raise UsageError(f"there is no folder {path}")
        inside = sorted(p for p in path.iterdir() if (p / "manifest.json").exists() or (p / "metrics.jsonl").exists())
        is_run = (path / "metrics.jsonl").exists() or (path / "manifest.json").exists()
        if not is_run and not inside:
            raise UsageError(f"{path} is no work directory and holds none: no manifest.json, no metrics.jsonl")
        runs += [read_run(path)] if is_run else [read_run(p) for p in inside]
    return runs


def differences(run: Run, first: Run) -> list[str]:
    """Why the losses of two runs say nothing about each other: "model.n_embd: 128 -> 384"; empty if they do."""
    unsaid = {"task": "lm", "model.gelu": "tanh"}  # of the common case an identity says nothing
    before, now = (unsaid | one.identity for one in (first, run))
    found = [
        f"{key}: {_short(before[key])} -> {_short(now[key])}"
        for key in MUST_AGREE
        if key in before and key in now and before[key] != now[key]
    ]
    if not first.identity or not run.identity:
        found.append("what was run is not known")
    if run.step != first.step:
        found.append(f"steps: {first.step} -> {run.step}")
    return found


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:8]}..." if len(text) == 64 else text
