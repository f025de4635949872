"""Checksums of arrays, computed where the arrays are.

A checkpoint stores the checksum of every leaf beside the leaf, in the same atomic commit; after a restore it is
computed again from what came back. Whatever happened in between, on disk, in a file system or in a library, shows.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from altgrad_jax.state import leaf_names

Array = jax.Array


def _words(x: Array) -> Array:
    """The bits of an array as a flat uint32 vector, one element an element (two for 64-bit types)."""
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * min(4, x.dtype.itemsize)}"))
    return bits.reshape(-1).astype(jnp.uint32)


def _mix(words: Array) -> Array:
    """One round of the lowbias32 hash: a one-to-one map of uint32 that spreads every bit over higher and lower ones."""
    words = (words ^ (words >> 16)) * jnp.uint32(0x7FEB352D)
    return words ^ (words >> 15)


def leaf_checksum(x: Array) -> Array:
    """Two uint32 sums modulo 2^32: of a mixed form of every word, and of that weighted by a mixed form of its index.

    The first sees every single changed word, since the mixing is one-to-one; the second, whose weights differ from
    place to place, sees words that changed places, but for a chance of one in millions. (Weights that grow with the
    index would not do: those of places a power of two apart, such as two halves of an array, differ by a power of two,
    and the product loses as many bits.)
    """
    mixed = _mix(_words(x))
    weights = _mix(jnp.arange(mixed.size, dtype=jnp.uint32))
    return jnp.stack([jnp.sum(mixed, dtype=jnp.uint32), jnp.sum(mixed * weights, dtype=jnp.uint32)])


@partial(jax.jit)
def _tree_checksums(tree: Any) -> Array:
    return jnp.stack([leaf_checksum(leaf) for leaf in jax.tree.leaves(tree)])


def describe(tree: Any) -> dict[str, list]:
    """Leaf name -> [dtype, shape]; takes arrays or ShapeDtypeStructs."""
    leaves = jax.tree.leaves(tree)
    return {n: [str(x.dtype), list(x.shape)] for n, x in zip(leaf_names(tree), leaves, strict=True)}


def checksums(tree: Any) -> dict[str, str]:
    """Leaf name -> checksum, 16 hex digits."""
    sums = np.asarray(_tree_checksums(tree))
    return {name: f"{a:08x}{b:08x}" for name, (a, b) in zip(leaf_names(tree), sums, strict=True)}


def changed_leaves(tree: Any, expected: dict[str, str]) -> list[str]:
    """Names whose checksum is not the expected one, or that are in only one of the two."""
    actual = checksums(tree)
    return sorted(n for n in actual.keys() | expected.keys() if actual.get(n) != expected.get(n))
