"""The GPT against NumPy in float64, its sizes by hand, its causality, its cache."""

import dataclasses
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from altgrad_jax.layers import parameter_counts
from altgrad_jax.model import GELUS, GPT, GPTConfig, KVCache, Linear, _dropout, attention_implementation, gpt_config
from altgrad_jax.state import init_params, leaf_names, model_structure
from tests import numpy_gpt

TINY = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=12, vocab_size=23, compute_dtype="float32")
TOKENS = np.random.default_rng(0).integers(0, TINY.vocab_size, (2, TINY.block_size)).astype(np.int32)


def parameters(config: GPTConfig, seed: int = 1, std: float = 0.3) -> dict:
    return numpy_gpt.random_like(jax.eval_shape(lambda: init_params(config, 0)), seed, std)


def call(config: GPTConfig, params, method, *args):
    """method(model, *args), compiled."""
    graphdef = model_structure(config)
    return jax.jit(lambda p, *a: method(nnx.merge(graphdef, p, copy=True), *a))(params, *args)


def forward_error(config: GPTConfig) -> float:
    """Largest difference from the reference's logits, over the largest logit."""
    params = parameters(config)
    logits = call(config, params, GPT.__call__, TOKENS)
    assert logits.dtype == jnp.float32 and logits.shape == (*TOKENS.shape, config.vocab_size)
    expected = np.stack([numpy_gpt.logits(params, row, config.n_head, config.gelu) for row in TOKENS])
    return np.abs(logits - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize(("bias", "tied"), [(False, False), (False, True), (True, False), (True, True)])
def test_float32_forward_is_the_reference(bias, tied):
    # A few float32 roundings (6e-8 each) of numbers that are then summed; 6e-7 seen.
    assert forward_error(dataclasses.replace(TINY, bias=bias, tie_embeddings=tied)) < 2e-6


@pytest.mark.parametrize(("bias", "tied"), [(False, True), (True, False)])
def test_bfloat16_forward_is_near_the_reference(bias, tied):
    error = forward_error(dataclasses.replace(TINY, bias=bias, tie_embeddings=tied, compute_dtype="bfloat16"))
    # bfloat16 rounds by up to 2^-9 = 0.2 %, some twenty times in a row here; 1.0 % seen. No error: not bfloat16.
    assert 1e-3 < error < 0.03


def test_exact_gelu_is_the_reference_and_another_than_tanh():
    exact = dataclasses.replace(TINY, gelu="exact")
    assert forward_error(exact) < 2e-6
    assert 1e-3 < forward_error(dataclasses.replace(exact, compute_dtype="bfloat16")) < 0.03
    params = parameters(exact)
    by_kind = [np.asarray(call(dataclasses.replace(TINY, gelu=kind), params, GPT.__call__, TOKENS)) for kind in GELUS]
    assert 1e-5 < np.abs(by_kind[0] - by_kind[1]).max() / np.abs(by_kind[0]).max() < 1e-2


def test_models_of_runs_from_before_a_setting_have_its_default():
    section = {**dataclasses.asdict(TINY)}
    assert gpt_config({**section, "gelu": "exact"}, "float32").gelu == "exact"
    del section["gelu"]
    assert gpt_config(section, "float32") == dataclasses.replace(TINY, compute_dtype="float32")


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_float32_attention_asks_for_float32(compute):
    """At the default precision GPUs multiply float32 as TF32; on a CPU no result shows it."""
    config = dataclasses.replace(TINY, compute_dtype=compute)
    graphdef = model_structure(config)
    total = lambda p: nnx.merge(graphdef, p, copy=True)(TOKENS).sum()  # noqa: E731
    program = jax.jit(jax.value_and_grad(total)).lower(jax.eval_shape(lambda: init_params(config, 0))).as_text()
    products = [line for line in program.splitlines() if "dot_general" in line]
    highest = sum("precision = [HIGHEST, HIGHEST]" in line for line in products)
    # In every block 4 dense layers and 2 products of attention, and the output layer: each forward and twice backward.
    assert len(products) == 3 * (6 * config.n_layer + 1)
    assert highest == (len(products) if compute == "float32" else 0)


def test_dtypes():
    config = dataclasses.replace(TINY, compute_dtype="bfloat16", bias=True, tie_embeddings=False)
    shapes = jax.eval_shape(lambda: init_params(config, 0))
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    params = parameters(config)
    graphdef = model_structure(config)

    def outputs(p):
        model = nnx.merge(graphdef, p, copy=True)
        hidden = model.hidden(TOKENS)
        return hidden, model.logits(hidden), model.head_weight_CV(), model.decode(TOKENS, KVCache.empty(config, 2))

    hidden, logits, head, (last, cache) = jax.eval_shape(outputs, params)
    assert (hidden.dtype, hidden.shape) == (jnp.bfloat16, (2, 12, 16))
    assert (logits.dtype, head.dtype, last.dtype) == (jnp.float32,) * 3
    assert (head.shape, last.shape) == ((16, 23), (2, 23))
    assert (cache.k_LBSHD.dtype, cache.v_LBSHD.shape) == (jnp.bfloat16, (2, 2, 12, 2, 8))


def test_parameter_counts_by_hand():
    config = GPTConfig(n_layer=6, n_head=6, n_embd=384, block_size=256, vocab_size=50257)
    norms, qkv, proj, mlp = 2 * 384, 384 * 1152, 384 * 384, 2 * 384 * 1536
    blocks = 6 * (norms + qkv + proj + mlp) + 384
    assert blocks == 10_621_824
    assert parameter_counts(config) == {"total": blocks + 50257 * 384 + 256 * 384, "without_embeddings": blocks}
    assert parameter_counts(config)["total"] == 30_018_816

    biases = 6 * (2 * 384 + 1152 + 384 + 1536 + 384) + 384
    counts = parameter_counts(dataclasses.replace(config, bias=True))
    assert counts == {"total": 30_018_816 + biases, "without_embeddings": blocks + biases}
    assert counts["total"] == 30_044_544  # AltGrad's model has these, with biases

    untied = parameter_counts(dataclasses.replace(config, tie_embeddings=False))
    assert untied == {"total": 30_018_816 + 384 * 50257, "without_embeddings": blocks}


def test_initial_weights():
    config = GPTConfig(n_layer=2, n_head=2, n_embd=64, block_size=96, vocab_size=300, bias=True, tie_embeddings=False)
    # Random numbers need no optimised code, which takes longer to compile than all the rest of this.
    program = jax.jit(lambda: init_params(config, 7)).lower()
    params = program.compile(compiler_options={"xla_backend_optimization_level": 0})()
    leaves = dict(zip(leaf_names(params), (np.asarray(leaf) for leaf in jax.tree.leaves(params)), strict=True))
    for name, values in leaves.items():
        if name.endswith("scale"):
            assert (values == 1).all(), name
        elif name.endswith("bias"):
            assert (values == 0).all(), name
        else:
            residual = "attn.proj" in name or "mlp.down" in name
            std = 0.02 / math.sqrt(2 * 2) if residual else 0.02
            # The standard deviation of n normal numbers is off by 1 / sqrt(2 n); the mean by 1 / sqrt(n).
            assert values.std() == pytest.approx(std, rel=5 / math.sqrt(2 * values.size)), name
            assert abs(values.mean()) < 5 * std / math.sqrt(values.size), name
    matrices = [v.ravel()[:50] for v in leaves.values() if v.ndim == 2]
    assert len({tuple(v) for v in matrices}) == len(matrices)  # no two layers begin alike


def test_layer_paths():
    model = nnx.eval_shape(lambda: GPT(dataclasses.replace(TINY, n_layer=4), nnx.Rngs(0)))
    paths = {node.path for _, node in nnx.iter_graph(model) if isinstance(node, Linear)}
    layers = ("attn.qkv", "attn.proj", "mlp.up", "mlp.down")
    assert paths == {f"blocks.{i}.{layer}" for i in range(4) for layer in layers}
    # The same names lead to the weights.
    names = leaf_names(jax.eval_shape(lambda: init_params(dataclasses.replace(TINY, tie_embeddings=False), 0)))
    assert {"blocks.1.attn.qkv.kernel", "blocks.1.mlp.down.kernel", "lm_head", "wte", "wpe"} <= set(names)


def test_a_position_sees_itself_and_the_past_only():
    # Position s's embedding is wte[token] + wpe[s], so its gradient is that of wpe[s].
    config = dataclasses.replace(TINY, tie_embeddings=False)
    params = parameters(config)
    weights_V = np.random.default_rng(2).normal(size=config.vocab_size).astype(np.float32)
    graphdef = model_structure(config)

    def summary_T(wpe, rest):
        return nnx.merge(graphdef, rest | {"wpe": wpe}, copy=True)(TOKENS[:1])[0] @ weights_V

    gradient_TSC = np.asarray(jax.jit(jax.jacrev(summary_T))(params["wpe"], params))
    seen_TS = np.abs(gradient_TSC).max(axis=-1)
    assert (seen_TS[np.triu_indices(config.block_size, 1)] == 0).all()
    assert (seen_TS[np.tril_indices(config.block_size)] > 1e-4).all()


@pytest.mark.parametrize("prefill", [1, 5])
def test_decoding_with_a_cache_equals_the_full_forward(prefill):
    params = parameters(TINY)
    graphdef = model_structure(TINY)
    expected = np.stack([numpy_gpt.logits(params, row, TINY.n_head) for row in TOKENS])

    @jax.jit
    def decode(params, tokens, cache):
        return nnx.merge(graphdef, params, copy=True).decode(tokens, cache)

    cache = KVCache.empty(TINY, batch=2)
    start = 0
    for stop in range(prefill, TINY.block_size + 1):
        logits, cache = decode(params, TOKENS[:, start:stop], cache)
        np.testing.assert_allclose(logits, expected[:, stop - 1], atol=2e-6 * np.abs(expected).max())
        assert cache.length == stop
        start = stop


def test_dropout_is_unbiased():
    x = jnp.full((1000, 1000), 3.0, jnp.bfloat16)
    dropped = np.asarray(_dropout(x, 0.25, jax.random.key(0)), np.float64)
    assert set(np.unique(dropped)) == {0.0, 4.0}
    assert (dropped == 0).mean() == pytest.approx(0.25, abs=5 * math.sqrt(0.25 * 0.75 / x.size))
    assert dropped.mean() == pytest.approx(3.0, rel=0.003)
    assert _dropout(x, 0.25, None) is x and _dropout(x, 0.0, jax.random.key(0)) is x


def test_dropout_in_the_network():
    def hidden(config):
        graphdef = model_structure(config)
        return lambda params, key: nnx.merge(graphdef, params, copy=True).hidden(TOKENS, key)

    dropping = dataclasses.replace(TINY, dropout=0.3)
    params = parameters(TINY)
    run = jax.jit(hidden(dropping))
    once, again, other = (np.asarray(run(params, jax.random.key(seed))) for seed in (0, 0, 1))
    np.testing.assert_array_equal(once, again)
    assert (once != other).mean() > 0.9
    # Without a key, or at rate 0 with one, it is the very program of a model that never drops.
    plain = str(jax.make_jaxpr(hidden(TINY))(params, None))
    assert str(jax.make_jaxpr(hidden(dropping))(params, None)) == plain
    assert "random" not in plain and "random" in str(jax.make_jaxpr(hidden(dropping))(params, jax.random.key(0)))
    assert "random_bits" not in str(jax.make_jaxpr(hidden(TINY))(params, jax.random.key(0)))


def test_attention_kernel_is_chosen_by_what_fits(monkeypatch):
    assert attention_implementation(TINY) == "xla"
    monkeypatch.setattr("altgrad_jax.model.target_device", lambda: SimpleNamespace(platform="gpu"))
    bf16 = dataclasses.replace(TINY, compute_dtype="bfloat16")
    assert attention_implementation(bf16) == "cudnn"
    assert attention_implementation(TINY) == "xla"  # cuDNN takes 16-bit operands only
    assert attention_implementation(dataclasses.replace(bf16, n_embd=24)) == "xla"  # heads of 12
    assert attention_implementation(dataclasses.replace(bf16, n_embd=272)) == "xla"  # heads of 136
    assert attention_implementation(dataclasses.replace(bf16, attention="xla")) == "xla"
