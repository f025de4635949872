"""Every optimizer against its rule in NumPy, one step and ten; on its grid; under vmap over rates and under pmap."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from altgrad_jax.optimizers.clipping import clip_by_format_range
from altgrad_jax.optimizers.draws import update_key
from altgrad_jax.optimizers.grid import grid
from altgrad_jax.optimizers.grids import apply_on_grids, resolve_grids, snap_to_grids
from altgrad_jax.optimizers.madam import madam
from altgrad_jax.optimizers.manifold import manifold_adamw
from altgrad_jax.optimizers.stored import adamw_sr
from altgrad_jax.precision.formats import get_format
from altgrad_jax.precision.grid import stack_grids
from altgrad_jax.precision.weight_grid import WeightGrid
from tests.optimizers import numpy_rules as rules

FORMATS = ("e5m2", "e4m3fn", "e3m4", "e0m7", "e7m0")
ADAM = {"b1": 0.9, "b2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
RATE = 2.0**-7
STEPS = 10


def initial(seed=0):
    rng = np.random.default_rng(seed)
    w = (0.02 * rng.standard_normal((12, 7))).astype(np.float32)
    w[0, 0] = 0.0
    return {"a": {"kernel": jnp.asarray(w)}, "norm": jnp.asarray(np.linspace(0.5, 1.5, 5, dtype=np.float32))}


def gradients(steps=STEPS, seed=1):
    rng = np.random.default_rng(seed)

    def one(shape):
        return (rng.standard_normal(shape) * 2.0 ** rng.uniform(-12, 0, shape)).astype(np.float32)

    return [{"a": {"kernel": one((12, 7))}, "norm": one((5,))} for _ in range(steps)]


def run(optimizer, params, grads, apply=optax.apply_updates):
    """The parameters after every step."""

    @jax.jit
    def step(params, state, g):
        updates, state = optimizer.update(g, state, params)
        return apply(params, updates), state

    state, seen = optimizer.init(params), []
    for g in grads:
        params, state = step(params, state, g)
        seen.append(params)
    return seen


def reference(rule, w, grads, **options):
    model, seen = rule(w, **options), []
    for g in grads:
        model.step(np.asarray(g, np.float64))
        seen.append(model.w)
    return seen


def kernels(trees):
    return [np.asarray(tree["a"]["kernel"], np.float64) for tree in trees]


MANIFOLDS = {
    "before": (rules.ManifoldBefore, {"placement": "before"}),
    "relative": (rules.ManifoldRelative, {"placement": "after", "form": "relative"}),
    "ulps": (rules.ManifoldUlps, {"placement": "after", "form": "ulps"}),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("kind", MANIFOLDS)
def test_manifold_adamw(kind, name):
    rule, options = MANIFOLDS[kind]
    params, grads = initial(), gradients()
    seen = run(
        manifold_adamw(RATE, name, **options, **ADAM, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p)),
        params,
        grads,
    )
    expected = reference(rule, params["a"]["kernel"], kernels(grads), rate=RATE, fmt=name)
    for actual, wanted in zip(kernels(seen), expected, strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=2e-4, atol=2e-7)
    norm = reference(rules.Adam, params["norm"], [g["norm"] for g in grads], rate=RATE, decay=0.0)
    np.testing.assert_allclose(seen[-1]["norm"], norm[-1], rtol=1e-5)


def test_ulps_move_as_many_ulps_as_the_rate_says():
    params = {"w": jnp.asarray([[1.0, 0.1, 0.01, 0.001]])}
    optimizer = manifold_adamw(0.5, "e4m3fn", placement="after", form="ulps", weight_decay=0.0)
    updates, _ = optimizer.update({"w": jnp.asarray([[1.0, -2.0, 3e-4, 5.0]])}, optimizer.init(params), params)
    found = resolve_grids("e4m3fn", params, None)["w"]
    np.testing.assert_allclose(updates["w"] / found.ulp(params["w"]), [[-0.5, 0.5, -0.5, -0.5]], rtol=1e-3)


def test_off_is_adamw_to_the_bit():
    params, grads = initial(), gradients()
    ours = run(manifold_adamw(RATE, "e5m2", placement="off", **ADAM), params, grads)
    theirs = run(optax.adamw(RATE, **ADAM), params, grads)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", ["e0m7", "e1m6", "e1m2:inf=0,nan=0"])
def test_relative_is_adamw_where_all_spacings_are_equal(name):
    params, grads = initial(), gradients(3)
    found = run(manifold_adamw(RATE, name, **ADAM), params, grads)
    expected = run(optax.adamw(RATE, **ADAM), params, grads)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9)
    other = run(manifold_adamw(RATE, "e2m5", **ADAM), params, grads)
    assert not np.allclose(other[-1]["a"]["kernel"], expected[-1]["a"]["kernel"], rtol=1e-3)


def test_what_before_can_and_cannot_change():
    """Adam divides by the gradient's scale, so a stiffness that stays cancels; what acts is its change, and eps."""
    w = {"w": jnp.asarray(2.0 ** np.linspace(-9, 0, 40, dtype=np.float32))[None]}
    grads = [{"w": g} for g in np.random.default_rng(0).standard_normal((30, 1, 40)).astype(np.float32)]

    def directions(optimizer):
        state, seen = optimizer.init(w), []
        for g in grads:  # at weights that stay where they are
            u, state = optimizer.update(g, state, w)
            seen.append(np.asarray(u["w"]).ravel())
        return np.stack(seen)

    def cosine(a, b):
        return np.sum(a * b) / np.linalg.norm(a) / np.linalg.norm(b)

    options = dict(b1=0.9, b2=0.95, weight_decay=0.0)
    plain = directions(optax.adamw(RATE, eps=0.0, **options))
    before = directions(manifold_adamw(RATE, "e5m2", placement="before", eps=0.0, **options))
    np.testing.assert_allclose(before, plain, rtol=1e-4)  # it cannot change the direction at all
    damped = directions(manifold_adamw(RATE, "e5m2", placement="before", eps=1e-3, **options))
    assert cosine(damped, plain) < 0.95  # but for eps, which it makes larger where S is small
    ratio = np.abs(damped / plain).mean(0)
    assert ratio[0] < 0.6 and ratio[-1] > 0.95
    after = directions(manifold_adamw(RATE, "e5m2", placement="after", form="relative", eps=0.0, **options))
    assert cosine(after, plain) < 0.9  # placed after, it does
    np.testing.assert_allclose(
        after / plain,
        np.broadcast_to((s := rules.stiffness(np.asarray(w["w"]), "e5m2")) / s.mean(), after.shape),
        rtol=1e-4,
    )


