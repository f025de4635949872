"""Token cross entropy that never holds float32 logits for the whole batch.

With a vocabulary of 50257, float32 logits of 12 x 256 tokens take 618 MB, and their gradient as much again. The loss
is a sum over tokens, so it is computed chunk by chunk; and because each chunk's gradient needs nothing from the other
chunks, it is formed in the same sweep, while the chunk's logits are still at hand. The backward pass then only scales
what is stored: one gradient for the hidden states, one for the output weights, no logits and no recomputation.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from altgrad_jax.precision.dot import Prepared, Probe, matmul, product_backward, product_forward
from altgrad_jax.precision.statistics import over_parts

Array = jax.Array


def _chunk_loss(logits_nV: Array, targets_n: Array) -> tuple[Array, Array]:
    """Summed cross entropy of n tokens in nats, and its gradient in the logits, softmax - onehot; both float32.

    The exponentials, the costly part, are taken once and serve both the sum and the gradient.
    """
    max_n1 = jnp.max(logits_nV, axis=-1, keepdims=True)
    exp_nV = jnp.exp(logits_nV - max_n1)
    sum_n1 = jnp.sum(exp_nV, axis=-1, keepdims=True)
    target_logit_n1 = jnp.take_along_axis(logits_nV, targets_n[:, None], axis=-1)
    onehot_nV = jnp.arange(logits_nV.shape[-1]) == targets_n[:, None]
    return jnp.sum(jnp.log(sum_n1) + max_n1 - target_logit_n1), exp_nV / sum_n1 - onehot_nV


def _chunks(hidden_NC: Array, targets_N: Array, chunk: int) -> tuple[Array, Array]:
    """Splits the token axis into [N / n, n, ...], with n the largest divisor of N that is at most `chunk`."""
    tokens, width = hidden_NC.shape
    size = next(n for n in range(min(chunk, tokens), 0, -1) if tokens % n == 0)
    return hidden_NC.reshape(-1, size, width), targets_N.reshape(-1, size)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def token_cross_entropy(
    hidden_NC: Array,
    w_CV: Array,
    targets_N: Array,
    compute_dtype: jnp.dtype,
    chunk: int,
    head: tuple[Prepared, Probe] | None = None,
    loss_scale: Array | float = 1.0,
) -> Array:
    """Mean cross entropy of the targets under softmax(hidden w).

    Args:
      hidden_NC: final hidden states, [N, C].
      w_CV: output weights, [C, V], float32.
      targets_N: target token of each position, [N], int32 in [0, V).
      compute_dtype: operands of the output product; the softmax and the sum are float32.
      chunk: most tokens whose logits exist at once.
      head: the output layer's quantised operands and its probe, where it is quantised; its gradients are rounded at
        the size they have, that of a mean over N tokens times `loss_scale`, and "current" scales are a chunk's.
      loss_scale: factor on the gradient, not on the loss: what loss scaling does to everything before the loss.

    Returns:
      Scalar float32, nats per token.
    """
    del loss_scale
    if head is not None:
        prepared = head[0]

    def step(total, chunk_inputs):
        hidden_nC, targets_n = chunk_inputs
        if head is None:
            logits_nV = matmul(hidden_nC, w_CV, compute_dtype, jnp.float32, "lm_head")
        else:
            logits_nV = product_forward(hidden_nC, prepared)[0]
        return total + _chunk_loss(logits_nV, targets_n)[0], None

    total, _ = lax.scan(step, jnp.zeros((), jnp.float32), _chunks(hidden_NC, targets_N, chunk))
    return total / targets_N.size


def _forward(hidden_NC, w_CV, targets_N, compute_dtype, chunk, head, loss_scale):
    """The loss and, in the same sweep over chunks, both gradients of it."""
    tokens = targets_N.size

    def plain(hidden_nC, targets_n, index):
        del index
        logits_nV, product_vjp = jax.vjp(
            lambda h, w: matmul(h, w, compute_dtype, jnp.float32, "lm_head"), hidden_nC, w_CV
        )
        loss, dlogits_nV = _chunk_loss(logits_nV, targets_n)
        return loss, *product_vjp(dlogits_nV), None

    def quantised(hidden_nC, targets_n, index):
        prepared = head[0].fold_keys(index)
        logits_nV, hidden, hidden_stats = product_forward(hidden_nC, prepared)
        loss, dlogits_nV = _chunk_loss(logits_nV, targets_n)
        # Rounding knows sizes, so here the gradient must have its own before it is rounded, not after.
        dhidden_nC, dw_CV, stats = product_backward(dlogits_nV * (loss_scale / tokens), hidden, prepared)
        return loss, dhidden_nC.astype(hidden_nC.dtype), dw_CV, Probe(hidden_stats, stats)

    def step(carry, chunk_inputs):
        total, dw_CV = carry
        loss, dhidden_nC, dw_chunk_CV, probe = (plain if head is None else quantised)(*chunk_inputs)
        return (total + loss, dw_CV + dw_chunk_CV), (dhidden_nC, probe)

    start = jnp.zeros((), jnp.float32), jnp.zeros(w_CV.shape, jnp.float32)
    hidden, targets = _chunks(hidden_NC, targets_N, chunk)
    chunk_inputs = hidden, targets, jnp.arange(targets.shape[0])
    (total, dw_CV), (dhidden, probes) = lax.scan(step, start, chunk_inputs)
    probe = None if head is None else Probe(over_parts(probes.activation), over_parts(probes.gradient))
    # Were this a constant 1, XLA would fold the transpose of a tied embedding's gradient into the product behind dw_CV,
    # and its CPU kernels cannot run what comes of that. The gradient of a loss that is NaN is NaN.
    factor = loss_scale / tokens if head is None else 1.0
    scale = jnp.where(jnp.isnan(total), jnp.nan, jnp.asarray(factor, jnp.float32))
    return total / tokens, (dhidden.reshape(hidden_NC.shape), dw_CV, probe, scale)


def _backward(compute_dtype, chunk, residuals, cotangent):
    del compute_dtype, chunk
    dhidden_NC, dw_CV, probe, scale = residuals
    factor = cotangent * scale
    head = None if probe is None else (None, probe)
    return (dhidden_NC * factor).astype(dhidden_NC.dtype), dw_CV * factor, None, head, None


token_cross_entropy.defvjp(_forward, _backward)
