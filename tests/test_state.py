"""TrainState: what it holds, the names of its leaves, its hash."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import nnx

from altgrad_jax.model import GPTConfig
from altgrad_jax.optimizers import make_optimizer
from altgrad_jax.state import init_params, init_state, leaf_names, model_structure, tree_sha256
from configs.base import get_config
from tests import numpy_gpt

MODEL = GPTConfig(n_layer=2, n_head=2, n_embd=8, block_size=8, vocab_size=13, bias=True)
SHAPES = jax.eval_shape(lambda: init_params(MODEL, 0))
OPTIMIZER = make_optimizer(get_config().optimizer, 10)


def test_the_state_before_the_first_step():
    params = numpy_gpt.random_like(SHAPES, seed=0)
    state = init_state(params, OPTIMIZER)
    assert state.step == state.nonfinite_steps == 0
    assert state.step.dtype == state.nonfinite_steps.dtype == jnp.int32
    assert tree_sha256(state.params) == tree_sha256(params)
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert len(moments) == 2 * len(jax.tree.leaves(params))
    assert all(m.dtype == jnp.float32 and not np.any(m) for m in moments)


def test_a_state_can_be_donated():
    # A buffer that stands in two places cannot be.
    state = init_state(jax.tree.map(jnp.asarray, numpy_gpt.random_like(SHAPES, seed=0)), OPTIMIZER)
    buffers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)]
    assert len(set(buffers)) == len(buffers)


def test_parameters_follow_from_the_seed():
    small = dataclasses.replace(MODEL, n_layer=1, bias=False)

    def draw(seed: int) -> dict:
        program = jax.jit(lambda: init_params(small, seed)).lower()
        return program.compile(compiler_options={"xla_backend_optimization_level": 0})()

    assert tree_sha256(draw(0)) == tree_sha256(draw(0)) != tree_sha256(draw(1))


def test_parameters_are_a_plain_tree_that_fits_the_structure():
    params = numpy_gpt.random_like(SHAPES, seed=0)
    model = nnx.merge(model_structure(MODEL), params, copy=True)
    assert model.config == MODEL
    assert tree_sha256(nnx.to_pure_dict(nnx.state(model, nnx.Param))) == tree_sha256(params)
    np.testing.assert_array_equal(model.blocks[1].mlp.up.kernel[...], params["blocks"][1]["mlp"]["up"]["kernel"])
    # The structure is hashable and equal each time, so that a program compiled for one serves the other.
    assert model_structure(MODEL) == model_structure(MODEL)
    assert hash(model_structure(MODEL)) == hash(model_structure(MODEL))
    assert model_structure(MODEL) != model_structure(dataclasses.replace(MODEL, n_head=4))


def test_leaf_names():
    state = jax.eval_shape(lambda: init_state(init_params(MODEL, 0), optax.sgd(0.1, momentum=0.9)))
    names = leaf_names(state)
    assert len(names) == len(set(names)) == len(jax.tree.leaves(state))
    assert {"step", "nonfinite_steps", "params.wte", "params.blocks.1.attn.qkv.kernel"} <= set(names)
    assert {"params.norm_f.scale", "params.blocks.0.norm_2.bias", "opt_state.0.trace.blocks.1.mlp.up.bias"} <= set(
        names
    )
    by_name = dict(zip(names, jax.tree.leaves(state), strict=True))
    assert by_name["params.blocks.1.attn.qkv.kernel"].shape == (8, 24)
    assert by_name["params.wpe"].shape == (8, 8) and by_name["params.wte"].shape == (13, 8)


BASE = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": {"c": np.zeros(4, np.int32)}}


@pytest.mark.parametrize(
    "other",
    [
        BASE | {"a": BASE["a"].reshape(3, 2)},
        BASE | {"a": BASE["a"].view(np.int32)},
        BASE | {"a": np.nextafter(BASE["a"], np.float32(9))},
        BASE | {"a": -BASE["a"] + 0.0},
        {"a": BASE["a"], "b": {"d": BASE["b"]["c"]}},
        {"a": BASE["a"]},
        BASE | {"z": np.zeros(1, np.int32)},
        BASE | {"a": np.where(BASE["a"] == 0, np.float32(-0.0), BASE["a"])},
    ],
    ids=["shape", "dtype", "last bit", "values", "name", "missing", "extra", "minus zero"],
)
def test_hash_sees_every_difference(other):
    assert tree_sha256(other) != tree_sha256(BASE)


def test_hash_of_equal_trees():
    assert tree_sha256(jax.tree.map(jnp.asarray, BASE)) == tree_sha256(BASE)
    assert tree_sha256({"b": BASE["b"], "a": np.asfortranarray(BASE["a"])}) == tree_sha256(BASE)
    nan = {"x": np.array([np.nan, 1], ml_dtypes.bfloat16)}
    assert tree_sha256(nan) == tree_sha256(jax.tree.map(np.copy, nan))
