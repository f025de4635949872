"""Recomputing blocks in the backward pass changes no mathematics, with and without quantised layers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from altgrad_jax.layers import layer_shapes, layer_weights
from altgrad_jax.model import GPTConfig
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


def test_it_saves_memory_in_the_compiled_program():
    """XLA's CPU compiler would merge a recomputation that it can tell is one."""
    model = GPTConfig(n_layer=4, n_head=2, n_embd=32, block_size=64, vocab_size=31)
    params = jax.eval_shape(lambda: init_params(model, 0))
    tokens = jax.ShapeDtypeStruct((16, model.block_size + 1), jnp.int32)

    def temporary_bytes(remat: str) -> int:
        graphdef = model_structure(dataclasses.replace(model, remat=remat))
        gradient = jax.grad(lambda params, tokens: window_loss(graphdef, params, tokens, 64, None))
        return jax.jit(gradient).lower(params, tokens).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes("block") < 0.6 * temporary_bytes("none")


@pytest.mark.slow
def test_second_derivatives():
    """Forward over reverse, as curvature is measured, of a quantised network too."""
    model = dataclasses.replace(MODEL, n_layer=1)
    policy = resolve([(r"blocks\..*", "e4m3 x=float32 w=float32 g=float32")], layer_shapes(model))
    params = init_params(model, 0)

    def along(remat: str):
        graphdef = model_structure(dataclasses.replace(model, remat=remat))
        prepared, _ = policy.prepare(layer_weights(params), policy.init())
        probes = policy.probes(prepared)

        def loss(params):
            quantised = {path: (layer, probes.get(path)) for path, layer in prepared.items()}
            return window_loss(graphdef, params, TOKENS, 16, None, quantised)

        return jax.jit(lambda params: jax.jvp(jax.grad(loss), (params,), (params,))[1])(params)

    kept, recomputed = along("none"), along("block")
    for one, other in zip(jax.tree.leaves(kept), jax.tree.leaves(recomputed), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)


def test_the_block_is_computed_twice():
    def products(remat: str) -> int:
        graphdef = model_structure(dataclasses.replace(MODEL, remat=remat))
        loss = lambda params: window_loss(graphdef, params, TOKENS, 16, None)  # noqa: E731
        return str(jax.make_jaxpr(jax.grad(loss))(init_params(MODEL, 0))).count("dot_general")

    # Four dense layers and two products of attention in each of two blocks, of which the last layer's is not needed.
    assert products("none") < products("block") <= products("none") + 2 * 6
