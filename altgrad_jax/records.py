"""A run's records: lines of metrics.jsonl, read, written, and held against what a checkpoint says of them."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeGuard

from altgrad_jax import files
from altgrad_jax.errors import UserError

Record = dict[str, Any]
NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
TEXTS = ("/codes", "/stiffness")  # what the names of histograms end with, the texts among measurements
# Events that come after the checkpoint of their step: a run resumed from there has yet to see them.
LATER = ("rewind", "records", "measured")


@dataclass(frozen=True)
class Extent:
    """How far the records of a run go: lines, bytes, and the SHA-256 of those bytes. A checkpoint seals it."""

    lines: int
    bytes: int
    sha256: str

    def as_json(self) -> dict[str, Any]:
        """For the checkpoint's manifest: its fields by name."""
        return asdict(self)


def json_value(value: Any) -> Any:
    """A value as JSON has it: non-finite floats become their names."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def lower(best: float, record: Record) -> float:
    """The lowest finite validation loss so far, NaN for none, with one more record."""
    loss = record.get("val/loss", math.nan)
    return best if not math.isfinite(loss) or loss >= best else loss


def line_of(record: Record) -> bytes:
    """A record as a line of metrics.jsonl."""
    return json.dumps({k: json_value(v) for k, v in record.items()}).encode() + b"\n"


def read_metrics(path: Path) -> list[Record]:
    """All records of a metrics file, floats restored; a torn last line (the process was killed) is left out."""
    records: list[Record] = []
    lines = (files.read_bytes(path) or b"").split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            records.append(parse_record(line))
        except ValueError as e:
            if number == len(lines):
                break
            raise UserError(f"{path} is damaged in line {number} ({e}); restore it or use a new --workdir") from e
    return records


def parse_record(line: bytes) -> Record:
    """The record that a line of a metrics file holds: `step`, numbers, and what is said of events.

    Raises:
      ValueError: it holds none; in one line, why.
    """
    record = files.parse_json(line)
    if wrong := files.misfit(record, {"step": int}) or (
        record.get("event") == "rewind" and files.misfit(record, {"event/skipped_batches": int})
    ):
        raise ValueError(f"no record of a step: {wrong}")
    if not 0 <= record["step"] < 2**53:
        raise ValueError(f"no record of a step: {record['step']}")
    restored = {k: NOT_FINITE.get(v, v) if isinstance(v, str) else v for k, v in record.items()}
    for key, value in restored.items():
        is_text = key.startswith("event") or (key.endswith(TEXTS) and isinstance(value, str))
        if not (is_number(value) or isinstance(value, bool) or is_text):
            raise ValueError(f"{key} is no number")
    return restored


def is_number(value: Any) -> TypeGuard[float]:
    """Whether it is one that a float holds; true and false are none."""
    return isinstance(value, float) or (type(value) is int and abs(value) < 2**63)


def recover(data: bytes, extent: Extent, step: int, rewinds: Sequence[Record] = ()) -> tuple[bytes, str]:
    """The lines that a metrics file had when a checkpoint was saved, or what is left of them.

    Args:
      data: what the file holds.
      extent: what it held then.
      step: the checkpoint's.
      rewinds: those that the run had behind it.

    Returns:
      The lines, and what is missing or changed, for people; "" where they are those of then.
    """
    if hashlib.sha256(data[: extent.bytes]).hexdigest() == extent.sha256:
        return data[: extent.bytes], ""
    kept: dict[bytes, int] = {}  # line -> step; one that is there twice counts once
    for line in data.split(b"\n"):
        try:
            record = parse_record(line)
        except ValueError:
            continue
        if record["step"] < step + (record.get("event") not in LATER):
            kept.setdefault(line + b"\n", record["step"])
    found = _joined(kept)
    if hashlib.sha256(found).hexdigest() == extent.sha256:
        return found, f"metrics.jsonl was out of order, and is again what it was at step {step}: nothing is missing"
    missing = extent.lines - len(kept)
    kept |= {line_of(record): record["step"] for record in rewinds if line_of(record) not in kept}
    what = f"{missing} of {extent.lines} records are missing" if missing > 0 else "records were changed"
    return _joined(kept), f"metrics.jsonl is not what it was at step {step}, when the checkpoint was saved: {what}"


def _joined(lines: dict[bytes, int]) -> bytes:
    """Lines in the order of their steps."""
    return b"".join(line for line, _ in sorted(lines.items(), key=lambda item: item[1]))
