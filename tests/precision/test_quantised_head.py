"""The chunked loss with a quantised output layer against NumPy with all logits at once; what loss scaling rescues."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from altgrad_jax.losses import token_cross_entropy
from altgrad_jax.precision.statistics import SHARES
from tests import numpy_gpt
from tests.precision import numpy_quantised as reference
from tests.precision.layers import F32, normal, prepare, states
from tests.precision.numpy_quantised import Role

N, C, V = 24, 8, 31
HISTORIES = ((3.0, 2.0), (1.5,), (0.02,))
# Text -> roles; gradients under delayed scaling are 1 / N of those of the logits, times the loss scale.
CASES = {
    "hybrid history=2": tuple(
        Role(fmt, history=history) for fmt, history in zip(("e4m3fn", "e4m3fn", "e5m2"), HISTORIES, strict=True)
    ),
    "e5m2 scaling=none": (Role("e5m2", "none"),) * 3,
    "e3m4 scaling=none g=e5m2": (Role("e3m4", "none"), Role("e3m4", "none"), Role("e5m2", "none")),
    "mxfp8": (Role("e4m3fn", "mx"),) * 3,
}


def inputs(seed: int = 0):
    targets = np.random.default_rng(seed + 2).integers(0, V, N).astype(np.int32)
    return normal(seed, N, C), normal(seed + 1, C, V), targets


def run(hidden, w, targets, text: str, chunk: int, loss_scale=1.0, times=1.0, collect=False):
    """Loss, both gradients of `times` the loss, and what the head saw."""
    by_role = states(text, HISTORIES) if "history" in text else None
    prepared = prepare(jnp.asarray(w), text, by_role, collect=collect)

    def loss(hidden, w, probe):
        return times * token_cross_entropy(hidden, w, targets, F32, chunk, (prepared, probe), loss_scale)

    value, (dhidden, dw, seen) = jax.value_and_grad(loss, (0, 1, 2))(
        jnp.asarray(hidden), jnp.asarray(w), prepared.probe()
    )
    return value, dhidden, dw, seen


def expected(hidden, w, targets, roles, loss_scale: float = 1.0):
    """The same in float64, but for x s in float32; dlogits has its true size, a mean's, when it is rounded."""
    x_role, w_role, g_role = roles
    logits = reference.quantise(hidden, x_role, 1).value @ reference.quantise(w, w_role, 0).value
    loss, dlogits = numpy_gpt.cross_entropy(logits, targets)
    g = dlogits * loss_scale
    dhidden = reference.quantise(g, g_role, 1).value @ reference.quantise(w, w_role, 1).value.T
    dw = reference.quantise(hidden, x_role, 0).value.T @ reference.quantise(g, g_role, 0).value
    return loss, dhidden, dw, g


@pytest.mark.parametrize("text", CASES)
@pytest.mark.parametrize("loss_scale", [1.0, 1024.0])
def test_loss_and_gradients(text, loss_scale):
    # Blocks along the tokens are those of a chunk.
    chunk = N if text == "mxfp8" else 8
    arrays = inputs()
    value, dhidden, dw, seen = run(*arrays, text, chunk, loss_scale)
    loss, dhidden_64, dw_64, g = expected(*arrays, CASES[text], loss_scale)
    assert float(value) == pytest.approx(loss, rel=1e-5)  # the loss itself is not scaled
    for actual, exact in ((dhidden, dhidden_64), (dw, dw_64)):
        assert actual.dtype == jnp.float32
        np.testing.assert_allclose(actual, exact, rtol=1e-4, atol=1e-5 * np.abs(exact).max())
    assert seen.activation.amax == np.abs(arrays[0]).max()
    assert float(seen.gradient.amax) == pytest.approx(np.abs(g).max(), rel=1e-5)
    # The comparison can tell: without any rounding the gradients are others by far more.
    plain = expected(*arrays, (Role("float32", "none"),) * 3, loss_scale)
    assert np.abs(plain[2] - dw_64).max() > 1e-3 * np.abs(dw_64).max()


@pytest.mark.parametrize("text", ["hybrid history=2", "e5m2 scaling=none"])
def test_chunks_change_nothing_where_scales_do_not_depend_on_them(text):
    one, many = run(*inputs(), text, N, collect=True), run(*inputs(), text, 4, collect=True)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_scale_of_a_chunk_s_own_amax():
    """ "current" is, within a chunk, what it is for a tensor: chunks of one token have scales of their own."""
    hidden, w, targets = inputs()
    hidden = hidden * np.exp2(np.arange(N) % 5).astype(np.float32)[:, None]
    value, _, _, _ = run(hidden, w, targets, "e4m3fn scaling=current", 1)
    role = Role("e4m3fn", "current")
    rows = [reference.quantise(row[None], role, 1).value for row in hidden]
    loss, _ = numpy_gpt.cross_entropy(np.concatenate(rows) @ reference.quantise(w, role, 0).value, targets)
    assert float(value) == pytest.approx(loss, rel=1e-5)


def test_evaluation_uses_the_same_operands():
    hidden, w, targets = inputs()
    prepared = prepare(jnp.asarray(w), "hybrid")
    loss = token_cross_entropy(hidden, w, targets, F32, 8, (prepared, prepared.probe()))
    trained, _, _, _ = run(hidden, w, targets, "hybrid", 8)
    assert float(loss) == float(trained)
    assert abs(float(loss) - expected(hidden, w, targets, (Role("float32", "none"),) * 3)[0]) > 1e-4


def test_what_comes_after_the_loss_is_not_rounded():
    """A factor on the loss multiplies gradients that are rounded already; loss_scale multiplies them before."""
    arrays = inputs()
    plain, thrice = (run(*arrays, "e5m2 scaling=none", 8, times=times) for times in (1.0, 3.0))
    for a, b in zip(plain[1:3], thrice[1:3], strict=True):
        np.testing.assert_allclose(3 * a, b, rtol=1e-6)
    scaled = run(*arrays, "e5m2 scaling=none", 8, loss_scale=3.0)
    assert (np.abs(scaled[1] - thrice[1]) > 1e-3 * np.abs(thrice[1])).any()


def test_gradients_of_a_mean_vanish_in_bare_e5m2_and_loss_scaling_brings_them_back():
    """Of 256 tokens and 1024 words, a logit's gradient is 1 / 2^18: under half of E5M2's smallest number, 2^-16."""
    rng = np.random.default_rng(0)
    hidden, w = normal(0, 256, 4, size=0.1), normal(1, 4, 1024, size=0.1)
    targets = rng.integers(0, 1024, 256).astype(np.int32)
    lost = {}
    for scale in (1.0, 2.0**16):
        _, _, dw, seen = run(hidden, w, targets, "e5m2 scaling=none", 64, scale, collect=True)
        lost[scale] = float(seen.gradient.shares[SHARES.index("underflow")])
        _, _, exact, g = expected(hidden, w, targets, CASES["e5m2 scaling=none"], scale)
        assert lost[scale] == pytest.approx(np.mean(reference.to_nearest(g, "e5m2") == 0), abs=1e-4)
        np.testing.assert_allclose(dw, exact, atol=1e-3 * np.abs(exact).max())
    assert lost[1.0] > 0.99 and lost[2.0**16] == 0
