"""Runs a matrix of experiments: every recipe x optimizer x seed, many at once, resumable.

    python -m altgrad_jax.sweep --config=configs/matrix.py:quick --workdir=runs/quick [--shard=0/4]

Running the same command again goes on: conditions that have ended are not repeated, groups that were running go on
from their checkpoints. A condition that diverges or fails is a result. Exit status: 0 all conditions have ended, 1
some failed or have no result, 2 usage error, 129 / 130 / 138 / 143 stopped by SIGHUP / Ctrl-C / SIGUSR1 / SIGTERM: by
the first with a checkpoint, by a second without. `python -m altgrad_jax.report WORKDIR --out=report.html` shows the
results.
"""

import math
import shlex
import shutil
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from altgrad_jax.allocator import restart_with_large_pages
from altgrad_jax.interrupt import GracefulStop, watch
from altgrad_jax.streams import occupy_closed_streams, protect_streams

if __name__ == "__main__":
    restart_with_large_pages()
    occupy_closed_streams()
    watch()

from absl import flags
from ml_collections import ConfigDict
from rich.console import Console

from altgrad_jax import cli, provenance
from altgrad_jax.config import check_is_matrix, load_config
from altgrad_jax.console import make_console, print_header
from altgrad_jax.data.corpus import describe, open_corpus, refuse_another_meaning
from altgrad_jax.errors import UsageError, UserError
from altgrad_jax.files import make_folder, read_json, write_json
from altgrad_jax.machine import check_xla_flags
from altgrad_jax.optimizers import describe_schedule
from altgrad_jax.sweep.groups import program_keys
from altgrad_jax.sweep.matrix import PLAIN_CONFIG, Condition, conditions
from altgrad_jax.sweep.progress import Progress
from altgrad_jax.sweep.run import in_process_of_its_own, refuse_others, run_all
from altgrad_jax.sweep.search import choose, search_conditions
from altgrad_jax.versions import check_versions

MANY_ON_CPU, MANY = 8, 64  # conditions in one program where config.together is 0


def parse_shard(text: str) -> tuple[int, int]:
    """ "i/n" as (i, n).

    Raises:
      UsageError: it is no such thing, or i is not below n.
    """
    i, slash, n = text.partition("/")
    if not (slash and i.isdecimal() and n.isdecimal() and int(i) < int(n)):
        raise UsageError(f"--shard={text} is not i/n with i from 0 to n - 1, such as 0/4")
    return int(i), int(n)


