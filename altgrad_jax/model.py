"""A GPT-2 style transformer in flax.nnx. Knows nothing of training.

Pre-LayerNorm blocks, learned positions, GELU, tied embeddings. Parameters are float32; dense layers multiply in
`compute_dtype`; LayerNorm, softmax and logits are float32. Shape letters: B batch, T time, S cached time, C width,
H heads, D head width, V vocabulary, N tokens (B * T).
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
from flax import nnx

from altgrad_jax.precision.dot import Prepared, Probe, dequantised_table, matmul, quantised_matmul
from altgrad_jax.precision.target import on_cpu, target_device
from altgrad_jax.recomputation import recomputed_backward

Array = jax.Array
# The quantised layers of a step, by path: what each multiplies with, and where its statistics go (a table has none).
Quantised = Mapping[str, tuple[Prepared, Probe | None]]
UNQUANTISED: Quantised = {}
REMATS = ("none", "block")
GELUS = ("tanh", "exact")
INIT_STD = 0.02  # GPT-2, Radford et al. 2019
NORM_EPS = 1e-5


@dataclass(frozen=True)
class GPTConfig:
    """The network's shape. Field names are the keys of `config.model`, but for the last three.

    With `labels` above 0 it is a classifier: hidden states go to so many outputs, and to no next token. `gelu` is
    "exact", x Phi(x), or "tanh", an approximation of it (Hendrycks & Gimpel 2016, arXiv 1606.08415).
    """

    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    vocab_size: int
    dropout: float = 0.0
    bias: bool = False
    tie_embeddings: bool = True
    gelu: str = "tanh"
    attention: str = "auto"
    compute_dtype: str = "bfloat16"
    remat: str = "none"
    labels: int = 0

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.n_embd // self.n_head

    @property
    def dtype(self) -> jnp.dtype:
        """`compute_dtype` as a dtype."""
        return jnp.dtype(self.compute_dtype)


# Attention scores of a layer, float32 [B, H, T, T], above which a CPU keeps none of them for the backward pass.
LARGE_SCORES = 16 * 2**20

Implementation = Literal["xla", "cudnn"]


def attention_implementation(config: GPTConfig) -> Implementation:
    """Resolves `attention="auto"`: "cudnn" (flash attention) where the device and the shapes allow it, else "xla".

    cuDNN's kernel takes 16-bit operands and head widths that are multiples of 8 up to 128.
    """
    if config.attention != "auto":
        return cast(Implementation, config.attention)
    fits = config.dtype.itemsize == 2 and config.head_dim % 8 == 0 and config.head_dim <= 128
    return "cudnn" if target_device().platform == "gpu" and fits else "xla"


class Linear(nnx.Module):
    """Dense layer y = x w + b over the last axis; `path` is the name that precision rules match."""

    def __init__(self, path: str, inputs: int, outputs: int, std: float, config: GPTConfig, rngs: nnx.Rngs):
        self.path = path
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), (inputs, outputs), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((outputs,), jnp.float32)) if config.bias else None
        self.dtype = config.dtype

    def __call__(self, x: Array, quantised: Quantised) -> Array:
        """[..., I] -> [..., O] in the compute dtype."""
        x_NI, bias = x.reshape(-1, x.shape[-1]), None if self.bias is None else self.bias[...]
        if self.path in quantised:
            y = quantised_matmul(x_NI, self.kernel[...], bias, *quantised[self.path], self.dtype)
        else:
            y = matmul(x_NI, self.kernel[...], self.dtype, self.dtype, self.path)
            if bias is not None:
                y = y + bias.astype(y.dtype)
        return y.reshape(*x.shape[:-1], y.shape[-1])


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys and values of the positions decoded so far, for every layer.

    Attributes:
      k_LBSHD: keys, [layers, B, S, H, D].
      v_LBSHD: values, same shape.
      length: scalar int32, how many of the S positions are filled.
    """

    k_LBSHD: Array
    v_LBSHD: Array
    length: Array

    @staticmethod
    def empty(config: GPTConfig, batch: int) -> "KVCache":
        """A cache of `block_size` free positions."""
        shape = (config.n_layer, batch, config.block_size, config.n_head, config.head_dim)
        return KVCache(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype), jnp.zeros((), jnp.int32))


