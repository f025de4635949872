"""Checkpoints through Orbax: asynchronous saves, and restores that are checked before anything relies on them.

A checkpoint is one Composite, committed atomically by Orbax: `state` (the TrainState), `iterator` (which batch comes
next) and `manifest` (what the run is: identity, leaf types, checksums). The newest checkpoint that proves whole is the
one a run resumes from; a damaged one is named, moved to `damaged/`, and the one before is tried. Where checkpoints
exist and none is whole the run stops: it never starts from zero behind the user's back.
"""

import gc
import hashlib
import json
import logging
import re
import shutil
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from altgrad_jax import integrity
from altgrad_jax.differences import differences
from altgrad_jax.errors import UsageError, UserError

log = logging.getLogger(__name__)
T = TypeVar("T")
ITEMS = ("state", "iterator", "manifest")
OUTPUT_LAYERS = ("params.lm_head",)  # of a language model, beside the trunk


@dataclass(frozen=True)
class Restored:
    """What a checkpoint held.

    Attributes:
      step: optimizer steps done.
      state: the TrainState, with the sharding asked for.
      iterator: the data iterator's state, a JSON object.
      manifest: what was stored beside it, a JSON object.
    """

    step: int
    state: Any
    iterator: dict[str, Any]
    manifest: dict[str, Any]


def _seal(content: dict[str, Any]) -> dict[str, Any]:
    """JSON content with a SHA-256 of itself."""
    return {"content": content, "sha256": hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()}


def _unseal(sealed: Any, what: str) -> dict[str, Any]:
    if not isinstance(sealed, dict) or "content" not in sealed or _seal(sealed["content"]) != sealed:
        raise ValueError(f"{what} does not match its checksum")
    return sealed["content"]


def _reason(error: Exception) -> str:
    """What an exception says of a full disk, else its first line, short enough for a log."""
    if full := re.search("No space left on device|Disk quota exceeded|File too large", str(error)):
        return full[0]
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]


class _DamagedError(Exception):
    """A checkpoint could not be read, or is not what was written; the text says why."""


def _attempt(read: Callable[[], T]) -> T:
    """What `read` returns. Raises _DamagedError for whatever the storage layers raise on damaged files."""
    # A read that fails leaves coroutines of Orbax's half run, and Python would print a page about each.
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        try:
            try:
                return read()
            except UserError:
                raise
            except Exception as e:
                reason = _reason(e)
            gc.collect()
        finally:
            sys.unraisablehook = hook
    raise _DamagedError(reason)


