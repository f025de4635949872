"""Stochastic rounding: unbiased, between the two neighbours, repeatable; and the random bits under it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from altgrad_jax.precision.formats import get_format
from altgrad_jax.precision.grid import Grid
from altgrad_jax.precision.rounding import encode, round_to_format
from altgrad_jax.precision.threefry import random_bits, threefry_2x32
from tests.precision.numpy_rounding import assert_same, largest, neighbours, random_floats, same_bits, telling_inputs

DRAWS = 10**6
FORMATS = ["e5m2", "e4m3fnuz", "e3m4", "e0m7", "e7m0", "e2m1fn", "e5m3:bias=140", "bfloat16"]


@jax.jit
def stochastic(x, grid, key):
    return round_to_format(x, grid, "stochastic", key=key)


@partial(jax.jit, static_argnums=(1, 3))
def by_name(x, name, key, overflow="saturate"):
    return round_to_format(x, name, "stochastic", overflow, key)


@jax.jit
def drawn_up(x, grid, key, low, high):
    """How many of DRAWS became `high`, and how many neither that nor `low`; for each x."""

    def count(part):
        rounded = round_to_format(
            jnp.broadcast_to(x, (DRAWS // 10, x.size)), grid, "stochastic", key=jax.random.fold_in(key, part)
        )
        bits, low_bits, high_bits = (jax.lax.bitcast_convert_type(a, jnp.uint32) for a in (rounded, low, high))
        up = bits == high_bits
        return jnp.sum(up, 0), jnp.sum(~up & (bits != low_bits), 0)

    return jax.tree.map(lambda n: jnp.sum(n, 0), jax.lax.map(count, jnp.arange(10)))


def inputs_of_all_kinds(name: str) -> np.ndarray:
    """Below the smallest step, subnormal, around e_min, ordinary, in the last binade; of both signs."""
    fmt = get_format(name)
    step, normal, top = fmt.min_positive, fmt.min_normal, largest(fmt)
    x = [
        *(step * part for part in (2.0**-40, 2.0**-12, 0.01, 0.5, 0.999)),
        *(step * part for part in (1.3, 1.5)),
        *((normal - step) * 1.0001, normal * 0.9999, normal * 1.01),
        *(top * part for part in (0.07, 0.123, 0.51, 0.77, 1 - 2.0**-12, 1 - 2.0**-20)),
    ]
    x = np.float32([v for v in x if v <= top])
    return np.concatenate([x, -x])


@pytest.mark.parametrize("name", FORMATS)
def test_unbiased_within_5_sigma(name):
    fmt, x = get_format(name), inputs_of_all_kinds(name)
    low, high, share = neighbours(x, fmt)
    up, elsewhere = (
        np.asarray(n) for n in drawn_up(x, Grid.of(fmt), jax.random.key(11), np.float32(low), np.float32(high))
    )
    assert (elsewhere == 0).all()
    sigma = np.sqrt(share * (1 - share) / DRAWS)
    moved = low != high
    assert moved.sum() > x.size / 2
    off = np.abs(up / DRAWS - share)[moved]
    assert (off <= 5 * sigma[moved]).all(), (x[moved], off / sigma[moved])


@pytest.mark.parametrize("name", [*FORMATS, "e15m0", "e9m6", "e8m0:bias=201"])
def test_only_neighbours_occur_and_exact_values_never_move(name):
    fmt = get_format(name)
    x = np.concatenate([telling_inputs(fmt), random_floats(0, 10_000)])
    x = np.where(np.isnan(x), np.float32(1.0), x)
    x = x[np.isfinite(x)]
    low, high, share = neighbours(x, fmt)
    for seed in range(3):
        rounded = np.asarray(stochastic(x, Grid.of(fmt), jax.random.key(seed)))
        assert (same_bits(rounded, low) | same_bits(rounded, high)).all()
        at = (share == 0) | (np.abs(x) > largest(fmt))
        assert_same(rounded[at], low[at], x[at], f"{name}: exact")
        assert not same_bits(rounded, low).all() and not same_bits(rounded, high).all()


def test_overflow_special():
    x = jnp.full((10_000,), np.float32(61440))  # halfway from the largest value to 2^16
    rounded = np.asarray(by_name(x, "e5m2", jax.random.key(0), "special"))
    assert set(rounded) == {57344.0, np.inf}
    assert abs(np.mean(rounded == np.inf) - 0.5) < 5 * 0.5 / 100
    assert set(np.asarray(by_name(x, "e5m2", jax.random.key(0)))) == {57344.0}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_inputs_round_as_their_float32(dtype):
    x = jnp.asarray(np.linspace(-500, 500, 10_001), dtype)
    key = jax.random.key(4)
    for name in ("e4m3fn", "e0m7"):
        narrow, wide = by_name(x, name, key), by_name(x.astype(jnp.float32), name, key)
        assert narrow.dtype == x.dtype
        assert_same(np.asarray(narrow, np.float32), wide, np.asarray(x, np.float32), name)


def test_same_key_same_bits_and_another_key_others():
    x = random_floats(3, 10_000)
    x = np.where(np.abs(x) < 1e4, x, np.float32(0.3))
    first, again, other = (stochastic(x, Grid.of("e5m2"), jax.random.key(seed)) for seed in (1, 1, 2))
    assert same_bits(first, again).all()
    assert not same_bits(first, other).all()
    # Another program, the format built in.
    assert same_bits(first, by_name(x, "e5m2", jax.random.key(1))).all()


@pytest.mark.parametrize("spec", [("d",), (None, "d"), ("d", "e"), ()])
def test_same_bits_on_one_device_and_on_eight(spec):
    assert len(jax.devices()) == 8
    shape = (4, 2) if "e" in spec else (8,)
    mesh = Mesh(np.array(jax.devices()).reshape(shape), ("d", "e")[: len(shape)])
    x = np.random.default_rng(0).normal(size=(64, 136)).astype(np.float32)
    key = jax.random.key(9)
    rounded = jax.jit(partial(round_to_format, fmt="e5m2", rounding="stochastic"))
    alone = rounded(jax.device_put(x, jax.devices()[0]), key=key)
    spread = rounded(jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec))), key=key)
    assert len(spread.sharding.device_set) == 8 and len(alone.sharding.device_set) == 1
    assert_same(spread, alone, x)
    codes = jax.jit(partial(encode, fmt="e5m2", rounding="stochastic"))
    np.testing.assert_array_equal(codes(jax.device_put(x, spread.sharding), key=key), codes(x, key=key))


def test_elements_are_drawn_independently():
    x = jnp.full((1000, 1000), np.float32(1.125))  # halfway from 1 to 1.25
    up = np.asarray(stochastic(x, Grid.of("e5m2"), jax.random.key(0))) == 1.25
    signs = np.where(up, 1.0, -1.0)
    # Of n products of independent signs the sum has a standard deviation of sqrt(n).
    for along in (
        signs[1:] * signs[:-1],
        signs[:, 1:] * signs[:, :-1],
        signs[:, 8:] * signs[:, :-8],
        signs[8:] * signs[:-8],
    ):
        assert abs(along.sum()) < 5 * np.sqrt(along.size)


@pytest.mark.parametrize("kind", ["threefry2x32", "rbg", "raw"])
@pytest.mark.parametrize("shape", [(), (0, 3), (3, 5, 7)])
def test_random_bits_are_those_of_jax(shape, kind):
    both = jax.jit(lambda key: (random_bits(key, shape), jax.random.bits(key, shape, jnp.uint32)))
    for seed in (0, 1, 2**32 - 1):
        ours, theirs = both(jax.random.PRNGKey(seed) if kind == "raw" else jax.random.key(seed, impl=kind))
        assert ours.shape == shape and ours.dtype == jnp.uint32
        np.testing.assert_array_equal(ours, theirs)


def test_random_bits_under_vmap_and_of_wrong_keys():
    keys = jax.random.split(jax.random.key(0), 4)
    ours, theirs = jax.jit(
        jax.vmap(lambda key: (random_bits(key, (7,)), jax.random.bits(key, (7,), jnp.uint32))),
    )(keys)
    np.testing.assert_array_equal(ours, theirs)
    with pytest.raises(ValueError, match="accepts a single key"):
        random_bits(keys, (7,))


@pytest.mark.parametrize(
    ("key", "counter", "expected"),
    [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_threefry_gives_the_known_answers_of_random123(key, counter, expected):
    found = jax.jit(threefry_2x32)(np.uint32(key), *np.uint32(counter))
    assert tuple(int(word) for word in found) == expected
