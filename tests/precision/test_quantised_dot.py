"""The three products of a quantised layer against NumPy, which rounds each operand separately; backends; statistics."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from altgrad_jax.precision import dot
from altgrad_jax.precision.dot import dequantised_table, operand_pair, product_backward, product_forward
from altgrad_jax.precision.formats import family
from altgrad_jax.precision.recipes import ROLES, parse_recipe
from altgrad_jax.precision.scaling import initial_state, quantise, traced_grid
from altgrad_jax.precision.statistics import SHARES
from tests.precision import numpy_quantised as reference
from tests.precision.layers import F32, integers, normal, prepare, run, states
from tests.precision.numpy_quantised import Role

BF16 = jnp.dtype("bfloat16")
N, I, O = 12, 40, 6  # noqa: E741


def uniform(*args, **kwargs) -> tuple[Role, Role, Role]:
    return (Role(*args, **kwargs),) * 3


HISTORIES = ((2.0, 3.5), (0.0, 0.2), (0.01, 0.02))
CASES = {
    "e5m2": uniform("e5m2"),
    "e4m3": uniform("e4m3fn"),
    "hybrid": (Role("e4m3fn"), Role("e4m3fn"), Role("e5m2")),
    "hybrid history=2": tuple(
        map(Role, ("e4m3fn", "e4m3fn", "e5m2"), ["delayed"] * 3, ["tensor"] * 3, [1.0] * 3, [0] * 3, HISTORIES)
    ),
    "e5m2 scaling=none": uniform("e5m2", "none"),
    "e3m4 scaling=static scale=0.75": uniform("e3m4", "static", scale=0.75),
    "e4m3fn scaling=current g.margin=3": (*uniform("e4m3fn", "current")[:2], Role("e4m3fn", "current", margin=3)),
    "e5m2 scaling=current granularity=channel": uniform("e5m2", "current", "channel"),
    "e5m2 w=e0m7 g=e7m0 scaling=current x.granularity=channel": (
        Role("e5m2", "current", "channel"),
        Role("e0m7", "current"),
        Role("e7m0", "current"),
    ),
    "mxfp8": uniform("e4m3fn", "mx"),
    "mxfp4 g=e5m2": (Role("e2m1fn", "mx"), Role("e2m1fn", "mx"), Role("e5m2", "mx")),
    "mxfp6_e2m3 g.scaling=current g.granularity=channel": (
        *uniform("e2m3fn", "mx")[:2],
        Role("e2m3fn", "current", "channel"),
    ),
    "float32 scaling=none": uniform("float32", "none"),
} | {f"{fmt.name} scaling=current": uniform(fmt.name, "current") for fmt in family(7)}


def inputs(seed: int = 0):
    return normal(seed, N, I), normal(seed + 1, I, O, size=0.02), normal(seed + 2, O), normal(seed + 3, N, O, size=1e-3)


@pytest.mark.parametrize("text", CASES)
def test_the_three_products(text):
    x, w, bias, g = inputs()
    by_role = states(text, HISTORIES) if "history" in text else None
    actual, expected = run(x, w, bias, g, text, by_role), reference.products(x, w, bias, g, CASES[text])
    for what, bound in zip(("y", "dx", "dw"), expected.bounds, strict=True):
        error = np.abs(np.asarray(getattr(actual, what), np.float64) - getattr(expected, what))
        assert (error <= bound).all(), f"{what} is off by {(error / bound).max()} times what accumulation may do"
    np.testing.assert_allclose(actual.dbias, expected.dbias, rtol=1e-6, atol=1e-9)  # g itself, not rounded
    # The bound is far below what rounding does, or the comparison would show nothing.
    unrounded = x.astype(np.float64) @ w + bias
    assert (np.abs(expected.y - unrounded) > 10 * expected.bounds[0]).mean() > 0.9 or "float32" in text


@pytest.mark.exhaustive
@given(st.integers(0, 2**32 - 5), st.sampled_from([(1, 1, 1), (33, 1, 5), (7, 70, 33)]))
@settings(max_examples=3, deadline=None)
def test_the_three_products_of_other_shapes(seed, shape):
    rows, inner, columns = shape
    arrays = normal(seed, rows, inner), normal(seed + 1, inner, columns), normal(seed + 2, columns)
    g = normal(seed + 3, rows, columns)
    for text in ("hybrid scaling=current", "mxfp8"):
        roles = (
            uniform("e4m3fn", "mx")
            if text == "mxfp8"
            else tuple(Role(f, "current") for f in ("e4m3fn", "e4m3fn", "e5m2"))
        )
        actual, expected = run(*arrays, g, text), reference.products(*arrays, g, roles)
        for what, bound in zip(("y", "dx", "dw"), expected.bounds, strict=True):
            assert (np.abs(getattr(actual, what) - getattr(expected, what)) <= bound).all()


def test_defects_1_and_2_all_operands_are_rounded_and_the_backward_pass_has_the_forward_pass_s():
    """AltGrad took gradients at the unrounded weights, and never rounded activations. Here all is exact in float32."""
    x, w, g = integers(0, N, I), integers(1, I, O), integers(2, N, O)
    actual = run(x, w, None, g, "e5m2 scaling=none")
    x64, w64, g64 = (np.asarray(a, np.float64) for a in (x, w, g))
    x_q, w_q, g_q = (reference.to_nearest(a, "e5m2") for a in (x, w, g))
    np.testing.assert_array_equal(actual.y, x_q @ w_q)
    assert (actual.y != x64 @ w_q).any() and (actual.y != x_q @ w64).any()
    np.testing.assert_array_equal(actual.dx, g_q @ w_q.T)
    assert (actual.dx != g_q @ w64.T).any() and (actual.dx != g64 @ w_q.T).any()
    np.testing.assert_array_equal(actual.dw, x_q.T @ g_q)
    assert (actual.dw != x64.T @ g_q).any() and (actual.dw != x_q.T @ g64).any()
    assert actual.dbias is None


def test_defects_1_and_2_stochastic_draws_are_the_same_in_both_passes():
    """With g exact, dx and dw tell what was multiplied forward: y is the product of just these."""
    x, w, g = integers(0, N, I), integers(1, I, N), np.eye(N, dtype=np.float32)
    for key in (0, 1):
        actual = run(x, w, None, g, "e5m2 scaling=none rounding=stochastic", key=jax.random.key(key))
        w_q, x_q = np.asarray(actual.dx).T, np.asarray(actual.dw).T  # dx = g w^T, dw = x^T g
        np.testing.assert_array_equal(actual.y, x_q.astype(np.float64) @ w_q)
        assert np.isin(np.abs(x_q), reference.magnitudes("e5m2")).all()
        assert (x_q != reference.to_nearest(x, "e5m2")).any() and (w_q != reference.to_nearest(w, "e5m2")).any()


def all_of_bfloat16() -> np.ndarray:
    """Every finite value, [256, 255]; and their float32 neighbours are what float8 ties are between."""
    values = np.arange(2**16, dtype=np.uint32) << 16
    floats = values.view(np.float32)
    finite = floats[np.isfinite(floats)]
    return finite[np.abs(finite) > 2.0**-120][: 256 * 240].reshape(256, 240)


@pytest.mark.parametrize("fmt", reference.NATIVE)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "toward_zero"])
def test_native_and_emulated_operands_are_equal_to_the_bit(fmt, rounding):
    key = jax.random.key(0) if rounding == "stochastic" else None
    for options in ("scaling=none", "scaling=static scale=0.3 overflow=special"):
        role = parse_recipe(f"e5m2 x={fmt} {options} rounding={rounding}").activation  # the recipe e4m3 is e4m3fn
        state, x = initial_state(role), jnp.asarray(all_of_bfloat16())
        operands = [quantise(x, role, state, 1, native=native, key=key)[0] for native in (True, False)]
        native, emulated = (np.asarray(operand.values) for operand in operands)
        assert native.dtype == reference.ml_dtype(fmt) and emulated.dtype == BF16
        wide = native.astype(np.float32), emulated.astype(np.float32)
        np.testing.assert_array_equal(*wide)
        np.testing.assert_array_equal(*(np.signbit(np.where(np.isnan(a), 0, a)) for a in wide))  # -0 too
        assert operands[0].inverse_scale == operands[1].inverse_scale


@pytest.mark.parametrize("text", ["e5m2", "hybrid", "e4m3fnuz", "e5m2 scaling=current granularity=channel"])
def test_native_and_emulated_products_agree(text):
    x, w, bias, g = inputs(5)
    native, emulated = (run(x, w, bias, g, text, native=n) for n in (True, False))
    x_fmt, g_fmt = {"hybrid": ("e4m3fn", "e5m2"), "e4m3fnuz": ("e4m3fnuz",) * 2}.get(text, ("e5m2",) * 2)
    kind = ("current", "channel") if "channel" in text else ("delayed",)
    expected = reference.products(x, w, bias, g, (Role(x_fmt, *kind), Role(x_fmt, *kind), Role(g_fmt, *kind)))
    for what, bound in zip(("y", "dx", "dw"), expected.bounds, strict=True):
        assert (np.abs(getattr(native, what) - getattr(emulated, what)) <= 2 * bound).all()
        assert (np.abs(getattr(native, what) - getattr(expected, what)) <= bound).all()


@pytest.mark.parametrize("options", ["", " scaling=current", " scaling=current granularity=channel"])
def test_defect_4_e1m6_and_e0m7_give_the_same_layer_to_the_bit(options):
    one, zero = (run(*inputs(), f"{fmt}{options}") for fmt in ("e1m6", "e0m7"))
    for what in ("y", "dx", "dw", "dbias"):
        assert np.asarray(getattr(one, what)).tobytes() == np.asarray(getattr(zero, what)).tobytes()


@pytest.mark.parametrize(("x_dtype", "out_dtype"), [(BF16, BF16), (F32, F32), (BF16, F32)])
@pytest.mark.parametrize(("text", "native"), [("e5m2", True), ("hybrid", False), ("mxfp8", False)])
def test_dtypes(x_dtype, out_dtype, text, native):
    x, w, bias, g = inputs()

    def layer(x, w, bias, g):
        return run(x, w, bias, g, text, out_dtype=out_dtype, native=native).__dict__

    out = jax.eval_shape(layer, jnp.asarray(x, x_dtype), w, bias, g)
    assert [out[what].dtype for what in ("y", "dx", "dw", "dbias")] == [out_dtype, x_dtype, F32, F32]
    assert [out[what].shape for what in ("y", "dx", "dw", "dbias")] == [(N, O), (N, I), (I, O), (O,)]


def test_bias_is_added_before_the_result_is_rounded():
    x, w, bias, g = inputs()
    y = run(x, w, bias, g, "e5m2", out_dtype=BF16).y
    exact = run(x, w, bias, g, "e5m2").y
    np.testing.assert_array_equal(np.asarray(y, np.float32), np.asarray(exact.astype(BF16), np.float32))


@pytest.mark.parametrize("text", ["float32 scaling=none", "float32 scaling=current granularity=channel"])
def test_check_grads_where_rounding_does_nothing(text):
    def layer(x, w, bias):
        prepared = prepare(jax.lax.stop_gradient(w), text)
        return dot.quantised_matmul(x, w, bias, prepared, prepared.probe(), F32)

    check_grads(layer, (normal(0, 5, 4), normal(1, 4, 3), normal(2, 3)), order=1, modes=["rev"], eps=1e-2, rtol=1e-3)


def test_check_grads_of_the_straight_through_form():
    """Without its rounding a layer is x w + b; at points of the grid its gradient is the one of that."""
    rng = np.random.default_rng(0)
    x, w, g = (rng.integers(-4, 5, shape).astype(np.float32) / 4 for shape in ((5, 4), (4, 3), (5, 3)))
    actual = run(x, w, np.zeros(3, np.float32), g, "e4m3fn scaling=none")
    check_grads(lambda x, w: x @ w, (x, w), order=1, modes=["rev"], eps=1e-2)
    y, back = jax.vjp(lambda x, w: x @ w, x, w)
    for found, expected in zip((actual.y, actual.dx, actual.dw), (y, *back(g)), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_jit_and_bf16_activations():
    x, w, bias, g = inputs()
    x = jnp.asarray(x, BF16)
    fields = ("y", "dx", "dw", "dbias")

    @jax.jit
    def compiled(*arrays):
        return run(*arrays, "hybrid", out_dtype=BF16).__dict__

    whole, steps = compiled(x, w, bias, g), run(x, w, bias, g, "hybrid", out_dtype=BF16)
    expected = reference.products(
        *(np.asarray(x, np.float32), w, bias, np.asarray(jnp.asarray(g, BF16), np.float32), CASES["hybrid"])
    )
    for what in fields:
        np.testing.assert_allclose(*(np.asarray(a, np.float32) for a in (whole[what], getattr(steps, what))), rtol=8e-3)
    np.testing.assert_allclose(whole["dw"], expected.dw, atol=float(expected.bounds[2].max()))


@pytest.mark.parametrize("options", ["scaling=current", pytest.param("scaling=mx", marks=pytest.mark.slow)])
def test_vmap_over_formats(options):
    """One program for eight formats: the same bits as eight programs with a format each."""
    x, w, bias, g = inputs()
    grids = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(traced_grid, family(7)))
    text = f"e4m3 {options}"

    @jax.jit
    @jax.vmap
    def layers(grid):
        by_role = {role: replace(state, grid=grid) for role, state in states(text).items()}
        found = run(x, w, bias, g, text, by_role)
        return found.y, found.dx, found.dw

    batched = layers(grids)
    for i, fmt in enumerate(family(7)):
        expected = reference.products(x, w, bias, g, uniform(fmt.name, options.removeprefix("scaling=")))
        alone = run(x, w, bias, g, f"{fmt.name} {options}")
        for found, one, what, bound in zip(
            batched, (alone.y, alone.dx, alone.dw), ("y", "dx", "dw"), expected.bounds, strict=True
        ):
            assert (np.abs(found[i] - getattr(expected, what)) <= bound).all()
            assert (np.abs(found[i] - one) <= bound).all()


@pytest.mark.parametrize(
    ("text", "times"),
    [("e5m2", 1), ("hybrid scaling=current", 1), ("e5m2 scaling=current granularity=channel", 2), ("mxfp8", 2)],
)
def test_x_and_g_are_rounded_once_for_both_of_their_products(monkeypatch, text, times):
    """Once each with one scale a tensor; with scales along the contraction the two products need two operands."""
    x, w, _, g = map(jnp.asarray, inputs())
    prepared = prepare(w, text)
    calls = []
    monkeypatch.setattr(dot, "quantise", lambda a, *args, **kwargs: calls.append(a) or quantise(a, *args, **kwargs))
    _, x_operand, _ = product_forward(x, prepared)
    assert [a is x for a in calls] == [True] * times
    product_backward(g, x_operand, prepared)
    assert [a is g for a in calls[times:]] == [True] * times  # x is not rounded again, and w not at all
    first, second, _ = operand_pair(
        x, prepared.recipe.activation, prepared.activation, (1, 0), False, None, None, False
    )
    assert (first is second) == (times == 1)


def test_native_casts_in_the_whole_layer():
    """The same seen in the program: three casts to float8, of x, w and g, and three products of float8 operands."""
    x, w, _, g = inputs()
    program = jax.jit(lambda x, w, g: run(x, w, None, g, "e5m2", native=True).__dict__).lower(x, w, g).as_text()
    casts = [line for line in program.splitlines() if "convert" in line and "xf8E5M2>" in line.split("->")[-1]]
    products = [line for line in program.splitlines() if "dot_general" in line]
    assert len(casts) == 3 and len(products) == 3
    assert all(line.count("f8E5M2") == 2 and line.rstrip().split("->")[1].count("f32") == 1 for line in products)


@pytest.mark.parametrize("collect", [False, True])
@pytest.mark.parametrize("text", ["hybrid", "e5m2 scaling=none", "mxfp8", "e5m2 scaling=current granularity=channel"])
def test_the_probe_s_cotangent_is_what_was_seen_of_x_and_g(text, collect):
    x, w, bias, g = inputs()
    seen, recipe = run(x, w, bias, g, text, collect=collect).seen, parse_recipe(text)
    for found, role, array in ((seen.activation, recipe.activation, x), (seen.gradient, recipe.gradient, g)):
        expected = quantise(jnp.asarray(array), role, initial_state(role), 1, collect=collect)[1]
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        jax.tree.map(np.testing.assert_array_equal, found, expected)
        assert found.amax == np.abs(array).max()
    if collect and text == "e5m2 scaling=none":
        lost = np.mean((g != 0) & (reference.to_nearest(g, "e5m2") == 0))
        assert np.asarray(seen.gradient.shares)[SHARES.index("underflow")] == pytest.approx(lost)


@pytest.mark.parametrize("text", ["e5m2", "hybrid scaling=current", "e4m3fn scaling=current granularity=channel"])
def test_eight_devices_round_as_one(text):
    """Amax is the largest over all devices, so each of them uses the scale that one device would."""
    x, w, g = normal(0, 32, I), normal(1, I, O), normal(2, 32, O)
    x[20, 3], g[9, 1] = 30, -40  # each on one device alone
    alone = run(x, w, None, g, text)

    def part(x, g):
        found = run(x, w, None, g, text, axis_name="data")
        return found.y, found.dx, jax.lax.psum(found.dw, "data"), found.seen.activation.amax, found.seen.gradient.amax

    y, dx, dw, *amaxes = jax.pmap(part, axis_name="data")(x.reshape(8, 4, I), g.reshape(8, 4, O))
    np.testing.assert_allclose(y.reshape(32, O), alone.y, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dx.reshape(32, I), alone.dx, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dw[0], alone.dw, rtol=1e-5, atol=1e-4)
    np.testing.assert_array_equal(amaxes, [[30] * 8, [40] * 8])


def test_table_rows_are_rounded_and_its_gradient_is_passed_through():
    table, ids = normal(0, 7, 5), np.array([3, 3, 0])
    prepared = prepare(jnp.asarray(table), "e4m3fn scaling=current")

    def looked_up(table):
        return dequantised_table(table, prepared)[ids]

    rows, back = jax.vjp(looked_up, jnp.asarray(table))
    expected = reference.quantise(table, Role("e4m3fn", "current"), 1).value[ids]
    np.testing.assert_allclose(rows, expected, rtol=1e-6)
    assert (np.asarray(rows) != table[ids]).any()
    g = normal(1, 3, 5)
    scattered = np.zeros_like(table)
    np.add.at(scattered, ids, g)
    np.testing.assert_allclose(back(jnp.asarray(g))[0], scattered, rtol=1e-6)


def test_keys_of_parts():
    prepared = prepare(jnp.ones((4, 4)), "e5m2 rounding=stochastic", key=jax.random.key(0))
    keys = [prepared.fold_keys(i) for i in range(3)]
    drawn = {
        tuple(np.asarray(jax.random.key_data(k)).tolist()) for p in keys for k in (p.activation_key, p.gradient_key)
    }
    assert len(drawn) == 6
    assert all(p.forward is prepared.forward for p in keys)  # the weight's draws are one
    nearest = prepare(jnp.ones((4, 4)), "e5m2").fold_keys(1)
    assert nearest.activation_key is None and nearest.gradient_key is None and set(ROLES) == set(states("e5m2"))
