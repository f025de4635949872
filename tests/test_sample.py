"""Drawing tokens, and generation with a cache against the full forward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from altgrad_jax.model import GPTConfig
from altgrad_jax.sample import draw, generate
from altgrad_jax.state import init_params, model_structure
from tests import numpy_gpt

MODEL = GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=16, vocab_size=20, compute_dtype="float32")
GRAPHDEF = model_structure(MODEL)
PARAMS = numpy_gpt.random_like(jax.eval_shape(lambda: init_params(MODEL, 0)), seed=3)
PROMPT = np.random.default_rng(0).integers(0, MODEL.vocab_size, (3, 5)).astype(np.int32)
LOGITS = np.array([2.0, -1.0, 0.5, 1.5, 7.0, 0.0, 9.0], np.float32)
DRAWS = 20_000


def drawn(temperature: float, top_k: int, vocab_size: int, seed: int = 0) -> np.ndarray:
    """How often each token comes in many draws from the same logits."""
    tokens = draw(jnp.tile(LOGITS, (DRAWS, 1)), jax.random.key(seed), temperature, top_k, vocab_size)
    assert tokens.dtype == jnp.int32
    return np.bincount(tokens, minlength=LOGITS.size) / DRAWS


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(np.float64(logits) - np.float64(logits).max())
    return weights / weights.sum()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize(("top_k", "vocab_size"), [(0, 7), (0, 4), (2, 7), (3, 4), (7, 4), (100, 6)])
def test_frequencies(temperature, top_k, vocab_size):
    masked = np.where(np.arange(LOGITS.size) < vocab_size, LOGITS, -np.inf)
    if top_k:
        masked[np.argsort(-masked)[top_k:]] = -np.inf
    expected = softmax(masked / temperature)
    frequencies = drawn(temperature, top_k, vocab_size)
    assert (frequencies[expected == 0] == 0).all()  # not among the k likeliest, or not in the tokenizer
    np.testing.assert_allclose(frequencies, expected, atol=5 * np.sqrt(0.25 / DRAWS))


def test_temperature_zero_takes_the_likeliest():
    assert drawn(0.0, 0, 7)[6] == 1.0
    assert drawn(0.0, 0, 6)[4] == 1.0
    assert drawn(0.0, 3, 4)[0] == 1.0
    assert drawn(1e-3, 0, 4)[0] == 1.0
    assert drawn(1.0, 1, 4)[0] == 1.0
    equal = draw(jnp.zeros((100, 5)), jax.random.key(0), 0.0, 0, 5)
    assert not equal.any()  # of equal ones the first, every time


TOKENS = MODEL.block_size + 1 - PROMPT.shape[1]  # as many as fit: the last one drawn is not read


def run(prompt, seed=0, temperature=0.0, params=PARAMS, top_k=0, vocab_size=MODEL.vocab_size) -> np.ndarray:
    options = {"tokens": TOKENS, "top_k": top_k, "vocab_size": vocab_size}
    return np.asarray(generate(GRAPHDEF, params, prompt, jax.random.key(seed), temperature, **options))


def test_greedy_is_the_argmax_of_the_full_forward():
    actual = run(PROMPT)
    assert actual.shape == (3, TOKENS) and actual.dtype == np.int32
    # What comes after a position does not reach it, so one forward of the finished texts shows every step's logits.
    texts = np.concatenate([PROMPT, actual], axis=1)
    logits = np.asarray(jax.jit(lambda p, t: nnx.merge(GRAPHDEF, p, copy=True)(t))(PARAMS, texts[:, :-1]))
    np.testing.assert_array_equal(actual, logits[:, PROMPT.shape[1] - 1 :].argmax(axis=-1))
    reference = numpy_gpt.logits(PARAMS, texts[0, :-1], MODEL.n_head)
    np.testing.assert_array_equal(actual[0], reference[PROMPT.shape[1] - 1 :].argmax(axis=-1))
    assert len({tuple(row) for row in actual}) == 3


def test_seeds_and_steps():
    once, again, other = (run(PROMPT, seed, temperature=2.0) for seed in (0, 0, 1))
    np.testing.assert_array_equal(once, again)
    assert (once != other).any()
    same_prompt = run(np.tile(PROMPT[:1], (3, 1)), temperature=2.0)
    assert len({tuple(row) for row in same_prompt}) == 3  # every row draws for itself
    # Each step draws anew: from equal logits, not the same token again and again.
    tokens = run(PROMPT, temperature=2.0, params=jax.tree.map(np.zeros_like, PARAMS))
    assert all(len(set(row)) > 2 for row in tokens.tolist())


def test_every_step_keeps_to_the_tokenizer_and_to_the_k_likeliest():
    vocabulary, k = 6, 2
    assert run(PROMPT).max() >= vocabulary  # the model would take what the tokenizer lacks
    prompt = PROMPT % vocabulary
    tokens = run(prompt, temperature=50.0, top_k=k, vocab_size=vocabulary)
    assert tokens.max() < vocabulary
    ranks = []
    for text in np.concatenate([prompt, tokens], axis=1):
        logits = numpy_gpt.logits(PARAMS, text[:-1], MODEL.n_head)[PROMPT.shape[1] - 1 :, :vocabulary]
        ranks += [int((row > row[token]).sum()) for row, token in zip(logits, text[PROMPT.shape[1] :], strict=True)]
    assert set(ranks) == set(range(k))  # only the likeliest two, and not only the likeliest
