"""The same GPT as a user of flax.linen would write it, with dense layers that a library quantises: for comparison.

Pre-LayerNorm blocks, learned positions, tanh-GELU, tied embeddings; AdamW with decay on matrices, gradients clipped.
`train_step` is the whole program: no loss scaling, no chunked loss, nothing counted.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from flax.training.train_state import TrainState

from altgrad_jax.model import GPTConfig, attention_implementation

Array = jax.Array
DENSE = ("qkv", "proj", "up", "down")


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)); `dot_general_cls` multiplies in the dense layers."""

    config: GPTConfig
    dot_general_cls: Any = None

    @nn.compact
    def __call__(self, x_BTC: Array) -> Array:
        """One block over whole sequences."""
        config, width = self.config, self.config.n_embd
        dense = partial(nn.Dense, use_bias=config.bias, dtype=config.dtype, dot_general_cls=self.dot_general_cls)
        norm = partial(nn.LayerNorm, use_bias=config.bias, dtype=config.dtype)
        qkv = dense(3 * width, name="qkv")(norm(name="norm_1")(x_BTC))
        q, k, v = jnp.split(qkv.reshape(*qkv.shape[:2], 3 * config.n_head, -1), 3, axis=2)
        implementation = attention_implementation(config)
        attended = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=implementation)
        x_BTC = x_BTC + dense(width, name="proj")(attended.reshape(x_BTC.shape))
        hidden = nn.gelu(dense(4 * width, name="up")(norm(name="norm_2")(x_BTC)), approximate=True)
        return x_BTC + dense(width, name="down")(hidden)


class GPT(nn.Module):
    """Tokens to logits; the output layer is the embedding, in the compute dtype."""

    config: GPTConfig
    dot_general_cls: Any = None

    @nn.compact
    def __call__(self, tokens_BT: Array) -> Array:
        """[B, T] -> [B, T, V], float32."""
        config = self.config
        embed = partial(nn.Embed, dtype=config.dtype, embedding_init=nn.initializers.normal(0.02))
        wte = embed(config.vocab_size, config.n_embd, name="wte")
        positions = embed(config.block_size, config.n_embd, name="wpe")(jnp.arange(tokens_BT.shape[1]))
        x_BTC = wte(tokens_BT) + positions
        for i in range(config.n_layer):
            x_BTC = Block(config, self.dot_general_cls, name=f"block_{i}")(x_BTC)
        x_BTC = nn.LayerNorm(use_bias=config.bias, dtype=config.dtype, name="norm_f")(x_BTC)
        return wte.attend(x_BTC).astype(jnp.float32)


def train_step(model: nn.Module, config: GPTConfig, batch: int) -> tuple[Any, TrainState, Array]:
    """The jitted step (state, tokens) -> (state, loss), the state before it, and random tokens."""
    keys = jax.random.split(jax.random.key(0))
    tokens = jax.random.randint(keys[0], (batch, config.block_size + 1), 0, config.vocab_size)
    variables = jax.jit(model.init)(keys[1], tokens[:, :-1])
    # Amax histories and scales are variables whose "gradient" is their next value; TrainState knows of them.
    params = variables if OVERWRITE_WITH_GRADIENT in variables else {"params": variables["params"]}
    decayed = lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree)  # noqa: E731
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(6e-4, b1=0.9, b2=0.95, weight_decay=0.1, mask=decayed)
    )
    state = TrainState.create(apply_fn=model.apply, params=params, tx=optimizer)

    @partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, tokens: Array) -> tuple[TrainState, Array]:
        def loss(params: Any) -> Array:
            logits = state.apply_fn(params, tokens[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

        value, grads = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=grads), value

    return step, state, tokens
