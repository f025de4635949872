"""Checksums: every flipped bit and every swap shows, and nothing but the bits matters."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from altgrad_jax.integrity import changed_leaves, checksums, describe, leaf_checksum

DTYPES = {
    "f32": np.float32,
    "bf16": ml_dtypes.bfloat16,
    "i32": np.int32,
    "u8": np.uint8,
    "e5m2": ml_dtypes.float8_e5m2,
    "bool": np.bool_,
}
SHAPE = (4, 6)


def random_tree(seed: int) -> dict[str, np.ndarray]:
    """Any bits at all in each dtype, NaN and Inf included."""
    rng = np.random.default_rng(seed)
    tree = {}
    for name, dtype in DTYPES.items():
        size = np.dtype(dtype).itemsize
        raw = rng.integers(0, 2 if name == "bool" else 256, (*SHAPE[:-1], SHAPE[-1] * size), np.uint8)
        tree[name] = raw.view(dtype)
    return tree


seeds = st.integers(0, 2**32 - 1)
positions = st.tuples(*(st.integers(0, n - 1) for n in SHAPE))


@given(seed=seeds, leaf=st.sampled_from(sorted(DTYPES)), position=positions, bit=st.integers(0, 31))
@settings(max_examples=300, deadline=None)
def test_every_single_bit_matters(seed, leaf, position, bit):
    tree = random_tree(seed)
    before = checksums(tree)
    assert changed_leaves(tree, before) == []
    words = tree[leaf].view(f"uint{8 * tree[leaf].dtype.itemsize}")
    words[position] ^= 1 << (bit % (1 if leaf == "bool" else 8 * words.dtype.itemsize))
    assert changed_leaves(tree, before) == [leaf]


def test_every_other_word_in_its_place_shows():
    # Pairs of bits are the likeliest to cancel: the mixing shifts a word onto itself.
    word = np.uint32(0x3F9DCD2A)
    masks = [1 << a | 1 << b for a in range(32) for b in range(32)]
    words = np.array([[0, word ^ np.uint32(mask), 7] for mask in [0, *masks]], np.uint32)
    sums = np.asarray(jax.vmap(leaf_checksum)(words))
    assert (sums[1:, 0] != sums[0, 0]).all()
    assert len(np.unique(words, axis=0)) == len(np.unique(sums[:, 0]))


@given(seed=seeds, leaf=st.sampled_from(sorted(DTYPES)), a=positions, b=positions)
@settings(max_examples=300, deadline=None)
def test_swapped_elements_show(seed, leaf, a, b):
    tree = random_tree(seed)
    before = checksums(tree)
    words = tree[leaf].view(f"uint{8 * tree[leaf].dtype.itemsize}")
    different = words[a] != words[b]
    words[a], words[b] = words[b], words[a].copy()
    assert changed_leaves(tree, before) == ([leaf] if different else [])


def test_swaps_over_powers_of_two_show():
    # With weights of 2 i + 1 this one does not: the mixed forms of the two numbers agree in 24 bits, 2 * 128 in 8 more.
    x = np.zeros(256, np.uint32)
    x[3], x[131] = 0xBFD56032, 0xC013DD51
    swapped = x.copy()
    swapped[3], swapped[131] = x[131], x[3]
    assert changed_leaves({"x": swapped}, checksums({"x": x})) == ["x"]
    # Every swap of two elements 2^15 apart, by linearity of the sums: about one of 2^16 would be missed with them.
    x = np.random.default_rng(0).normal(size=2**16).astype(np.float32)
    single = jax.jit(jax.vmap(lambda i, value: leaf_checksum(jnp.zeros(x.size, jnp.float32).at[i].set(value))))
    for first in range(0, 2**8, 2**7):
        i = np.arange(first, first + 2**7)
        j = i + 2**15
        there = single(i, x[i]) + single(j, x[j])
        swapped = single(i, x[j]) + single(j, x[i])
        assert (there != swapped).any(axis=1).all()


def test_rows_and_halves_that_changed_places_show():
    x = np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32)
    before = checksums({"x": x})
    for other in (x[::-1], np.roll(x, 32, axis=0), np.roll(x, 1, axis=1), x.reshape(32, 64).T.reshape(64, 32)):
        assert changed_leaves({"x": np.ascontiguousarray(other)}, before) == ["x"]


@pytest.mark.parametrize("spec", [(None, None), ("a", None), (None, "b"), ("a", "b"), (("a", "b"), None)])
def test_sharding_does_not_matter(spec):
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))
    x = {"x": np.random.default_rng(1).normal(size=(16, 6)).astype(ml_dtypes.bfloat16)}
    placed = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
    assert len(placed["x"].sharding.device_set) == 8
    assert checksums(placed) == checksums(x) == checksums(jax.tree.map(jnp.asarray, x))


def test_sixty_four_bit_types():
    with jax.enable_x64(True):
        x = np.arange(10, dtype=np.float64)
        low, high = x.copy(), x.copy()
        low.view(np.uint64)[3] ^= 1
        high.view(np.uint64)[3] ^= 1 << 63
        sums = {tuple(map(int, leaf_checksum(jnp.asarray(y)))) for y in (x, low, high)}
        assert jnp.asarray(x).dtype == jnp.float64 and len(sums) == 3


def test_names_of_what_changed():
    tree = {"a": np.zeros((2, 3), np.float32), "b": {"c": np.ones(2, np.int32)}, "e": np.zeros((0, 4), np.float32)}
    sums = checksums(tree)
    assert list(sums) == ["a", "b.c", "e"] and all(len(s) == 16 and int(s, 16) >= 0 for s in sums.values())
    assert describe(tree) == {"a": ["float32", [2, 3]], "b.c": ["int32", [2]], "e": ["float32", [0, 4]]}
    assert describe(jax.eval_shape(lambda: tree)) == describe(tree)
    assert changed_leaves(tree, sums) == []
    assert changed_leaves({"a": tree["a"], "b": {"c": np.zeros(2, np.int32)}, "f": np.ones(1)}, sums) == [
        "b.c",
        "e",
        "f",
    ]
