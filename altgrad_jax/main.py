"""The main job: trains as a config file says, or resumes.

    python -m altgrad_jax.main --config=configs/bf16.py:quick --workdir=runs/quick [--config.train.steps=500]

Running the same command again continues where the run stopped. --describe prints what would run and what it takes, and
stops. Exit status: 0 finished, 1 failed or diverged, 2 usage error, 75 another one of several processes is absent or
gone, 129 / 130 / 138 / 143 stopped by SIGHUP / Ctrl-C / SIGUSR1 / SIGTERM. The first signal finishes the step and saves
a checkpoint; while the program starts or compiles there is nothing to save. A second one stops at once, unsaved: the
same command goes on from an earlier checkpoint, if any.
"""

from pathlib import Path

from altgrad_jax.allocator import restart_with_large_pages
from altgrad_jax.interrupt import watch
from altgrad_jax.streams import occupy_closed_streams, protect_streams

if __name__ == "__main__":
    restart_with_large_pages()
    occupy_closed_streams()
    watch()

import jax
from absl import flags

from altgrad_jax import cli
from altgrad_jax.config import validate
from altgrad_jax.describe import describe
from altgrad_jax.errors import UsageError
from altgrad_jax.hosts import together
from altgrad_jax.machine import check_xla_flags
from altgrad_jax.train import train
from altgrad_jax.versions import check_versions

CONFIG = cli.define_config()
DESCRIBE = flags.DEFINE_boolean("describe", False, "Print header, layers and memory, and stop; nothing is trained.")
WORKDIR = flags.DEFINE_string("workdir", None, "Work directory; default runs/<config.tracking.name>.")
RESTART = flags.DEFINE_boolean(
    "restart", False, "Begin anew; what an earlier run left in the work directory is moved to its folder `earlier`."
)


def main() -> int:
    """Checks the configuration, then trains."""
    protect_streams()
    config = cli.read_config(CONFIG)
    validate(config)
    cli.quiet_libraries()
    check_versions()
    check_xla_flags()
    workdir = WORKDIR.value or f"runs/{config.tracking.name}"
    if DESCRIBE.value:
        if config.parallel.hosts > 1:
            raise UsageError("--describe is of one process: leave config.parallel.hosts and coordinator out")
        return describe(config, Path(workdir).expanduser().absolute())
    if config.runtime.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", str(Path(config.runtime.compilation_cache).expanduser()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    with together(config, workdir, {"--restart": RESTART.value}):
        return train(config, workdir, restart=RESTART.value)


if __name__ == "__main__":
    cli.run(main)
