"""The E5M2 experiment: the BF16 baseline with every dense layer's operands in 8-bit E5M2.

    python -m altgrad_jax.main --config=configs/e5m2.py          # 2000 steps, 30 M parameters; a GPU job
    python -m altgrad_jax.main --config=configs/e5m2.py:quick    # 300 steps; about a minute and a half on 2 CPU cores

Same model, data, seed and schedule as configs/bf16.py. Activations, weights and gradients are rounded to E5M2 under one
delayed scale a tensor, in all three products of every dense layer and of the output layer; embeddings are not products
and stay as they are.

Expect: docs/results/formats.md has the losses measured beside the other formats'.
"""

from altgrad_jax.config import load_sibling


def get_config(variant: str = ""):
    """The baseline with its dense layers in E5M2; `variant` is "" or "quick"."""
    config = load_sibling(__file__, "base").get_config(variant)
    config.precision.rules = ((r"blocks\..*|lm_head", "e5m2"),)
    config.tracking.name = "e5m2" if not variant else f"e5m2-{variant}"
    config.tracking.tags = ("fp8", "e5m2")
    return config
