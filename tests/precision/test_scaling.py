"""Scales: which one a tensor gets, how it follows the history, and what becomes of zeros, NaN, Inf and large ranges."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from altgrad_jax.precision.formats import family, get_format
from altgrad_jax.precision.recipes import RoleRecipe, parse_recipe
from altgrad_jax.precision.scaling import RoleState, carrier, initial_state, next_state, quantise, traced_grid
from tests.precision import numpy_quantised as reference

SHAPE = (6, 40)
FAMILY = [fmt.name for fmt in family(7)]
FORMATS = ["e5m2", "e4m3fn", "e3m4", "e4m3b11fnuz", "bfloat16", *FAMILY]


def role_of(text: str) -> RoleRecipe:
    """The recipe of one operand; "bfloat16 ..." too, which of a layer would mean that it is not quantised."""
    return parse_recipe(text.replace("bfloat16", "e5m2 x=bfloat16")).activation


def run(x, role, state, axis=1, collect=False):
    # Operation by operation: one compiled program for every recipe would take minutes.
    return quantise(jnp.asarray(x), role, state, axis, collect=collect)


compiled = jax.jit(run, static_argnames=("role", "axis", "collect"))


def state_of(text: str, history=()) -> RoleState:
    state = initial_state(role_of(text))
    return replace(state, history=jnp.asarray(history, jnp.float32)) if history else state


def quantised(x, text: str, history=(), axis: int = 1, collect: bool = False):
    """The operand, 1 / inverse_scale in float64, and the statistics."""
    operand, stats = run(np.asarray(x, np.float32), role_of(text), state_of(text, history), axis, collect)
    return operand, 1 / np.float64(operand.inverse_scale), stats


def normal(seed: int, *shape: int, size: float = 1.0) -> np.ndarray:
    return (size * np.random.default_rng(seed).normal(size=shape or SHAPE)).astype(np.float32)


def assert_equals_reference(x, text: str, role: reference.Role, history=(), axis: int = 1):
    """Rounded values equal to the bit, and scales."""
    operand, scale, _ = quantised(x, text, history, axis)
    expected = reference.quantise(x, role, axis)
    np.testing.assert_array_equal(np.asarray(operand.values, np.float64), expected.q)
    assert operand.inverse_scale.dtype == jnp.float32
    np.testing.assert_array_equal(operand.inverse_scale, np.float32(1) / expected.s)
    np.testing.assert_allclose(scale, expected.s, rtol=2e-7)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ("scaling=none", {"scaling": "none"}),
        ("scaling=static scale=3.7", {"scaling": "static", "scale": np.float32(3.7)}),
        ("scaling=current", {"scaling": "current"}),
        ("scaling=current margin=3", {"scaling": "current", "margin": 3}),
        ("history=3", {"history": (0.25, 1.5, 0.75)}),
        ("history=2 margin=1", {"history": (0.7, 0.0), "margin": 1}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_scale_of_a_tensor(fmt, options, settings):
    role = reference.Role(fmt, **settings)
    assert_equals_reference(normal(1), f"{fmt} {options}", role, role.history)


@pytest.mark.parametrize(
    "text", ["e5m2", "e4m3fn margin=2", "e7m0 scaling=current granularity=channel", "e0m7 scaling=mx"]
)
def test_compiled_as_a_whole_it_is_the_same(text):
    x = normal(9)
    for history in ((), (0.25, 1.5)):
        alone = run(x, role_of(text), state_of(text, history), collect=True)
        whole = compiled(x, role_of(text), state_of(text, history), collect=True)
        for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(whole), strict=True):
            # Means over elements may be summed in another order.
            np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=1e-6)
        np.testing.assert_array_equal(*(np.asarray(out[0].values, np.float32) for out in (alone, whole)))


@pytest.mark.parametrize("fmt", ["e5m2", "e4m3fn", "e0m7", "e7m0"])
@pytest.mark.parametrize("axis", [0, 1])
def test_scale_of_every_vector_along_the_contraction(fmt, axis):
    x = normal(2) * np.exp2(np.arange(SHAPE[0])[:, None] - np.arange(SHAPE[1]) % 7).astype(np.float32)
    x[1], x[:, 2] = 0, 0
    text = f"{fmt} scaling=current granularity=channel margin=2"
    assert_equals_reference(x, text, reference.Role(fmt, "current", "channel", margin=2), axis=axis)
    operand, scale, _ = quantised(x, text, axis=axis)
    assert scale.shape == ((SHAPE[0], 1) if axis else (1, SHAPE[1]))
    np.testing.assert_array_equal(scale.reshape(-1)[1 if axis else 2], 1)  # of a vector of zeros
    largest = np.abs(np.asarray(operand.values, np.float64)).max(axis=axis)
    target = min(get_format(fmt).max, 2.0**50) / 4
    np.testing.assert_allclose(largest[largest > 0], target, rtol=0.07)


@pytest.mark.parametrize("fmt", FORMATS)
@given(st.floats(2.0**-60, 2.0**60, width=32), st.integers(0, 2**32 - 1))
@settings(max_examples=5, deadline=None)
def test_amax_lands_on_the_largest_value(fmt, size, seed):
    x = normal(seed, size=size)
    operand, _, _ = quantised(x, f"{fmt} scaling=current")
    q = np.asarray(operand.values, np.float64)
    # x s may come out a few 2^-24 below the largest value, which rounds to it.
    assert np.abs(q).max() == min(get_format(fmt).max, 2.0**50)
    error = np.abs(q * np.float64(operand.inverse_scale) - x)
    ulp = get_format(fmt).ulp(q) * np.float64(operand.inverse_scale)
    assert (error <= 0.5001 * ulp + 1e-6 * np.abs(x)).all()


@pytest.mark.parametrize("text", ["e4m3fn", "e7m0 history=3 margin=2", "e5m2 history=1"])
@given(st.lists(st.sampled_from([0.0, 1e-6, 0.125, 1.0, 3.3, 700.0, np.inf, np.nan]), max_size=12))
@settings(max_examples=12, deadline=None)
def test_history_over_steps(text, amaxes):
    role, state = role_of(text), initial_state(role_of(text))
    x = normal(3)
    target = min(get_format(role.fmt).max, 2.0**50) / 2**role.margin
    seen, mean = [], 0.0
    step = jax.jit(next_state)
    for amax in amaxes:
        state = step(state, np.float32(amax))
        if np.isfinite(amax):  # another one changes nothing
            known = float(np.float32(amax))
            seen = [known, *seen]
            mean = 0.9 * mean + 0.1 * known if mean else known
        window = (seen + [0.0] * role.history)[: role.history]
        np.testing.assert_array_equal(state.history, np.float32(window))
        assert float(state.mean) == pytest.approx(mean, rel=1e-5)
    window = seen[: role.history]
    now = float(np.abs(x).max()) if not any(window) else max(window)
    operand, _ = run(x, role, state)
    assert operand.inverse_scale == np.float32(1) / (np.float32(target) / np.float32(now))


def test_the_largest_amax_leaves_the_window_after_its_length():
    role = role_of("e5m2 history=3")
    state, x = initial_state(role), np.ones((2, 2), np.float32)
    scales = []
    for amax in (8.0, 1.0, 2.0, 1.0, 1.0, 1.0):
        state = next_state(state, jnp.float32(amax))
        scales.append(57344 * float(run(x, role, state)[0].inverse_scale))
    np.testing.assert_allclose(scales, [8, 8, 8, 2, 2, 1], rtol=1e-6)


def test_the_first_step_is_scaled_by_its_own_amax():
    # flax begins with scale 1, and gradients near 1e-6 vanish in E5M2 until an amax is known.
    x = normal(4, size=1e-8)
    first, scale, _ = quantised(x, "e5m2")
    np.testing.assert_array_equal(first.values, quantised(x, "e5m2 scaling=current")[0].values)
    assert scale == pytest.approx(57344 / np.abs(x).max(), rel=1e-6)
    assert (np.asarray(first.values, np.float32) != 0).mean() > 0.99
    assert (np.asarray(quantised(x, "e5m2 scaling=none")[0].values, np.float32) == 0).all()


def test_state_is_float32_and_of_the_history_s_length():
    # None and not an empty array: checkpoints cannot hold those.
    for text, length in (("e5m2", 16), ("e5m2 history=3", 3), ("e5m2 scaling=current", None), ("mxfp8", None)):
        state = initial_state(role_of(text))
        assert (None if length is None else (length,)) == getattr(state.history, "shape", None)
        assert state.mean.shape == () and state.grid is None
        assert {leaf.dtype for leaf in jax.tree.leaves(next_state(state, jnp.float32(2)))} == {jnp.dtype("float32")}
        assert jax.tree.map(jnp.shape, next_state(state, jnp.float32(2))) == jax.tree.map(jnp.shape, state)
    x = jnp.asarray(normal(5), jnp.bfloat16)
    operand, stats = run(x, role_of("e5m2"), initial_state(role_of("e5m2")))
    assert (operand.inverse_scale.dtype, stats.amax.dtype) == (jnp.float32, jnp.float32)
    # The scale itself is no bfloat16: rounded to one it would be off by up to 0.2 %.
    assert np.float32(1) / operand.inverse_scale == pytest.approx(57344 / float(jnp.abs(x).max()), rel=2e-7)


SCALINGS = ["scaling=none", "scaling=current", "history=4", "scaling=current granularity=channel", "scaling=mx"]


@pytest.mark.parametrize("fmt", ["e5m2", "e4m3fn", "e0m7", "e7m0"])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_zeros_stay_zeros(fmt, scaling):
    operand, scale, stats = quantised(np.zeros(SHAPE), f"{fmt} {scaling}", collect=True)
    assert (np.asarray(operand.values, np.float32) == 0).all() and (scale == 1).all()
    assert stats.amax == 0 and stats.scale == 1 and not np.asarray(stats.shares).any()


@pytest.mark.parametrize(
    "text", ["e0m7 scaling=current", "e0m7 history=2 margin=32", "e7m0 scaling=current", "e0m7 scaling=mx"]
)
@given(st.floats(2.0**-126, float(np.finfo(np.float32).max), width=32))
@settings(max_examples=12, deadline=None)
def test_whatever_the_amax_values_stay_finite(text, amax):
    x = np.array([[amax, -amax, amax / 2, 0.0]], np.float32)
    operand, _, _ = quantised(x, text)
    value = np.asarray(operand.values, np.float64) * np.float64(operand.inverse_scale)
    assert np.isfinite(value).all() and 0 < float(operand.inverse_scale) < np.inf
    if "margin" in text:
        return  # 32 binades below, e0m7 has nothing left
    # The scale stops at 2^-126 and 2^126, where amax does not fit any more, or does not fill the range.
    if 2.0**-70 < amax < 2.0**125:
        np.testing.assert_allclose(value[0], x[0], rtol=0.5)
    assert value[0, 0] == -value[0, 1] > 0 or amax < 2.0**-70


@pytest.mark.parametrize("fmt", ["e7m0", "bfloat16", "e6m9", "e8m7", "float32"])
@given(st.integers(-100, 100), st.integers(-100, 100))
@settings(max_examples=6, deadline=None)
def test_products_of_formats_with_a_large_range_stay_finite(fmt, x_exponent, w_exponent):
    """Amax goes to 2^50 at most; at the largest value, 2^64 or 2^127, sums of products would overflow."""
    length = 2**12
    left = quantised(np.full((1, length), 1.75 * 2.0**x_exponent), f"{fmt} scaling=current")[0]
    right = quantised(np.full((length, 1), 1.75 * 2.0**w_exponent), f"{fmt} history=2", axis=0)[0]
    assert float(jnp.max(left.values)) <= 2.0**50
    total = lax.dot_general(left.values, right.values, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    assert 0 < float(total[0, 0]) < np.inf
    exact = length * 1.75**2 * 2.0 ** (x_exponent + w_exponent)
    if -100 < x_exponent + w_exponent < 100:
        actual = float(total[0, 0]) * float(left.inverse_scale) * float(right.inverse_scale)
        assert actual == pytest.approx(exact, rel=0.8 if fmt == "e7m0" else 0.01)


@pytest.mark.parametrize("options", ["scaling=current", "history=2", "scaling=current granularity=channel", "margin=3"])
@given(st.integers(0, 2**32 - 1), st.integers(-60, 60))
@settings(max_examples=8, deadline=None)
def test_defect_4_under_a_free_scale_e1m6_is_e0m7(options, seed, exponent):
    """To the bit: their grids differ by the factor 4, and so do their scales."""
    x = normal(seed, size=2.0**exponent)
    history = (float(np.abs(x).max()) / 2, 0.0) if options == "history=2" else ()
    one, zero = (quantised(x, f"{fmt} {options}", history)[0] for fmt in ("e1m6", "e0m7"))
    values = [np.asarray(operand.values.astype(jnp.float32) * operand.inverse_scale) for operand in (one, zero)]
    assert values[0].tobytes() == values[1].tobytes() and values[0].any()
    np.testing.assert_array_equal(np.asarray(one.values, np.float64), 4 * np.asarray(zero.values, np.float64))


def test_defect_4_under_a_fixed_scale_they_differ():
    x = normal(6)
    one, zero = (quantised(x, f"{fmt} scaling=none")[0].values for fmt in ("e1m6", "e0m7"))
    assert (np.asarray(one, np.float32) != np.asarray(zero, np.float32)).any()


@pytest.mark.parametrize("text", ["e5m2 scaling=current", "e5m2 history=2", "e5m2 scaling=current granularity=channel"])
@pytest.mark.parametrize("axis", [0, 1])
def test_one_device_and_eight_have_the_same_scales(text, axis):
    """Rows lie on different devices; what each of them rounds is what one device would."""
    role, x = role_of(text), normal(7, 16, 5)
    x[11] *= 37  # the largest element is on one device alone
    state = initial_state(role)
    alone, stats = compiled(x, role, state, axis)

    def part(x_RC):
        return quantise(x_RC, role, state, axis, axis_name="data")

    parts, part_stats = jax.pmap(part, axis_name="data")(x.reshape(8, 2, 5))
    np.testing.assert_array_equal(np.asarray(parts.values).reshape(16, 5), alone.values)
    np.testing.assert_array_equal(part_stats.amax, np.full(8, stats.amax))
    if role.per_tensor or axis == 0:
        for inverse_scale in parts.inverse_scale:
            np.testing.assert_array_equal(inverse_scale, alone.inverse_scale)
    else:
        np.testing.assert_array_equal(parts.inverse_scale.reshape(16, 1), alone.inverse_scale)


@pytest.mark.parametrize("options", ["scaling=current", "history=2 margin=1", "scaling=mx"])
@pytest.mark.parametrize("collect", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_formats_traced_and_batched(options, collect):
    """One vmapped quantisation over eight formats equals eight, each with its format built in."""
    text, x = f"e4m3 {options}", normal(8)
    if "mx" in options:
        x *= np.exp2(np.arange(SHAPE[0]))[:, None].astype(np.float32)
    histories = [(), (0.0, 2.5)] if "history" in options else [()]
    grids = [traced_grid(fmt) for fmt in family(7)]

    @jax.jit
    @partial(jax.vmap, in_axes=(None, RoleState(None, None, 0)))
    def batched(x, state):
        return run(x, role_of(text), state, collect=collect)

    for history in histories:
        state = replace(state_of(text, history), grid=jax.tree.map(lambda *grid: jnp.stack(grid), *grids))
        operands, stats = batched(x, state)
        for i, name in enumerate(FAMILY):
            operand, _, expected = quantised(x, f"{name} {options}", history, collect=collect)
            np.testing.assert_array_equal(*(np.asarray(v, np.float32) for v in (operands.values[i], operand.values)))
            # All scales as they are without vmap, though x is not batched and XLA then would not divide by its amax.
            np.testing.assert_array_equal(np.broadcast_to(operands.inverse_scale, 8)[i], operand.inverse_scale)
            if collect:
                np.testing.assert_array_equal(stats.shares[i], expected.shares)


def test_carrier_is_the_narrowest_that_is_exact():
    for name in ("e5m2", "e4m3fn", "e2m1fn", *FAMILY):
        assert carrier(get_format(name)).name == "bfloat16"
    for name in ("float16", "float32", "e0m15", "e5m10"):
        assert carrier(get_format(name)).name == "float32"
