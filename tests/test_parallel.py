"""How a step is spread over devices: what goes where, what comes back, and that it does not change the numbers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from altgrad_jax.model import GPTConfig
from altgrad_jax.optimizers import make_optimizer, make_schedule
from altgrad_jax.parallel import DataParallel
from altgrad_jax.state import TrainState, init_params, init_state, model_structure, tree_sha256
from altgrad_jax.step import AXIS, make_eval_step, make_train_step
from configs.base import get_config
from tests import numpy_gpt


def toy_step(state: TrainState, tokens_ABT1):
    """Adds the mean token over all devices to the parameter."""
    mean = lax.pmean(tokens_ABT1.astype(jnp.float32).mean(), AXIS)
    return dataclasses.replace(state, step=state.step + 1, params=state.params + mean), {"mean": mean}


def toy_state(parallel: DataParallel) -> TrainState:
    state = TrainState(np.zeros((), np.int32), np.ones((2, 3), np.float32), (), np.zeros((), np.int32))
    return jax.device_put(state, parallel.replicated)


def test_there_are_eight_devices():
    assert len(DataParallel().devices) == len(jax.local_devices()) == 8
    assert [len(DataParallel(n).devices) for n in (1, 3, 8)] == [1, 3, 8]
    assert DataParallel(3).devices == jax.local_devices()[:3]


@pytest.mark.parametrize("devices", [1, 2, 8])
@pytest.mark.parametrize("microbatches", [None, 1, 2, 3])
def test_rows_go_to_devices_in_order(devices, microbatches):
    batch = np.arange(48 * 5, dtype=np.int32).reshape(48, 5)
    sharded = DataParallel(devices).shard(batch, microbatches)
    rows = 48 // devices
    lead = (rows,) if microbatches is None else (microbatches, rows // microbatches)
    assert sharded.shape == (devices, *lead, 5) and sharded.dtype == jnp.int32
    assert len(sharded.addressable_shards) == devices
    for shard in sharded.addressable_shards:
        number = jax.local_devices().index(shard.device)
        np.testing.assert_array_equal(
            np.asarray(shard.data).reshape(rows, 5), batch[number * rows : (number + 1) * rows]
        )


@pytest.mark.parametrize("devices", [1, 8])
def test_train_step_has_no_device_axis_and_consumes_the_state(devices):
    parallel = DataParallel(devices)
    run = parallel.train_step(toy_step)
    state = toy_state(parallel)
    tokens = np.arange(16 * 3, dtype=np.int32).reshape(16, 3)
    new, metrics = run(state, parallel.shard(tokens, 1))
    assert state.params.is_deleted() and state.step.is_deleted()
    assert new.params.shape == (2, 3) and metrics["mean"].shape == new.step.shape == ()
    np.testing.assert_array_equal(new.params, np.full((2, 3), 1 + 23.5, np.float32))
    # Every device holds the whole of it, in the place where the next step and a checkpoint expect it.
    assert new.params.sharding.is_fully_replicated and new.params.sharding.device_set == set(parallel.devices)
    assert new.params.sharding.is_equivalent_to(parallel.replicated, ndim=2)
    again, _ = run(new, parallel.shard(tokens, 1))
    np.testing.assert_array_equal(again.params, np.full((2, 3), 1 + 2 * 23.5, np.float32))
    assert again.step == 2


def test_eval_step_averages_over_devices_and_keeps_the_parameters():
    parallel = DataParallel()
    run = parallel.eval_step(lambda params, tokens: params * lax.pmean(tokens.astype(jnp.float32).mean(), AXIS))
    params = jax.device_put(np.float32(2), parallel.replicated)
    for tokens in (np.arange(32), np.arange(32)[::-1]):
        result = run(params, parallel.shard(tokens.astype(np.int32).reshape(16, 2)))
        assert result.shape == () and result == 31.0
    assert not params.is_deleted()


def test_abstract_state_has_the_place_of_the_real_one():
    parallel = DataParallel()
    abstract = parallel.abstract(jax.eval_shape(lambda: toy_state(DataParallel(1))))
    real = toy_state(parallel)
    for a, b in zip(jax.tree.leaves(abstract), jax.tree.leaves(real), strict=True):
        assert (a.shape, a.dtype, a.sharding) == (b.shape, b.dtype, b.sharding)
    # On one host, the global state is the local one.
    assert parallel.to_global(real) is real and parallel.to_local(real) is real
    assert parallel.to_global_abstract(abstract) is abstract


MODEL = GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=16, vocab_size=31, compute_dtype="float32")
STEPS = 50


@pytest.fixture(scope="module")
def train():
    """(devices) -> the losses of 50 steps, an evaluation, and the final state."""
    config = get_config().optimizer
    config.update(learning_rate=0.01, warmup_steps=10)
    optimizer, schedule = make_optimizer(config, STEPS), make_schedule(config, STEPS)
    graphdef = model_structure(MODEL)
    # Text that can be learnt: each token follows from the one before it, most of the time.
    rng = np.random.default_rng(0)
    tokens = np.zeros((STEPS, 16, MODEL.block_size + 1), np.int32)
    tokens[..., 0] = rng.integers(0, MODEL.vocab_size, tokens.shape[:2])
    for t in range(1, tokens.shape[2]):
        noise = rng.random(tokens.shape[:2]) < 0.2
        tokens[..., t] = np.where(noise, rng.integers(0, 31, tokens.shape[:2]), (3 * tokens[..., t - 1] + 1) % 31)
    programs = {}

    def run(devices: int):
        parallel = DataParallel(devices)
        if devices not in programs:
            step = make_train_step(graphdef, optimizer, schedule, loss_chunk=64, seed=0)
            evaluation = make_eval_step(graphdef, loss_chunk=64)
            programs[devices] = parallel.train_step(step), parallel.eval_step(evaluation)
        train_step, eval_step = programs[devices]
        params = numpy_gpt.random_like(jax.eval_shape(lambda: init_params(MODEL, 0)), seed=0, std=0.05)
        state = jax.device_put(init_state(params, optimizer), parallel.replicated)
        losses = []
        for batch in tokens:
            state, metrics = train_step(state, parallel.shard(batch, 1))
            losses.append(metrics["train/loss"])
        return np.array(losses), np.asarray(eval_step(state, parallel.shard(tokens[0]))), state

    return run


@pytest.mark.slow
def test_one_device_and_eight_train_alike(train):
    one, eight = train(1), train(8)
    assert one[0][-1] < 0.75 * one[0][0]  # it learns, so the parameters matter
    np.testing.assert_allclose(eight[0], one[0], rtol=1e-5)
    np.testing.assert_allclose(eight[1], one[1], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 8])
def test_repeated_runs_are_equal_to_the_bit(train, devices):
    first, second = train(devices), train(devices)
    assert first[0].tobytes() == second[0].tobytes() and first[1].tobytes() == second[1].tobytes()
    assert tree_sha256(first[2]) == tree_sha256(second[2])
