"""Tokenizers against plain Python references."""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import regex
from hypothesis import example, given, settings
from hypothesis import strategies as st

from altgrad_jax.data import tokenizer
from altgrad_jax.data.tokenizer import (
    END_OF_TEXT,
    BpeTokenizer,
    BytesTokenizer,
    Gpt2Tokenizer,
    load_tokenizer,
)
from altgrad_jax.errors import UserError

CORPUS = [
    "Article 1. The Member States shall ensure that Regulation (EC) No 178/2002 isn't infringed.\n\n",
    "Article 2. Member States' authorities shall ensure, by 31.12.2003, that measures are ensured.\n",
    "Überführung naïve façade €5 — 𝔘nicode ☃ ☃ ☃ \u3000 the end<|endoftext|>",
] * 3
BPE = BpeTokenizer.train(CORPUS, 390)
GPT2 = Gpt2Tokenizer(BPE.table)  # a small stand-in: GPT-2's own file cannot be had offline
ALL = pytest.mark.parametrize("tok", [BytesTokenizer(), BPE, GPT2], ids=lambda tok: tok.kind)

TEXTS = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("aes thn.\n'S1€"), max_size=60)


def reference_pieces(text: str) -> list[bytes]:
    """GPT-2's pre-tokenisation as its paper's code states it, run by another engine."""
    pattern = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    return [piece.encode() for piece in regex.findall(pattern, text)]


def reference_merge(ids: list[int], pair: tuple[int, int], new: int) -> list[int]:
    merged: list[int] = []
    for i in ids:
        if merged and (merged[-1], i) == pair:
            merged[-1] = new
        else:
            merged.append(i)
    return merged


def reference_base() -> dict[int, int]:
    """GPT-2's id of each byte: printable Latin-1 first, then the rest."""
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    return {b: i for i, b in enumerate(printable + [b for b in range(256) if b not in printable])}


def reference_training(texts: list[str], entries: int) -> list[tuple[int, int]]:
    base = reference_base()
    words = Counter(piece for text in texts for piece in reference_pieces(text))
    split = {word: [base[b] for b in word] for word in words}
    merges: list[tuple[int, int]] = []
    while 256 + len(merges) < entries:
        pairs: Counter[tuple[int, int]] = Counter()
        for word, ids in split.items():
            for pair in pairwise(ids):
                pairs[pair] += words[word]
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        if pairs[best] < 2:
            break
        split = {word: reference_merge(ids, best, 256 + len(merges)) for word, ids in split.items()}
        merges.append(best)
    return merges


def reference_encoding(text: str, joined: Callable[[int, int], int | None]) -> list[int]:
    """`joined` gives the id two ids merge to, if they do; the lowest goes first."""
    base, encoded = reference_base(), []
    for piece in reference_pieces(text):
        ids = [base[b] for b in piece]
        while present := [(new, pair) for pair in pairwise(ids) if (new := joined(*pair)) is not None]:
            new, pair = min(present)
            ids = reference_merge(ids, pair, new)
        encoded += ids
    return encoded


@ALL
def test_interface(tok):
    ids = tok.encode("a b")
    assert ids.dtype == np.uint32
    assert tok.end_of_text == tok.vocab_size - 1
    assert [list(i) for i in tok.encode_batch(["a", "", "b a"])] == [list(tok.encode(t)) for t in ("a", "", "b a")]
    assert tok.encode("").shape == (0,) and tok.encode("").dtype == np.uint32
    assert len(tok.fingerprint()) == 64


@ALL
@given(text=TEXTS)
@example(text=END_OF_TEXT)
@example(text="a\r\n\u2028\x00\u0085 \u00a0  x")
@settings(max_examples=150, deadline=None)
def test_round_trip_of_any_unicode_text(tok, text):
    ids = tok.encode(text)
    assert tok.decode(ids) == text
    assert (ids < tok.end_of_text).all()


@ALL
def test_end_of_text_in_a_document_is_ordinary_text(tok):
    ids = tok.encode(f"one{END_OF_TEXT}two")
    assert tok.end_of_text not in ids
    assert tok.decode([*ids, tok.end_of_text]) == f"one{END_OF_TEXT}two{END_OF_TEXT}"


