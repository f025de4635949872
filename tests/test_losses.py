"""The chunked cross entropy against plain log-softmax in float64, and what its program holds in memory."""

import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from altgrad_jax.losses import _chunks, token_cross_entropy
from tests import numpy_gpt

BF16, F32 = jnp.dtype("bfloat16"), jnp.dtype("float32")
N, C, V = 24, 8, 31


def inputs(seed: int = 0):
    rng = np.random.default_rng(seed)
    hidden, w = rng.normal(size=(N, C)).astype(np.float32), rng.normal(size=(C, V)).astype(np.float32)
    return hidden, w, rng.integers(0, V, N).astype(np.int32)


def reference(hidden, w, targets):
    """Loss and both gradients in float64."""
    hidden, w = np.asarray(hidden, np.float64), np.asarray(w, np.float64)
    loss, dlogits = numpy_gpt.cross_entropy(hidden @ w, targets)
    return loss, dlogits @ w.T, hidden.T @ dlogits


def chunked(hidden, w, targets, compute_dtype=F32, chunk=8, scale=1.0):
    """Loss and both gradients of scale * loss."""

    def scaled(hidden, w):
        loss = token_cross_entropy(hidden, w, targets, compute_dtype, chunk)
        return scale * loss, loss

    (_, loss), gradients = jax.value_and_grad(scaled, (0, 1), has_aux=True)(hidden, w)
    return loss, *gradients


run = jax.jit(chunked, static_argnums=(3, 4))


def plain(hidden, w, targets):
    """The same loss with all logits at once."""
    log_softmax = jax.nn.log_softmax(hidden @ w)
    return -jnp.take_along_axis(log_softmax, targets[:, None], axis=1).mean()


