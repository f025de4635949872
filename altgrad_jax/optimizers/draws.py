"""Random draws of optimizers: a function of a seed, the update's number and the parameter's name."""

import zlib

import jax

Array = jax.Array
STREAM = 2**31 - 2  # apart from what a training step folds into the same seed


def update_key(seed: int | Array, count: Array, name: str) -> Array:
    """The key of one parameter in one update; the same on all devices, which hold the same parameters."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), STREAM), count)
    return jax.random.fold_in(key, zlib.crc32(name.encode()))
