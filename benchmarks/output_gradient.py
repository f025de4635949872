"""What formats keep of the output layer's gradient (softmax - onehot) / N, by vocabulary and by tokens a step.

    python benchmarks/output_gradient.py --out=docs/results/output_gradient.json

The gradient of the mean cross entropy of N tokens has one entry a token near -1 / N and V - 1 entries near 1 / (V N).
Under one scale a tensor the first decides the scale, and the others become zero where 1 / V lies below half the
format's smallest step over its largest value: at vocabularies above 2 largest / step. Blocks scaled by the OCP rule
saturate where a block's largest lies between 1.75 and 2 times a power of two (E4M3FN), and (1 - p) / N lies there at
every token with a small p if N is a power of two. No training here: softmax of normal logits, targets drawn from it.

    vanish       share of the entries that are not targets and become zero
    lost         share of the probability that those entries held
    kept         target entries after rounding over before, mean
    row_sum      mean over tokens of the sum of a row, times N; exactly 0 before rounding
"""

import argparse
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from common import write_results

from altgrad_jax.precision.formats import get_format
from altgrad_jax.precision.recipes import parse_recipe
from altgrad_jax.precision.scaling import initial_state, quantise

FORMATS = ("e0m7", "e1m6", "e2m5", "e3m4", "e4m3", "e5m2")
VOCABULARIES = (257, 512, 1024, 2048, 4096, 50257)
TOKENS = (1536, 2048)
LOSS_SCALES = (1.0, 1.5)
SPREAD = 0.5  # standard deviation of the logits: about that of the first steps


def largest_vocabulary(name: str) -> float:
    """V above which 1 / V is rounded to zero beside a 1, under one scale a tensor: 2 largest / smallest step."""
    fmt = get_format(name)
    return 2 * fmt.max / 2.0**fmt.step_exponent


def measure(recipe: str, tokens: int, vocabulary: int, spread: float, loss_scale: float = 1.0) -> dict[str, float]:
    """What is left of the gradient after it is rounded as `recipe` says; the module's docstring has the names."""
    found = _measure(recipe, tokens, vocabulary, jnp.float32(spread), jnp.float32(loss_scale))
    return {name: float(value) for name, value in found.items()}


@partial(jax.jit, static_argnums=(0, 1, 2))
def _measure(recipe: str, tokens: int, vocabulary: int, spread: jax.Array, loss_scale: jax.Array) -> dict:
    of_logits, of_targets = jax.random.split(jax.random.key(0))
    logits = spread * jax.random.normal(of_logits, (tokens, vocabulary), jnp.float32)
    p, targets = jax.nn.softmax(logits), jax.random.categorical(of_targets, logits)
    is_target = jax.nn.one_hot(targets, vocabulary, dtype=bool)
    g = (p - is_target) / tokens
    parsed = parse_recipe(recipe)
    assert parsed is not None, "a recipe that quantises"
    role = parsed.role("gradient")
    operand, _ = quantise(g * loss_scale, role, initial_state(role), axis=1)
    rounded = operand.values.astype(jnp.float32) * operand.inverse_scale / loss_scale
    gone = (rounded == 0) & ~is_target
    return {
        "vanish": gone.sum() / (~is_target).sum(),
        "lost": jnp.where(gone, p, 0).sum() / jnp.where(is_target, 0, p).sum(),
        "kept": jnp.where(is_target, rounded / g, 0).sum() / tokens,
        "row_sum": rounded.sum(axis=1).mean() * tokens,
    }


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512, help="of the table by vocabulary")
    parser.add_argument("--spread", type=float, default=SPREAD, help="standard deviation of the logits")
    parser.add_argument("--tiny", action="store_true", help="two vocabularies, few tokens: that it runs")
    parser.add_argument("--out", help="JSON file of the results")
    given = parser.parse_args()
    vocabularies = VOCABULARIES[:2] if given.tiny else VOCABULARIES
    tokens = 64 if given.tiny else given.tokens
    one_scale: dict[str, Any] = {}
    for name in FORMATS:
        found = {v: measure(f"{name} scaling=current", tokens, v, given.spread) for v in vocabularies}
        one_scale[name] = {"largest_vocabulary": largest_vocabulary(name), "vocabularies": found}
    blocks = {
        f"N = {n}, loss scale {scale:g}": measure("mxfp8", n, 512 if given.tiny else 1024, given.spread, scale)
        for n in ((48, 64) if given.tiny else TOKENS)
        for scale in LOSS_SCALES
    }
    write_results(given.out, {"spread": given.spread, "one_scale": one_scale, "mxfp8": blocks})


if __name__ == "__main__":
    main()
