"""Singular values: by hand, against NumPy in float64 on well- and ill-conditioned matrices, and warnings of falls."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from altgrad_jax.diagnostics import spectra

measure = jax.jit(spectra.measure)


def in_float64(w) -> list[float]:
    """The definitions, in the order of MEASURES."""
    s = np.linalg.svd(np.float64(w), compute_uv=False)
    p = s[s > 0] / s.sum()
    share = np.cumsum(s**2) / np.sum(s**2)
    rank_99 = np.searchsorted(share, 0.99) + 1
    return [s[0], np.sum(s**2) / s[0] ** 2, math.exp(-np.sum(p * np.log(p))), rank_99]


def with_values(s, rows, seed=0) -> np.ndarray:
    """A matrix [rows, len(s)] with these singular values, float32."""
    rng = np.random.default_rng(seed)
    u = np.linalg.qr(rng.standard_normal((rows, len(s))))[0]
    v = np.linalg.qr(rng.standard_normal((len(s), len(s))))[0]
    return ((u * s) @ v).astype(np.float32)


def test_numbers_worked_out_by_hand():
    """s = 4, 2, 2: 24 / 16; p = 1/2, 1/4, 1/4 has an entropy of 1.5 bits; and s = 10, 1, of which 10 has 99.01 %."""
    w = jnp.zeros((5, 3)).at[0, 1].set(-4.0).at[2, 0].set(2.0).at[4, 2].set(2.0)
    rows = np.asarray(measure({"a": w, "b": w.T, "bias": w[0], "c": jnp.diag(jnp.array([1.0, 10.0]))}))
    np.testing.assert_allclose(rows[:2], [[4.0, 1.5, 2**1.5, 3.0]] * 2, rtol=1e-6)
    entropy = 10 / 11 * math.log(11 / 10) + 1 / 11 * math.log(11)
    np.testing.assert_allclose(rows[2], [10.0, 1.01, math.exp(entropy), 1.0], rtol=1e-6)


@pytest.mark.parametrize("size", [1.0, 1e-25, 1e25])
@pytest.mark.parametrize(
    "decay", [lambda i: 1 / i, lambda i: i**-2.0, lambda i: i**-3.0, lambda i: 0.8**i, lambda i: 1.0 * (i <= 5)]
)
def test_ill_conditioned_matrices(decay, size):
    """Half and more of the singular values may lie below 3e-4 of the largest, where a Gram matrix knows nothing."""
    s = decay(np.arange(1, 65))
    s[s < 1e-30] = 0.0
    w = with_values(s, 150) * np.float32(size)
    np.testing.assert_allclose(measure([w, w.T]), [in_float64(w)] * 2, rtol=2e-4)


@pytest.mark.parametrize("shape", [(96, 96), (96, 384), (3000, 96)])
def test_matrices_as_they_are_drawn(shape):
    w = (0.02 * np.random.default_rng(1).standard_normal(shape)).astype(np.float32)
    np.testing.assert_allclose(measure([w])[0], in_float64(w), rtol=1e-4)


def test_zero_and_spoilt_matrices():
    good = jnp.eye(4)
    rows = np.asarray(measure([0 * good, good.at[1, 2].set(jnp.nan), good.at[0, 0].set(jnp.inf), good]))
    assert rows[0, 0] == 0.0 and np.isnan(rows[0, 1:]).all() and np.isnan(rows[1:3]).all()
    np.testing.assert_allclose(rows[3], [1.0, 4.0, 4.0, 4.0], rtol=1e-6)


def test_batched_and_on_several_devices():
    matrices = np.stack([with_values(np.linspace(1, 0.1, 12) ** power, 20, power) for power in (1, 2, 5)])
    expected = [in_float64(w) for w in matrices]
    for transformed in (jax.vmap, jax.pmap):
        rows = transformed(lambda w: spectra.measure({"a": w}))(matrices)
        np.testing.assert_allclose(rows[:, 0], expected, rtol=1e-5)


def test_names():
    params = {"blocks": {0: {"up": {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)}}}, "wte": jnp.zeros((4, 2))}
    record = spectra.name(params, np.arange(8, dtype=np.float32).reshape(2, 4))
    first = {f"spectra/blocks.0.up/{what}": float(i) for i, what in enumerate(spectra.MEASURES)}
    of_all = {f"spectra/{what}": 2.0 + i if i else 4.0 for i, what in enumerate(spectra.MEASURES)}
    assert record == first | {f"spectra/wte/{what}": 4.0 + i for i, what in enumerate(spectra.MEASURES)} | of_all
