"""The dense layer's three products against NumPy float64 on operands rounded by ml_dtypes."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from altgrad_jax.precision.dot import _transposed_copy, _weight_grad, matmul

BF16, F32 = jnp.dtype("bfloat16"), jnp.dtype("float32")
N, I, O = 12, 10, 6  # noqa: E741


def rounded(x, compute_dtype) -> np.ndarray:
    """What the product is to see of x, in float64."""
    x = np.asarray(x, np.float32)
    return (x.astype(ml_dtypes.bfloat16) if compute_dtype == BF16 else x).astype(np.float64)


def products(x, w, g, compute_dtype, out_dtype):
    """y, dx and dw of one layer, where g is the gradient that arrives at y."""
    y, back = jax.vjp(lambda x, w: matmul(x, w, compute_dtype, out_dtype), x, w)
    return y, *back(jnp.asarray(g, out_dtype))


run = jax.jit(products, static_argnums=(3, 4))


def integers(seed: int, *shape: int) -> np.ndarray:
    """Whole numbers of up to ten bits: most are not bfloat16, and sums of their products are exact in float32."""
    return np.random.default_rng(seed).integers(-1000, 1001, shape).astype(np.float32)


@pytest.mark.parametrize("compute_dtype", [BF16, F32])
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=10, deadline=None)
def test_all_three_products_are_exact_sums_of_rounded_operands(compute_dtype, seed):
    x, w, g = integers(seed, N, I), integers(seed + 1, I, O), integers(seed + 2, N, O)
    y, dx, dw = run(x, w, g, compute_dtype, F32)
    x64, w64, g64 = (rounded(a, compute_dtype) for a in (x, w, g))
    np.testing.assert_array_equal(y, x64 @ w64)
    np.testing.assert_array_equal(dx, g64 @ w64.T)
    np.testing.assert_array_equal(dw, x64.T @ g64)
    assert (np.asarray(y) != x.astype(np.float64) @ w).any() == (compute_dtype == BF16)


def test_bfloat16_result_is_rounded_once():
    x, w, g = integers(0, N, I), integers(1, I, O), integers(2, N, O)
    y, _, _ = run(x, w, g, BF16, BF16)
    assert y.dtype == BF16
    exact = (rounded(x, BF16) @ rounded(w, BF16)).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(np.asarray(y), exact)


@pytest.mark.parametrize("compute_dtype", [BF16, F32])
def test_real_numbers(compute_dtype):
    rng = np.random.default_rng(3)
    x, w, g = (rng.normal(size=shape).astype(np.float32) for shape in ((64, 200), (200, 48), (64, 48)))
    x64, w64, g64 = (rounded(a, compute_dtype) for a in (x, w, g))
    for actual, left, right in zip(
        run(x, w, g, compute_dtype, F32),
        (x64, g64, x64.T),
        (w64, w64.T, g64),
        strict=True,
    ):
        # Each of n additions in float32 is off by 2^-24 of a partial sum at the most; 200 * 2^-24 = 1.2e-5.
        bound = left.shape[1] * 2.0**-24 * (np.abs(left) @ np.abs(right))
        assert (np.abs(actual - left @ right) <= bound).all()


@pytest.mark.parametrize("x_dtype", [BF16, F32])
@pytest.mark.parametrize("w_dtype", [BF16, F32])
@pytest.mark.parametrize("out_dtype", [BF16, F32])
def test_gradients_have_the_dtypes_of_what_they_are_gradients_of(x_dtype, w_dtype, out_dtype):
    x, w = jax.ShapeDtypeStruct((N, I), x_dtype), jax.ShapeDtypeStruct((I, O), w_dtype)
    y, dx, dw = jax.eval_shape(lambda x, w: products(x, w, jnp.ones((N, O)), BF16, out_dtype), x, w)
    assert (y.dtype, dx.dtype, dw.dtype) == (out_dtype, x_dtype, w_dtype)
    assert (y.shape, dx.shape, dw.shape) == ((N, O), (N, I), (I, O))


def test_weight_gradient_is_accumulated_and_kept_in_float32():
    # In bfloat16 a sum of ones stops at 256, and 4097 is no bfloat16 number.
    x, w, g = jnp.ones((4097, 2), BF16), jnp.ones((2, 3)), jnp.ones((4097, 3), BF16)
    dw = run(x, w, g, BF16, BF16)[2]
    assert dw.dtype == F32
    np.testing.assert_array_equal(dw, np.full((2, 3), 4097.0))


def test_operands_are_in_the_compute_dtype_and_results_in_float32():
    x, w, g = integers(0, N, I), integers(1, I, O), integers(2, N, O)
    program = run.lower(x, w, g, BF16, BF16).as_text()
    found = re.findall(r"dot_general .*: \((.*)\) -> (.*)", program)
    assert sorted(found) == [
        ("tensor<10x12xbf16>, tensor<12x6xbf16>", "tensor<10x6xf32>"),
        ("tensor<12x10xbf16>, tensor<10x6xbf16>", "tensor<12x6xf32>"),
        ("tensor<12x6xbf16>, tensor<10x6xbf16>", "tensor<12x10xf32>"),
    ]


def test_vmap():
    x, w, g = integers(0, 3, N, I), integers(1, 3, I, O), integers(2, 3, N, O)
    batched = jax.jit(jax.vmap(lambda x, w, g: products(x, w, g, BF16, F32)))(x, w, g)
    shared = jax.jit(jax.vmap(lambda x, g: products(x, w[0], g, BF16, F32)))(x, g)
    for i in range(3):
        for whole, one in zip(batched, run(x[i], w[i], g[i], BF16, F32), strict=True):
            np.testing.assert_array_equal(whole[i], one)
        for whole, one in zip(shared, run(x[i], w[0], g[i], BF16, F32), strict=True):
            np.testing.assert_array_equal(whole[i], one)


def test_second_derivatives():
    rng = np.random.default_rng(0)
    at = tuple(rng.normal(size=shape).astype(np.float32) for shape in ((N, I), (I, O)))
    along = tuple(rng.normal(size=a.shape).astype(np.float32) for a in at)

    def gradient(multiply):
        return jax.grad(lambda at: jnp.sum(multiply(*at) ** 3))

    def forward_over_reverse(multiply):
        return jax.jvp(gradient(multiply), (at,), (along,))[1]

    def reverse_over_reverse(multiply):
        return jax.grad(lambda at: sum(map(jnp.vdot, gradient(multiply)(at), along)))(at)

    for second in (forward_over_reverse, reverse_over_reverse):
        exact = jax.jit(partial(second, jnp.dot))()
        for dtype, tolerance in ((F32, 1e-6), (BF16, 0.02)):
            actual = jax.jit(partial(second, partial(matmul, compute_dtype=dtype, out_dtype=F32)))()
            for a, b in zip(actual, exact, strict=True):
                np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max())


def test_transposed_copy_of_every_bfloat16():
    codes = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
    for x in (codes, codes[::-1, ::-1].copy()):
        copy = jax.jit(_transposed_copy)(x.view(ml_dtypes.bfloat16))
        assert copy.dtype == BF16
        np.testing.assert_array_equal(np.asarray(copy).view(np.uint16), x.T)


@pytest.mark.parametrize("bits", [16, 32])
def test_transposed_copy_whatever_the_first_element(bits):
    # The branch it hides behind looks at element [0, 0]; the other branch would give zeros.
    dtype = {16: ml_dtypes.bfloat16, 32: np.float32}[bits]
    special = np.array([0, 1, 2, 0.0, -0.0, 1.0, np.inf, -np.inf, np.nan, 2**0.5], dtype).view(f"uint{bits}")
    firsts = [*special, *range(10), *np.random.default_rng(0).integers(0, 2**bits, 300, dtype=f"uint{bits}")]
    copy = jax.jit(_transposed_copy)
    for first in firsts:
        x = np.append(first, special).astype(f"uint{bits}").reshape(1, -1)
        np.testing.assert_array_equal(np.asarray(copy(x.view(dtype))).view(f"uint{bits}"), x.T)


def test_transposed_copy_is_still_there_in_the_compiled_program():
    program = jax.jit(_weight_grad).lower(jnp.ones((64, 32), BF16), jnp.ones((64, 16), BF16)).compile()
    assert "conditional(" in program.as_text()
