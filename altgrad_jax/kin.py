"""Whether the files of a work directory belong together: what was recorded, what was saved, what it began from.

A checkpoint seals the run's id and, of a run that began with the weights of another, which they were. manifest.json has
the id too, and whether a checkpoint was ever saved: where it says so and there is none, it was lost.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from altgrad_jax.checkpoint_files import ancestor
from altgrad_jax.errors import UserError
from altgrad_jax.workdir import Workdir


def is_lost(workdir: Workdir) -> bool:
    """Whether a folder without a checkpoint has had one, by what else lies in it.

    Raises:
      UserError: its manifest is damaged.
    """
    manifest = workdir.read_json("manifest.json")
    if manifest is not None:
        return bool(manifest.get("checkpointed"))
    return any((workdir.path / name).exists() for name in ("metrics.jsonl", "summary.json"))


def refuse_lost(workdir: Workdir) -> None:
    """Raises UserError if the checkpoints of the run in a folder are gone: it must not begin anew in silence."""
    if is_lost(workdir):
        raise UserError(
            f"{workdir.path} has the records of a run, and its checkpoints are gone from {workdir.checkpoints}; bring"
            " them back, or give --restart to begin anew (what is there is moved to its folder `earlier`)"
        )


def refuse_strangers(
    manifest: Mapping[str, Any] | None, restore_from: str | None, sealed: Mapping[str, Any], where: Path
) -> None:
    """Checks that a checkpoint is one of this run.

    Args:
      manifest: manifest.json of the work directory; None if there is none.
      restore_from: `config.checkpoint.restore_from`.
      sealed: the checkpoint's manifest.
      where: the checkpoint's folder.

    Raises:
      UserError: it is another run's, or that run began with other weights than those asked for.
    """
    if manifest is not None and manifest.get("run_id", sealed["run_id"]) != sealed["run_id"]:
        raise UserError(
            f"{where} belongs to another run (run_id {sealed['run_id']}, and manifest.json has {manifest['run_id']});"
            " bring back this run's checkpoints, or give --restart to begin anew"
        )
    if not restore_from:
        return
    began = sealed["ancestor"]
    if began is None:
        raise UserError(
            f"{where} is of a run that began with new weights, not with those of"
            f" --config.checkpoint.restore_from={restore_from}; leave that out, or use another --workdir"
        )
    try:
        # A run that has gone on since has newer checkpoints than the one that was taken.
        asked = ancestor(restore_from if "@" in restore_from else f"{restore_from}@{began['step']}")
    except UserError:
        return  # it is gone, and no longer needed: this run goes on from its own checkpoints
    if asked != began:
        raise UserError(
            f"{where} is of a run that began with other weights (step {began['step']},"
            f" {began['weights_sha256'][:8]}) than --config.checkpoint.restore_from={restore_from} has now (step"
            f" {asked['step']}, {asked['weights_sha256'][:8]}); leave that out to go on, or use another --workdir"
        )
