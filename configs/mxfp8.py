"""Microscaling FP8: E4M3 in blocks of 32 that share a power-of-two scale (OCP MX 1.0).

    python -m altgrad_jax.main --config=configs/mxfp8.py          # 2000 steps, 30 M parameters; a GPU job
    python -m altgrad_jax.main --config=configs/mxfp8.py:quick    # 300 steps; about two minutes on 2 CPU cores

Blocks run along the contraction of each product, so that every operand is rounded twice, once for either product.
Emulated: no H100 or H200 multiplies block-scaled operands.

Expect: in the quick variant a loss clearly above BF16's. It has a power of two of tokens a step, where the standard's
rule for scales lets the targets' entries of the output layer's gradient saturate (docs/results/formats.md).
"""

from altgrad_jax.config import load_sibling


def get_config(variant: str = ""):
    """The baseline with its dense layers in MXFP8; `variant` is "" or "quick"."""
    config = load_sibling(__file__, "base").get_config(variant)
    config.precision.rules = ((r"blocks\..*|lm_head", "mxfp8"),)
    config.tracking.name = "mxfp8" if not variant else f"mxfp8-{variant}"
    config.tracking.tags = ("fp8", "mx")
    return config
