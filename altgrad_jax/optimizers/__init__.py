"""optax.GradientTransformations, and the factory that reads `config.optimizer`."""

from altgrad_jax.optimizers.factory import make_optimizer, make_schedule

__all__ = ["make_optimizer", "make_schedule"]
