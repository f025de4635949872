"""What holds an infinity or NaN stays visibly spoilt: in every scaling, granularity, role and format, over devices."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from altgrad_jax.optimizers.moments import pack
from altgrad_jax.precision.dot import dequantised_table
from altgrad_jax.precision.largest import amax
from altgrad_jax.precision.recipes import RoleRecipe, parse_recipe
from altgrad_jax.precision.scaling import RoleState, initial_state, next_state, quantise, traced_grid
from altgrad_jax.precision.statistics import SHARES, RoleStats, over_parts
from altgrad_jax.precision.weight_grid import grid_of
from tests.precision import numpy_quantised as reference
from tests.precision.layers import normal, prepare, run, states

SPOILS = (np.inf, -np.inf, np.nan)
SCALINGS = {
    "scaling=none": {"scaling": "none"},
    "scaling=static scale=0.75": {"scaling": "static", "scale": np.float32(0.75)},
    "scaling=current": {"scaling": "current"},
    "scaling=current pow2=1": None,
    "history=2": {"history": ()},
    "history=2 margin=1": {"history": (2.0, 3.5), "margin": 1},
    "scaling=current granularity=channel": {"scaling": "current", "granularity": "channel"},
    "scaling=current granularity=channel pow2=1": None,
    "scaling=mx": {"scaling": "mx"},
    "scaling=mx margin=1": None,
}
scalings = pytest.mark.parametrize("scaling", SCALINGS)


def role_of(text: str) -> RoleRecipe:
    return parse_recipe(text).activation


def state_of(text: str, scaling: str) -> RoleState:
    """The state of a recipe with this scaling; with a history, if it has one above."""
    state, history = initial_state(role_of(text)), (SCALINGS[scaling] or {}).get("history")
    return replace(state, history=jnp.asarray(history, jnp.float32)) if history else state


def value_of(operand) -> np.ndarray:
    """What the operand stands for, float64."""
    return np.asarray(operand.values.astype(jnp.float32), np.float64) * np.asarray(operand.inverse_scale, np.float64)


def spoilt(x, scaling: str, axis: int) -> np.ndarray:
    """Which elements share their scale with an infinity or NaN."""
    kind = "mx" if "mx" in scaling else "channel" if "channel" in scaling else "tensor"
    return reference.shares_a_scale(~np.isfinite(np.asarray(x, np.float64)), kind, axis)


@scalings
@pytest.mark.parametrize(
    ("fmt", "overflow"), [("e5m2", "saturate"), ("e4m3fn", "special"), ("e0m7", "saturate"), ("e2m1fn", "special")]
)
def test_all_that_share_a_scale_with_it_are_nan_and_nothing_else(fmt, overflow, scaling):
    if overflow == "special" and scaling == "scaling=mx":
        return  # there the largest of a block overflow
    text = f"{fmt} overflow={overflow} {scaling}"
    for number, spoil in enumerate(SPOILS):
        axis = number % 2
        x = normal(number, 5, 70) if axis else normal(number, 70, 5)
        clean = value_of(quantise(jnp.asarray(x), role_of(text), state_of(text, scaling), axis)[0])
        x[3, 3] = spoil
        operand, stats = quantise(jnp.asarray(x), role_of(text), state_of(text, scaling), axis, collect=True)
        value, lost = value_of(operand), spoilt(x, scaling, axis)
        np.testing.assert_array_equal(np.isnan(value), lost)
        np.testing.assert_array_equal(value[~lost], clean[~lost])
        assert lost[3, 3] and lost.all() == ("mx" not in scaling and "channel" not in scaling)
        shares = dict(zip(SHARES, map(float, np.asarray(stats.shares)), strict=True))
        assert shares["nonfinite"] == np.float32(1 / 350) and shares["nan"] == pytest.approx(lost.mean())
        assert not np.isfinite(stats.amax) and np.isnan(stats.scale)
        if (settings := SCALINGS[scaling]) and overflow == "saturate":
            expected = reference.quantise(x, reference.Role(fmt, **settings), axis).value
            np.testing.assert_allclose(value, expected, rtol=1e-7)


@scalings
@pytest.mark.parametrize("fmt", ["e4m3fn", "e4m3b11fnuz"])
def test_natively_too(fmt, scaling):
    """Operands in the format's own dtype; the scale is what is NaN, so that it does not matter if the codes can be."""
    if "mx" in scaling:
        return  # never native
    text, x = f"{fmt} {scaling}", normal(7, 6, 40)
    x[2, 5] = -np.inf
    operand, _ = quantise(jnp.asarray(x), role_of(text), state_of(text, scaling), 1, native=True)
    assert operand.values.dtype == reference.ml_dtype(fmt)
    np.testing.assert_array_equal(np.isnan(value_of(operand)), spoilt(x, scaling, 1))


@pytest.mark.parametrize(
    ("scaling", "dtype"),
    [
        *(("scaling=current", "float32"), ("history=2", "bfloat16"), ("scaling=mx", "float32")),
        *(("scaling=current granularity=channel", "float32"), ("scaling=mx", "bfloat16")),
    ],
)
def test_in_tensors_so_large_that_xla_s_own_maximum_loses_nan(scaling, dtype):
    text = f"e4m3 {scaling}"
    x = jnp.asarray(normal(1, 64, 4096), dtype).at[40, 1111].set(-jnp.nan)
    operand, stats = jax.jit(lambda x: quantise(x, role_of(text), state_of(text, scaling), 1))(x)
    assert np.isnan(value_of(operand)[40, 1111]) and not np.isfinite(stats.amax)
    np.testing.assert_array_equal(np.isnan(value_of(operand)), spoilt(x.astype(jnp.float32), scaling, 1))


