"""From `config.optimizer` to an optax transformation and its learning-rate schedule."""

import jax
import optax
from ml_collections import ConfigDict

from altgrad_jax.errors import UsageError


def make_schedule(optimizer: ConfigDict, total_steps: int) -> optax.Schedule:
    """Learning rate as a function of the step, counted from 0.

    Warm-up is linear and its first step already moves: rate (step + 1) / warmup_steps x peak. After it the rate falls
    to `min_lr_ratio` x peak at `decay_steps` (0: `total_steps`), by a half cosine or a straight line, and stays there.
    """
    peak, warmup = optimizer.learning_rate, optimizer.warmup_steps
    decay = max(1, (optimizer.decay_steps or total_steps) - warmup)
    if optimizer.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, decay, alpha=optimizer.min_lr_ratio)
    elif optimizer.schedule == "linear":
        after = optax.linear_schedule(peak, peak * optimizer.min_lr_ratio, decay)
    else:
        after = optax.constant_schedule(peak)
    if warmup == 0:
        return after
    ramp = optax.linear_schedule(peak / warmup, peak, max(1, warmup - 1))
    return optax.join_schedules([ramp, after], [warmup])


def is_matrix(params) -> object:
    """Mask of the parameters that weight decay applies to: matrices, not biases or LayerNorm gains."""
    return jax.tree.map(lambda p: p.ndim >= 2, params)


def make_optimizer(optimizer: ConfigDict, total_steps: int) -> optax.GradientTransformation:
    """Gradient clipping by global norm, then AdamW (Loshchilov & Hutter 2019) with decay on matrices only.

    Raises:
      UsageError: `config.optimizer.name` is not known.
    """
    if optimizer.name != "adamw":
        raise UsageError(f"config.optimizer.name={optimizer.name!r} is not known; there is adamw")
    adamw = optax.adamw(
        make_schedule(optimizer, total_steps),
        b1=optimizer.b1,
        b2=optimizer.b2,
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        mask=is_matrix,
    )
    if optimizer.grad_clip == 0:
        return adamw
    return optax.chain(optax.clip_by_global_norm(optimizer.grad_clip), adamw)