@pytest.mark.parametrize(("chunk", "size"), [(1, 1), (5, 4), (7, 6), (8, 8), (23, 12), (24, 24), (4096, 24)])
def test_chunk_is_the_largest_divisor_that_is_allowed(chunk, size):
    hidden, _, targets = inputs()
    hidden_knC, targets_kn = _chunks(hidden, targets, chunk)
    assert hidden_knC.shape == (N // size, size, C)
    np.testing.assert_array_equal(hidden_knC.reshape(N, C), hidden)
    np.testing.assert_array_equal(targets_kn.reshape(N), targets)


@pytest.mark.parametrize("chunk", [1, 7, 8, 4096])
def test_float32_loss_and_gradients(chunk):
    hidden, w, targets = inputs()
    loss, dhidden, dw = run(hidden, w, targets, F32, chunk)
    expected_loss, expected_dhidden, expected_dw = reference(hidden, w, targets)
    assert loss.dtype == dhidden.dtype == dw.dtype == F32
    assert loss == pytest.approx(expected_loss, rel=5e-7)
    np.testing.assert_allclose(dhidden, expected_dhidden, atol=3e-7 * np.abs(expected_dhidden).max())
    np.testing.assert_allclose(dw, expected_dw, atol=5e-7 * np.abs(expected_dw).max())


def test_loss_without_gradients():
    hidden, w, targets = inputs()
    loss = token_cross_entropy(hidden, w, targets, F32, 8)
    assert loss == pytest.approx(reference(hidden, w, targets)[0], rel=5e-7)


def test_bfloat16_operands():
    hidden, w, targets = inputs()
    hidden = hidden.astype(ml_dtypes.bfloat16)
    loss, dhidden, dw = run(hidden, w, targets, BF16, 8)
    expected_loss, expected_dhidden, expected_dw = reference(hidden, w.astype(ml_dtypes.bfloat16), targets)
    assert (loss.dtype, dhidden.dtype, dw.dtype) == (F32, BF16, F32)
    # Softmax and sum are float32; the logits' gradient is rounded to bfloat16 (2^-9), and so is that of hidden.
    assert loss == pytest.approx(expected_loss, rel=5e-7)
    np.testing.assert_allclose(
        dhidden.astype(np.float32), expected_dhidden, atol=3 * 2**-9 * np.abs(expected_dhidden).max()
    )
    np.testing.assert_allclose(dw, expected_dw, atol=2 * 2**-9 * np.abs(expected_dw).max())
    assert np.abs(dw - expected_dw).max() > 1e-5 * np.abs(expected_dw).max()


def test_gradients_scale_with_the_cotangent():
    hidden, w, targets = inputs()
    loss, dhidden, dw = run(hidden, w, targets)
    for scale in (-3.0, 0.0, 2.0**-20):
        scaled_loss, scaled_dhidden, scaled_dw = run(hidden, w, targets, scale=scale)
        assert scaled_loss == loss
        np.testing.assert_allclose(scaled_dhidden, scale * dhidden, rtol=2e-7)
        np.testing.assert_allclose(scaled_dw, scale * dw, rtol=2e-7)
    # And where the loss is only a part of what is differentiated.
    squared = jax.grad(lambda h: token_cross_entropy(h, w, targets, F32, 8) ** 2 + jnp.sum(h))(hidden)
    np.testing.assert_allclose(squared, 2 * loss * dhidden + 1, atol=5e-7)


@pytest.mark.parametrize("size", [90.0, 1e4, 3e38])
@pytest.mark.parametrize("target", [0, 1, 2])
def test_extreme_logits(size, target):
    # e^90 is more than float32 can hold. Targets: the largest logit, the smallest, the one between.
    hidden, w = np.ones((3, 1), np.float32), np.array([[size, -size, 0.0]], np.float32)
    loss, dhidden, dw = run(hidden, w, np.full(3, target, np.int32), F32, 2)
    total = 3 * (float(w[0, 0]) - float(w[0, target]))
    # The sum over tokens is float32: of three losses of 3e38 or more it is too large.
    assert loss * 3 == pytest.approx(total if total < float(np.finfo(np.float32).max) else math.inf, rel=1e-6)
    np.testing.assert_allclose(dw, [np.array([1.0, 0, 0]) - np.eye(3)[target]], atol=1e-6)
    assert not np.isnan(dhidden).any()


@pytest.mark.parametrize("level", [0.0, -1e4, 1e4])
def test_equal_logits(level):
    hidden, w = np.ones((3, 1), np.float32), np.full((1, 3), level, np.float32)
    loss, _, dw = run(hidden, w, np.zeros(3, np.int32), F32, 2)
    assert loss == pytest.approx(math.log(3), abs=2e-3 if level else 1e-6)  # float32 has steps of 1e-3 at 1e4
    np.testing.assert_allclose(dw, [[-2 / 3, 1 / 3, 1 / 3]], rtol=1e-5)


def largest_float32(program: str) -> int:
    """Elements of the largest float32 array in a compiled program's text."""
    shapes = re.findall(r"\bf32\[([0-9,]+)\]", program)
    return max(math.prod(map(int, shape.split(","))) for shape in shapes)


def test_memory():
    tokens, width, vocabulary, chunk = 512, 16, 2048, 64
    hidden, w = jax.ShapeDtypeStruct((tokens, width), F32), jax.ShapeDtypeStruct((width, vocabulary), F32)
    targets = jax.ShapeDtypeStruct((tokens,), jnp.int32)

    def compiled(loss):
        return jax.jit(jax.value_and_grad(loss, (0, 1))).lower(hidden, w, targets).compile()

    whole = compiled(plain)
    assert f"f32[{tokens},{vocabulary}]" in whole.as_text() and largest_float32(whole.as_text()) == tokens * vocabulary
    cut = compiled(partial(token_cross_entropy, compute_dtype=F32, chunk=chunk))
    assert largest_float32(cut.as_text()) == chunk * vocabulary
    temporary = cut.memory_analysis().temp_size_in_bytes
    assert temporary < whole.memory_analysis().temp_size_in_bytes / 2
    assert temporary < 4 * (3 * chunk * vocabulary + 3 * width * vocabulary + 3 * tokens * width)


def test_evaluation_does_no_gradient_work():
    loss = partial(token_cross_entropy, compute_dtype=F32, chunk=8)
    evaluation = jax.jit(loss).lower(*inputs()).as_text()
    training = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*inputs()).as_text()
    assert (evaluation.count("dot_general"), training.count("dot_general")) == (1, 3)
    # Forward mode is not defined for it; a clear error, not a wrong number.
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(lambda h: loss(h, *inputs()[1:]), inputs()[:1], inputs()[:1])
