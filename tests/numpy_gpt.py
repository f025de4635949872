"""GPT-2 in NumPy float64, written from its description: what the model in JAX is measured against.

Sources: Radford et al. 2019 (layer norm before each part of a block, one more at the end), Vaswani et al. 2017 (scaled
dot product attention, softmax(q k^T / sqrt(d)) v), Hendrycks & Gimpel 2016 (the tanh form of GELU). One sequence, one
head and one position at a time, as the formulas read; nothing is shared with altgrad_jax.
"""

import math
import statistics

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def _layer_norm(x: Floats, parameters: dict) -> Floats:
    out = np.empty_like(x)
    for position, row in enumerate(x):
        centred = row - sum(row) / len(row)
        variance = sum(centred**2) / len(row)
        out[position] = centred / math.sqrt(variance + 1e-5) * parameters["scale"]
        if "bias" in parameters:
            out[position] += parameters["bias"]
    return out


def _linear(x: Floats, parameters: dict) -> Floats:
    y = x @ parameters["kernel"]
    return y + parameters["bias"] if "bias" in parameters else y


def _gelu(x: Floats, kind: str) -> Floats:
    if kind == "exact":
        return x * np.vectorize(statistics.NormalDist().cdf)(x)
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _attention(x: Floats, parameters: dict, n_head: int) -> Floats:
    length, width = x.shape
    size = width // n_head
    q, k, v = np.split(_linear(x, parameters["qkv"]), 3, axis=1)
    out = np.zeros((length, width))
    for head in range(n_head):
        part = slice(head * size, (head + 1) * size)
        for t in range(length):
            scores = np.array([q[t, part] @ k[s, part] / math.sqrt(size) for s in range(t + 1)])
            weights = np.exp(scores - scores.max())
            out[t, part] = sum(w * v[s, part] for s, w in enumerate(weights / weights.sum()))
    return _linear(out, parameters["proj"])


def logits(params: dict, tokens: npt.NDArray[np.integer], n_head: int, gelu: str = "tanh") -> Floats:
    """Next-token logits of one sequence, [T] -> [T, V]; `params` is a nested dict, without "lm_head" if it is tied."""
    params = _float64(params)
    x = np.stack([params["wte"][token] + params["wpe"][position] for position, token in enumerate(tokens)])
    for i in range(len(params["blocks"])):
        block = params["blocks"][i]
        x = x + _attention(_layer_norm(x, block["norm_1"]), block["attn"], n_head)
        inner = _gelu(_linear(_layer_norm(x, block["norm_2"]), block["mlp"]["up"]), gelu)
        x = x + _linear(inner, block["mlp"]["down"])
    x = _layer_norm(x, params["norm_f"])
    return x @ (params["lm_head"] if "lm_head" in params else params["wte"].T)


def cross_entropy(logits_NV: Floats, targets_N: npt.NDArray[np.integer]) -> tuple[float, Floats]:
    """Mean of -log softmax(logits)[target], in nats, and its gradient in the logits."""
    shifted = np.asarray(logits_NV, np.float64)
    shifted = shifted - shifted.max(axis=1, keepdims=True)
    log_softmax = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    rows = np.arange(len(targets_N))
    gradient = np.exp(log_softmax)
    gradient[rows, targets_N] -= 1
    return -log_softmax[rows, targets_N].mean(), gradient / len(rows)


def _float64(tree):
    if isinstance(tree, dict):
        return {key: _float64(value) for key, value in tree.items()}
    return np.asarray(tree, np.float64)


def random_like(shapes: dict, seed: int, std: float = 0.3) -> dict:
    """Normal float32 numbers in the shapes of a parameter tree, gains about 1.

    The spread is wider than at the beginning of training, and no gain is 1 and no bias 0, so that every part of the
    network has a say in the result.
    """
    rng = np.random.default_rng(seed)

    def draw(name: str, tree):
        if isinstance(tree, dict):
            return {key: draw(key, value) for key, value in tree.items()}
        return (rng.normal(size=tree.shape) * std + (name == "scale")).astype(np.float32)

    return draw("", shapes)
