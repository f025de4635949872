"""Recomputing blocks in the backward pass changes no mathematics, with and without quantised layers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from altgrad_jax.model import GPTConfig, layer_shapes, layer_weights
from altgrad_jax.precision.policy import resolve
from altgrad_jax.state import init_params, model_structure
from altgrad_jax.step import window_loss

MODEL = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=31, compute_dtype="float32", dropout=0.1)
TOKENS = np.random.default_rng(0).integers(0, MODEL.vocab_size, (3, MODEL.block_size + 1)).astype(np.int32)


@pytest.mark.parametrize("recipe", ["bf16", "e5m2 rounding=stochastic"])
def test_loss_gradients_and_statistics_are_the_same(recipe):
    policy = resolve([(r"blocks\..*", recipe)], layer_shapes(MODEL))
    params = init_params(MODEL, 0)

    def results(remat: str):
        graphdef = model_structure(dataclasses.replace(MODEL, remat=remat))

        def loss(params, probes):
            prepared, _ = policy.prepare(layer_weights(params), policy.init(), key=jax.random.key(1))
            quantised = {path: (layer, probes.get(path)) for path, layer in prepared.items()}
            return window_loss(graphdef, params, TOKENS, 16, jax.random.key(2), quantised)

        prepared, _ = policy.prepare(layer_weights(params), policy.init(), key=jax.random.key(1))
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(params, policy.probes(prepared))

    kept, recomputed = results("none"), results("block")
    for one, other in zip(jax.tree.leaves(kept), jax.tree.leaves(recomputed), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=1e-6)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(kept[1][0])) > 0


def test_the_block_is_computed_twice():
    def products(remat: str) -> int:
        graphdef = model_structure(dataclasses.replace(MODEL, remat=remat))
        loss = lambda params: window_loss(graphdef, params, TOKENS, 16, None)  # noqa: E731
        return str(jax.make_jaxpr(jax.grad(loss))(init_params(MODEL, 0))).count("dot_general")

    # Four dense layers and two products of attention in each of two blocks, of which the last layer's is not needed.
    assert products("none") < products("block") <= products("none") + 2 * 6
