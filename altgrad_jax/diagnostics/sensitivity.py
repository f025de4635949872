"""What rounding costs the loss, layer by layer and role by role: each is rounded alone, everything else is float32.

Measured on the first tokens of a window. With L the float32 loss there:

    activation, weight   L with this layer's operand rounded in the forward pass, less L
    gradient             L after a step along the gradient got with this layer's incoming gradient rounded in the
                         backward pass, less L after a step along the float32 gradient g

Both steps move every parameter and have the same length, 0.01 L / |g|, at which the second lowers L by 1 % to first
order. A gradient that became zero makes no step, and so costs about 0.01 L. Each device takes a window of its own and
steps by that; the losses are averaged.

Scales are the recipe's: delayed ones come from the state's history, and gradients are rounded at the size that they
have in the mean over the step's whole batch.

One compiled program serves all layers and roles: which is rounded is a traced number, and `lax.map` goes through the
numbers at the memory of one evaluation. What makes it cheap:

  - All gradients share the float32 forward pass. From there on the backward pass is linear: what rounding changed at
    one layer is sent on alone, and products that it does not reach are left out.
  - For N tokens a weight's gradient x^T g has rank N. After a step the layer's output x' (w - c x^T g) is got as
    x' w - c (x' x^T) g, and |x^T g|^2 as the sum of x x^T times g g^T: nothing of the weight's size is formed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax
from flax import nnx
from jax import lax

from altgrad_jax.layers import layer_weights
from altgrad_jax.model import UNQUANTISED
from altgrad_jax.precision.dot import Prepared, operand_pair
from altgrad_jax.precision.policy import TABLES, Policy
from altgrad_jax.precision.recipes import ROLES
from altgrad_jax.precision.scaling import Operand, quantise

Array = jax.Array
Dense = Callable[[str, Array, Array], Array]  # (layer, x_NI, w_IO) -> [N, O]
LOSS_DECREASE = 0.01  # of the loss, to first order, by the step that gradients are compared with
HEAD = "lm_head"


def make_sensitivity(
    graphdef32: Any, policy: Policy, *, tokens: int = 64, axis_name: str = "data"
) -> Callable[..., tuple[Array, Array]]:
    """Builds sensitivity(params, quant, tokens_BT1, windows, loss_scale) -> (increases, loss).

    It runs under the axis `axis_name`, on a device's share of the batch, B windows of T + 1 tokens. `params` and
    `quant` are the train state's; `windows` is the number that this device has of the step's batch where that is not B;
    `loss_scale` is what gradients are multiplied by while they are rounded.

    The increases of the loss are nats per token, [layers, 3] float32 in the order of `policy.plans` and ROLES, NaN
    where a table lacks the role; the loss is the float32 one. Both are means over the devices.

    Args:
      graphdef32: the structure of the model in float32.
      policy: which layers are rounded, and how; its formats may be traced.
      tokens: how many tokens of the device's first window stand for its batch; 0: all of that window.
      axis_name: the devices' axis.
    """
    cases = [(plan.path, role) for plan in policy.plans for role in plan.roles]
    forward = [case for case in cases if case[1] != "gradient"]
    backward = [case for case in cases if case[1] == "gradient"]
    widths = {path: shape[1] for path, shape in policy.shapes if path not in TABLES}

    def sensitivity(
        params: Any, quant: Any, tokens_BT1: Array, windows: int | None = None, loss_scale: Array | float = 1.0
    ) -> tuple[Array, Array]:
        batch_tokens = (windows or tokens_BT1.shape[0]) * lax.axis_size(axis_name) * (tokens_BT1.shape[1] - 1)
        prepared, _ = policy.prepare(layer_weights(params), quant, axis_name=axis_name)
        net = Network(graphdef32, params, tokens_BT1[0, : tokens + 1 if tokens else None])
        found: dict[tuple[str, str], Array] = {}
        with jax.default_matmul_precision("highest"):
            clean = backward_pass(net, widths, loss_scale / batch_tokens)
            if forward:
                found |= dict(zip(forward, forward_increases(net, prepared, forward), strict=True))
            if backward:
                found |= dict(zip(backward, backward_increases(net, prepared, backward, clean), strict=True))
        rows = [[found.get((plan.path, role), jnp.nan) for role in ROLES] for plan in policy.plans]
        return lax.pmean((jnp.array(rows).reshape(-1, len(ROLES)), clean.loss), axis_name)

    return sensitivity


def name(policy: Policy, increases: npt.NDArray[np.float32], loss: float) -> dict[str, float | str]:
    """`sensitivity/<layer>/<role>` in nats, `sensitivity/loss` in float32, and `sensitivity/worst` as "layer role".

    Worst is the largest increase, NaN above all; "" where nothing is rounded or the float32 loss is itself not finite.
    """
    record: dict[str, float | str] = {"sensitivity/loss": float(loss)}
    costs = {
        (plan.path, role): float(value)
        for plan, row in zip(policy.plans, increases, strict=True)
        for role, value in zip(ROLES, row, strict=True)
        if role in plan.roles
    }
    worst = max(costs, key=lambda case: np.inf if np.isnan(costs[case]) else costs[case], default=())
    record["sensitivity/worst"] = " ".join(worst) if np.isfinite(loss) else ""
    return record | {f"sensitivity/{layer}/{role}": value for (layer, role), value in costs.items()}


@dataclass(frozen=True)
class Network:
    """The float32 model on one window, its matrix products and its embedding left to the caller.

    Attributes:
      graphdef: the model's structure.
      params: its parameters.
      window: N + 1 tokens, the first N of which are read and the last N predicted.
    """

    graphdef: Any
    params: Any
    window: Array

    @property
    def read(self) -> Array:
        """The N tokens that are read."""
        return self.window[:-1]

    @property
    def tied(self) -> bool:
        """Whether the output layer is the embedding."""
        return HEAD not in self.params

    def tables(self) -> dict[str, tuple[Array, Array]]:
        """The tables, and which of their rows are read."""
        return {"wte": (self.params["wte"], self.read), "wpe": (self.params["wpe"], jnp.arange(self.read.size))}

    def embedding(self) -> Array:
        """The sum of the tables' rows, [N, C]."""
        wte_NC, wpe_NC = (table[index] for table, index in self.tables().values())
        return wte_NC + wpe_NC

    def vectors(self) -> list[Array]:
        """Parameters that are no matrices: gains and biases."""
        return [leaf for leaf in jax.tree.leaves(self.params) if leaf.ndim == 1]

    def logits(self, x_NC: Array, vectors: Sequence[Array], dense: Dense) -> Array:
        """From embedded tokens to logits, [N, V]; `dense` makes all products, without their biases."""
        leaves, tree = jax.tree.flatten(self.params)
        given = iter(vectors)
        params = jax.tree.unflatten(tree, [next(given) if leaf.ndim == 1 else leaf for leaf in leaves])
        model = nnx.merge(self.graphdef, params, copy=True)
        x_BTC = x_NC[None]
        for block in model.blocks:
            for part, names in ((block.attn, ("qkv", "proj")), (block.mlp, ("up", "down"))):
                for layer in names:
                    setattr(part, layer, _with_product(getattr(part, layer), dense))
            x_BTC = block(x_BTC, None, UNQUANTISED)
        return dense(HEAD, model.norm_f(x_BTC)[0], model.head_weight_CV())

    def losses(self, logits_NV: Array) -> Array:
        """Cross entropy of every token, [N], in nats."""
        return optax.softmax_cross_entropy_with_integer_labels(logits_NV, self.window[1:])