def draws(step, shape=(12, 7), name="a.kernel"):
    return np.asarray(jax.random.uniform(update_key(0, jnp.int32(step), name), shape), np.float64)


def on_grid(w, name, scale) -> bool:
    return bool(np.isin(np.asarray(w, np.float64) * scale, get_format(name).finite_values()).all())


@pytest.mark.parametrize("name", FORMATS)
def test_grid(name):
    only = lambda path: name if path == "a.kernel" else None  # noqa: E731
    params = snap_to_grids(initial(), only)
    grads = gradients()
    optimizer = optax.partition(
        {"grid": grid(3.0, only), "rest": optax.sgd(0.1)}, {"a": {"kernel": "grid"}, "norm": "rest"}
    )
    seen = run(optimizer, params, grads, lambda p, u: apply_on_grids(p, u, only))
    expected = reference(rules.Grid, params["a"]["kernel"], kernels(grads), scale=3.0, fmt=name, draws=draws)
    before = [kernels([params])[0], *expected[:-1]]
    for i, (actual, wanted, earlier) in enumerate(zip(kernels(seen), expected, before, strict=True)):
        assert on_grid(actual, name, rules.fitted_scale(earlier, name))
        # A rung is taken or not: float32's velocity and float64's differ in the last digits, a draw seldom between.
        assert np.mean(actual != wanted) <= 0.012 * i
    assert np.mean(kernels(seen)[-1] != kernels([params])[0]) > 0.5
    np.testing.assert_allclose(seen[-1]["norm"], params["norm"] - 0.1 * sum(g["norm"] for g in grads), rtol=1e-5)


