"""From `config.optimizer` to an optax transformation."""

from collections.abc import Callable
from typing import TypeAlias

import jax
import optax
from ml_collections import ConfigDict

from altgrad_jax.errors import UsageError
from altgrad_jax.optimizers.clipping import clip_by_format_range
from altgrad_jax.optimizers.grid import grid
from altgrad_jax.optimizers.grids import Formats, labels
from altgrad_jax.optimizers.madam import madam
from altgrad_jax.optimizers.manifold import manifold_adamw
from altgrad_jax.optimizers.schedule import make_schedule
from altgrad_jax.optimizers.stored import adamw_sr

Transformation: TypeAlias = optax.GradientTransformation
ADAM = ("b1", "b2", "eps", "weight_decay")
# What each optimizer reads of `config.optimizer` beside the schedule and `grad_clip`.
OPTIONS = {
    "adamw": ADAM,
    "manifold_adamw": (*ADAM, "placement", "form", "max_stiffness", "other_learning_rate"),
    "grid": (*ADAM, "momentum", "rung_clip", "other_learning_rate", "weights"),
    "madam": (*ADAM, "update_clip", "max_scale", "other_learning_rate"),
    "adamw_sr": (*ADAM, "weights", "moments"),
}
OWN_OPTIONS = tuple(dict.fromkeys(key for keys in OPTIONS.values() for key in keys if key not in ADAM))
KEEP_TO_GRIDS = ("grid", "adamw_sr")  # weights are on the grid after every step


def needs_formats(optimizer: ConfigDict) -> bool:
    """Whether the optimizer works on the grids of quantised layers, and has nothing to do without any."""
    on_bfloat16 = optimizer.name == "adamw_sr" and optimizer.weights == "bfloat16"
    return optimizer.name in ("manifold_adamw", "grid", "adamw_sr") and not on_bfloat16


def is_matrix(params) -> object:
    """Mask of the parameters that weight decay applies to: matrices, not biases or LayerNorm gains."""
    return jax.tree.map(lambda p: p.ndim >= 2, params)


def no_formats(name: str) -> None:
    """Of a model without quantised layers."""
    del name


def make_optimizer(
    optimizer: ConfigDict,
    total_steps: int,
    formats: Formats = no_formats,
    seed: int | jax.Array = 0,
    relative_clip: bool = False,
) -> Transformation:
    """Gradient clipping by global norm, then the optimizer named, with decay on matrices only.

    Args:
      optimizer: `config.optimizer`.
      total_steps: of the run.
      formats: of the parameters, by name.
      seed: of stochastic rounding.
      relative_clip: clip each format by its range (`clip_by_format_range`).

    Raises:
      UsageError: `config.optimizer.name` is not known.
    """
    if optimizer.name not in MAKERS:
        raise UsageError(f"config.optimizer.name={optimizer.name!r} is not known; there are {', '.join(MAKERS)}")
    made = MAKERS[optimizer.name](optimizer, total_steps, formats, seed)
    if optimizer.grad_clip == 0:
        return made
    if relative_clip:
        return optax.chain(clip_by_format_range(optimizer.grad_clip, formats), made)
    return optax.chain(optax.clip_by_global_norm(optimizer.grad_clip), made)


def _adam_options(c: ConfigDict) -> dict:
    return {"b1": c.b1, "b2": c.b2, "eps": c.eps, "weight_decay": c.weight_decay, "mask": is_matrix}


def _other(c: ConfigDict, total_steps: int) -> Transformation:
    """AdamW for the parameters that the named optimizer leaves alone."""
    return optax.adamw(make_schedule(c, total_steps, c.other_learning_rate), **_adam_options(c))


def _adamw(c: ConfigDict, total_steps: int, formats: Formats, seed: int | jax.Array) -> Transformation:
    del formats, seed
    return optax.adamw(make_schedule(c, total_steps), **_adam_options(c))


def _manifold(c: ConfigDict, total_steps: int, formats: Formats, seed: int | jax.Array) -> Transformation:
    del seed
    own = {"placement": c.placement, "form": c.form, "max_stiffness": c.max_stiffness}
    other = make_schedule(c, total_steps, c.other_learning_rate)
    schedule = make_schedule(c, total_steps)
    return manifold_adamw(schedule, formats, **own, **_adam_options(c), other_learning_rate=other)


def _grid(c: ConfigDict, total_steps: int, formats: Formats, seed: int | jax.Array) -> Transformation:
    own = {"momentum": c.momentum, "weight_decay": c.weight_decay, "rung_clip": c.rung_clip, "seed": seed}
    parts = {"grid": grid(make_schedule(c, total_steps), formats, **own), "rest": _other(c, total_steps)}
    return optax.partition(parts, lambda tree: labels(formats, tree))


def _madam(c: ConfigDict, total_steps: int, formats: Formats, seed: int | jax.Array) -> Transformation:
    """Multiplicative for matrices, whose elements begin away from zero; vectors may begin at it, and get AdamW."""
    del formats, seed
    made = madam(make_schedule(c, total_steps), b=c.b2, update_clip=c.update_clip, max_scale=c.max_scale)
    parts = {"grid": made, "rest": _other(c, total_steps)}
    return optax.partition(parts, lambda tree: jax.tree.map(lambda p: "grid" if p.ndim >= 2 else "rest", tree))


def _adamw_sr(c: ConfigDict, total_steps: int, formats: Formats, seed: int | jax.Array) -> Transformation:
    return adamw_sr(make_schedule(c, total_steps), formats, moments=c.moments, seed=seed, **_adam_options(c))


MAKERS: dict[str, Callable[[ConfigDict, int, Formats, int | jax.Array], Transformation]] = {
    "adamw": _adamw,
    "manifold_adamw": _manifold,
    "grid": _grid,
    "madam": _madam,
    "adamw_sr": _adamw_sr,
}
