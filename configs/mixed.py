"""Attention, MLP and output layer in formats of their own.

    python -m altgrad_jax.main --config=configs/mixed.py          # 2000 steps, 30 M parameters; a GPU job
    python -m altgrad_jax.main --config=configs/mixed.py:quick    # 300 steps; about a minute and a half on 2 CPU cores

The first rule that matches a layer decides; the table printed at the start shows what came of them. Here attention runs
in E5M2, the MLPs in the hybrid recipe with scales of their own tensors, and the output layer stays in BF16.

Expect: the loss of BF16 within the spread of seeds (EUR-Lex, seeds 42 and 43: 3.941, 3.938; BF16: 3.976, 3.884).
"""

from altgrad_jax.config import load_sibling


def get_config(variant: str = ""):
    """The baseline with three kinds of layers in three arithmetics; `variant` is "" or "quick"."""
    config = load_sibling(__file__, "base").get_config(variant)
    config.precision.rules = (
        (r"lm_head|wte|wpe", "bf16"),
        (r"blocks\.\d+\.attn\..*", "e5m2"),
        (r"blocks\.\d+\.mlp\..*", "hybrid scaling=current"),
    )
    config.tracking.name = "mixed" if not variant else f"mixed-{variant}"
    config.tracking.tags = ("fp8", "mixed")
    return config
