"""What a run says of its learning rates; that it is what they do."""

import re

import pytest

from altgrad_jax.optimizers import describe_schedule, make_schedule
from configs.base import get_config


def settings(**changes):
    optimizer = get_config().optimizer
    optimizer.update(**changes)
    return optimizer


@pytest.mark.parametrize(
    ("steps", "changes", "says"),
    [
        (2000, {}, "warm-up to 0.0006 in 100 steps, then cosine to 6e-05 at step 2000"),
        (20, {}, "still in its warm-up when the run ends: 20 of 100 steps .*, so it reaches 20% of 0.0006"),
        (100, {}, "warm-up to 0.0006 in 100 steps, then the run ends"),
        (2000, {"decay_steps": 500, "schedule": "linear"}, "linear to 6e-05 at step 500, where it stays"),
        (300, {"decay_steps": 500}, "cosine to 6e-05 at step 500, which lies beyond the run's 300 steps"),
        (50, {"schedule": "constant", "warmup_steps": 0}, "0.0006, constant"),
        (50, {"learning_rate": 0.0}, "0: no weight will move"),
    ],
)
def test_what_is_said(steps, changes, says):
    assert re.match(f".*{says}", describe_schedule(settings(**changes), steps))


@pytest.mark.parametrize("steps", [7, 33, 99])
def test_the_share_that_a_short_run_reaches_is_what_its_schedule_gives(steps):
    optimizer = settings()
    said = re.search(r"reaches (\d+)%", describe_schedule(optimizer, steps))
    rates = [float(make_schedule(optimizer, steps)(step)) for step in range(steps)]
    assert int(said[1]) == round(100 * max(rates) / optimizer.learning_rate)