def sweep(matrix: ConfigDict, workdir: Path, shard: tuple[int, int], restart: bool = False) -> int:
    """Runs a matrix, or its `shard`, in a folder; returns the exit status. To `restart` is to begin conditions anew
    whose checkpoint is lost.

    Raises:
      UsageError: the matrix contradicts itself.
      UserError: anything else that the user can mend.
    """
    workdir = workdir.absolute()  # as Orbax wants it
    plain = load_config(PLAIN_CONFIG)
    if matrix.together < 0:
        raise UsageError(f"config.together={matrix.together} must be 0 (as many as memory allows) or more")
    if matrix.base.tracking.wandb != "disabled":
        raise UsageError(
            "config.base.tracking.wandb must be 'disabled': the conditions of a sweep are recorded in their"
            " folders, and not sent to W&B"
        )
    compiled = workdir / f"compiled-{shard[0]}of{shard[1]}"
    if not matrix.base.runtime.compilation_cache:  # groups of one size share their programs
        matrix.base.runtime.compilation_cache = str(compiled)
    trial, all_conditions = search_conditions(matrix, plain), conditions(matrix, plain)
    # In a process of its own: one that has opened a GPU holds its memory, and this one lives as long as the sweep.
    backend, keys = in_process_of_its_own(program_keys, [*trial, *all_conditions])
    corpus = open_corpus(matrix.base)  # prepared once, before any process needs it
    console = make_console()
    progress = Progress(console)
    most = matrix.together or (MANY_ON_CPU if backend == "cpu" else MANY)
    together = min(most, math.ceil(len(all_conditions) / shard[1]))
    for condition in all_conditions:
        place = workdir / condition.name
        refuse_another_meaning(matrix.base.data, corpus.header, read_json(place / "manifest.json"), place)
    refuse_others(trial, workdir / "search", corpus.sha256)
    refuse_others(all_conditions, workdir, corpus.sha256, without=("learning_rate",) if trial else ())
    _describe(workdir, matrix, all_conditions)
    facts = {
        "question": matrix.question,
        "work directory": str(workdir),
        "conditions": f"{len(all_conditions)}, and {len(trial)} of the search for learning rates",
        "each": f"{matrix.base.train.steps} steps, data {corpus.sha256[:8]}",
        "corpus": describe(matrix.base.data, corpus.header),
        "learning rates": f"of each condition, as a factor: {_schedule(matrix.base)}",
        "shard": f"{shard[0]} of {shard[1]}",
    }
    print_header(console, f"altgrad_jax sweep {matrix.name}", facts)
    given: dict[str, Any] = {"matrix": matrix.name, "keys": keys, "data_sha256": corpus.sha256, "progress": progress}
    given |= {"together": together, "restart": restart}
    with GracefulStop() as stop:
        factors = {}
        if trial:
            if not run_all(trial, workdir / "search", shard=(0, 1), stop=stop, **given):
                return _interrupted(console, stop)
            _refuse_gaps(progress)
            found = choose(trial, workdir / "search", matrix.optimizers)
            write_json(workdir / "search" / "rates.json", found)
            factors = found["factors"]
            for line in [f"learning rates x {factors}", *found["notes"]]:
                console.print(line, soft_wrap=True)
        chosen = conditions(matrix, plain, factors)
        _describe(workdir, matrix, chosen)
        if not run_all(chosen, workdir, shard=shard, stop=stop, **given):
            return _interrupted(console, stop)
    shutil.rmtree(compiled, ignore_errors=True)
    for line in progress.table():
        console.print(line, soft_wrap=True)
    report = shlex.join(["python", "-m", "altgrad_jax.report", str(workdir), f"--out={workdir}/report.html"])
    counts = progress.statuses()
    console.print(f"ended: {', '.join(f'{n} {status}' for status, n in counts.items())}; in {workdir}", soft_wrap=True)
    console.print(f"to compare them: {report}", soft_wrap=True)
    _refuse_gaps(progress)
    return 1 if counts.get("failed") else 0


def _interrupted(console: Console, stop: GracefulStop) -> int:
    """Says how to go on; returns the exit status."""
    console.print(f"interrupted; to go on: {provenance.to_go_on(_command())}", soft_wrap=True)
    return stop.exit_code


def _refuse_gaps(progress: Progress) -> None:
    """Raises UserError where conditions have no result: whoever ended their processes, it was not the conditions."""
    if found := progress.given_up:
        name, reason = next(iter(found.items()))
        more = f" (and {len(found) - 1} more conditions)" if len(found) > 1 else ""
        raise UserError(
            f"{name}{more} has no result: {reason}. The same command tries again; if the kernel ended it for want of"
            " memory (dmesg says so), lower config.base.train.batch_size"
        )


def _command() -> list[str]:
    return ["python", "-m", "altgrad_jax.sweep", *sys.argv[1:]]


def _schedule(base: ConfigDict) -> str:
    """What all conditions' rates have in common."""
    relative = ConfigDict(base.optimizer.to_dict() | {"learning_rate": 1.0})
    return describe_schedule(relative, base.train.steps)


def _describe(workdir: Path, matrix: ConfigDict, all_conditions: Sequence[Condition]) -> None:
    """Writes matrix.json."""
    make_folder(workdir)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    write_json(
        workdir / "matrix.json",
        {
            "name": matrix.name,
            "question": matrix.question,
            "command": _command(),
            "created": (read_json(workdir / "matrix.json", {"created?": str}) or {}).get("created", now),
            "conditions": [{"name": c.name, **c.facts} for c in all_conditions],
        },
    )


def main() -> int:
    """Checks the matrix, then runs it."""
    protect_streams()
    matrix = cli.read_config(CONFIG, check_is_matrix)
    shard = parse_shard(SHARD.value)
    cli.quiet_libraries()
    check_versions()
    check_xla_flags()
    return sweep(matrix, Path(WORKDIR.value or f"runs/{matrix.name}").expanduser(), shard, RESTART.value)


if __name__ == "__main__":
    CONFIG = cli.define_config()
    WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the conditions' folders; default runs/<config.name>.")
    SHARD = flags.DEFINE_string("shard", "0/1", "Part i of n of the conditions, for several machines: i/n.")
    RESTART = flags.DEFINE_boolean(
        "restart",
        False,
        "Begin conditions anew whose checkpoint is lost; their records are moved to their folder `earlier`.",
    )
    cli.run(main)
