"""Loss scaling: the state machine by hand, steps that are left out, and what a scale does to bare casts."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from altgrad_jax import loss_scale
from altgrad_jax.diagnose import make_diagnose_step
from altgrad_jax.diagnostics import quantisation
from altgrad_jax.errors import UsageError
from altgrad_jax.layers import layer_shapes
from altgrad_jax.loss_scale import LossScale, all_finite, parse_loss_scale
from altgrad_jax.model import GPTConfig
from altgrad_jax.optimizers import make_optimizer, make_schedule
from altgrad_jax.precision.policy import Policy, resolve
from altgrad_jax.state import TrainState, init_params, init_state, model_structure, tree_sha256
from altgrad_jax.step import make_train_step
from altgrad_jax.tracking import read_metrics
from configs.base import get_config
from tests.runs import bits, checkpoint_steps, summary

MODEL = GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=16, vocab_size=31)
GRAPHDEF = model_structure(MODEL)
CAST = resolve([(r"blocks\..*|lm_head", "e5m2_cast")], layer_shapes(MODEL))
TOKENS = np.random.default_rng(0).integers(0, 31, (1, 1, 12, 17)).astype(np.int32)  # [device, microbatch, B, T + 1]


# The state machine.


@pytest.mark.parametrize("text", ["3.41e38", "1e-39", "1e38"])
def test_scales_that_float32_lacks_or_whose_inverse_it_does(text):
    with pytest.raises(UsageError, match=f"^config.train.loss_scale='{text}' must be .*float32"):
        parse_loss_scale(text)


@pytest.mark.parametrize("text", ["abc", "", "nan", "inf", "-inf", "0", "-1", "1e400", "Dynamic", "2**3", "dynamic "])
def test_what_is_no_scale(text):
    with pytest.raises(UsageError, match="is neither a number above 0 nor 'dynamic'|must be finite$") as caught:
        parse_loss_scale(text)
    assert str(caught.value).startswith(f"config.train.loss_scale={text!r}")


def test_what_is_one():
    assert [parse_loss_scale(text).fixed for text in ("1", "1024", "0.5", "1e3", "dynamic")] == [
        1,
        1024,
        0.5,
        1e3,
        None,
    ]
    assert parse_loss_scale("8").init() == {} and parse_loss_scale("8").factor({}) == 8.0
    assert parse_loss_scale("8").next({}, jnp.array(False)) == {}


def scales(state: dict, finite: list[bool]) -> list[float]:
    """The scales after each of some steps."""
    found, advance = [], jax.jit(LossScale(None).next)
    for ok in finite:
        state = advance(state, jnp.array(ok))
        found.append(float(state["scale"]))
    return found


def test_it_halves_at_once_and_doubles_after_enough_good_steps(monkeypatch):
    monkeypatch.setattr(loss_scale, "GROWTH_STEPS", 3)
    start = LossScale(None).init()
    assert start["scale"] == 2.0**16 and start["good_steps"] == 0
    good, bad = True, False
    assert scales(start, [bad, bad]) == [2.0**15, 2.0**14]
    assert scales(start, [good] * 6) == [2.0**16] * 2 + [2.0**17] * 3 + [2.0**18]
    # A bad step begins the count again.
    assert scales(start, [good, good, bad, good, good, good]) == [2.0**16] * 2 + [2.0**15] * 3 + [2.0**16]
    assert scales(start | {"scale": jnp.float32(2.0**23)}, [good] * 9)[2::3] == [2.0**24] * 3
    assert scales(start | {"scale": jnp.float32(2.0)}, [bad] * 3) == [1.0] * 3


def test_a_thousand_steps():
    state = LossScale(None).init() | {"good_steps": jnp.asarray(997, jnp.int32)}
    assert scales(state, [True] * 4) == [2.0**16] * 2 + [2.0**17] * 2


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_bad_element_anywhere_is_seen(value):
    tree = {"a": jnp.ones((3, 4)), "b": [jnp.zeros(()), jnp.ones((5,))]}
    assert all_finite(tree)
    assert not all_finite(tree | {"a": tree["a"].at[2, 3].set(value)})
    assert not all_finite(tree | {"b": [jnp.asarray(value), tree["b"][1]]})


# In the training step.


def optimizer_config():
    config = get_config().optimizer
    config.update(learning_rate=0.01, warmup_steps=1, schedule="constant")
    return config


def lanes(step):
    """A step of one device as a jitted function of (state, tokens), its device axis being a vmap's."""
    return jax.jit(jax.vmap(step, in_axes=(None, 0), out_axes=None, axis_name="data"))