def _with_product(linear: Any, dense: Dense) -> Callable[..., Array]:
    """A dense layer of the model with another matrix product."""

    def call(x_BTI: Array, quantised: Any) -> Array:
        del quantised
        y = dense(linear.path, x_BTI[0], linear.kernel[...])
        return (y if linear.bias is None else y + linear.bias[...])[None]

    return call


def _value(operand: Operand) -> Array:
    return operand.values.astype(jnp.float32) * operand.inverse_scale


def _increases(losses: Callable[[Array], Array], cases: int) -> Array:
    """The mean loss of each case, less that of the case after the last, in which nothing is rounded."""
    losses_KN = lax.map(losses, jnp.arange(cases + 1))
    # Token by token: near 10 nats a difference of means would lose what is below 1e-6.
    return jnp.mean(losses_KN[:-1] - losses_KN[-1], axis=1)


def forward_increases(net: Network, prepared: Mapping[str, Prepared], cases: Sequence[tuple[str, str]]) -> Array:
    """The loss with one weight or activation rounded, less the loss with none: one a case (layer, role)."""
    number = {case: i for i, case in enumerate(cases)}

    def losses(case: Array) -> Array:
        def dense(path: str, x_NI: Array, w_IO: Array) -> Array:
            if path not in prepared:
                return x_NI @ w_IO
            p, w = prepared[path], prepared[path].forward
            rounded, _ = quantise(
                *(x_NI, p.recipe.activation, p.activation, 1), key=p.activation_key, axis_name=p.axis_name
            )
            x_NI = jnp.where(case == number[path, "activation"], _value(rounded), x_NI)
            product = lambda x: (x @ w.values.astype(jnp.float32)) * w.inverse_scale  # noqa: E731
            return lax.cond(case == number[path, "weight"], product, lambda x: x @ w_IO, x_NI)

        def rows(path: str, table: Array, index: Array) -> Array:
            if path not in prepared:
                return table[index]
            w = prepared[path].forward
            scales = jnp.broadcast_to(w.inverse_scale, (table.shape[0], 1))
            rounded = w.values[index].astype(jnp.float32) * scales[index]
            return jnp.where(case == number[path, "weight"], rounded, table[index])

        wte_NC, wpe_NC = (rows(path, *table) for path, table in net.tables().items())
        return net.losses(net.logits(wte_NC + wpe_NC, net.vectors(), dense))

    return _increases(losses, len(cases))