class Checkpoints:
    """The checkpoints of one work directory."""

    def __init__(self, folder: Path, *, max_to_keep: int):
        """Opens (and creates) the folder; half-written checkpoints of a killed process are removed.

        Raises:
          UserError: the folder cannot be written.
        """
        self._folder = folder
        options = ocp.CheckpointManagerOptions(
            max_to_keep=max_to_keep,
            enable_async_checkpointing=True,
            cleanup_tmp_directories=True,
            create=True,
        )
        try:
            folder.mkdir(exist_ok=True)
            self._manager = ocp.CheckpointManager(folder, options=options, item_names=ITEMS)
        except OSError as e:
            raise UserError(f"{folder} cannot be written: {e.strerror}") from e

    def steps(self) -> list[int]:
        """Steps that have a committed checkpoint, damaged ones included, oldest first."""
        return committed_steps(self._folder)

    def save(self, step: int, state: Any, iterator: dict[str, Any], manifest: dict[str, Any]) -> None:
        """Starts a save and returns once the arrays are copied; errors of an earlier save surface here.

        Raises:
          UserError: this or an earlier save failed (a full disk); older checkpoints stay whole.
        """
        manifest = manifest | {"leaves": integrity.describe(state), "checksums": integrity.checksums(state)}
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    iterator=ocp.args.JsonSave(_seal(iterator)),
                    manifest=ocp.args.JsonSave(_seal(manifest)),
                ),
                force=True,
            )
        except Exception as e:  # Orbax passes on what its storage layers raise, of no common type
            raise self._failed_save(e) from e

    def wait(self) -> None:
        """Returns when all saves are on disk. Raises UserError if one failed."""
        try:
            self._manager.wait_until_finished()
        except Exception as e:  # as in `save`
            raise self._failed_save(e) from e

    def close(self) -> None:
        """Waits for saves and frees Orbax's threads."""
        self.wait()
        self._manager.close()

    def _failed_save(self, error: Exception) -> UserError:
        kept = ", ".join(map(str, self.steps())) or "none"
        return UserError(
            f"a checkpoint could not be written to {self._folder}: {_reason(error)}; checkpoints kept: {kept}."
            " Free some space and run the same command again"
        )

    def discard(self, wanted: Callable[[int], bool]) -> None:
        """Deletes the checkpoints of steps that are not wanted, once all saves are on disk."""
        self.wait()
        for step in self.steps():
            if not wanted(step):
                self._manager.delete(step)

    def restore_latest(self, like: Any, identity: dict[str, Any]) -> Restored | None:
        """The newest whole checkpoint, or None where none was ever committed.

        Args:
          like: a TrainState of ShapeDtypeStructs with the shardings wanted.
          identity: what the run is; see `provenance.identity`.

        Raises:
          UserError: the checkpoint belongs to a different run (the differences are listed), or none is whole.
        """
        damaged = []
        for step in reversed(self.steps()):
            try:
                restored = _attempt(partial(self._restore_step, step, like, identity))
            except _DamagedError as e:
                log.warning("checkpoint %s is damaged: %s", self._folder / str(step), e)
                damaged.append(step)
                continue
            for broken in damaged:
                log.warning("moved to %s; resuming from step %d", self._set_aside(broken), step)
            return restored
        if damaged:
            raise UserError(
                f"every checkpoint in {self._folder} is damaged (steps {', '.join(map(str, damaged))});"
                " bring back a copy, or use a new --workdir to start from zero"
            )
        return None

    def _restore_step(self, step: int, like: Any, identity: dict[str, Any]) -> Restored:
        manifest = read_manifest(self._folder, step)
        refuse_differences(manifest["identity"], identity, self._folder / str(step))
        return read(self._folder, step, like, manifest)

    def _set_aside(self, step: int) -> Path:
        """Moves a damaged checkpoint out of Orbax's way and keeps it for inspection."""
        folder = self._folder.parent / "damaged"
        target = next(p for i in range(10**6) if not (p := folder / f"{step}.{i}").exists())
        if jax.process_index() == 0:
            folder.mkdir(exist_ok=True)
            shutil.move(self._folder / str(step), target)
        multihost_utils.sync_global_devices(f"set aside checkpoint {step}")
        self._manager.reload()
        return target


def committed_steps(folder: Path) -> list[int]:
    """Steps with a committed checkpoint in a folder, oldest first. Orbax writes elsewhere and renames when whole."""
    if not folder.is_dir():
        return []
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdecimal() and p.is_dir())


def _restore(folder: Path, step: int, args: dict[str, Any]) -> Any:
    options = ocp.CheckpointManagerOptions(read_only=True)
    with ocp.CheckpointManager(folder, options=options, item_names=ITEMS) as manager:
        return manager.restore(step, args=ocp.args.Composite(**args))


def read_manifest(folder: Path, step: int) -> dict[str, Any]:
    """A checkpoint's manifest, its checksum verified. Raises ValueError or OSError if it is damaged."""
    sealed = _restore(folder, step, {"manifest": ocp.args.JsonRestore()})["manifest"]
    return _unseal(sealed, "the manifest")


def read(folder: Path, step: int, like: Any, manifest: dict[str, Any]) -> Restored:
    """Reads a checkpoint and verifies every leaf.

    Raises:
      UserError: it holds other arrays than `like`.
      Exception: it is damaged (the storage layers' own types, or ValueError).
    """
    # Orbax casts silently where dtypes differ, so they are compared before it sees them.
    if (wanted := integrity.describe(like)) != manifest["leaves"]:
        different = differences(manifest["leaves"], wanted, most=4)
        raise UserError(
            f"the checkpoint {folder / str(step)} holds other arrays than this run ({different}); use the version of"
            " altgrad_jax it was made with, or another --workdir"
        )
    args = {"state": ocp.args.StandardRestore(like), "iterator": ocp.args.JsonRestore()}
    items = _restore(folder, step, args)
    if changed := integrity.changed_leaves(items["state"], manifest["checksums"]):
        raise ValueError(f"{len(changed)} arrays do not match their checksums, {changed[0]} the first")
    return Restored(step, items["state"], _unseal(items["iterator"], "the iterator"), manifest)


