"""The bits of `jax.random.bits`, computed where they are used.

JAX's own, compiled for a CPU, took five times as long for 2^24 words as the same arithmetic written out, which XLA can
also make part of the loop over the elements that need the bits.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Array = jax.Array

# Threefry-2x32 with 20 rounds: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011.
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = np.uint32(0x1BD1_1BDA)


@partial(jax.jit, static_argnames="shape", inline=True)
def random_bits(key: Array, shape: tuple[int, ...]) -> Array:
    """32 random bits for every element, uint32: a function of the key and of the element's index in row-major order.

    Equal to `jax.random.bits(key, shape, jnp.uint32)`, which makes them where the key is not one of Threefry's, or the
    index needs more than 32 bits.
    """
    size = math.prod(shape)
    words = jax.random.key_data(key)
    if str(jax.random.key_impl(key)) != "threefry2x32" or words.shape != (2,) or size > 1 << 32:
        return jax.random.bits(key, shape, jnp.uint32)
    index = jnp.zeros(shape, jnp.uint32)
    for axis, length in enumerate(shape):
        size //= max(length, 1)
        index += lax.broadcasted_iota(jnp.uint32, shape, axis) * np.uint32(size)
    first, second = threefry_2x32(words, jnp.zeros_like(index), index)
    return first ^ second


def threefry_2x32(key: Array, first: Array, second: Array) -> tuple[Array, Array]:
    """Two words of a counter, enciphered with a key of two words; all uint32."""
    schedule = (key[0], key[1], key[0] ^ key[1] ^ _PARITY)
    first, second = first + schedule[0], second + schedule[1]
    for turn in range(5):
        for rotation in _ROTATIONS[turn % 2]:
            first = first + second
            second = first ^ ((second << rotation) | (second >> (32 - rotation)))
        first = first + schedule[(turn + 1) % 3]
        second = second + schedule[(turn + 2) % 3] + np.uint32(turn + 1)
    return first, second