class Gradients(NamedTuple):
    """A gradient of the loss in all parameters, those of matrices in factors.

    Attributes:
      outputs: at the output of every dense layer, [N, O]; its weight's gradient is x^T times this.
      embedding: at the embedding, [N, C]: what each row that was read gets.
      vectors: of the parameters that are no matrices.
    """

    outputs: dict[str, Array]
    embedding: Array
    vectors: list[Array]


class Backward(NamedTuple):
    """The float32 forward and backward pass.

    Attributes:
      loss: L.
      inputs: x of every dense layer, [N, I].
      size: what gradients are multiplied by here, to have the size at which they are rounded.
      gradients: of L, times `size`.
      pull: what is added to the gradients at the outputs of some dense layers -> what that adds to all gradients.
    """

    loss: Array
    inputs: dict[str, Array]
    size: Array | float
    gradients: Gradients
    pull: Callable[[dict[str, Array]], Gradients]


@jax.custom_vjp
def _product(x_NI: Array, w_IO: Array) -> Array:
    """x w, w constant; backward, a gradient of zeros is not multiplied."""
    return x_NI @ w_IO


def _product_backward(w_IO: Array, g_NO: Array) -> tuple[Array, None]:
    shape = g_NO.shape[0], w_IO.shape[0]
    return lax.cond(jnp.any(g_NO != 0), lambda g: g @ w_IO.T, lambda g: jnp.zeros(shape, g.dtype), g_NO), None


_product.defvjp(lambda x_NI, w_IO: (x_NI @ w_IO, w_IO), _product_backward)


