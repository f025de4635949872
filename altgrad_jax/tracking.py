"""Metrics: one record a logged step, sent to metrics.jsonl, the console and W&B.

metrics.jsonl is the truth. It holds one JSON object a logged step, ascending; when a run resumes, the lines past its
checkpoint are cut off before the steps are repeated, so the file of a run killed ten times reads like that of a run
never killed. Non-finite values are written as the strings "NaN", "Infinity" and "-Infinity", which keeps it valid JSON.
"""

import hashlib
import os
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from altgrad_jax import files
from altgrad_jax.errors import UsageError, UserError
from altgrad_jax.records import Extent, Record, line_of, parse_record, read_metrics, recover

__all__ = ["MetricsFile", "Record", "Sink", "Wandb", "read_metrics", "require_login", "wandb_mode"]
WANDB_MODES = ("disabled", "offline", "online")  # from the quietest


class Sink(Protocol):
    """Where records go."""

    def log(self, record: Record) -> None:
        """Takes a record: `step` and slash-named scalars."""
        ...

    def sync(self) -> None:
        """Makes what was logged safe; called before a checkpoint that it belongs to."""
        ...

    def rewind(self, step: int) -> None:
        """The run has gone back to this step; what was logged of later ones did not happen."""
        ...

    def close(self, status: str) -> None:
        """The run ended, as `finished`, `interrupted`, `diverged` or `failed`."""
        ...


AGAIN = "then run the same command again: the checkpoints are whole"


class MetricsFile:
    """Appends records to metrics.jsonl.

    Attributes:
      lost: what the file lacked of the records that it should have had when it was opened; "" if nothing.
    """

    def __init__(self, path: Path, step: int = 0, extent: Extent | None = None, rewinds: Sequence[Record] = ()):
        """Opens the file for appending, after cutting off what lies past a checkpoint.

        Args:
          path: the file.
          step: of the checkpoint; 0 to begin anew.
          extent: how far the records went when it was saved; None to begin anew.
          rewinds: those that the run had behind it then, put back where they are missing.

        Raises:
          UserError: the file cannot be read or written.
        """
        self._path, self.lost = path, ""
        kept = b""
        if extent is not None:
            kept, self.lost = recover(files.read_bytes(path) or b"", extent, step, rewinds)
        self._rewrite(kept)

    @property
    def extent(self) -> Extent:
        """How far the records go."""
        return Extent(self._lines, self._bytes, self._hash.hexdigest())

    def rewind(self, step: int) -> None:
        """Cuts off what lies past a step."""
        self._file.close()
        lines = (files.read_bytes(self._path) or b"").split(b"\n")
        self._rewrite(b"".join(line + b"\n" for line in lines if line and parse_record(line)["step"] <= step))

    def _rewrite(self, content: bytes) -> None:
        """Puts a file with this content in the place of the old one, and opens it for more."""
        files.write_atomically(self._path, content)
        self._hash, self._bytes, self._lines = hashlib.sha256(content), len(content), content.count(b"\n")
        try:
            self._file = open(self._path, "ab")  # noqa: SIM115  closed in `close`
        except OSError as e:
            raise files.unwritable(self._path, e) from e

    def log(self, record: Record) -> None:
        """Writes a line and hands it to the operating system, so that it survives a kill of this process."""
        line = line_of(record)
        try:
            self._file.write(line)
            self._file.flush()
        except OSError as e:
            raise self._unwritable(e) from e
        self._hash.update(line)
        self._bytes, self._lines = self._bytes + len(line), self._lines + 1

    def _unwritable(self, error: OSError) -> UserError:
        return files.unwritable(self._path, error, AGAIN)

    def sync(self) -> None:
        """Returns when all lines are on disk. Raises UserError if they cannot be written."""
        try:
            os.fsync(self._file.fileno())
        except OSError as e:
            raise self._unwritable(e) from e

    def close(self, status: str) -> None:
        """Closes the file."""
        del status
        self._file.close()


def wandb_mode(settings: Any) -> tuple[str, str]:
    """How W&B runs: the quieter of `config.tracking.wandb` and the variable WANDB_MODE; and why, where they differ.

    Raises:
      UsageError: WANDB_MODE is none of the three.
    """
    given = os.environ.get("WANDB_MODE") or settings.wandb
    asked = {"dryrun": "offline", "run": "online"}.get(given, given)
    if asked not in WANDB_MODES:
        raise UsageError(f"WANDB_MODE={given} is not one of {', '.join(WANDB_MODES)}; correct or unset it")
    if asked == settings.wandb:
        return asked, ""
    if WANDB_MODES.index(asked) < WANDB_MODES.index(settings.wandb):
        return asked, f"WANDB_MODE={given}, in place of config.tracking.wandb={settings.wandb}"
    return settings.wandb, f"config.tracking.wandb; WANDB_MODE={given} asks for more and is not followed"


def require_login(settings: Any) -> None:
    """Checks that W&B can start as it is asked to, before a run changes anything. Asks no server.

    Raises:
      UserError: W&B is not installed, refuses a variable of the environment, or is to be online without a login.
    """
    mode, _ = wandb_mode(settings)
    if mode == "disabled":
        return
    try:
        import wandb
    except ImportError as e:
        raise UserError("W&B is not installed; pip install wandb or --config.tracking.wandb=disabled") from e
    for name in sorted(name for name in os.environ if name.startswith("WANDB_")):
        try:
            wandb.Settings().update_from_env_vars({name: os.environ[name]})
        except Exception as e:  # pydantic's, ValueError, W&B's own
            raise UsageError(f"W&B refuses the environment variable {name}: {_reason(e)}; correct or unset it") from e
    try:
        wandb.setup()
    except Exception as e:  # as above; its message names the variable
        raise UsageError(f"W&B cannot start with this environment: {_reason(e)}") from e
    if mode == "online" and not wandb.login(prompt=False, verify=False):
        raise UserError(
            "config.tracking.wandb=online, but there is no W&B login; run `wandb login`, or use"
            " --config.tracking.wandb=offline and `wandb sync` the folder later"
        )


