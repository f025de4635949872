"""How far a gradient is from the float32 gradient: by hand, at the edges of float32, and of real training steps."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from altgrad_jax.diagnose import make_diagnose_step
from altgrad_jax.diagnostics import shadow
from altgrad_jax.diagnostics.questions import is_of_one_layer
from altgrad_jax.layers import layer_shapes
from altgrad_jax.loss_scale import LossScale
from altgrad_jax.model import GPTConfig
from altgrad_jax.precision.policy import Policy, resolve
from altgrad_jax.state import init_params, init_state, leaf_names, model_structure
from tests import numpy_gpt

compare = jax.jit(shadow.compare)


def measured(grads, reference) -> np.ndarray:
    """[leaves + 1, 3]: cosine, relative error, SNR in dB."""
    as_tree = lambda arrays: [jnp.asarray(a, jnp.float32) for a in arrays]  # noqa: E731
    return np.asarray(compare(as_tree(grads), as_tree(reference)))


def by_hand(g, r) -> tuple[float, float, float]:
    """The definitions, in float64."""
    g, r = np.float64(g).ravel(), np.float64(r).ravel()
    error = np.linalg.norm(g - r) / np.linalg.norm(r)
    return g @ r / (np.linalg.norm(g) * np.linalg.norm(r)), error, -20 * math.log10(error)


def test_numbers_worked_out_by_hand():
    # |r| = 5, |g - r| = 5, <g, r> = 25, |g| = sqrt(50); and a second layer at right angles to its shadow.
    rows = measured([[3.0, 4.0, 5.0], [[2.0, 0.0]]], [[3.0, 4.0, 0.0], [[0.0, 2.0]]])
    np.testing.assert_allclose(rows[0], [math.sqrt(0.5), 1.0, 0.0], atol=1e-6)
    np.testing.assert_allclose(rows[1], [0.0, math.sqrt(2), -10 * math.log10(2)], atol=1e-6)
    # Together: <g, r> = 25, |g|^2 = 54, |r|^2 = 29, |g - r|^2 = 33.
    expected = [25 / math.sqrt(54 * 29), math.sqrt(33 / 29), 10 * math.log10(29 / 33)]
    np.testing.assert_allclose(rows[2], expected, rtol=1e-5)


def test_a_tenth_off_is_twenty_decibels():
    rows = measured([[0.9], [-1.0]], [[1.0], [1.0]])
    np.testing.assert_allclose(rows[0], [1.0, 0.1, 20.0], rtol=1e-5)
    np.testing.assert_allclose(rows[1], [-1.0, 2.0, -20 * math.log10(2)], rtol=1e-5)


@given(seed=st.integers(0, 2**32 - 1), size=st.integers(-30, 30))
@settings(max_examples=30, deadline=None)
def test_random_gradients_of_any_size(seed, size):
    """Squares of gradients near 1e-20 and beyond are no float32 numbers; their ratios are."""
    rng = np.random.default_rng(seed)
    r = [rng.normal(size=shape) * 10.0**size for shape in ((3, 4), (5,), (7,))]
    g = [a + rng.normal(size=a.shape) * 10.0 ** (size - 2) for a in r]
    g, r = ([np.float32(a) for a in arrays] for arrays in (g, r))
    rows = measured(g, r)
    for row, pair in zip(rows, zip(g, r, strict=True), strict=False):
        np.testing.assert_allclose(row, by_hand(*pair), rtol=1e-3)
    whole = by_hand(*(np.concatenate([a.ravel() for a in arrays]) for arrays in (g, r)))
    np.testing.assert_allclose(rows[-1], whole, rtol=1e-3)


def test_layers_of_very_different_sizes():
    """Each is measured for itself, as long as it is a float32 number at all; all together is the large one's."""
    rows = measured([[3e-25, 4e-25], [2.0, 0.0]], [[3e-25, 5e-25], [2.0, 0.0]])
    np.testing.assert_allclose(rows[0], by_hand([3, 4], [3, 5]), rtol=1e-4)
    assert rows[1].tolist() == rows[2].tolist() == [1.0, 0.0, math.inf]


