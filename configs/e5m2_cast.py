"""The bare `jnp.float8_e5m2` cast: E5M2 with no scales, as one would first write it.

    python -m altgrad_jax.main --config=configs/e5m2_cast.py            # with a dynamic loss scale
    python -m altgrad_jax.main --config=configs/e5m2_cast.py:quick
    python -m altgrad_jax.main --config=configs/e5m2_cast.py:quick --config.train.loss_scale=1    # without one

E5M2's smallest value is 2^-16 = 1.5e-5, and the gradients of a mean over thousands of tokens are smaller than that, so
without a loss scale most of them become zero. Values beyond 57344 become infinite, as the cast has it; a step with
such a gradient is left out and the scale halved.

Expect: docs/results/formats.md has the losses measured with and without loss scaling.
"""

from altgrad_jax.config import load_sibling


def get_config(variant: str = ""):
    """The baseline with bare casts and a dynamic loss scale; `variant` is "" or "quick"."""
    config = load_sibling(__file__, "base").get_config(variant)
    config.precision.rules = ((r"blocks\..*|lm_head", "e5m2_cast"),)
    config.train.loss_scale = "dynamic"
    config.tracking.name = "e5m2-cast" if not variant else f"e5m2-cast-{variant}"
    config.tracking.tags = ("fp8", "e5m2", "cast")
    return config
