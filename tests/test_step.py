"""One training step against the same step by hand; accumulation, evaluation, dropout, the count of bad losses."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from altgrad_jax.model import GPTConfig
from altgrad_jax.optimizers import make_optimizer, make_schedule
from altgrad_jax.parallel import DataParallel
from altgrad_jax.state import TrainState, init_params, init_state, leaf_names, model_structure, tree_sha256
from altgrad_jax.step import make_eval_step, make_train_step, window_loss
from configs.base import get_config
from tests import numpy_gpt

MODEL = GPTConfig(
    n_layer=1,
    n_head=2,
    n_embd=8,
    block_size=8,
    vocab_size=13,
    bias=True,
    tie_embeddings=False,
    compute_dtype="float32",
)
GRAPHDEF = model_structure(MODEL)
STEPS, CHUNK = 10, 16
TOKENS = np.random.default_rng(0).integers(0, MODEL.vocab_size, (3, 4, MODEL.block_size + 1)).astype(np.int32)


def optimizer_config():
    config = get_config().optimizer
    # eps is large beside the smallest gradients, so that the update is a smooth function of them: with 1e-8 the sign of
    # a gradient of 0 + rounding would decide. The clipping threshold is one that every gradient here exceeds.
    config.update(learning_rate=0.02, warmup_steps=4, min_lr_ratio=0.1, eps=1e-3, weight_decay=0.3, grad_clip=0.25)
    return config


def parameters(seed: int = 1) -> dict:
    return numpy_gpt.random_like(jax.eval_shape(lambda: init_params(MODEL, 0)), seed)


def train_step(seed: int = 0):
    config = optimizer_config()
    return make_train_step(
        GRAPHDEF, make_optimizer(config, STEPS), make_schedule(config, STEPS), loss_chunk=CHUNK, seed=seed
    )


@pytest.fixture(scope="module")
def one() -> DataParallel:
    return DataParallel(1)


@pytest.fixture(scope="module")
def run(one):
    return one.train_step(train_step())


@pytest.fixture(scope="module")
def evaluate(one):
    return one.eval_step(make_eval_step(GRAPHDEF, loss_chunk=CHUNK))


def fresh_state(one: DataParallel, params=None) -> TrainState:
    """New arrays each time: a step consumes its state."""
    state = init_state(parameters() if params is None else params, make_optimizer(optimizer_config(), STEPS))
    return jax.device_put(jax.tree.map(np.array, state), one.replicated)


def plain_loss_and_grad(params, tokens_BT1):
    """From all logits at once, with JAX's own log-softmax."""

    def loss(params):
        logits = nnx.merge(GRAPHDEF, params, copy=True)(tokens_BT1[:, :-1])
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, tokens_BT1[:, 1:]).mean()

    return jax.value_and_grad(loss)(params)