def _dropout(x: Array, rate: float, key: Array | None) -> Array:
    """Inverted dropout; the identity without a key (evaluation) or at rate 0."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0).astype(x.dtype)


def _attend(q: Array, k: Array, v: Array, implementation: Implementation) -> Array:
    """Causal attention of [B, T, H, D] queries, keys and values."""
    # The library's own products have no argument for it: GPUs take TF32 for float32 unless they are told not to.
    with jax.default_matmul_precision("float32") if q.dtype == jnp.float32 else nullcontext():
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=implementation)


def _attend_by_row(q: Array, k: Array, v: Array, implementation: Implementation) -> Array:
    """`_attend`, one row of the batch at a time, with the scores computed again in the backward pass.

    Three float32 [B, H, T, T] arrays a layer need not be kept, 0.3 GB of the baseline's step. The loop is what makes
    it so: outside of one, XLA's CPU compiler merges the recomputation with the first computation.
    """
    row = jax.checkpoint(lambda q, k, v: _attend(q[None], k[None], v[None], implementation)[0])
    return jax.lax.map(lambda qkv: row(*qkv), (q, k, v))


class Attention(nnx.Module):
    """Causal multi-head self-attention through `jax.nn.dot_product_attention`."""

    def __init__(self, path: str, config: GPTConfig, rngs: nnx.Rngs):
        width = config.n_embd
        residual_std = INIT_STD / math.sqrt(2 * config.n_layer)
        self.qkv = Linear(f"{path}.qkv", width, 3 * width, INIT_STD, config, rngs)
        self.proj = Linear(f"{path}.proj", width, width, residual_std, config, rngs)
        self.n_head = config.n_head
        self.implementation = attention_implementation(config)

    def _heads(self, x_BTC: Array, quantised: Quantised) -> tuple[Array, Array, Array]:
        qkv = self.qkv(x_BTC, quantised)
        q, k, v = jnp.split(qkv.reshape(*qkv.shape[:2], 3 * self.n_head, -1), 3, axis=2)
        return q, k, v  # each [B, T, H, D]

    def __call__(self, x_BTC: Array, quantised: Quantised) -> Array:
        """Attends over the whole sequence."""
        q, k, v = self._heads(x_BTC, quantised)
        batch, time, heads, _ = q.shape
        by_row = 4 * batch * heads * time * time > LARGE_SCORES and on_cpu()
        y = (_attend_by_row if by_row else _attend)(q, k, v, self.implementation)
        return self.proj(y.reshape(x_BTC.shape), quantised)

    def decode(
        self, x_BTC: Array, k_BSHD: Array, v_BSHD: Array, length: Array, quantised: Quantised
    ) -> tuple[Array, Array, Array]:
        """Attends T new positions to `length` cached ones and themselves; returns the output and the new k, v."""
        q, k, v = self._heads(x_BTC, quantised)
        k_BSHD = jax.lax.dynamic_update_slice(k_BSHD, k, (0, length, 0, 0))
        v_BSHD = jax.lax.dynamic_update_slice(v_BSHD, v, (0, length, 0, 0))
        query_position = length + jnp.arange(x_BTC.shape[1])
        visible_TS = jnp.arange(k_BSHD.shape[1])[None, :] <= query_position[:, None]
        y = jax.nn.dot_product_attention(q, k_BSHD, v_BSHD, mask=visible_TS[None, None])
        return self.proj(y.reshape(x_BTC.shape), quantised), k_BSHD, v_BSHD


class MLP(nnx.Module):
    """Two dense layers around a GELU, four times as wide inside."""

    def __init__(self, path: str, config: GPTConfig, rngs: nnx.Rngs):
        width = config.n_embd
        self.up = Linear(f"{path}.up", width, 4 * width, INIT_STD, config, rngs)
        self.down = Linear(f"{path}.down", 4 * width, width, INIT_STD / math.sqrt(2 * config.n_layer), config, rngs)
        self.approximate = config.gelu == "tanh"

    def __call__(self, x_BTC: Array, quantised: Quantised) -> Array:
        """[B, T, C] -> [B, T, C]."""
        # Recomputed backward: a few operations an element, against keeping two more arrays four times the width.
        gelu = jax.checkpoint(partial(jax.nn.gelu, approximate=self.approximate))
        return self.down(gelu(self.up(x_BTC, quantised)), quantised)


def _layer_norm(config: GPTConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    # The fast variance E[x^2] - E[x]^2 loses digits when the mean is large; the two-pass form costs nothing here.
    return nnx.LayerNorm(
        config.n_embd,
        epsilon=NORM_EPS,
        use_bias=config.bias,
        use_fast_variance=False,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs=rngs,
    )


class Block(nnx.Module):
    """x + attn(norm(x)), then x + mlp(norm(x)); the residual stream stays in the compute dtype."""

    def __init__(self, path: str, config: GPTConfig, rngs: nnx.Rngs):
        self.path = path
        self.norm_1 = _layer_norm(config, rngs)
        self.attn = Attention(f"{path}.attn", config, rngs)
        self.norm_2 = _layer_norm(config, rngs)
        self.mlp = MLP(f"{path}.mlp", config, rngs)
        self.dropout = config.dropout
        self.dtype = config.dtype

    def __call__(self, x_BTC: Array, key: Array | None, quantised: Quantised) -> Array:
        """One block over whole sequences; `key` drives dropout, None turns it off."""
        key_attn, key_mlp = (None, None) if key is None else jax.random.split(key)
        y_BTC = self.attn(self.norm_1(x_BTC).astype(self.dtype), quantised)
        x_BTC = x_BTC + _dropout(y_BTC, self.dropout, key_attn)
        y_BTC = self.mlp(self.norm_2(x_BTC).astype(self.dtype), quantised)
        return x_BTC + _dropout(y_BTC, self.dropout, key_mlp)

    def decode(
        self, x_BTC: Array, k_BSHD: Array, v_BSHD: Array, length: Array, quantised: Quantised
    ) -> tuple[Array, Array, Array]:
        """One block over new positions, with the layer's cache."""
        normed_BTC = self.norm_1(x_BTC).astype(self.dtype)
        y_BTC, k_BSHD, v_BSHD = self.attn.decode(normed_BTC, k_BSHD, v_BSHD, length, quantised)
        x_BTC = x_BTC + y_BTC
        return x_BTC + self.mlp(self.norm_2(x_BTC).astype(self.dtype), quantised), k_BSHD, v_BSHD


