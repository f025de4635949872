"""altgrad_jax: train a GPT in 8-bit floating point with JAX and Flax, and show what the number format does to it."""

__version__ = "0.1.0"