def _reason(error: Exception) -> str:
    """What an exception says, in one line, without the value where pydantic tells it apart: it may be secret."""
    found = getattr(error, "errors", None)
    text = found()[0]["msg"] if callable(found) else str(error)
    return " ".join(text.split())[:200]


class Wandb:
    """Sends records to Weights & Biases, one run per work directory however often it resumes.

    W&B works in a process of its own, and the SIGTERM of a scheduler or of a machine that shuts down reaches that one
    too. The run outlives it, to save and end as it should: metrics.jsonl has all that W&B then lacks.
    """

    _counter = 0
    _lost = False
    # For a call and for the end, after which W&B's process is taken to stand still; online the end sends what is left.
    _answer_seconds, _finish_seconds, _finish_online_seconds = 60.0, 60.0, 600.0

    def __init__(
        self,
        settings: Any,
        workdir: Path,
        run_id: str,
        config: dict[str, Any],
        earlier: Iterable[Record] = (),
        tags: Iterable[str] = (),
    ):
        """Starts or continues the W&B run `run_id`.

        Args:
          settings: `config.tracking`.
          workdir: W&B writes below `<workdir>/wandb`.
          run_id: kept in the manifest over resumes.
          config: shown as the run's configuration.
          earlier: what earlier sessions logged, up to where this one goes on.
          tags: beside those of `settings`.

        Raises:
          UserError: W&B could not start, for lack of network or rights.
        """
        import wandb

        mode, _ = wandb_mode(settings)
        # Calls wait for W&B's process, which may stand still: so another thread makes them.
        self._caller = ThreadPoolExecutor(max_workers=1)
        try:
            self._run = wandb.init(
                dir=str(workdir),
                id=run_id,
                resume="allow",
                mode=mode,  # type: ignore[arg-type]  # one of WANDB_MODES
                project=settings.project,
                entity=settings.entity,
                name=settings.name,
                tags=list(dict.fromkeys((*settings.tags, *tags))),
                config=config,
                # No console capture, code or machine statistics: what is sent is what is in the record.
                settings=wandb.Settings(
                    console="off",
                    silent=True,
                    disable_git=True,
                    save_code=False,
                    x_disable_stats=True,
                    x_disable_meta=True,
                ),
            )
        except Exception as e:  # W&B's own, pydantic's, of its network and its files
            raise UserError(
                f"W&B could not start ({_reason(e) or type(e).__name__});"
                " --config.tracking.wandb=offline needs no network"
            ) from e
        # Its own step must never go back, but online a resumed run repeats steps: so the step is a metric like others.
        self._run.define_metric("*", step_metric="step")
        # Offline, W&B knows nothing of earlier sessions: each would begin at its step 0, and when they are synced the
        # last would replace the others (wandb/wandb#5865, #11144). So each session holds the whole run.
        self._offline = mode == "offline"
        if self._offline:
            for record in earlier:
                self.log(record)

    def log(self, record: Record) -> None:
        """Queues a record; W&B plots numbers, so texts stay in metrics.jsonl."""
        numbers = {key: value for key, value in record.items() if not isinstance(value, str)}
        # W&B's own counter must not go back: after a rewind it stays until the run is past where it was.
        self._counter = max(self._counter, record["step"])
        self._unless_lost(lambda: self._run.log(numbers, step=self._counter if self._offline else None))

    def rewind(self, step: int) -> None:
        """W&B keeps what it was sent; the steps repeated follow it, by their own numbers."""

    def sync(self) -> None:
        """W&B writes by itself, and metrics.jsonl is the truth."""

    def close(self, status: str) -> None:
        """Finishes the run and waits for what is queued."""
        seconds = self._finish_seconds if self._offline else self._finish_online_seconds
        self._unless_lost(lambda: self._finish(status), seconds)

    def _finish(self, status: str) -> None:
        self._run.summary["status"] = status
        self._run.finish(exit_code=0 if status in ("finished", "interrupted") else 1)

    def _unless_lost(self, call: Callable[[], None], seconds: float | None = None) -> None:
        if self._lost:
            return
        seconds = seconds or self._answer_seconds
        try:
            self._caller.submit(call).result(seconds)
        except TimeoutError:
            self._lose(f"W&B's process has not answered for {seconds:g} s and was ended")
        except Exception as e:  # a broken socket has many names
            self._lose(f"W&B's process is gone ({type(e).__name__}: {' '.join(str(e).split())[:200]})")

    def _lose(self, what: str) -> None:
        import wandb

        self._lost = True
        print(f"warning: {what}; metrics.jsonl has what it lacks", file=sys.stderr)
        _end_children("wandb-core")  # else the call that waits for it would keep this process from ending
        with suppress(Exception):
            wandb.teardown()  # else it tries once more at exit, and prints a traceback


def _end_children(name: str) -> None:
    """Kills the children of this process that run a program; on Linux, where the kernel tells of them."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended
            program, _, rest = path.read_text().partition("(")[2].rpartition(")")
            if program == name and rest.split()[1] == str(os.getpid()):
                os.kill(int(path.parent.name), signal.SIGKILL)
