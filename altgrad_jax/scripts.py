"""The commands by a short name: `altgrad-train ...` is `python -m altgrad_jax.main ...`.

Each runs its module as `python -m` does, so that the two differ in nothing but their name.
"""

import runpy
from functools import partial


def _run(module: str) -> None:
    runpy.run_module(module, run_name="__main__", alter_sys=True)


audit = partial(_run, "altgrad_jax.audit")
data = partial(_run, "altgrad_jax.data")
formats = partial(_run, "altgrad_jax.formats")
report = partial(_run, "altgrad_jax.report")
sample = partial(_run, "altgrad_jax.sample")
sweep = partial(_run, "altgrad_jax.sweep")
train = partial(_run, "altgrad_jax.main")
