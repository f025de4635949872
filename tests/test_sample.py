"""Drawing tokens, generation with a cache against the full forward pass, and the command that prints it."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from flax import nnx

from altgrad_jax import checkpoint, sample
from altgrad_jax.errors import UserError
from altgrad_jax.model import GPTConfig
from altgrad_jax.sample import draw, generate, load_run
from altgrad_jax.state import init_params, model_structure, tree_sha256
from tests import numpy_gpt
from tests.forks import run_module
from tests.runs import snapshot, summary

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


def printed(capsys, monkeypatch, workdir, **options) -> tuple[str, list[str]]:
    """The first line of `python -m altgrad_jax.sample`, run in this process, and the texts after it."""
    monkeypatch.setattr(sample.cli, "quiet_libraries", lambda: None)  # it would take pytest's log handlers away
    arguments = [f"--{key}={value}" for key, value in options.items()]
    with flagsaver.flagsaver():
        flags.FLAGS(["sample", f"--workdir={workdir}", *arguments])
        assert sample.main() == 0
        flags.FLAGS.unparse_flags()
    head, *texts = capsys.readouterr().out.split("\n---\n")
    return head, [text.removesuffix("\n") for text in texts]


def test_the_command_prints_texts(finished, capsys, monkeypatch):
    options = {"prompt": "the member ", "tokens": 12, "samples": 2, "temperature": 1.5, "top_k": 20}
    head, texts = printed(capsys, monkeypatch, finished, **options)
    assert head == "step 20, temperature 1.5, top_k 20, seed 0"
    assert len(set(texts)) == 2 and all(text.startswith("the member ") for text in texts)
    assert printed(capsys, monkeypatch, finished, **options) == (head, texts)
    assert printed(capsys, monkeypatch, finished, **options, step=20) == (head, texts)
    head, others = printed(capsys, monkeypatch, finished, **options, seed=1)
    assert head.endswith("seed 1") and not set(others) & set(texts)
    head, others = printed(capsys, monkeypatch, finished, **options, step=10)
    assert head.startswith("step 10,") and others != texts


LONG_PROMPT = "that each operator keeps the records of the goods "


@pytest.mark.parametrize(("step", "prompt"), [(10, LONG_PROMPT), (20, LONG_PROMPT), (20, "")])
def test_the_likeliest_continuation_of_a_checkpoint(finished, capsys, monkeypatch, step, prompt):
    """Against NumPy on the weights of that step: what was drawn is the likeliest, up to what bfloat16 rounds."""
    tokens, block, end_of_text = 12, 32, 256
    options = {"prompt": prompt, "tokens": tokens, "temperature": 0, "step": step}
    _, [text] = printed(capsys, monkeypatch, finished, **options)
    assert text.startswith(prompt)
    drawn = list(text.removeprefix(prompt).encode())
    assert len(drawn) == tokens, "so few steps have not learned to end a text"
    shape = GPTConfig(n_layer=1, n_head=2, n_embd=32, block_size=block, vocab_size=257)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.eval_shape(lambda: init_params(shape, 0))
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), like)
    params, _, _ = checkpoint.read_params(f"{finished}@{step}", like)
    context = (list(prompt.encode()) or [end_of_text])[-(block + 1 - tokens) :]
    logits = numpy_gpt.logits(params, np.array([*context, *drawn[:-1]]), shape.n_head)[len(context) - 1 :]
    chosen = np.take_along_axis(logits, np.array(drawn)[:, None], axis=-1)[:, 0]
    assert logits.shape == (tokens, 257) and (chosen > logits.max(axis=-1) - 0.02).all()


def test_a_text_ends_where_its_document_does(finished, capsys, monkeypatch):
    """With weights that draw everything alike, some texts end early, and what comes after the end is not shown."""
    run = load_run(str(finished), None)
    zeros = jax.tree.map(jnp.zeros_like, run.params)
    monkeypatch.setattr(sample, "load_run", lambda *_: dataclasses.replace(run, params=zeros))
    monkeypatch.setattr(type(run.cache.tokenizer()), "decode", lambda self, ids: ",".join(map(str, ids)))
    _, texts = printed(capsys, monkeypatch, finished, prompt="a", tokens=30, samples=200, temperature=1, top_k=0)
    lengths = [len(text.removeprefix("a").split(",")) for text in texts]
    ended = sum(length < 30 for length in lengths)
    assert 200 * (1 - (256 / 257) ** 30) / 3 < ended < 200 * (1 - (256 / 257) ** 30) * 3
    assert not any("256" in text for text in texts)


def test_the_run_that_is_read(finished, copied, tmp_path):
    run, older = load_run(str(finished), None), load_run(str(finished), 10)
    assert (run.step, older.step) == (20, 10)
    assert run.model == older.model and run.model.vocab_size == 257 and run.quantised == {}
    assert tree_sha256(run.params) == summary(finished)["parameter_sha256"] != tree_sha256(older.params)
    manifest = json.loads((copied / "manifest.json").read_text())
    assert run.cache.sha256 == manifest["corpus"]["sha256"]
    (copied / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"manifest.json is damaged: .*; restore it, or delete it"):
        load_run(str(copied), None)


SAMPLE_MISTAKES: list[tuple[list[str], int, list[str]]] = [
    ([], 2, ["--workdir is missing: the work directory of a run"]),
    (["--workdir=nowhere"], 2, ["--workdir=nowhere holds no manifest.json; give a run's work directory"]),
    (["--workdir=RUN/checkpoints"], 2, ["checkpoints holds no manifest.json"]),
    (["--workdir=RUN", "--step=11"], 2, ["run has no checkpoint of step 11; it has 10, 15, 20"]),
    (["--workdir=RUN", "--step=last"], 2, ["step", "last"]),
    (["--workdir=RUN", "--tokens=33"], 2, ["--tokens=33 is more than the model's block of 32 can hold"]),
    (["--workdir=RUN", "--tokens=0"], 2, ["tokens", "0"]),
    (["--workdir=RUN", "--temperature=-1"], 2, ["temperature", "-1"]),
    (["--workdir=RUN", "the prompt"], 2, ["unexpected argument 'the prompt'"]),
    (["--workdir=RUN", "--promt=x"], 2, ["Unknown command line flag 'promt'"]),
    (["--workdir=RUN", "--temperature=inf"], 2, ["--temperature=inf is not finite in float32"]),
    (["--workdir=RUN", "--temperature=nan"], 2, ["--temperature=nan is not finite in float32"]),
    (["--workdir=RUN", "--temperature=1e39"], 2, ["--temperature=1e+39 is not finite in float32"]),
    (["--workdir=RUN", "--step=-1"], 2, ["step", "-1"]),
    (["--workdir=RUN", "--seed=4294967296"], 2, ["seed", "4294967296"]),
    (["--workdir=RUN", "--top_k=2147483648"], 2, ["top_k", "2147483648"]),
    (["--workdir=RUN", "--samples=1000000000000"], 2, ["samples", "1000000000000"]),
    (["--workdir=EMPTY"], 2, ["no checkpoint in", "empty; give a run's work directory"]),
    (["--workdir=TORN", "--step=15"], 1, ["checkpoint", "15 is damaged", "choose another with"]),
    (["--workdir=MOVED"], 1, ["no token cache at", "elsewhere"]),
]


def test_the_commands_mistakes_are_one_line_each(copied, tmp_path):
    places = {"RUN": copied}
    for name in ("empty", "torn", "moved"):
        places[name.upper()] = shutil.copytree(copied, tmp_path / name)
    shutil.rmtree(tmp_path / "empty" / "checkpoints")
    for path in (tmp_path / "torn" / "checkpoints" / "15" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    manifest = json.loads((copied / "manifest.json").read_text())
    manifest["corpus"]["cache"] = str(tmp_path / "elsewhere")
    (tmp_path / "moved" / "manifest.json").write_text(json.dumps(manifest))

    def placed(word: str) -> str:
        flag, _, value = word.partition("=")
        name, _, below = value.partition("/")
        return f"{flag}={places[name] / below}" if name in places else word

    before = snapshot(tmp_path)
    cases = [[*map(placed, words)] for words, _, _ in SAMPLE_MISTAKES]
    ended = run_module("altgrad_jax.sample", cases, tmp_path / "out", ["altgrad_jax.train"])
    for done, (words, code, says) in zip(ended, SAMPLE_MISTAKES, strict=True):
        assert (done.code, done.out) == (code, ""), (words, done)
        assert done.err.startswith("error: ") and done.err.count("\n") == 1, (words, done)
        assert [text for text in says if text not in done.err] == [], (words, done.err)
    assert {k: v for k, v in snapshot(tmp_path).items() if not k.startswith("out/")} == before