def _recomputed(block: Block) -> Callable[[Array, Array | None, Quantised], Array]:
    """The block, of whose activations only the input is kept for the backward pass; the rest is computed again."""
    graphdef, params = nnx.split(block)

    def run(params: Any, x_BTC: Array, probes: Any, key: Array | None, prepared: Any) -> Array:
        quantised = {path: (layer, probes.get(path)) for path, layer in prepared.items()}
        return nnx.merge(graphdef, params, copy=True)(x_BTC, key, quantised)

    again = recomputed_backward(run) if on_cpu() else jax.checkpoint(run)

    def apply(x_BTC: Array, key: Array | None, quantised: Quantised) -> Array:
        own = {path: layer for path, layer in quantised.items() if path.startswith(f"{block.path}.")}
        prepared = {path: layer for path, (layer, _) in own.items()}
        probes = {path: probe for path, (_, probe) in own.items() if probe is not None}
        return again(params, x_BTC, probes, key, prepared)

    return apply


class Classifier(nnx.Module):
    """The output layer of a classifier, x w + b; its weight is the layer `classifier` of precision rules."""

    def __init__(self, config: GPTConfig, rngs: nnx.Rngs):
        shape = config.n_embd, config.labels
        self.kernel = nnx.Param(INIT_STD * jax.random.normal(rngs.params(), shape, jnp.float32))
        # Whatever config.bias says of the other layers: how frequent each label is must be said somewhere.
        self.bias = nnx.Param(jnp.zeros((config.labels,), jnp.float32))