def refuse_differences(stored: dict[str, Any], current: dict[str, Any], where: Path) -> None:
    """Raises UserError with the list of what differs between two runs' identities."""
    if stored != current:
        raise UserError(
            f"{where} belongs to a different run ({differences(stored, current)}); use the settings it"
            " was made with, another --workdir, or"
            " --config.checkpoint.restore_from to start a new run from its weights"
        )


def read_params(source: str, like: Any, optional: tuple[str, ...] = ()) -> tuple[Any, int, Path]:
    """Weights of another run; `read_parts` for the parameters alone.

    Where that run lacks one of the `optional` entries of `like`, it is left out, and what that run has in its place
    (the output layer of another task) is not read.
    """
    parts, step, where = read_parts(source, {"params": like}, optional)
    return parts["params"], step, where


def read_parts(source: str, like: dict[str, Any], optional: tuple[str, ...] = ()) -> tuple[dict[str, Any], int, Path]:
    """Parts of another run's state: `source` is DIR or DIR@STEP, DIR a work directory or its `checkpoints` folder.

    Args:
      source: where to read.
      like: field of the TrainState -> its arrays as ShapeDtypeStructs with the shardings wanted.
      optional: entries of fields that the run need not have.

    Returns:
      The same fields, the step they are from, and the checkpoint's folder.

    Raises:
      UserError: there is no such checkpoint, it is damaged, or its arrays have other names, shapes or dtypes.
    """
    name, _, step_text = source.rpartition("@")
    if not step_text.isdecimal() or Path(source).expanduser().is_dir():  # an @ of the folder's own name
        name, step_text = source, ""
    root = Path(name).expanduser().absolute()
    folder = root / "checkpoints" if (root / "checkpoints").is_dir() else root
    steps = committed_steps(folder)
    if not steps:
        raise UsageError(f"no checkpoint in {root}; give a run's work directory as DIR or DIR@STEP")
    if step_text and int(step_text) not in steps:
        raise UsageError(f"{root} has no checkpoint of step {step_text}; it has {', '.join(map(str, steps))}")
    step = int(step_text) if step_text else steps[-1]
    where = folder / str(step)
    try:
        parts = _attempt(partial(_read_parts, folder, step, like, optional))
    except _DamagedError as e:
        raise UserError(f"the checkpoint {where} is damaged: {e}; choose another with {name}@STEP") from e
    return jax.tree.map(lambda x: x, parts), step, where


def _read_parts(folder: Path, step: int, like: dict[str, Any], optional: tuple[str, ...] = ()) -> dict[str, Any]:
    manifest = read_manifest(folder, step)
    like = {name: tree for name, tree in like.items() if jax.tree.leaves(tree)}
    fields = tuple(f"{name}." for name in like)
    found = {n: d for n, d in manifest["leaves"].items() if n.startswith(fields)}
    for name in optional:
        if not any(n.startswith(f"params.{name}.") for n in found):
            like["params"] = {key: tree for key, tree in like["params"].items() if key != name}
            found = {n: d for n, d in found.items() if n not in OUTPUT_LAYERS}
    wanted = integrity.describe(like)
    if wanted != found:
        different = differences(found, wanted, most=4)
        raise UserError(f"the weights in {folder / str(step)} do not fit config.model: {different}")
    restore = ocp.args.PyTreeRestore(
        item=like, restore_args=ocp.checkpoint_utils.construct_restore_args(like), partial_restore=True
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        parts = reader.restore(folder / str(step) / "state", args=restore)
    expected = {n: c for n, c in manifest["checksums"].items() if n in wanted}
    if changed := integrity.changed_leaves(parts, expected):
        raise ValueError(f"{len(changed)} arrays do not match their checksums, {changed[0]} the first")
    return parts
