"""`main --describe`: what a run would be, and what it would take, without beginning it."""

from pathlib import Path

from ml_collections import ConfigDict

from altgrad_jax import experiment
from altgrad_jax.checkpoint import committed_steps
from altgrad_jax.console import make_console, print_header, print_lines
from altgrad_jax.data.corpus import open_corpus
from altgrad_jax.machine import check_device, memory_errors
from altgrad_jax.program import WHAT_SAVES_MEMORY
from altgrad_jax.run_record import header, memory_lines


def describe(config: ConfigDict, workdir: Path) -> int:
    """Prints the header, the layers and the memory of a run; its work directory is neither made nor changed.

    The corpus is prepared if it is not yet, and the training step is compiled, for what it needs beside the state.
    """
    check_device()
    exp = experiment.build(config, open_corpus(config))
    steps = committed_steps(workdir / "checkpoints")
    origin = f"the checkpoint of step {steps[-1]}" if steps else _origin(config)
    console = make_console()
    facts = header(exp, workdir, steps[-1] if steps else 0, origin)
    print_header(console, f"altgrad_jax {config.tracking.name}", facts)
    print_lines(console, exp.policy.lines())
    with memory_errors(WHAT_SAVES_MEMORY):
        compiled = exp.compile_train()
    print_lines(console, memory_lines(exp, compiled.memory_analysis()))
    return 0


def _origin(config: ConfigDict) -> str:
    source = config.checkpoint.restore_from
    return f"the weights of {source}" if source else f"new weights from seed {config.seed}"
