"""Lanczos eigenvalues against spectra that are known, and against the dense Hessian of a model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from altgrad_jax.diagnostics import curvature
from altgrad_jax.model import GPTConfig
from altgrad_jax.state import init_params, model_structure
from altgrad_jax.step import window_loss
from tests import numpy_gpt

KEY = jax.random.key(0)
MODEL = GPTConfig(n_layer=1, n_head=1, n_embd=4, block_size=6, vocab_size=11, bias=True, compute_dtype="float32")
TOKENS = np.random.default_rng(0).integers(0, 11, (8, 2, 7)).astype(np.int32)  # devices, windows, tokens


def quadratic(spectrum, seed: int = 0):
    """x^T A x / 2 over a tree of two arrays, with A of this spectrum, and a point."""
    size = len(spectrum)
    basis = np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))[0]
    matrix = jnp.asarray(basis @ np.diag(spectrum) @ basis.T, jnp.float32)

    def loss(params):
        x = jnp.concatenate([params["a"], params["b"].ravel()])
        return 0.5 * jnp.dot(x, jnp.dot(matrix, x, precision="highest"), precision="highest")

    return loss, {"a": jnp.ones((size - 4,)), "b": jnp.ones((2, 2))}


def ends(loss, params, iterations: int, **options):
    find = jax.jit(lambda params: curvature.largest_eigenvalues(loss, params, KEY, iterations, **options))
    return [np.asarray(x) for x in find(params)]


@pytest.mark.parametrize("unit", [1e-6, 1e6])
def test_as_many_steps_as_dimensions_find_the_whole_spectrum(unit):
    spectrum = np.array([-3.0, -1.0, 0.0, 0.5, 2.0, 7.0]) * unit
    found, bounds = ends(*quadratic(spectrum), 6)
    np.testing.assert_allclose(found, spectrum[::-1], atol=2e-5 * unit)
    assert (bounds < 1e-4 * unit).all()


def test_both_ends_of_a_wide_spectrum_and_the_bounds_hold():
    """Two large eigenvalues, a negative one and a bulk, as the Hessian of a network has them."""
    spectrum = np.concatenate([[-2.0], np.linspace(-0.1, 0.5, 197), [6.0, 10.0]])
    loss, params = quadratic(spectrum)
    found, bounds = ends(loss, params, 10)
    assert (np.diff(found) < 0).all()
    np.testing.assert_allclose([*found[:2], found[-1]], [10.0, 6.0, -2.0], atol=2e-3)
    distances = np.abs(found[:, None] - spectrum).min(axis=1)
    assert (distances <= bounds + 1e-5).all() and (distances < 1e-3).sum() >= 3


@pytest.mark.parametrize("iterations", [10, 40])
def test_without_a_basis_the_ends_are_right_and_copies_come_in(iterations):
    spectrum = np.concatenate([[-2.0], np.linspace(-0.1, 0.5, 197), [6.0, 10.0]])
    found, bounds = ends(*quadratic(spectrum), iterations, keep_basis=False)
    np.testing.assert_allclose([found[0], found[-1]], [10.0, -2.0], atol=1e-4)
    assert found[1] == pytest.approx(10.0, abs=0.01), "a copy: documented, not wanted"
    assert (np.abs(found[:, None] - spectrum).min(axis=1) <= bounds + 1e-4).all()


def test_what_cannot_be_reached_is_nan():
    """Three different eigenvalues: after three steps nothing is left."""
    found, _ = ends(*quadratic([1.0] * 4 + [2.0] * 4 + [5.0] * 2), 6)
    np.testing.assert_allclose(found[:3], [5.0, 2.0, 1.0], rtol=1e-5)
    assert np.isnan(found[3:]).all()
    named = curvature.name(ends(*quadratic([3.0] * 6), 2))
    np.testing.assert_allclose(named["curvature/largest_eigenvalue"], 3.0, rtol=1e-5)
    np.testing.assert_allclose(named["curvature/smallest_eigenvalue"], 3.0, rtol=1e-5)
    assert np.isnan(named["curvature/second_eigenvalue"])


def test_a_spoilt_loss_is_nan_and_flat_ones_are_zero():
    loss, params = quadratic(np.ones(6))
    assert np.isnan(ends(lambda p: loss(p) * jnp.nan, params, 3)[0]).all()
    found, bounds = ends(lambda p: loss(p) * 0.0, params, 3)
    assert found[0] == bounds[0] == 0 and np.isnan(found[1:]).all()


def model_loss(params, tokens_BT1):
    return window_loss(model_structure(MODEL), params, tokens_BT1, 4, None)


@pytest.fixture(scope="module")
def params():
    drawn = numpy_gpt.random_like(jax.eval_shape(lambda: init_params(MODEL, 0)), 1)
    return jax.tree.map(jnp.asarray, drawn)


@pytest.fixture(scope="module")
def dense_spectrum(params):
    """Of the mean loss of all windows, ascending, from the Hessian formed whole."""
    flat, unravel = ravel_pytree(params)
    tokens = TOKENS.reshape(-1, TOKENS.shape[-1])
    hessian = jax.jit(jax.hessian(lambda flat: model_loss(unravel(flat), tokens)))(flat)
    return np.linalg.eigvalsh(np.asarray(hessian, np.float64))


def test_a_model_on_eight_devices_against_its_dense_hessian(params, dense_spectrum):
    """With 10 products: the custom backward passes of the model and its loss are differentiated again."""

    def find(params, tokens_BT1):
        loss = lambda params: model_loss(params, tokens_BT1)  # noqa: E731
        return curvature.largest_eigenvalues(loss, params, KEY, 10, axis_name="data")

    found, bounds = jax.pmap(find, axis_name="data", in_axes=(None, 0), out_axes=None)(params, TOKENS)
    largest, second = dense_spectrum[:-3:-1]
    assert found[0] == pytest.approx(largest, rel=1e-4)
    assert found[1] == pytest.approx(second, rel=2e-2)
    assert found[-1] == pytest.approx(dense_spectrum[0], rel=0.1)
    distances = np.abs(np.asarray(found)[:, None] - dense_spectrum).min(axis=1)
    assert (distances <= np.asarray(bounds) + 1e-5 * largest).all()


def test_names():
    assert curvature.name((np.array([4.0, 2.0, -1.0]), np.array([0.5, 0.25, 0.125]))) == {
        "curvature/largest_eigenvalue": 4.0,
        "curvature/second_eigenvalue": 2.0,
        "curvature/smallest_eigenvalue": -1.0,
        "curvature/residual": 0.5,
    }