def test_grid_stands_still_without_gradient():
    """AltGrad's snapped every weight upwards."""
    params = snap_to_grids({"w": initial()["a"]["kernel"]}, "e5m2")
    optimizer = grid(6.0, "e5m2", weight_decay=0.0)
    updates, _ = optimizer.update({"w": jnp.zeros((12, 7))}, optimizer.init(params), params)
    assert not np.asarray(updates["w"]).any()


@pytest.mark.parametrize("name", ["e5m2", "e0m7", "e7m0"])
def test_grid_is_never_nan_and_stops_at_the_ends(name):
    params = snap_to_grids({"w": initial()["a"]["kernel"]}, name)
    grads = [{"w": jnp.full((12, 7), g)} for g in (jnp.nan, jnp.inf, -jnp.inf, 1e30, *[-1e30] * 60)]
    found = WeightGrid(stack_grids([name]), jnp.ones(1))
    scale = rules.fitted_scale(np.asarray(params["w"]), name)
    fixed = {"w": WeightGrid(jax.tree.map(lambda x: x[0], found.grid), jnp.float32(scale), fixed=True)}
    optimizer, w = grid(6.0, name), params
    state = optimizer.init(params)
    for g in grads:
        updates, state = optimizer.update(g, state, w, grids=fixed)
        w = apply_on_grids(w, updates, name, fixed)
        assert on_grid(w["w"], name, scale)
    if name != "e0m7":  # 60 times 10 rungs is all of the others
        assert (np.abs(w["w"]) == get_format(name).max / scale).all()


def test_grid_rounding_is_unbiased():
    """The mean of many steps of a third of a rung is a third of a rung, to 5 sigma."""
    size = 1_000_000
    w = {"w": jnp.full((1, size), 0.5)}
    optimizer = grid(1.0, "e5m2", momentum=0.0, weight_decay=0.0, seed=3)
    updates, _ = optimizer.update({"w": jnp.full((1, size), 1 / 3)}, optimizer.init(w), w)
    # Down from a power of two a rung is half an ulp of it.
    rungs = np.asarray(updates["w"], np.float64) / 0.0625
    assert set(np.unique(rungs)) == {-1.0, 0.0}
    assert abs(rungs.mean() + 1 / 3) < 5 * np.sqrt(2 / 9 / size)


def test_madam():
    params, grads = {"w": initial()["a"]["kernel"]}, gradients()
    grads = [{"w": jnp.asarray(g["a"]["kernel"]).at[3].set(0.0)} for g in grads]
    seen = run(madam(0.05), params, grads)
    expected = reference(rules.Madam, params["w"], [np.asarray(g["w"]) for g in grads], rate=0.05)
    for actual, wanted in zip(seen, expected, strict=True):
        np.testing.assert_allclose(actual["w"], wanted, rtol=1e-4)
    first = np.asarray(params["w"])
    assert (np.sign(seen[-1]["w"]) == np.sign(first)).all() and (np.asarray(seen[-1]["w"])[3] == first[3]).all()
    with pytest.raises(ValueError, match="madam needs params"):
        madam(0.1).update(grads[0], madam(0.1).init(params))


