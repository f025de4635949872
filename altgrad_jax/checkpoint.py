"""Checkpoints through Orbax: asynchronous saves, and restores that are checked before anything relies on them.

A checkpoint is one Composite: `state` (the TrainState), `iterator` (which batch comes next) and `manifest` (what the
run is; see `checkpoint_files`). It is written under another name. When all of it is on disk it gets its own, and when
that is on disk too, older ones may go. The newest checkpoint that proves whole is the one a run resumes from; a damaged
one is named, moved to `damaged/`, and the one before is tried. Where checkpoints exist and none is whole the run stops:
it never starts from zero behind the user's back.
"""

import asyncio
import logging
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from altgrad_jax import files, integrity
from altgrad_jax.checkpoint_files import (
    ITEMS,
    DamagedError,
    Restored,
    attempt,
    committed_steps,
    first_line,
    read,
    read_manifest,
    read_params,
    read_parts,
    refuse_differences,
    refuse_what_is_in_the_way,
    seal,
    sha256_of,
)
from altgrad_jax.errors import UserError

__all__ = [
    "Checkpoints",
    "Restored",
    "committed_steps",
    "read",
    "read_manifest",
    "read_params",
    "read_parts",
]

log = logging.getLogger(__name__)
UNFINISHED, GOING = ".orbax-checkpoint-tmp", ".going"  # ends of names: being written, being deleted


def surplus(steps: Sequence[int], keep: int, every: int) -> list[int]:
    """The steps whose checkpoints may go.

    The newest `keep` stay. So do the newest `keep` regular ones, of every `every`-th step: a run that is interrupted
    saves beside them, and a rewind goes back to regular ones alone, as it would in a run never interrupted.

    Args:
      steps: that have a checkpoint, ascending.
      keep: at least 1.
      every: `config.checkpoint.every`.
    """
    regular = [step for step in steps if step % every == 0]
    kept = {*steps[-keep:], *regular[-keep:]}
    return [step for step in steps if step not in kept]


def _path_class(committed: Callable[[], None]) -> type[ocp.path.atomicity.AtomicRenameTemporaryPath]:
    """How Orbax commits a checkpoint, in its own thread: all of it is on disk before it has its name, and that before
    `committed` is called."""

    class SyncedPath(ocp.path.atomicity.AtomicRenameTemporaryPath):
        async def finalize(self) -> None:
            await asyncio.to_thread(files.sync_tree, Path(self.get()))
            await super().finalize()
            await asyncio.to_thread(self._settle)

        def _settle(self) -> None:
            final = Path(self.get_final())
            files.sync_tree(final)  # Orbax adds its own notes just before it renames
            files.sync_folder(final.parent)
            committed()

    return SyncedPath


