"""One program for many formats: policies whose formats are traced values, one after the other and all at once."""

import dataclasses
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from altgrad_jax.diagnose import make_diagnose_step
from altgrad_jax.layers import layer_shapes
from altgrad_jax.loss_scale import LossScale
from altgrad_jax.model import GPTConfig
from altgrad_jax.precision.formats import family
from altgrad_jax.precision.policy import Policy, resolve
from altgrad_jax.state import init_params, init_state, model_structure
from altgrad_jax.step import make_train_step

MODEL = GPTConfig(
    n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=13, tie_embeddings=False, compute_dtype="float32"
)
TOKENS = np.random.default_rng(0).integers(0, MODEL.vocab_size, (1, 4, MODEL.block_size + 1)).astype(np.int32)


SMALL = dataclasses.replace(MODEL, n_layer=1)
OPTIMIZER = optax.sgd(0.5)
FAMILY = [fmt.name for fmt in family(7)]


def one_device(policy: Policy):
    """The training step as a function of (state, tokens), the device axis being a vmap's."""
    step = make_train_step(model_structure(SMALL), OPTIMIZER, lambda _: 0.5, loss_chunk=64, seed=0, policy=policy)
    return jax.vmap(step, in_axes=(None, 0), out_axes=None, axis_name="data")


def small_policy(recipe: str, **options) -> Policy:
    return resolve([(r"blocks\..*|lm_head", recipe)], layer_shapes(SMALL), **options)


def small_state(policy: Policy, quant: dict | None = None):
    params = init_params(SMALL, 0)
    return init_state(params, OPTIMIZER, policy.init() if quant is None else quant)


@pytest.fixture(scope="module")
def in_eight_formats():
    """The traced policy, its step (counting how often it was traced), and the state after two steps in each format."""
    policy, traces = small_policy("e3m4", traced=True), Counter()
    train = one_device(policy)

    @jax.jit
    def step(state, tokens):
        traces["step"] += 1
        return train(state, tokens)

    after = {}
    for name in FAMILY:
        state = small_state(policy, policy.with_format(policy.init(), name))
        for _ in range(2):  # the second with scales from the history of the first
            state, metrics = step(state, TOKENS[None])
        after[name] = state, metrics
    return policy, train, traces, after


def test_one_compilation_serves_the_whole_family(in_eight_formats):
    _, _, traces, after = in_eight_formats
    assert traces["step"] == 1
    losses = {name: float(metrics["train/loss"]) for name, (_, metrics) in after.items()}
    # e1m6 is four times e0m7, value for value, so under a free scale they are one format; the others all differ.
    assert losses["e0m7"] == losses["e1m6"]
    assert len(set(losses.values())) == 7 and all(np.isfinite(loss) for loss in losses.values())
    for a, b in zip(jax.tree.leaves(after["e0m7"][0].params), jax.tree.leaves(after["e1m6"][0].params), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n == "e6m1" else pytest.mark.slow) for n in FAMILY])
def test_a_traced_format_is_that_format(in_eight_formats, name):
    """Against a program with the format built in."""
    _, _, _, after = in_eight_formats
    policy = small_policy(name)
    step, state = jax.jit(one_device(policy)), small_state(policy)
    for _ in range(2):
        state, metrics = step(state, TOKENS[None])
    traced, traced_metrics = after[name]
    assert metrics["train/loss"] == pytest.approx(float(traced_metrics["train/loss"]), rel=1e-5)
    for actual, expected in zip(jax.tree.leaves(traced.params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-5)
    histories = jax.tree.map(lambda role: role.history, (traced.quant, state.quant), is_leaf=_is_role)
    for actual, expected in zip(*map(jax.tree.leaves, histories), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-4)


def _is_role(x) -> bool:
    return hasattr(x, "history")


def test_vmap_over_the_family_is_eight_steps(in_eight_formats):
    policy, train, _, after = in_eight_formats
    states = [small_state(policy, policy.with_format(policy.init(), name)) for name in FAMILY]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    step = jax.jit(jax.vmap(train, in_axes=(0, None)))
    for _ in range(2):
        stacked, metrics = step(stacked, TOKENS[None])
    for i, name in enumerate(FAMILY):
        state, alone = after[name]
        assert metrics["train/loss"][i] == pytest.approx(float(alone["train/loss"]), rel=1e-5)
        # A batched product sums in another order than eight products, so not to the bit.
        for actual, expected in zip(jax.tree.leaves(stacked.params), jax.tree.leaves(state.params), strict=True):
            np.testing.assert_allclose(actual[i], expected, atol=1e-5, err_msg=name)


def test_formats_are_put_into_traced_states_that_can_hold_them():
    traced, built_in = small_policy("e3m4", traced=True), small_policy("e3m4")
    assert {role.grid is None for layer in built_in.init().values() for role in layer.values()} == {True}
    with pytest.raises(ValueError, match="blocks.0.attn.qkv has its format built in; resolve the rules with traced=Tr"):
        built_in.with_format(built_in.init(), "e4m3fn")
    with pytest.raises(ValueError, match=r"e5m10 needs float32 operands, and blocks.0.attn.qkv has bfloat16 ones"):
        traced.with_format(traced.init(), "e5m10")
    with pytest.raises(ValueError, match="unknown format 'e3m'"):
        traced.with_format(traced.init(), "e3m")
    for fmt in ("e5m2", "e4m3fn", "e2m1fn", "binary8p3", "e0m7"):
        state = traced.with_format(traced.init(), fmt)
        assert jax.tree.structure(state) == jax.tree.structure(traced.init())
    wide = small_policy("e5m10", traced=True)
    same = {jax.tree.structure(wide.with_format(wide.init(), fmt)) for fmt in ("float16", "bfloat16", "e9m6", "e10m5")}
    assert same == {jax.tree.structure(wide.init())}


@pytest.mark.slow
def test_a_traced_formats_statistics_are_its_own(in_eight_formats):
    """All measures but the codes, which are those of no format known when the program was compiled."""
    policy = in_eight_formats[0]
    built_in = small_policy("e7m0")
    graphdef = model_structure(SMALL)

    def measured(policy, quant):
        step = make_diagnose_step(graphdef, graphdef, loss_chunk=64, seed=0, policy=policy, loss_scale=LossScale())
        lanes = jax.vmap(
            lambda state, tokens: step(state, tokens, quant=True, shadow=False),
            in_axes=(None, 0),
            out_axes=None,
            axis_name="data",
        )
        return jax.jit(lanes)(small_state(policy, quant), TOKENS[None])

    traced = measured(policy, policy.with_format(policy.init(), "e7m0"))
    static = measured(built_in, built_in.init())
    (traced_measures, traced_codes), (measures, codes) = traced["quant"], static["quant"]
    np.testing.assert_allclose(traced_measures, measures, rtol=1e-5, atol=1e-6)
    assert not np.asarray(traced_codes).any() and np.asarray(codes).any()