@pytest.mark.parametrize("name", [*FORMATS, "bfloat16"])
def test_adamw_sr(name):
    params = snap_to_grids({"w": initial()["a"]["kernel"]}, name)
    grads = [{"w": g["a"]["kernel"]} for g in gradients()]
    seen = run(adamw_sr(RATE, name, **ADAM), params, grads, lambda p, u: apply_on_grids(p, u, name))

    def bits(step):
        return np.asarray(jax.random.bits(update_key(0, jnp.int32(step), "w"), (12, 7)), np.int64)

    w = np.asarray(params["w"], np.float64)
    expected = reference(rules.AdamSR, w, [g["w"] for g in grads], rate=RATE, fmt=name, bits=bits)
    for actual, wanted, earlier in zip(seen, expected, [w, *expected[:-1]], strict=True):
        assert on_grid(actual["w"], name, rules.fitted_scale(earlier, name))
        assert np.mean(np.asarray(actual["w"]) != wanted) < 0.03  # a draw between float32's and float64's sums


def test_stochastic_updates_arrive_where_nearest_ones_are_lost():
    w = {"w": jnp.full((1, 200_000), 1.0)}
    optimizer = adamw_sr(0.01, "e5m2", weight_decay=0.0)
    state, params = optimizer.init(w), w
    for _ in range(4):
        updates, state = optimizer.update({"w": jnp.ones((1, 200_000))}, state, params)
        params = apply_on_grids(params, updates, "e5m2")
    # 0.01 is a twelfth of the spacing below 1: to nearest nothing would ever move.
    moved = np.asarray(params["w"], np.float64)
    assert abs(moved.mean() - 0.96) < 5 * moved.std() / np.sqrt(moved.size)


def test_8_bit_moments_stay_near_adams():
    params, grads = {"w": jnp.zeros((40, 100))}, np.random.default_rng(0).standard_normal((60, 40, 100))
    sizes = 10.0 ** np.random.default_rng(1).uniform(-6, 0, (40, 1))
    ours, theirs = (
        run(optimizer, params, [{"w": (g * sizes).astype(np.float32)} for g in grads])
        for optimizer in (
            optax.chain(adamw_sr(RATE, lambda _: None, moments="8bit", **ADAM)),
            optax.adamw(RATE, **ADAM),
        )
    )
    a, b = (np.asarray(x[-1]["w"], np.float64).ravel() for x in (ours, theirs))
    assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.95
    assert np.linalg.norm(a) == pytest.approx(np.linalg.norm(b), rel=0.05)


def test_8_bit_moments_take_a_quarter():
    params = {"w": jnp.zeros((512, 512)), "b": jnp.zeros((100,))}
    state = adamw_sr(RATE, "e5m2", moments="8bit").init(params)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert size == 2 * (512 * 512 * (1 + 4 / 256) + 256 + 4) + 2 * 4  # moments, the padded vector, two counts
    with pytest.raises(ValueError, match="moments='4bit' is not one of float32, 8bit"):
        adamw_sr(RATE, "e5m2", moments="4bit")