class GPT(nnx.Module):
    """The language model: tokens to hidden states, and hidden states to logits. Or a classifier on the same trunk."""

    def __init__(self, config: GPTConfig, rngs: nnx.Rngs):
        self.config = config
        normal = lambda *shape: INIT_STD * jax.random.normal(rngs.params(), shape, jnp.float32)  # noqa: E731
        self.wte = nnx.Param(normal(config.vocab_size, config.n_embd))
        self.wpe = nnx.Param(normal(config.block_size, config.n_embd))
        self.blocks = nnx.List([Block(f"blocks.{i}", config, rngs) for i in range(config.n_layer)])
        self.norm_f = _layer_norm(config, rngs)
        own_head = not (config.tie_embeddings or config.labels)
        self.lm_head = nnx.Param(normal(config.n_embd, config.vocab_size)) if own_head else None
        self.classifier = Classifier(config, rngs) if config.labels else None

    def head_weight_CV(self) -> Array:
        """The output weights, [C, V], float32: the transposed embedding when tied."""
        return self.wte[...].T if self.lm_head is None else self.lm_head[...]

    def _embed(self, tokens_BT: Array, start: Array | int, quantised: Quantised) -> Array:
        wte_VC, wpe_TC = (
            dequantised_table(table, quantised[path][0]) if path in quantised else table
            for path, table in (("wte", self.wte[...]), ("wpe", self.wpe[...]))
        )
        positions_TC = jax.lax.dynamic_slice_in_dim(wpe_TC, start, tokens_BT.shape[1])
        return (wte_VC[tokens_BT] + positions_TC).astype(self.config.dtype)

    def hidden(self, tokens_BT: Array, dropout_key: Array | None = None, quantised: Quantised = UNQUANTISED) -> Array:
        """Final normalised hidden states, [B, T, C], in the compute dtype.

        Args:
          tokens_BT: int32.
          dropout_key: None turns dropout off.
          quantised: the layers that are not multiplied in the compute dtype.
        """
        keys = [None] * (self.config.n_layer + 1)
        if dropout_key is not None and self.config.dropout > 0.0:
            keys = list(jax.random.split(dropout_key, self.config.n_layer + 1))
        remat = self.config.remat == "block"
        x_BTC = _dropout(self._embed(tokens_BT, 0, quantised), self.config.dropout, keys[-1])
        for block, key in zip(self.blocks, keys, strict=False):
            x_BTC = _recomputed(block)(x_BTC, key, quantised) if remat else block(x_BTC, key, quantised)
        return self.norm_f(x_BTC).astype(self.config.dtype)

    def logits(self, hidden: Array, quantised: Quantised = UNQUANTISED) -> Array:
        """[..., C] -> [..., V] in float32."""
        flat = self._output(hidden.reshape(-1, hidden.shape[-1]), self.head_weight_CV(), "lm_head", quantised)
        return flat.reshape(*hidden.shape[:-1], -1)

    def label_logits(self, hidden_BC: Array, quantised: Quantised = UNQUANTISED) -> Array:
        """A classifier's logits, [B, L] in float32."""
        assert self.classifier is not None, "the model has no labels"
        logits_BL = self._output(hidden_BC, self.classifier.kernel[...], "classifier", quantised)
        return logits_BL + self.classifier.bias[...]

    def _output(self, hidden_NC: Array, w_CO: Array, path: str, quantised: Quantised) -> Array:
        """The output layer's product, [N, O] in float32."""
        if path in quantised:
            return quantised_matmul(hidden_NC, w_CO, None, *quantised[path], jnp.dtype(jnp.float32))
        return matmul(hidden_NC, w_CO, self.config.dtype, jnp.float32, path)

    def __call__(self, tokens_BT: Array, quantised: Quantised = UNQUANTISED) -> Array:
        """Logits of every position, [B, T, V] in float32; for small inputs (training uses the chunked loss)."""
        return self.logits(self.hidden(tokens_BT, None, quantised), quantised)

    def decode(self, tokens_BT: Array, cache: KVCache, quantised: Quantised = UNQUANTISED) -> tuple[Array, KVCache]:
        """Logits of the last of T new tokens, [B, V], and the cache with them added.

        The caller keeps `cache.length + T` within `block_size`.
        """
        x_BTC = self._embed(tokens_BT, cache.length, quantised)
        keys, values = [], []
        for i, block in enumerate(self.blocks):
            x_BTC, k, v = block.decode(x_BTC, cache.k_LBSHD[i], cache.v_LBSHD[i], cache.length, quantised)
            keys.append(k)
            values.append(v)
        last_BC = self.norm_f(x_BTC[:, -1]).astype(self.config.dtype)
        grown = KVCache(jnp.stack(keys), jnp.stack(values), cache.length + tokens_BT.shape[1])
        return self.logits(last_BC, quantised), grown


def gpt_config(model: dict, compute_dtype: str, remat: str = "none", labels: int = 0) -> GPTConfig:
    """Builds a `GPTConfig` from the `model` section of a configuration; `labels` makes it a classifier.

    What the configuration of an older run does not have yet is as it was then, the default.
    """
    names = {field.name for field in dataclasses.fields(GPTConfig)} - {"compute_dtype", "remat", "labels"}
    names = {name for name in names if name in model}
    return GPTConfig(**{name: model[name] for name in names}, compute_dtype=compute_dtype, remat=remat, labels=labels)
