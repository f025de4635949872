"""The learning rate over the steps: the schedule, what it cannot mean, and how a run says what it does."""

from collections.abc import Iterator

import optax
from ml_collections import ConfigDict


def make_schedule(optimizer: ConfigDict, total_steps: int, peak: float | None = None) -> optax.Schedule:
    """Learning rate as a function of the step, counted from 0.

    Warm-up is linear and its first step already moves: rate (step + 1) / warmup_steps x peak. After it the rate falls
    to `min_lr_ratio` x peak at `decay_steps` (0: `total_steps`), by a half cosine or a straight line, and stays there.
    `peak` is `learning_rate` where it is not given.
    """
    peak, warmup = optimizer.learning_rate if peak is None else peak, optimizer.warmup_steps
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


def schedule_violations(optimizer: ConfigDict) -> Iterator[str]:
    """What no schedule can mean, each in one sentence with the way out."""
    decay, warmup = optimizer.decay_steps, optimizer.warmup_steps
    if decay and optimizer.schedule == "constant":
        yield (
            f"config.optimizer.decay_steps={decay} does nothing with config.optimizer.schedule=constant: use cosine or"
            " linear, or leave it out"
        )
    elif decay and decay <= warmup:
        yield (
            f"config.optimizer.decay_steps={decay} is not above config.optimizer.warmup_steps={warmup}: the rate would"
            " fall to its floor in one step; decay_steps counts from step 0, and 0 stands for config.train.steps"
        )


def describe_schedule(optimizer: ConfigDict, total_steps: int) -> str:
    """One line for people, with what a run of `total_steps` does not get to see of its schedule."""
    peak, warmup, decay = optimizer.learning_rate, optimizer.warmup_steps, optimizer.decay_steps or total_steps
    if peak == 0:
        return "0: no weight will move (config.optimizer.learning_rate)"
    if warmup > total_steps:
        return (
            f"still in its warm-up when the run ends: {total_steps} of {warmup} steps (config.optimizer.warmup_steps),"
            f" so it reaches {total_steps / warmup:.0%} of {peak:g}"
        )
    ramp = f"warm-up to {peak:g} in {warmup} steps, then " if warmup else f"{peak:g}, "
    if optimizer.schedule == "constant" or optimizer.min_lr_ratio == 1:
        return f"{ramp}constant"
    if warmup == total_steps:
        return f"{ramp}the run ends (config.optimizer.warmup_steps is config.train.steps)"
    floor = f"{optimizer.schedule} to {peak * optimizer.min_lr_ratio:g} at step {decay}"
    if decay > total_steps:
        return f"{ramp}{floor}, which lies beyond the run's {total_steps} steps (config.optimizer.decay_steps)"
    return f"{ramp}{floor}{', where it stays' if decay < total_steps else ''}"