@ALL
def test_what_is_no_text_decodes_to_the_replacement_character(tok):
    half = tok.encode("é")[:1] if len(tok.encode("é")) > 1 else reference_base()[0xC3]
    assert tok.decode(np.atleast_1d(half)) == "\ufffd"
    assert tok.decode([tok.vocab_size, -1, *tok.encode("x")]) == "\ufffd\ufffdx"


@ALL
def test_lone_surrogate_is_the_users_error(tok):
    with pytest.raises(UserError, match=r"lone surrogate \(U\+D83D at character 2\)"):
        tok.encode("ab\ud83d")


@ALL
def test_json_gives_the_same_tokenizer(tok):
    copy = load_tokenizer(json.loads(json.dumps(tok.to_json())))
    assert (copy.kind, copy.vocab_size, copy.end_of_text) == (tok.kind, tok.vocab_size, tok.end_of_text)
    assert copy.fingerprint() == tok.fingerprint()
    assert list(copy.encode(CORPUS[0])) == list(tok.encode(CORPUS[0]))


def test_fingerprints_tell_tokenizers_apart():
    others = [BytesTokenizer(), BPE, GPT2, BpeTokenizer(BPE.merges[:-1]), BpeTokenizer(BPE.merges[::-1][-1:])]
    assert len({tok.fingerprint() for tok in others}) == len(others)


@pytest.mark.parametrize(
    "description",
    [
        None,
        [],
        {},
        {"kind": "word"},
        {"kind": "bytes", "vocab_size": 257},
        {"kind": "bpe"},
        {"kind": "bpe", "merges": [[0, 256]]},
        {"kind": "bpe", "merges": [[0, -1]]},
        {"kind": "bpe", "merges": [[0, 1, 2]]},
        {"kind": "bpe", "merges": [[0, 1.0]]},
        {"kind": "bpe", "merges": ["ab"]},
        {"kind": "bpe", "merges": [0]},
        # The second pair joins to the bytes of the first, so that id 257 does not exist for the third.
        {"kind": "bpe", "merges": [[0, 1], [256, 2], [1, 2], [0, 258], [259, 0]]},
        {"kind": "gpt2", "tokens": ["YQ=="]},
        {"kind": "gpt2", "tokens": [1]},
        {"kind": "gpt2", "tokens": ["%%"]},
        {"kind": "gpt2", "tokens": GPT2.to_json()["tokens"] + ["YQ=="]},
    ],
)
def test_malformed_descriptions(description):
    with pytest.raises(UserError, match="description of the tokenizer is malformed"):
        load_tokenizer(description)


def test_bytes_are_bytes():
    tok = BytesTokenizer()
    assert list(tok.encode("aé€")) == [0x61, 0xC3, 0xA9, 0xE2, 0x82, 0xAC]
    assert (tok.vocab_size, tok.end_of_text) == (257, 256)


