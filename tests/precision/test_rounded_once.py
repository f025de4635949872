"""What a whole training step rounds, and how often: counted in its program, loops included."""

from collections import Counter
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from altgrad_jax.layers import layer_shapes, layer_weights
from altgrad_jax.model import GPTConfig
from altgrad_jax.precision.policy import resolve
from altgrad_jax.state import init_params, model_structure
from altgrad_jax.step import gradients
from tests import numpy_gpt

WIDTH, VOCABULARY, ROWS, LENGTH, CHUNK, MICROBATCHES = 8, 13, 2, 6, 4, 3
TOKENS = ROWS * LENGTH
MODEL = GPTConfig(n_layer=1, n_head=2, n_embd=WIDTH, block_size=LENGTH, vocab_size=VOCABULARY, tie_embeddings=False)
RULES = ((r"wte|wpe", "bf16"), (r".*", "e5m2 w=e4m3fn g=e4m3"))
DTYPES = {"float8_e5m2": "activation", "float8_e4m3fn": "weight", "float8_e4m3": "gradient"}


def inner(value) -> Iterator:
    """The jaxprs in an equation's parameter."""
    if hasattr(value, "eqns"):
        yield value
    elif hasattr(value, "jaxpr"):
        yield from inner(value.jaxpr)
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from inner(part)


def casts(jaxpr, times: int = 1) -> Counter:
    """(role, shape) -> how often an array of this shape is cast to that role's format."""
    found: Counter = Counter()
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "convert_element_type" and eqn.params["new_dtype"].name in DTYPES:
            found[DTYPES[eqn.params["new_dtype"].name], eqn.outvars[0].aval.shape] += times
        again = times * eqn.params["length"] if eqn.primitive.name == "scan" else times
        for value in eqn.params.values():
            for sub in inner(value):
                found += casts(sub, again)
    return found


@pytest.mark.parametrize("microbatches", [1, MICROBATCHES])
def test_weights_once_a_step_and_activations_and_gradients_once_a_use(microbatches):
    policy = resolve(RULES, layer_shapes(MODEL), backend="native")
    graphdef, params = model_structure(MODEL), numpy_gpt.random_like(jax.eval_shape(lambda: init_params(MODEL, 0)), 0)
    tokens = np.zeros((microbatches, ROWS, LENGTH + 1), np.int32)

    def step(params, tokens):
        prepared, _ = policy.prepare(layer_weights(params), policy.init())
        return gradients(graphdef, params, tokens, CHUNK, jax.random.key(0), prepared, policy.probes(prepared), 1.0)

    found = casts(jax.make_jaxpr(step, axis_env=[("data", 1)])(params, jnp.asarray(tokens)).jaxpr)
    weights = {shape: count for (role, shape), count in found.items() if role == "weight"}
    assert weights == {(8, 24): 1, (8, 8): 1, (8, 32): 1, (32, 8): 1, (8, 13): 1}
    chunks = TOKENS // CHUNK
    activations = {(TOKENS, 8): 3, (TOKENS, 32): 1, (CHUNK, 8): chunks}  # qkv, proj and up; down; the head
    backward = {(TOKENS, 24): 1, (TOKENS, 8): 2, (TOKENS, 32): 1, (CHUNK, 13): chunks}  # qkv; proj, down; up; the head
    for role, per_microbatch in (("activation", activations), ("gradient", backward)):
        counted = {shape: count for (r, shape), count in found.items() if r == role}
        assert counted == {shape: microbatches * count for shape, count in per_microbatch.items()}
