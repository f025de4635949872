"""The BF16 baseline that every number format is compared with.

    python -m altgrad_jax.main --config=configs/bf16.py          # 2000 steps, 30 M parameters; a GPU job
    python -m altgrad_jax.main --config=configs/bf16.py:quick    # 300 steps, 0.9 M parameters; a minute on 2 CPU cores

Expect: see "What a run looks like" in the README and docs/results/baseline.md for measured losses and times.
"""

from altgrad_jax.config import load_sibling


def get_config(variant: str = ""):
    """The defaults, named for tracking; `variant` is "" or "quick"."""
    config = load_sibling(__file__, "base").get_config(variant)
    config.tracking.name = "bf16-baseline" if not variant else f"bf16-baseline-{variant}"
    config.tracking.tags = ("baseline", "bf16")
    return config