def test_bytes_and_all_decoding_need_no_library(tmp_path):
    """Runs where `tokenizers`, `tiktoken` and TFDS cannot be imported."""
    (tmp_path / "t.json").write_text(json.dumps([tok.to_json() for tok in (BPE, GPT2)]))
    ids = BPE.encode(CORPUS[0]).tolist()
    program = f"""
import sys
for name in ("tokenizers", "tiktoken", "tensorflow_datasets", "jax"): sys.modules[name] = None
import json
from altgrad_jax.data.tokenizer import load_tokenizer, make_tokenizer
tok = make_tokenizer("bytes", 50257, iter(()))
assert tok.decode(tok.encode("naïve")) == "naïve"
for description in json.load(open({str(tmp_path / "t.json")!r})):
    assert load_tokenizer(description).decode({ids}) == {CORPUS[0]!r}
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("vocab_size", [257, 300, 400, 5000])
def test_training_is_the_textbook_algorithm(vocab_size):
    assert list(BpeTokenizer.train(CORPUS, vocab_size).merges) == reference_training(CORPUS, vocab_size - 1)


@given(texts=st.lists(st.text("abc ", max_size=30), max_size=6))
@settings(max_examples=60, deadline=None)
def test_training_agrees_with_the_reference_on_text_full_of_ties(texts):
    tok = BpeTokenizer.train(texts, 300)
    expected = reference_training(texts, 299)
    # The reference numbers merges 256, 257, ...; so does the tokenizer unless two merges make the same bytes.
    if tok.vocab_size == 257 + len(tok.merges):
        assert list(tok.merges) == expected


@given(text=TEXTS | st.text("Article shal12'. \n", max_size=60))
@settings(max_examples=150, deadline=None)
def test_bpe_and_gpt2_encode_as_the_reference(text):
    assert BPE.vocab_size == 257 + len(BPE.merges)  # so that merge k makes id 256 + k
    id_of_merge = {pair: 256 + k for k, pair in enumerate(BPE.merges)}
    assert BPE.encode(text).tolist() == reference_encoding(text, lambda i, j: id_of_merge.get((i, j)))
    id_of_bytes = {token: i for i, token in enumerate(BPE.table)}
    assert GPT2.encode(text).tolist() == reference_encoding(
        text, lambda i, j: id_of_bytes.get(BPE.table[i] + BPE.table[j])
    )


@given(text=TEXTS | st.text("Article shal12'.é \n\u3000", max_size=60))
@example(text="ab.\n\n\n\n\nb")
@example(text="a  b\n\nc d. e' s isn't  \n")
@settings(deadline=None)
def test_long_texts_are_cut_where_no_token_lies_across(text):
    """So the memory that `tokenizers` takes for them is bounded, and their tokens are what they were."""
    whole = BPE.encode(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "LONG_TEXT", 3)
        cut = list(tokenizer.pieces(text))
        assert "".join(cut) == text and len(cut) <= 1 + len(text) // 3
        np.testing.assert_array_equal(BPE.encode_batch(["x", text, "y z"])[1], whole)
        assert BpeTokenizer.train(CORPUS, 390).merges == BPE.merges


def test_merges_that_make_the_same_bytes_share_an_id():
    a, b, c = (reference_base()[ord(x)] for x in "abc")
    tok = BpeTokenizer([(b, c), (a, 256), (a, b), (258, c), (257, 257)])
    assert tok.vocab_size == 256 + 4 + 1  # bc, abc, ab, abcabc
    assert tok.decode([257, 259]) == "abcabcabc"
    assert tok.decode(tok.encode("abcabcab")) == "abcabcab"


def test_a_small_corpus_gives_a_smaller_vocabulary():
    tok = BpeTokenizer.train(["abab"], 1000)
    assert tok.vocab_size == 258  # the bytes, "ab", end-of-text
    assert BpeTokenizer.train([], 1000).vocab_size == 257
    assert BPE.vocab_size == 390


def test_training_does_not_depend_on_threads():
    program = """
import random
from altgrad_jax.data.tokenizer import BpeTokenizer
random.seed(1)
texts = [" ".join("".join(random.choices("abcdeé", k=random.randint(1, 7))) for _ in range(60)) for _ in range(300)]
print(BpeTokenizer.train(texts, 900).fingerprint())
"""
    environments = [
        {"RAYON_NUM_THREADS": "1"},
        {"RAYON_NUM_THREADS": "7", "PYTHONHASHSEED": "5"},
        {"TOKENIZERS_PARALLELISM": "false"},
        {"TOKENIZERS_PARALLELISM": "true"},
    ]
    prints = {
        subprocess.run(
            [sys.executable, "-c", program], env={**os.environ, **env}, check=True, capture_output=True, text=True
        ).stdout
        for env in environments
    }
    assert len(prints) == 1 and len(prints.pop().strip()) == 64


def test_an_error_while_reading_the_corpus_is_not_lost():
    def texts():
        yield "abc"
        raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError, match="disk on fire"):
        BpeTokenizer.train(texts(), 300)
    with pytest.raises(UserError, match="lone surrogate"):
        BpeTokenizer.train(["\udfff"], 300)


def test_a_text_that_breaks_tiktoken_is_the_users_error():
    with pytest.raises(UserError, match="tiktoken gave up on a text"):
        GPT2.encode(" " * 1_100_000)