OPTIMIZERS = {
    "manifold before": lambda rate: manifold_adamw(rate, "e5m2", placement="before"),
    "manifold relative": lambda rate: manifold_adamw(rate, "e5m2"),
    "manifold ulps": lambda rate: manifold_adamw(rate, "e5m2", form="ulps"),
    "grid": lambda rate: grid(100 * rate, "e5m2"),
    "madam": madam,
    "adamw_sr": lambda rate: adamw_sr(rate, "e5m2"),
    "adamw_sr 8bit": lambda rate: adamw_sr(rate, "e5m2", moments="8bit"),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_vmap_over_the_rate_and_the_same_bits_on_eight_devices(kind):
    make = OPTIMIZERS[kind]
    params = {"w": initial()["a"]["kernel"]}
    grads = [jnp.asarray(g["a"]["kernel"]) for g in gradients(3)]

    def three_steps(rate):
        optimizer, p = make(rate), params
        state = optimizer.init(p)
        for g in grads:
            updates, state = optimizer.update({"w": g}, state, p)
            p = (
                apply_on_grids(p, updates, "e5m2")
                if kind.startswith(("grid", "adamw_sr"))
                else optax.apply_updates(p, updates)
            )
        return p["w"]

    rates = jnp.asarray([1e-3, 2e-2, 0.0])
    alone = [jax.jit(three_steps)(rate) for rate in rates]
    together = jax.vmap(three_steps)(rates)
    for i in range(3):
        if kind.startswith(("grid", "adamw_sr")):  # a draw may fall between two sums that differ in the last digit
            assert np.mean(np.asarray(together[i]) != np.asarray(alone[i])) < 0.03
        else:
            np.testing.assert_allclose(together[i], alone[i], rtol=1e-5, atol=1e-9)
    assert not np.array_equal(alone[0], alone[1])
    everywhere = jax.pmap(lambda _: three_steps(rates[1]))(jnp.arange(8))
    for copy in np.asarray(everywhere):
        np.testing.assert_array_equal(copy, np.asarray(everywhere)[0])


def test_a_format_for_each_parameter_and_grids_handed_in():
    params = {"a": jnp.full((2, 2), 0.3), "b": jnp.full((2, 2), 0.3), "c": jnp.full((2, 2), 0.3)}
    formats = {"a": "e5m2", "b": "e3m4", "c": None}.get
    optimizer = manifold_adamw(1.0, formats, form="ulps", weight_decay=0.0, other_learning_rate=0.125)
    g = jax.tree.map(jnp.ones_like, params)
    updates, _ = optimizer.update(g, optimizer.init(params), params)
    np.testing.assert_allclose([u[0, 0] for u in updates.values()], [-0.0625, -0.015625, -0.125], rtol=1e-4)
    grids = {name: WeightGrid(stack_grids(["e4m3fn"]), jnp.ones(1)) for name in "ab"}
    grids = jax.tree.map(lambda x: x[0], grids)
    updates, _ = optimizer.update(g, optimizer.init(params), params, grids=grids)
    np.testing.assert_allclose([u[0, 0] for u in updates.values()], [-0.03125, -0.03125, -0.125], rtol=1e-4)


def test_clipping_by_the_formats_range():
    params = {"a": jnp.ones((1, 1)), "b": jnp.ones((1, 1)), "c": jnp.ones((3,))}
    formats = {"a": "e5m2", "b": "e0m7", "c": None}.get
    g = {"a": jnp.full((1, 1), 3.0), "b": jnp.full((1, 1), 4.0), "c": jnp.zeros(3)}
    clip = clip_by_format_range(1.0, formats)
    clipped, _ = clip.update(g, clip.init(params), params)
    reach = {"e5m2": np.log2(57344 / 2**-16), "e0m7": np.log2(127)}
    norm = np.hypot(3.0, 4.0 * reach["e5m2"] / reach["e0m7"])
    np.testing.assert_allclose([clipped["a"][0, 0], clipped["b"][0, 0]], [3 / norm, 4 / norm], rtol=1e-5)
    small = jax.tree.map(lambda x: x * 0.01, g)
    kept, _ = clip.update(small, clip.init(params), params)
    for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(small), strict=True):
        np.testing.assert_array_equal(a, b)
    plain, ours = optax.clip_by_global_norm(1.0), clip_by_format_range(1.0, "e5m2")
    expected, _ = plain.update(g, plain.init(params))
    actual, _ = ours.update(g, ours.init(params), params)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_optimizers_say_what_they_miss():
    params = {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}
    with pytest.raises(ValueError, match="needs params"):
        grid(1.0, "e5m2").update(params, grid(1.0, "e5m2").init(params))
    with pytest.raises(ValueError, match="grid: parameter b has no format"):
        grid(1.0, "e5m2").update(params, grid(1.0, "e5m2").init(params), params)
    with pytest.raises(ValueError, match="placement='behind'"):
        manifold_adamw(1.0, "e5m2", placement="behind")
    with pytest.raises(ValueError, match="unknown format 'e5m'"):
        manifold_adamw(1.0, "e5m").update(params, manifold_adamw(1.0, "e5m").init(params), params)
