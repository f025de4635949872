"""What a row of a batch means, and the loss of a batch of rows: next tokens, or labels.

A batch is int32 rows, whatever the task. `NextToken` reads a window of T + 1 tokens; `LabelLoss` reads T tokens, the
place of the last that is not padding, and one 0 or 1 a label (`data.examples`). Everything else in a step, its
gradients, rounding and averages, is the same for both.
"""

from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp

from altgrad_jax.losses import token_cross_entropy
from altgrad_jax.model import GPT, Quantised

Array = jax.Array


class Objective(Protocol):
    """A loss on rows."""

    def width(self, block_size: int) -> int:
        """Columns of a row."""
        ...

    def shortened(self, rows_BW: Array, tokens: int) -> Array:
        """The same rows with at most the first `tokens` tokens read."""
        ...

    def loss(
        self,
        model: GPT,
        rows_BW: Array,
        chunk: int,
        dropout_key: Array | None,
        quantised: Quantised,
        loss_scale: Array | float,
    ) -> Array:
        """Mean loss of the rows, float32, in nats; its gradient is multiplied by `loss_scale`, itself it is not.

        `chunk` is the most logits of tokens that exist at once, for losses of every token.
        """
        ...


@dataclass(frozen=True)
class NextToken:
    """Mean cross entropy of the next token over all positions."""

    def width(self, block_size: int) -> int:
        """One more than is read: the last token is only predicted."""
        return block_size + 1

    def shortened(self, rows_BW: Array, tokens: int) -> Array:
        """Windows of `tokens` + 1."""
        return rows_BW[:, : tokens + 1]

    def loss(
        self,
        model: GPT,
        rows_BW: Array,
        chunk: int,
        dropout_key: Array | None,
        quantised: Quantised,
        loss_scale: Array | float,
    ) -> Array:
        """Nats per token."""
        hidden_BTC = model.hidden(rows_BW[:, :-1], dropout_key, quantised)
        return token_cross_entropy(
            hidden_BTC.reshape(-1, hidden_BTC.shape[-1]),
            model.head_weight_CV(),
            rows_BW[:, 1:].reshape(-1),
            model.config.dtype,
            chunk,
            quantised.get("lm_head"),
            loss_scale,
        )


@jax.custom_vjp
def scale_gradient(x: Array, factor: Array | float) -> Array:
    """`x`; its gradient is multiplied by `factor`."""
    del factor
    return x


scale_gradient.defvjp(lambda x, factor: (x, factor), lambda factor, g: (g * factor, None))


def pooled_logits(model: GPT, inputs_BT1: Array, dropout_key: Array | None, quantised: Quantised) -> Array:
    """Logits of every label, [B, L] float32, read off at the last token of each row that is not padding.

    No mask hides the padding: it is on the right, where causal attention does not look. (A quantised layer's scale is
    that of its whole operand, padding included.)
    """
    hidden_BTC = model.hidden(inputs_BT1[:, :-1], dropout_key, quantised)
    last_BC = jnp.take_along_axis(hidden_BTC, inputs_BT1[:, -1, None, None], axis=1)[:, 0]
    return model.label_logits(last_BC, quantised)


@dataclass(frozen=True)
class LabelLoss:
    """Mean over rows and labels of the binary cross entropy -w y log p - (1 - y) log(1 - p), p = sigmoid(logit).

    Attributes:
      labels: L, how many.
      positive_weight: w of each label, or one for all.
    """

    labels: int
    positive_weight: tuple[float, ...] = (1.0,)

    def width(self, block_size: int) -> int:
        """Tokens, the place of the last, labels."""
        return block_size + 1 + self.labels

    def shortened(self, rows_BW: Array, tokens: int) -> Array:
        """The first `tokens` tokens, read off at the last of them or at the row's own."""
        block = rows_BW.shape[1] - self.labels - 1
        kept = min(tokens, block)
        last_B1 = jnp.minimum(rows_BW[:, block : block + 1], kept - 1)
        return jnp.concatenate([rows_BW[:, :kept], last_B1, rows_BW[:, block + 1 :]], axis=1)

    def loss(
        self,
        model: GPT,
        rows_BW: Array,
        chunk: int,
        dropout_key: Array | None,
        quantised: Quantised,
        loss_scale: Array | float,
    ) -> Array:
        """Nats per decision."""
        del chunk  # one position a row: its logits are few
        inputs_BT1, y_BL = jnp.split(rows_BW, [rows_BW.shape[1] - self.labels], axis=1)
        z_BL = scale_gradient(pooled_logits(model, inputs_BT1, dropout_key, quantised), loss_scale)
        weight_L = jnp.array(self.positive_weight, jnp.float32)
        # -log p = softplus(-z), -log(1 - p) = softplus(z)
        return jnp.mean(jnp.where(y_BL > 0, weight_L * jax.nn.softplus(-z_BL), jax.nn.softplus(z_BL)))


NEXT_TOKEN = NextToken()
