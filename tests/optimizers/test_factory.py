"""The learning rate at chosen steps by hand, and the optimizer against AdamW put together from optax's parts."""

import math

import jax
import numpy as np
import optax
import pytest

from altgrad_jax.optimizers import make_optimizer, make_schedule
from configs.base import get_config


def config(**changes):
    optimizer = get_config().optimizer
    optimizer.update(**changes)
    return optimizer


def rates(total_steps: int, steps, **changes) -> list[float]:
    schedule = make_schedule(config(**changes), total_steps)
    return [float(schedule(step)) for step in steps]


def test_baseline_schedule_by_hand():
    # Peak 6e-4 after 100 steps of warm-up, half a cosine down to a tenth of it at step 2000.
    expected = {
        0: 6e-6,
        49: 3e-4,
        98: 5.94e-4,
        99: 6e-4,
        100: 6e-4,
        575: 6e-4 * (0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2),
        1050: 3.3e-4,
        2000: 6e-5,
        2001: 6e-5,
        10**6: 6e-5,
    }
    assert rates(2000, expected) == pytest.approx(list(expected.values()), rel=1e-5)


def test_linear_schedule():
    expected = [0.25, 0.5, 0.75, 1.0, 1.0, 0.9, 0.6, 0.2, 0.2]
    steps = [0, 1, 2, 3, 4, 5, 8, 12, 50]
    changes = {"learning_rate": 1.0, "warmup_steps": 4, "schedule": "linear", "min_lr_ratio": 0.2}
    assert rates(12, steps, **changes) == pytest.approx(expected, rel=1e-6)


def test_constant_schedule():
    changes = {"learning_rate": 0.5, "warmup_steps": 2, "schedule": "constant", "min_lr_ratio": 0.1}
    assert rates(5, [0, 1, 2, 5, 100], **changes) == [0.25, 0.5, 0.5, 0.5, 0.5]


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_decay_steps_set_the_floor(schedule):
    changes = {"learning_rate": 1.0, "warmup_steps": 10, "schedule": schedule, "min_lr_ratio": 0.25}
    ended = rates(1000, [9, 10, 30, 49, 50, 51, 999], decay_steps=50, **changes)
    assert ended[:3] == pytest.approx([1.0, 1.0, 0.625], rel=1e-6)  # half way down at 10 + 40 / 2
    assert ended[3] > 0.2501 and ended[4:] == pytest.approx([0.25] * 3, rel=1e-6)
    # 0 stands for the run's length.
    steps = range(0, 120, 7)
    assert rates(100, steps, decay_steps=0, **changes) == rates(7, steps, decay_steps=100, **changes)


def test_short_warmups():
    changes = {"learning_rate": 1.0, "schedule": "linear", "min_lr_ratio": 0.0}
    assert rates(4, range(6), warmup_steps=0, **changes) == pytest.approx([1, 0.75, 0.5, 0.25, 0, 0])
    assert rates(5, range(7), warmup_steps=1, **changes) == pytest.approx([1, 1, 0.75, 0.5, 0.25, 0, 0])
    # A warm-up longer than the run never ends.
    assert rates(3, range(3), warmup_steps=10, **changes) == pytest.approx([0.1, 0.2, 0.3])


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0, 1, 2, 7, 20])
def test_every_schedule_rises_then_never_rises_again(schedule, warmup):
    values = rates(30, range(40), schedule=schedule, warmup_steps=warmup, learning_rate=1.0, min_lr_ratio=0.1)
    peak = max(0, warmup - 1)
    assert values[peak] == max(values) == pytest.approx(1.0)
    assert values[: peak + 1] == sorted(values[: peak + 1]) and values[peak:] == sorted(values[peak:], reverse=True)
    assert min(values) > 0 and len(set(values[: peak + 1])) == peak + 1
    assert values[-1] == pytest.approx(1.0 if schedule == "constant" else 0.1)


PARAMS = {
    "matrix": np.linspace(-2, 2, 12, dtype=np.float32).reshape(3, 4),
    "gain": np.ones(4, np.float32),
    "stack": {"cube": np.linspace(1, 2, 8, dtype=np.float32).reshape(2, 2, 2), "bias": np.full(2, 0.5, np.float32)},
}


def gradients(step: int, size: float = 1.0) -> dict:
    rng = np.random.default_rng(step)
    return jax.tree.map(lambda p: (rng.normal(size=p.shape) * size).astype(np.float32), PARAMS)


def updates(optimizer: optax.GradientTransformation, size: float = 1.0, steps: int = 5) -> list[dict]:
    """Updates of a few steps at gradients of varying size."""

    @jax.jit
    def advance(grads, state, params):
        update, state = optimizer.update(grads, state, params)
        return update, state, optax.apply_updates(params, update)

    params, state, out = PARAMS, optimizer.init(PARAMS), []
    for step in range(steps):
        update, state, params = advance(gradients(step, size * 10.0 ** -(step % 3)), state, params)
        out.append(update)
    return out


def assert_same(a, b, rtol=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-9), a, b)


def largest_difference(a, b) -> float:
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: float(np.abs(x - y).max()), a, b)))


def test_optimizer_is_adamw():
    settings = {"learning_rate": 0.1, "warmup_steps": 3, "b1": 0.8, "b2": 0.9, "eps": 1e-4, "weight_decay": 0.3}
    schedule = make_schedule(config(**settings), 20)
    by_hand = optax.chain(
        optax.clip_by_global_norm(0.5),
        optax.scale_by_adam(0.8, 0.9, eps=1e-4),
        optax.add_decayed_weights(0.3, mask={"matrix": True, "gain": False, "stack": {"cube": True, "bias": False}}),
        optax.scale_by_learning_rate(schedule),
    )
    assert_same(updates(make_optimizer(config(grad_clip=0.5, **settings), 20)), updates(by_hand))


def test_decay_is_for_matrices_only():
    optimizer = make_optimizer(config(weight_decay=0.5), 20)
    update, _ = jax.jit(optimizer.update)(jax.tree.map(np.zeros_like, PARAMS), optimizer.init(PARAMS), PARAMS)
    rate = 6e-4 / 100
    np.testing.assert_allclose(update["matrix"], -rate * 0.5 * PARAMS["matrix"], rtol=1e-5, atol=0)
    np.testing.assert_allclose(update["stack"]["cube"], -rate * 0.5 * PARAMS["stack"]["cube"], rtol=1e-5)
    assert not np.any(update["gain"]) and not np.any(update["stack"]["bias"])


def test_warmup_has_an_effect():
    with_warmup = updates(make_optimizer(config(warmup_steps=10), 100))
    without = updates(make_optimizer(config(warmup_steps=0, schedule="constant"), 100))
    assert_same(with_warmup[0], jax.tree.map(lambda u: 0.1 * u, without[0]), rtol=1e-5)


def test_clipping_is_before_the_moments():
    clipped, free = (updates(make_optimizer(config(grad_clip=clip, learning_rate=1.0), 20)) for clip in (0.01, 0))
    # Clipped to the same norm, gradients of any size count alike ...
    larger = updates(make_optimizer(config(grad_clip=0.01, learning_rate=1.0), 20), size=3.0)
    assert_same(larger, clipped, rtol=1e-4)
    # ... and it changes the result, from the second step on: Adam divides by the size of the gradients it has seen.
    assert largest_difference(clipped[0], free[0]) < 1e-5
    assert largest_difference(clipped[1], free[1]) > 1e-3
    # A threshold that is never reached changes nothing.
    assert_same(updates(make_optimizer(config(grad_clip=1e6, learning_rate=1.0), 20)), free)
