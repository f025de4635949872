"""How parameters are stored: nothing is lost that lives on a grid, and each parameter is on its layer's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from altgrad_jax.layers import layer_shapes, layer_weights
from altgrad_jax.model import GPTConfig
from altgrad_jax.precision.policy import resolve
from altgrad_jax.state import init_params, leaf_names
from altgrad_jax.weights import PackedWeight, Weights, tree_bytes, unpack


def model(tied: bool) -> GPTConfig:
    return GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=13, tie_embeddings=tied)


def weights_of(rules, tied=True, **options) -> tuple[Weights, dict]:
    policy = resolve(rules, layer_shapes(model(tied)))
    return Weights(policy, tied, **options), init_params(model(tied), 0)


BLOCKS = ("attn.qkv", "attn.proj", "mlp.up", "mlp.down")


@pytest.mark.parametrize("tied", [True, False])
def test_which_parameter_lives_in_which_format(tied):
    rules = ((r"blocks\..*\.qkv", "e3m4"), (r"blocks\..*", "e5m2"), (r"lm_head", "e4m3"), (r"wpe", "e0m7"))
    weights, params = weights_of(rules, tied)
    found = {name: fmt.name for name in leaf_names(params) if (fmt := weights.formats(name))}
    expected = {f"blocks.0.{layer}.kernel": "e3m4" if layer == "attn.qkv" else "e5m2" for layer in BLOCKS}
    assert found == expected | {"wte" if tied else "lm_head": "e4m3fn", "wpe": "e0m7"}
    assert set(weights.policy_grids(params, weights.policy.init())) == set(found)
    sixteen = Weights(storage="bfloat16")
    assert {name for name in leaf_names(params) if sixteen.formats(name)} >= set(found)
    assert sixteen.formats("norm_f.scale") is None


def test_a_table_with_a_rule_of_its_own():
    weights, params = weights_of(((r"wte", "e5m2 scaling=current"), (r"blocks\..*", "e3m4")))
    assert weights.formats("wte").name == "e5m2"  # its rows are rounded when they are looked up
    assert "wte" in weights.policy_grids(params, weights.policy.init())


@pytest.mark.parametrize("recipe", ["e5m2", "e4m3 granularity=channel scaling=current", "mxfp8"])
def test_a_parameters_grid_is_what_its_product_reads(recipe):
    weights, params = weights_of(((r".*", recipe),))
    prepared, _ = weights.policy.prepare(layer_weights(params), weights.policy.init())
    grids = weights.policy_grids(params, weights.policy.init())
    read = {
        path: np.asarray(p.forward.values, np.float32) * np.asarray(p.forward.inverse_scale)
        for path, p in prepared.items()
    }
    np.testing.assert_allclose(grids["wte"].round(params["wte"]), read["lm_head"].T, rtol=3e-7)
    kernel = params["blocks"][0]["mlp"]["up"]["kernel"]
    np.testing.assert_allclose(grids["blocks.0.mlp.up.kernel"].round(kernel), read["blocks.0.mlp.up"], rtol=3e-7)


@pytest.mark.parametrize("fmt", ["e5m2", "e4m3", "e3m4", "e0m7", "e7m0", "e5m10"])
def test_weights_on_their_grid_are_stored_without_loss(fmt):
    weights, params = weights_of(((r"blocks\..*|lm_head", f"{fmt} w.pow2=1"),), storage="format", on_grid=True)
    weights = Weights(weights.policy, storage="format", on_grid=True, reads_grids=True)
    snapped = weights.snap(params, weights.policy.init())
    stored = weights.stored(params)
    kernel = stored["blocks"][0]["attn"]["qkv"]["kernel"]
    assert isinstance(kernel, PackedWeight) and kernel.codes.dtype == (jnp.int16 if fmt == "e5m10" else jnp.int8)
    assert stored["wpe"].dtype == jnp.float32
    for name, a, b in zip(leaf_names(snapped), jax.tree.leaves(unpack(stored)), jax.tree.leaves(snapped), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)
    again = weights.pack(snapped, snapped, weights.policy.init())
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(stored), strict=True):
        np.testing.assert_array_equal(a, b)
    size = {"wte": 13 * 16, "blocks": 12 * 16 * 16}
    packed = sum(size.values()) * kernel.codes.dtype.itemsize + 5 * 4
    assert tree_bytes(stored) == packed + 4 * (8 * 16 + 3 * 16)


def test_bfloat16_weights():
    weights = Weights(storage="bfloat16", on_grid=True)
    params = init_params(model(True), 0)
    stored = weights.stored(params)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(stored) if leaf.ndim == 2} == {"bfloat16"}
    assert stored["norm_f"]["scale"].dtype == jnp.float32
    for a, b in zip(jax.tree.leaves(stored), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(a, b.astype(a.dtype))


def test_float32_weights_are_the_parameters_themselves():
    weights, params = weights_of(((r"blocks\..*", "e5m2"),))
    stored = weights.stored(params)
    for a, b in zip(jax.tree.leaves(stored), jax.tree.leaves(params), strict=True):
        assert a is b
    assert weights.grids(params, weights.policy.init()) is None