def test_three_steps_by_hand(one, run):
    """Mean gradient -> clip by global norm -> Adam moments -> decay of matrices -> warm-up rate, in NumPy float64."""
    state = fresh_state(one)
    by_hand = jax.tree.map(lambda p: p.astype(np.float64), parameters())
    gradient = jax.jit(plain_loss_and_grad)
    mean = jax.tree.map(np.zeros_like, by_hand)
    square = jax.tree.map(np.zeros_like, by_hand)
    for count, tokens in enumerate(TOKENS, start=1):
        loss, grads = gradient(jax.tree.map(np.float32, by_hand), tokens)
        reference = np.concatenate([numpy_gpt.logits(by_hand, row[:-1], MODEL.n_head) for row in tokens])
        expected_loss, _ = numpy_gpt.cross_entropy(reference, tokens[:, 1:].reshape(-1))
        norm = math.sqrt(sum(float(np.sum(np.float64(g) ** 2)) for g in jax.tree.leaves(grads)))
        assert norm > 4 * 0.25  # clipping has something to do
        grads = jax.tree.map(lambda g, norm=norm: np.float64(g) * min(1, 0.25 / norm), grads)
        mean = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, mean, grads)
        square = jax.tree.map(lambda v, g: 0.95 * v + 0.05 * g**2, square, grads)
        rate = 0.02 * count / 4

        def updated(p, m, v, count=count, rate=rate):
            step = (m / (1 - 0.9**count)) / (np.sqrt(v / (1 - 0.95**count)) + 1e-3)
            return p - rate * (step + 0.3 * p * (p.ndim == 2))

        by_hand = jax.tree.map(updated, by_hand, mean, square)

        state, metrics = run(state, one.shard(tokens, 1))
        assert metrics["train/loss"] == pytest.approx(expected_loss, rel=1e-6)
        assert metrics["train/loss"] == pytest.approx(float(loss), rel=1e-6)
        assert metrics["train/grad_norm"] == pytest.approx(norm, rel=1e-5)  # before clipping
        assert metrics["train/learning_rate"] == pytest.approx(rate, rel=1e-6)
        assert metrics["train/nonfinite_steps"] == 0
        assert state.step == count
        for name, actual, expected in zip(
            leaf_names(by_hand), jax.tree.leaves(state.params), jax.tree.leaves(by_hand), strict=True
        ):
            assert actual.dtype == jnp.float32
            # A thousandth of the learning rate is much less than any of the parts above contributes.
            np.testing.assert_allclose(actual, expected, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("microbatches", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_gradient_accumulation_changes_nothing_but_memory(one, run, microbatches):
    whole, metrics = run(fresh_state(one), one.shard(TOKENS[0], 1))
    accumulating = one.train_step(train_step())
    parts, part_metrics = accumulating(fresh_state(one), one.shard(TOKENS[0], microbatches))
    for key in metrics:
        assert part_metrics[key] == pytest.approx(float(metrics[key]), rel=1e-5)
    for a, b in zip(jax.tree.leaves(parts.params), jax.tree.leaves(whole.params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    for a, b in zip(jax.tree.leaves(parts.opt_state), jax.tree.leaves(whole.opt_state), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def spoilt(kind: str) -> dict:
    """Parameters whose loss is NaN, or Inf: every hidden state is 1, so the logits are the head's first row."""
    params = parameters()
    if kind == "nan":
        params["wte"][:] = np.nan
        return params
    params["norm_f"]["scale"][:], params["norm_f"]["bias"][:] = 0, 1
    params["lm_head"][:] = 0
    params["lm_head"][0] = np.where(np.arange(MODEL.vocab_size) % 2, 3e38, -3e38)
    return params


def test_nonfinite_losses_are_counted(one, run):
    state = fresh_state(one)
    kinds = (("nan", math.isnan), ("inf", math.isinf), ("nan", math.isnan))
    for count, (kind, is_kind) in enumerate(kinds, start=1):
        state = dataclasses.replace(fresh_state(one, spoilt(kind)), nonfinite_steps=state.nonfinite_steps)
        state, metrics = run(state, one.shard(TOKENS[0], 1))
        assert is_kind(metrics["train/loss"])
        assert metrics["train/nonfinite_steps"] == state.nonfinite_steps == count
    state = dataclasses.replace(fresh_state(one), nonfinite_steps=state.nonfinite_steps)
    state, metrics = run(state, one.shard(TOKENS[0], 1))
    assert metrics["train/nonfinite_steps"] == state.nonfinite_steps == 0


def test_evaluation(one, run, evaluate):
    # It is the training loss at the same parameters ...
    start = fresh_state(one)
    before = tree_sha256(start)
    first, second = (one.shard(tokens) for tokens in TOKENS[:2])
    loss = evaluate(start, first)
    state, metrics = run(fresh_state(one), one.shard(TOKENS[0], 1))
    assert loss == pytest.approx(float(metrics["train/loss"]), rel=1e-6)
    # ... the same bits each time, whatever was evaluated in between, and it leaves the state as it is.
    evaluate(start, second)
    assert np.asarray(evaluate(start, first)).tobytes() == np.asarray(loss).tobytes()
    assert tree_sha256(start) == before
    # Training with and without an evaluation in between gives the same bits.
    state, _ = run(state, one.shard(TOKENS[1], 1))
    other, _ = run(fresh_state(one), one.shard(TOKENS[0], 1))
    evaluate(other, second)
    other, _ = run(other, one.shard(TOKENS[1], 1))
    assert tree_sha256(other) == tree_sha256(state)


@pytest.fixture(scope="module")
def dropping():
    """(tokens [devices, microbatches, B, T + 1], seed, step) -> loss of a step with dropout.

    Devices are lanes of a vmap and the optimizer does nothing, so that there is only one small thing to compile.
    """
    graphdef = model_structure(dataclasses.replace(MODEL, dropout=0.3))
    optimizer = optax.identity()

    @jax.jit
    def loss(params, seed, step, tokens_DABT1):
        zero = jnp.zeros((), jnp.int32)
        state = TrainState(step, params, optimizer.init(params), zero)
        train = make_train_step(graphdef, optimizer, lambda step: 0.0, loss_chunk=CHUNK, seed=seed)
        lanes = jax.vmap(train, in_axes=(None, 0), axis_name="data", out_axes=None)
        return lanes(state, tokens_DABT1)[1]["train/loss"]

    def run(tokens_DABT1, seed=0, step=0):
        return float(loss(parameters(), np.uint32(seed), np.int32(step), tokens_DABT1))

    return run


def test_dropout_follows_from_seed_and_step(dropping):
    tokens = np.stack([TOKENS[0], TOKENS[1]]).reshape(2, 2, 2, MODEL.block_size + 1)
    assert dropping(tokens) == dropping(tokens)
    losses = {dropping(tokens, seed, step) for seed in range(3) for step in range(3)}
    assert len(losses) == 9
    # Every device and every microbatch has its own mask: the same windows in another order lose other parts.
    assert abs(dropping(tokens[::-1]) - dropping(tokens)) > 1e-4
    assert abs(dropping(tokens[:, ::-1]) - dropping(tokens)) > 1e-4


def test_evaluation_never_drops():
    graphdef = model_structure(dataclasses.replace(MODEL, dropout=0.3))
    evaluation = jax.make_jaxpr(make_eval_step(graphdef, loss_chunk=CHUNK), axis_env=[("data", 1)])
    training = jax.make_jaxpr(lambda p, tokens: window_loss(graphdef, p, tokens, CHUNK, jax.random.key(0)))
    state = init_state(parameters(), make_optimizer(optimizer_config(), STEPS))
    assert "random" not in str(evaluation(state, TOKENS[0]))
    assert "random" in str(training(parameters(), TOKENS[0]))
