"""What the process that drives a sweep asks of those that train, and hears from them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from altgrad_jax.files import read_json

ENDED = ("finished", "diverged", "failed")


def ended(folder: Path) -> str | None:
    """How the run in a work directory ended: finished, diverged or failed; None if it has yet to.

    Raises:
      UserError: its summary is damaged.
    """
    summary = read_summary(folder)
    return summary["status"] if summary is not None and summary["status"] in ENDED else None


def read_summary(folder: Path) -> dict[str, Any] | None:
    """The summary in a work directory, or None if there is none. Raises UserError if it is damaged."""
    return read_json(folder / "summary.json", {"status": str, "final?": dict})


@dataclass(frozen=True)
class Member:
    """A condition to be trained, and where.

    Attributes:
      name: the condition's.
      folder: its work directory.
      config: its configuration.
      facts: what the manifest says of it, `condition` there.
      command: that would run it alone.
    """

    name: str
    folder: Path
    config: ConfigDict
    facts: dict[str, Any]
    command: tuple[str, ...]


@dataclass(frozen=True)
class Request:
    """Conditions to be trained by one process.

    Attributes:
      members: together in one program, if there are several.
      folder: of the group's checkpoints.
      alone: the one member needs a run of its own kind, not a lane.
      log: file that what the run prints goes to.
      restart: whether conditions whose checkpoint is lost begin anew.
    """

    members: tuple[Member, ...]
    folder: Path
    alone: bool
    log: Path
    restart: bool = False


@dataclass(frozen=True)
class Outcome:
    """How a request ended.

    Attributes:
      status: "finished", also where members diverged; "interrupted"; "too_large" for memory; "failed"; "busy":
        another process is at one of them; or "stopped" by what concerns more than these conditions, and the user can
        mend, such as a full disk.
      reason: why it failed or stopped.
      fitting: how many would fit into memory, of "too_large".
    """

    status: str
    reason: str = ""
    fitting: int = 0
