"""optax.GradientTransformations that know the grid of the weights, and the factory that reads `config.optimizer`."""

from altgrad_jax.optimizers.clipping import clip_by_format_range
from altgrad_jax.optimizers.factory import make_optimizer
from altgrad_jax.optimizers.grid import grid
from altgrad_jax.optimizers.grids import apply_on_grids, snap_to_grids
from altgrad_jax.optimizers.madam import madam
from altgrad_jax.optimizers.manifold import manifold_adamw
from altgrad_jax.optimizers.schedule import describe_schedule, make_schedule
from altgrad_jax.optimizers.stored import adamw_sr

__all__ = [
    "adamw_sr",
    "apply_on_grids",
    "clip_by_format_range",
    "describe_schedule",
    "grid",
    "madam",
    "make_optimizer",
    "make_schedule",
    "manifold_adamw",
    "snap_to_grids",
]