def train_step(scale: LossScale, policy: Policy = CAST):
    config = optimizer_config()
    return lanes(
        make_train_step(
            GRAPHDEF,
            make_optimizer(config, 100),
            make_schedule(config, 100),
            loss_chunk=64,
            seed=0,
            policy=policy,
            loss_scale=scale,
        )
    )


def fresh_state(scale: LossScale, policy: Policy = CAST) -> TrainState:
    optimizer = make_optimizer(optimizer_config(), 100)
    return init_state(init_params(MODEL, 0), optimizer, policy.init(), scale.init())


def with_scale(state: TrainState, scale: float) -> TrainState:
    return dataclasses.replace(state, loss_scale=state.loss_scale | {"scale": jnp.float32(scale)})


@pytest.fixture(scope="module")
def dynamic():
    """The step with a scale that doubles after three good steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_scale, "GROWTH_STEPS", 3)
        step = train_step(LossScale(None))
        step(fresh_state(LossScale(None)), TOKENS)  # traced while the patch holds
    return step


def test_steps_with_an_infinite_gradient_are_left_out(dynamic):
    """At 2^24 some gradients of the logits lie beyond 57344, where the bare cast makes them infinite."""
    state = with_scale(fresh_state(LossScale(None)), 2.0**24)
    skipped, found = [], []
    for step in range(16):
        before = tree_sha256((state.params, state.opt_state))
        state, metrics = dynamic(state, TOKENS)
        assert math.isfinite(metrics["train/loss"]) and metrics["train/nonfinite_steps"] == 0
        assert state.step == step + 1
        skipped.append(float(metrics["train/skipped"]))
        found.append(math.log2(metrics["train/loss_scale"]))
        assert (tree_sha256((state.params, state.opt_state)) == before) == bool(skipped[-1])
        assert bool(skipped[-1]) != math.isfinite(metrics["train/grad_norm"])
    assert skipped[0] == 1.0
    # Down until it fits; then up every three good steps, and down again where that was too much.
    expected, good = [24.0], 0
    for bad in skipped:
        good = 0 if bad else good + 1
        expected.append(expected[-1] + (-1 if bad else 1 if good == 3 else 0))
        good %= 3
    assert [*found, math.log2(state.loss_scale["scale"])] == expected
    assert skipped.count(0.0) >= 6 and skipped.count(1.0) >= 3


@pytest.mark.parametrize(
    ("recipe", "backs_off"),
    [
        ("e4m3 scaling=none", True),  # what is too large is 448, and finite
        ("e5m2_cast g.scaling=static g.scale=16 g.overflow=saturate", True),
        ("e4m3", False),  # the scale follows the gradient
        ("mxfp8", False),
    ],
)
def test_gradients_that_saturate_back_it_off_where_it_decides_their_size(recipe, backs_off):
    policy = resolve([(r"blocks\..*|lm_head", recipe)], layer_shapes(MODEL))
    step, state = train_step(LossScale(None), policy), with_scale(fresh_state(LossScale(None), policy), 2.0**20)
    left_out, exponents = [], []
    for _ in range(8):
        state, metrics = step(state, TOKENS)
        assert math.isfinite(metrics["train/grad_norm"])
        left_out.append(int(metrics["train/skipped"]))
        exponents.append(int(math.log2(metrics["train/loss_scale"])))
    assert exponents == [20 - sum(left_out[:i]) for i in range(8)]
    assert left_out[0] == backs_off and (0 < sum(left_out) < 8) == backs_off


def test_a_tensor_with_an_infinity_is_no_gradient_to_go_by():
    """An infinite factor makes every gradient infinite: clipped, all of them would be numbers again."""
    policy = resolve([(r"lm_head", "e4m3")], layer_shapes(MODEL))
    state, step = with_scale(fresh_state(LossScale(None), policy), np.inf), train_step(LossScale(None), policy)
    state, metrics = step(state, TOKENS)
    assert metrics["train/skipped"] == 1.0 and np.isfinite(jax.tree.leaves(state.quant)[0]).all()


def test_a_power_of_two_changes_no_bit_of_bf16_training():
    """All gradients are multiplied by it and divided again, exactly as long as none leaves bfloat16's range."""
    step, after = train_step(LossScale(None), Policy()), set()
    for scale in (1.0, 2.0**10):
        state = with_scale(fresh_state(LossScale(None), Policy()), scale)
        for _ in range(3):
            state, metrics = step(state, TOKENS)
            assert metrics["train/loss_scale"] == scale
        after.add(tree_sha256((state.params, state.opt_state)))
    assert len(after) == 1