def test_zeros_and_equals():
    zero, some = [0.0, 0.0], [1.0, -2.0]
    rows = measured([some, zero, some, zero], [some, some, zero, zero])
    np.testing.assert_allclose(rows[0], [1.0, 0.0, math.inf], rtol=1e-6)
    np.testing.assert_array_equal(rows[1], [math.nan, 1.0, 0.0])  # all is lost, as much as there was
    assert np.isnan(rows[2:4]).all()  # nothing to compare with
    np.testing.assert_allclose(rows[4], [0.5, 1.0, 0.0], atol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_spoilt_gradient_shows(bad):
    rows = measured([[1.0, bad], [1.0]], [[1.0, 1.0], [1.0]])
    assert not np.isfinite(rows[0]).any() and not np.isfinite(rows[2]).any()
    np.testing.assert_allclose(rows[1], [1.0, 0.0, math.inf])


def test_names():
    params = {"blocks": {0: {"attn": {"qkv": {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)}}}}, "wte": jnp.ones(4)}
    assert leaf_names(params) == ["blocks.0.attn.qkv.bias", "blocks.0.attn.qkv.kernel", "wte"]
    record = shadow.name(params, np.arange(12, dtype=np.float32).reshape(4, 3))
    assert record == {
        "grads/cosine": 9.0,
        "grads/relative_error": 10.0,
        "grads/snr_db": 11.0,
        "grads/blocks.0.attn.qkv.bias/cosine": 0.0,
        "grads/blocks.0.attn.qkv.bias/relative_error": 1.0,
        "grads/blocks.0.attn.qkv.bias/snr_db": 2.0,
        "grads/blocks.0.attn.qkv/cosine": 3.0,
        "grads/blocks.0.attn.qkv/relative_error": 4.0,
        "grads/blocks.0.attn.qkv/snr_db": 5.0,
        "grads/wte/cosine": 6.0,
        "grads/wte/relative_error": 7.0,
        "grads/wte/snr_db": 8.0,
    }
    assert [key for key in record if not is_of_one_layer(key)] == list(record)[:3]


# Of real steps.


MODEL = GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=23, dropout=0.2)
TOKENS = np.random.default_rng(0).integers(0, 23, (1, 1, 8, 9)).astype(np.int32)


def diagnosed(policy: Policy, compute: str) -> dict[str, float]:
    """The shadow comparison of a model's first step, dropout included."""
    graphdefs = [model_structure(dataclasses.replace(MODEL, compute_dtype=dtype)) for dtype in (compute, "float32")]
    step = make_diagnose_step(*graphdefs, loss_chunk=64, seed=0, policy=policy, loss_scale=LossScale())
    lanes = jax.vmap(
        lambda state, tokens: step(state, tokens, quant=False, shadow=True), (None, 0), None, axis_name="data"
    )
    params = numpy_gpt.random_like(jax.eval_shape(lambda: init_params(MODEL, 0)), 1)
    state = init_state(params, optax.identity(), policy.init())
    return shadow.name(params, jax.device_get(jax.jit(lanes)(state, TOKENS[None, 0]))["shadow"])


@pytest.mark.exhaustive
def test_more_precision_is_a_better_gradient():
    """float32 is its own shadow; bfloat16 is near, E5M2 in every dense layer further off."""
    everywhere = resolve([(r"blocks\..*|lm_head", "e5m2")], layer_shapes(MODEL))
    float32, bf16, e5m2 = (
        diagnosed(*case) for case in ((Policy(), "float32"), (Policy(), "bfloat16"), (everywhere, "bfloat16"))
    )
    assert float32["grads/cosine"] == pytest.approx(1.0, abs=1e-6) and float32["grads/snr_db"] > 100
    assert 0.8 < e5m2["grads/cosine"] < bf16["grads/cosine"] < 1.0
    assert 5 < e5m2["grads/snr_db"] < bf16["grads/snr_db"] - 6 < 60
    layers = [key for key in e5m2 if is_of_one_layer(key) and key.endswith("snr_db")]
    assert len(layers) == len(leaf_names(jax.eval_shape(lambda: init_params(MODEL, 0))))
    assert all(e5m2[key] < bf16[key] < float32[key] for key in layers)
