"""What lies in a folder of checkpoints, and how it is read: nothing is believed that its seal does not bear out.

A checkpoint holds `state`, `iterator` and `manifest`. The manifest is sealed by a hash of its own. It says which step
it is of, and has the checksum of every array and the hash of the iterator beside it: so a checkpoint under another
name, or with a part of another one, is damaged like one whose bytes have changed. What the operating system refuses to
read is not.
"""

import gc
import hashlib
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp

from altgrad_jax import files, integrity
from altgrad_jax.differences import differences
from altgrad_jax.errors import UsageError, UserError
from altgrad_jax.machine import is_out_of_memory

T = TypeVar("T")
ITEMS = ("state", "iterator", "manifest")
OUTPUT_LAYERS = ("params.lm_head",)  # of a language model, beside the trunk
_NAME = re.compile("0|[1-9][0-9]*")


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


def seal(content: dict[str, Any]) -> dict[str, Any]:
    """JSON content with a SHA-256 of itself."""
    return {"content": content, "sha256": sha256_of(content)}


def sha256_of(content: Any) -> str:
    """Of what JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _unseal(sealed: Any, what: str) -> dict[str, Any]:
    if not isinstance(sealed, dict) or "content" not in sealed or seal(sealed["content"]) != sealed:
        raise ValueError(f"{what} does not match its checksum")
    return sealed["content"]


class DamagedError(Exception):
    """A checkpoint is not what was written; the text says why."""


def attempt(read: Callable[[], T], where: Path) -> T:
    """What `read` returns.

    Args:
      read: reads a checkpoint.
      where: its folder.

    Raises:
      DamagedError: for whatever the storage layers raise on damaged files.
      UnreadableError: the operating system refuses to read them.
    """
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
                if is_out_of_memory(e):
                    raise
                refused = _refusal(e, where)
                reason = first_line(e)
            gc.collect()
        finally:
            sys.unraisablehook = hook
    if refused is not None:
        raise files.unreadable(*refused)
    raise DamagedError(reason)


def first_line(error: Exception) -> str:
    """What an exception says, short enough for a log."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _refusal(error: Exception, where: Path) -> tuple[Path, OSError] | None:
    """Which file of a checkpoint the operating system refuses to read, if it was that."""
    for path in (where, *_files(where)):
        try:
            if path.is_dir():
                os.listdir(path)
            else:
                with open(path, "rb") as file:
                    while file.read(2**20):
                        pass
        except OSError as e:
            if e.errno in files.REFUSALS:
                return path, e
    said = files.system_error(error)  # for a moment, as too many open files are
    return None if said is None else (where, said)


def _files(folder: Path) -> Iterator[Path]:
    for below, folders, names in os.walk(folder):
        yield from (Path(below) / name for name in (*folders, *names))


def committed_steps(folder: Path) -> list[int]:
    """Steps with a committed checkpoint in a folder, oldest first. Orbax writes elsewhere and renames when whole.

    Raises:
      UnreadableError: the folder cannot be read.
    """
    try:
        if not folder.is_dir():
            return []
        return sorted(int(p.name) for p in folder.iterdir() if _NAME.fullmatch(p.name) and p.is_dir())
    except OSError as e:
        raise files.unreadable(folder, e) from e


def refuse_what_is_in_the_way(folder: Path) -> None:
    """Raises UserError where something that is no folder has the name of a checkpoint to come."""
    for path in folder.iterdir():
        if _NAME.fullmatch(path.name) and not path.is_dir():
            raise UserError(f"{path} is no folder, and has the name of a checkpoint; move it away")


def _restore(folder: Path, step: int, args: dict[str, Any]) -> Any:
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler(*ITEMS)) as reader:
        return reader.restore(folder / str(step), args=ocp.args.Composite(**args))


def read_manifest(folder: Path, step: int) -> dict[str, Any]:
    """A checkpoint's manifest, its checksum and its place verified.

    Raises:
      Exception: it is damaged (the storage layers' own types, or ValueError).
    """
    sealed = _restore(folder, step, {"manifest": ocp.args.JsonRestore()})["manifest"]
    manifest = _unseal(sealed, "the manifest")
    if manifest.get("step", step) != step:
        raise ValueError(f"it is the checkpoint of step {manifest['step']} under another name")
    return manifest


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
    iterator = _unseal(items["iterator"], "the iterator")
    if sha256_of(iterator) != manifest["iterator_sha256"]:
        raise ValueError("the iterator is that of another checkpoint")
    return Restored(step, items["state"], iterator, manifest)


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
    folder, step, name = _locate(source)
    where = folder / str(step)
    try:
        parts = attempt(partial(_read_parts, folder, step, like, optional), where)
    except DamagedError as e:
        raise UserError(f"the checkpoint {where} is damaged: {e}; choose another with {name}@STEP") from e
    return jax.tree.map(lambda x: x, parts), step, where


def _locate(source: str) -> tuple[Path, int, str]:
    """Folder of checkpoints and step that DIR or DIR@STEP names, and DIR. Raises UserError if there is none."""
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
    return folder, step, name


def ancestor(source: str) -> dict[str, Any]:
    """What names the weights in DIR or DIR@STEP: `step`, and `weights_sha256` over the checksums of the parameters.

    Raises:
      UserError: there is no such checkpoint, or it is damaged.
    """
    folder, step, name = _locate(source)
    try:
        manifest = attempt(partial(read_manifest, folder, step), folder / str(step))
    except DamagedError as e:
        raise UserError(f"the checkpoint {folder / str(step)} is damaged: {e}; choose another with {name}@STEP") from e
    weights = {leaf: value for leaf, value in manifest["checksums"].items() if leaf.startswith("params.")}
    return {"step": step, "weights_sha256": sha256_of(weights)}


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