class Checkpoints:
    """The checkpoints of one work directory."""

    def __init__(self, folder: Path, *, max_to_keep: int, every: int = 1, committed: Callable[[], None] = lambda: None):
        """Opens (and creates) the folder; what a killed process left half written or half deleted is removed.

        Args:
          folder: of the checkpoints.
          max_to_keep: how many, see `surplus`.
          every: steps between regular ones.
          committed: called in a thread of its own when a checkpoint is on disk.

        Raises:
          UserError: the folder cannot be written, or something lies in the way of its checkpoints.
        """
        self._folder, self._keep, self._every, self._then = folder, max_to_keep, every, committed
        try:
            folder.mkdir(exist_ok=True)
            files.sync_folder(folder.parent)
            refuse_what_is_in_the_way(folder)
            if jax.process_index() == 0:
                for path in folder.iterdir():
                    if path.is_dir() and (UNFINISHED in path.name or path.name.endswith(GOING)):
                        shutil.rmtree(path)
        except OSError as e:
            raise files.unwritable(folder, e) from e
        handler = ocp.CompositeCheckpointHandler(*ITEMS)
        self._writer = ocp.AsyncCheckpointer(handler, temporary_path_class=_path_class(self._committed))

    def _committed(self) -> None:
        """A checkpoint is on disk: older ones may go."""
        self._then()
        for step in surplus(self.steps(), self._keep, self._every):
            self._delete(step)

    def _delete(self, step: int) -> None:
        """Deletes a checkpoint, by renaming it first: a kill meanwhile leaves none that is half there."""
        path = self._folder / str(step)
        try:
            going = path.rename(path.with_name(f"{step}{GOING}"))
            shutil.rmtree(going)
        except OSError as e:
            raise UserError(f"{path} cannot be deleted: {files.cause(path, e)}") from e

    def steps(self) -> list[int]:
        """Steps that have a committed checkpoint, damaged ones included, oldest first."""
        return committed_steps(self._folder)

    def save(self, step: int, state: Any, iterator: dict[str, Any], manifest: dict[str, Any]) -> None:
        """Starts a save and returns once the arrays are copied; errors of an earlier save surface here.

        Raises:
          UserError: this or an earlier save failed (a full disk); older checkpoints stay whole.
        """
        manifest = manifest | {
            "step": step,
            "leaves": integrity.describe(state),
            "checksums": integrity.checksums(state),
            "iterator_sha256": sha256_of(iterator),
        }
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            iterator=ocp.args.JsonSave(seal(iterator)),
            manifest=ocp.args.JsonSave(seal(manifest)),
        )
        try:
            self._writer.save(self._folder / str(step), args=args)
        except Exception as e:  # Orbax passes on what its storage layers raise, of no common type
            raise self._failed_save(e) from e

    def wait(self) -> None:
        """Returns when all saves are on disk. Raises UserError if one failed."""
        try:
            self._writer.wait_until_finished()
        except Exception as e:  # as in `save`
            raise self._failed_save(e) from e

    def close(self) -> None:
        """Waits for saves and frees Orbax's threads."""
        self.wait()
        self._writer.close()

    def _failed_save(self, error: Exception) -> UserError:
        if isinstance(error, UserError):
            return error
        system = files.system_error(error)
        why = first_line(error) if system is None else files.cause(self._folder, system)
        kept = ", ".join(map(str, self.steps())) or "none"
        return UserError(
            f"a checkpoint could not be written to {self._folder}: {why}; checkpoints kept: {kept}."
            " When that is mended, run the same command again"
        )

    def discard(self, wanted: Callable[[int], bool]) -> None:
        """Deletes the checkpoints of steps that are not wanted, once all saves are on disk."""
        self.wait()
        if jax.process_index() == 0:
            for step in self.steps():
                if not wanted(step):
                    self._delete(step)
        multihost_utils.sync_global_devices("discard checkpoints")

    def restore_latest(
        self,
        like: Any,
        identity: dict[str, Any],
        wanted: Callable[[int], bool] = lambda step: True,
        check: Callable[[dict[str, Any], Path], None] = lambda manifest, where: None,
    ) -> Restored | None:
        """The newest whole checkpoint, or None where none was ever committed.

        Args:
          like: a TrainState of ShapeDtypeStructs with the shardings wanted.
          identity: what the run is; see `provenance.identity`.
          wanted: of which steps.
          check: called with a checkpoint's manifest and folder; raises UserError if it is not this run's.

        Raises:
          UserError: the checkpoint belongs to a different run (the differences are listed), or none is whole.
        """
        self.wait()
        damaged = []
        for step in filter(wanted, reversed(self.steps())):
            try:
                restored = attempt(partial(self._restore_step, step, like, identity, check), self._folder / str(step))
            except DamagedError as e:
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

    def _restore_step(
        self, step: int, like: Any, identity: dict[str, Any], check: Callable[[dict[str, Any], Path], None]
    ) -> Restored:
        manifest = read_manifest(self._folder, step)
        refuse_differences(manifest["identity"], identity, self._folder / str(step))
        if "step" not in manifest:
            raise UserError(
                f"the checkpoint {self._folder / str(step)} was made by an older version of altgrad_jax; go on with"
                " that version, or start a new run from its weights with --config.checkpoint.restore_from"
            )
        check(manifest, self._folder / str(step))
        return read(self._folder, step, like, manifest)

    def _set_aside(self, step: int) -> Path:
        """Moves a damaged checkpoint out of the way and keeps it for inspection."""
        folder = self._folder.parent / "damaged"
        target = next(p for i in range(10**6) if not (p := folder / f"{step}.{i}").exists())
        if jax.process_index() == 0:
            try:
                folder.mkdir(exist_ok=True)
                shutil.move(self._folder / str(step), target)
            except OSError as e:
                raise files.unwritable(target, e) from e
        multihost_utils.sync_global_devices(f"set aside checkpoint {step}")
        return target