def backward_pass(net: Network, widths: Mapping[str, int], token_share: Array | float) -> Backward:
    """The float32 pass, given the width of every dense layer's output, and the share of a token in the batch's loss."""

    def outputs(taps: dict[str, Array], x_NC: Array, vectors: list[Array]) -> tuple[dict[str, Array], dict[str, Array]]:
        seen, inputs = {}, {}

        def dense(path: str, x_NI: Array, w_IO: Array) -> Array:
            inputs[path] = x_NI
            seen[path] = _product(x_NI, w_IO) + taps[path]
            return seen[path]

        net.logits(x_NC, vectors, dense)
        return seen, inputs

    nothing = {path: jnp.zeros((net.read.size, width), jnp.float32) for path, width in widths.items()}
    seen, pull, inputs = jax.vjp(outputs, nothing, net.embedding(), net.vectors(), has_aux=True)
    loss, dlogits_NV = jax.value_and_grad(lambda logits_NV: net.losses(logits_NV).mean())(seen[HEAD])
    size = token_share * net.read.size
    gradients = Gradients(*pull(nothing | {HEAD: dlogits_NV * size}))
    return Backward(loss, inputs, size, gradients, lambda more: Gradients(*pull(nothing | more)))


def backward_increases(
    net: Network, prepared: Mapping[str, Prepared], cases: Sequence[tuple[str, str]], clean: Backward
) -> Array:
    """The loss after a step with one layer's gradient rounded, less that after a float32 step: one a case."""
    length = LOSS_DECREASE * clean.loss / (_norm(net, clean.inputs, clean.gradients) / clean.size)
    rounded, changes = {}, {}
    for path, _ in cases:
        p, g_NO = prepared[path], clean.gradients.outputs[path]
        for_x, for_w, _ = operand_pair(
            *(g_NO, p.recipe.gradient, p.gradient, (1, 0), False, p.gradient_key, p.axis_name, False)
        )
        changes[path], rounded[path] = _value(for_x) - g_NO, _value(for_w)

    def losses(case: Array) -> Array:
        on = {path: case == i for i, (path, _) in enumerate(cases)}
        added = clean.pull({path: jnp.where(on[path], change, 0.0) for path, change in changes.items()})
        gradients = jax.tree.map(jnp.add, clean.gradients, added)
        own = {path: jnp.where(on[path], g_NO, gradients.outputs[path]) for path, g_NO in rounded.items()}
        gradients = gradients._replace(outputs=gradients.outputs | own)
        norm = _norm(net, clean.inputs, gradients)
        return stepped_losses(net, clean.inputs, gradients, jnp.where(norm == 0, 0.0, length / norm))

    return _increases(losses, len(cases))


def _wte_rows(net: Network, inputs: Mapping[str, Array], gradients: Gradients) -> tuple[Array, Array]:
    """The gradient of `wte` in the rows that are read, [N, C]: from reading them, and, if tied, from the output."""
    same_NN = (net.read[:, None] == net.read).astype(jnp.float32)
    of_head = gradients.outputs[HEAD][:, net.read].T @ inputs[HEAD] if net.tied else jnp.zeros(())
    return same_NN @ gradients.embedding, of_head


def _norm(net: Network, inputs: Mapping[str, Array], gradients: Gradients) -> Array:
    """|g| over all parameters."""
    products = ((inputs[path] @ inputs[path].T) * (g_NO @ g_NO.T) for path, g_NO in gradients.outputs.items())
    read, of_head = _wte_rows(net, inputs, gradients)
    # |x^T g + e|^2 of the tied table, where e is what reading adds; and wpe, whose rows are read once each.
    tables = gradients.embedding * (read + 2 * of_head), gradients.embedding**2
    return jnp.sqrt(sum(map(jnp.sum, (*products, *tables, *(vector**2 for vector in gradients.vectors)))))


def stepped_losses(net: Network, inputs: Mapping[str, Array], gradients: Gradients, factor: Array) -> Array:
    """The losses with all parameters moved by -factor times their gradients."""

    def dense(path: str, x_NI: Array, w_IO: Array) -> Array:
        moved = x_NI @ w_IO - factor * ((x_NI @ inputs[path].T) @ gradients.outputs[path])
        if path == HEAD and net.tied:
            moved = moved.at[:, net.read].add(-factor * (x_NI @ gradients.embedding.T))
        return moved

    read, of_head = _wte_rows(net, inputs, gradients)
    x_NC = net.embedding() - factor * (read + of_head + gradients.embedding)
    vectors = [vector - factor * g for vector, g in zip(net.vectors(), gradients.vectors, strict=True)]
    return net.losses(net.logits(x_NC, vectors, dense))
