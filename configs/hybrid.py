"""E4M3 forward, E5M2 for gradients: the recipe that FP8 libraries ship (Micikevicius et al. 2022, arXiv 2209.05433).

    python -m altgrad_jax.main --config=configs/hybrid.py          # 2000 steps, 30 M parameters; a GPU job
    python -m altgrad_jax.main --config=configs/hybrid.py:quick    # 300 steps; about a minute and a half on 2 CPU cores

One delayed scale a tensor. Activations and weights need precision and get three mantissa bits; gradients need range.

Expect: docs/results/formats.md has the losses measured beside the other formats'.
"""

from altgrad_jax.config import load_sibling


def get_config(variant: str = ""):
    """The baseline with its dense layers in the hybrid recipe; `variant` is "" or "quick"."""
    config = load_sibling(__file__, "base").get_config(variant)
    config.precision.rules = ((r"blocks\..*|lm_head", "hybrid"),)
    config.tracking.name = "hybrid" if not variant else f"hybrid-{variant}"
    config.tracking.tags = ("fp8", "hybrid")
    return config