@pytest.mark.parametrize("size", [1, 31, 5000])
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_amax(size, axis):
    for spoil in (*SPOILS, 7.5):
        x = np.full((3, size), -1.0, np.float32)
        x[1, size // 2] = spoil
        with np.errstate(invalid="ignore"):
            expected = np.abs(x).max(axis=axis, keepdims=axis is not None)
        expected = np.where(np.isnan(expected), np.inf, expected)
        for dtype in (jnp.float32, jnp.bfloat16):
            np.testing.assert_array_equal(jax.jit(amax, static_argnums=1)(jnp.asarray(x, dtype), axis), expected)


X, W, BIAS, G = normal(0, 12, 40), normal(1, 40, 6, size=0.02), normal(2, 6), normal(3, 12, 6, size=1e-3)
OPERANDS = {"activation": ("y", "dw"), "weight": ("y", "dx"), "gradient": ("dx", "dw")}


@pytest.mark.parametrize("role", OPERANDS)
@pytest.mark.parametrize(
    ("text", "spoil"),
    [("e4m3", -np.inf), ("e5m2_cast", np.nan), ("e0m7 scaling=current granularity=channel", np.inf), ("mxfp8", np.inf)],
)
def test_products(role, text, spoil):
    """Both products of the operand show it, in all that it goes into; the third does not know of it."""
    arrays = {"activation": X.copy(), "weight": W.copy(), "gradient": G.copy()}
    arrays[role][5, 3] = spoil
    actual = run(arrays["activation"], arrays["weight"], BIAS, arrays["gradient"], text)
    lost = {name: np.isnan(np.asarray(getattr(actual, name))) for name in ("y", "dx", "dw")}
    for name, found in lost.items():
        assert found.any() == (name in OPERANDS[role])
        if parse_recipe(text).role(role).per_tensor:
            assert found.all() == found.any()
    at = {"activation": ((5, 0), (3, 0)), "weight": ((0, 3), (0, 5)), "gradient": ((5, 0), (0, 3))}[role]
    assert all(lost[name][where] for name, where in zip(OPERANDS[role], at, strict=True))


def test_tables():
    table = normal(4, 9, 8)
    table[4, 4] = np.inf
    prepared = prepare(jnp.asarray(table), "e4m3", states("e4m3", ((), (2.0,) * 16, ())))
    assert np.isnan(dequantised_table(jnp.asarray(table), prepared)).all()


@pytest.mark.parametrize("scaling", ["scaling=current", "history=2", "scaling=current granularity=channel"])
@pytest.mark.parametrize("spoil", [np.inf, np.nan])
def test_one_device_s_nan_spoils_the_scale_that_all_share(scaling, spoil):
    text, axis = f"e5m2 {scaling}", 0
    x = normal(5, 16, 5)
    x[11, 2] = spoil

    def part(x_RC):
        operand, stats = quantise(x_RC, role_of(text), state_of(text, scaling), axis, axis_name="data", collect=True)
        return operand.values.astype(jnp.float32) * operand.inverse_scale, stats

    values, stats = jax.pmap(part, axis_name="data")(x.reshape(8, 2, 5))
    np.testing.assert_array_equal(np.isnan(values).reshape(16, 5), spoilt(x, scaling, axis))
    np.testing.assert_array_equal(stats.amax, np.full(8, np.inf))


def test_one_microbatch_s_nan_is_that_of_the_step():
    parts = RoleStats(jnp.asarray([1.0, np.nan, 3.0]), jnp.ones(3), jnp.ones((3, len(SHARES))), None)
    assert not np.isfinite(over_parts(parts).amax)


def test_the_history_forgets_nothing_and_keeps_no_infinity():
    role, state = role_of("e5m2 history=2"), initial_state(role_of("e5m2 history=2"))
    for seen in (8.0, 4.0, np.inf, np.nan, np.inf):
        state = jax.jit(next_state)(state, np.float32(seen))
        assert np.isfinite(state.history).all() and np.isfinite(state.mean)
    np.testing.assert_array_equal(state.history, [4.0, 8.0])
    operand, _ = quantise(jnp.ones((2, 2)), role, state, 1)
    assert operand.inverse_scale == np.float32(1) / (np.float32(57344) / np.float32(8))


def test_traced_formats():
    role, x = role_of("e4m3fn scaling=current"), normal(6, 4, 8)
    x[0, 0] = np.inf
    state = replace(initial_state(role), grid=traced_grid(role.fmt))
    assert np.isnan(value_of(quantise(jnp.asarray(x), role, state, 1)[0])).all()


def test_stored_moments_and_weights_on_a_grid():
    """What is carried from step to step in few bits has no code for it either."""
    x = normal(8, 3, 256)
    x[1, 7] = np.inf
    stored = pack(jnp.asarray(x), "e4m3fn", jax.random.key(0)).unpack()
    np.testing.assert_array_equal(np.isnan(stored).all(axis=1), [False, True, False])
    on = grid_of("e3m4:inf=0,nan=0", jnp.ones((2, 2)), scale=2.0)
    np.testing.assert_array_equal(on.round(jnp.asarray([1.0, np.inf, -np.inf, np.nan])), [1.0, np.nan, np.nan, np.nan])