@pytest.mark.slow
def test_a_fixed_scale_is_divided_out_again():
    """Up to the order of sums: the scale is built into the program, so there are two."""
    plain = Policy()
    after = {}
    for scale in (1.0, 2.0**10):
        state, step = fresh_state(LossScale(scale), plain), train_step(LossScale(scale), plain)
        for _ in range(3):
            state, metrics = step(state, TOKENS)
        after[scale] = state.params, float(metrics["train/grad_norm"])
    assert after[2.0**10][1] == pytest.approx(after[1.0][1], rel=1e-5)
    for a, b in zip(jax.tree.leaves(after[2.0**10][0]), jax.tree.leaves(after[1.0][0]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.fixture(scope="module")
def measured():
    """The diagnosis of bare casts at a loss scale, for a mean over 4096 tokens."""
    tokens = np.random.default_rng(0).integers(0, 31, (1, 1, 256, 17)).astype(np.int32)
    scale = LossScale(None)
    step = make_diagnose_step(GRAPHDEF, GRAPHDEF, loss_chunk=4096, seed=0, policy=CAST, loss_scale=scale)
    diagnose = lanes(lambda state, tokens: step(state, tokens, quant=True, shadow=False))

    def run(factor: float) -> dict[str, float]:
        values = jax.device_get(diagnose(with_scale(fresh_state(scale), factor), tokens))
        return quantisation.name(CAST, *values["quant"])

    return run


def test_without_a_scale_gradients_vanish_in_the_bare_cast(measured):
    bare, scaled = measured(1.0), measured(2.0**14)
    rate = "quant/{}/gradient/underflow".format
    layers = [plan.path for plan in CAST.plans]
    assert bare[rate("blocks.0.attn.qkv")] > 0.95 and bare[rate("blocks.0.mlp.up")] > 0.85
    for layer in layers:
        assert scaled[rate(layer)] < 0.05 and scaled[rate(layer)] < bare[rate(layer)] / 5, layer
    # It lifts gradients and nothing else, and not beyond the largest value.
    assert scaled["quant/gradient/amax"] == pytest.approx(2.0**14 * bare["quant/gradient/amax"], rel=0.5)
    for what in ("activation/underflow", "weight/underflow", "activation/amax", "weight/amax"):
        assert scaled[f"quant/{what}"] == bare[f"quant/{what}"]
    assert scaled["quant/gradient/overflow"] == scaled["quant/gradient/nan"] == 0
    # Beyond it, they are infinite, which is counted.
    assert measured(2.0**30)["quant/gradient/overflow"] > 0


# In a run.


@pytest.mark.slow
def test_the_scale_is_in_the_checkpoint(lab, tmp_path, monkeypatch):
    """Eight steps at once, and in two sessions: the first ends with a step left out, after some that were not."""
    monkeypatch.setattr(loss_scale, "INITIAL", 2.0**26)
    monkeypatch.setattr(loss_scale, "GROWTH_STEPS", 2)
    rules = ((r"lm_head", "e5m2_cast"),)
    run = {"precision__rules": rules, "train__loss_scale": "dynamic", "optimizer__decay_steps": 20}
    run |= {"diagnostics__quant_every": 0, "train__eval_every": 2}
    assert lab.train(tmp_path / "whole", train__steps=8, **run) == 0
    left_out = {r["step"]: r["train/skipped"] for r in read_metrics(tmp_path / "whole" / "metrics.jsonl")[1:]}
    first = max(step for step in range(2, 8) if left_out[step] and not left_out[step - 1])
    for steps in (first, 8):
        assert lab.train(tmp_path / "parts", train__steps=steps, **run) == 0
        assert checkpoint_steps(tmp_path / "parts")[-1] == steps
    names = ("train/loss_scale", "train/skipped")
    whole, parts = (
        [tuple(r.get(name) for name in names) for r in read_metrics(tmp_path / run / "metrics.jsonl")]
        for run in ("whole", "parts")
    )
    assert parts == whole and whole[1:3] == [(2.0**26, 1.0), (2.0**25, 1.0)]
    assert len({scale for scale, _ in whole[1:]}) > 3
    assert repr(bits(tmp_path / "parts")) == repr(bits(tmp_path / "whole"))  # with the NaN of steps left out
    assert summary(tmp_path / "parts")["parameter_sha256"] == summary(tmp_path / "whole")["parameter_sha256"]
