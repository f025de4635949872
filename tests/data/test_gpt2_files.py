"""GPT-2's vocabulary files, fabricated small, and the choice of a tokenizer, which depends on them."""

import base64
import hashlib
import inspect
import json
import socket
from pathlib import Path

import pytest
import tiktoken.load
import tiktoken_ext.openai_public
from tokenizers import pre_tokenizers

from altgrad_jax.data import gpt2_files, tokenizer
from altgrad_jax.data.gpt2_files import (
    GPT2_FILES,
    VocabularyFile,
    byte_characters,
    parse_merges,
    parse_ranks,
    read_vocabulary,
)
from altgrad_jax.data.tokenizer import (
    BpeTokenizer,
    Gpt2Tokenizer,
    gpt2_available,
    make_tokenizer,
    resolve_tokenizer,
)
from altgrad_jax.errors import UsageError, UserError

CORPUS = ["The Member States shall ensure that the measures are ensured by the Member States' authorities.\n"] * 3
BPE = BpeTokenizer.train(CORPUS, 300)  # its small vocabulary stands in for GPT-2's, whose file cannot be had offline


def merges_file() -> bytes:
    written = ["".join(byte_characters()[b] for b in token) for token in BPE.table]
    return "".join(["#version: 0.2\n", *(f"{written[left]} {written[right]}\n" for left, right in BPE.merges)]).encode()


def ranks_file() -> bytes:
    return b"".join(base64.b64encode(t) + f" {i}\n".encode() for i, t in enumerate(BPE.table))


CONTENTS = {"small.tiktoken": ranks_file(), "small.bpe": merges_file()}
SMALL_FILES = tuple(
    VocabularyFile(name, f"https://example.invalid/{name}", hashlib.sha256(CONTENTS[name]).hexdigest(), parse)
    for name, parse in (("small.tiktoken", parse_ranks), ("small.bpe", parse_merges))
)
EACH_FILE = pytest.mark.parametrize("file", SMALL_FILES, ids=lambda file: file.name)


@pytest.fixture
def no_gpt2(tmp_path, monkeypatch):
    """No vocabulary anywhere, and no network: trying to connect fails the test."""
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    monkeypatch.delenv("DATA_GYM_CACHE_DIR", raising=False)
    monkeypatch.setattr(gpt2_files.tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))

    def refuse(*args):
        pytest.fail("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(tiktoken.load, "read_file", refuse)
    return tmp_path


def test_the_published_addresses_and_hashes_are_those_of_tiktoken():
    source = inspect.getsource(tiktoken_ext.openai_public)
    for file in GPT2_FILES:
        place = source.index(file.url)
        assert file.sha256 in source[place : place + 500]
        assert file.url.endswith(file.name)


def test_both_layouts_parse_as_tiktoken_parses_them(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    monkeypatch.setattr(tiktoken.load, "read_file", lambda path: Path(path).read_bytes())
    merges, ranks, encoder = tmp_path / "vocab.bpe", tmp_path / "r.tiktoken", tmp_path / "encoder.json"
    merges.write_bytes(merges_file())
    ranks.write_bytes(ranks_file())
    written = {"".join(byte_characters()[b] for b in token): i for i, token in enumerate(BPE.table)}
    encoder.write_text(json.dumps(written))
    from_merges = tiktoken.load.data_gym_to_mergeable_bpe_ranks(str(merges), str(encoder))
    assert parse_merges(merges_file()) == sorted(from_merges, key=from_merges.__getitem__) == list(BPE.table)
    from_ranks = tiktoken.load.load_tiktoken_bpe(str(ranks))
    assert parse_ranks(ranks_file()) == sorted(from_ranks, key=from_ranks.__getitem__) == list(BPE.table)
    assert set(byte_characters()) == set(pre_tokenizers.ByteLevel.alphabet())


@EACH_FILE
@pytest.mark.parametrize("variable", ["TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR", None])
def test_tiktokens_cache_is_found(no_gpt2, monkeypatch, file, variable):
    folder = no_gpt2 / ("cache" if variable else "temporary/data-gym-cache")
    folder.mkdir(parents=True)
    if variable:
        monkeypatch.setenv(variable, str(folder))
    (folder / hashlib.sha1(file.url.encode()).hexdigest()).write_bytes(CONTENTS[file.name])
    assert read_vocabulary(files=SMALL_FILES) == list(BPE.table)


@EACH_FILE
def test_a_file_or_folder_given_by_the_user_is_found(no_gpt2, file):
    (no_gpt2 / file.name).write_bytes(CONTENTS[file.name])
    assert read_vocabulary(no_gpt2, SMALL_FILES) == list(BPE.table)
    assert read_vocabulary(no_gpt2 / file.name, SMALL_FILES) == list(BPE.table)
    renamed = (no_gpt2 / file.name).rename(no_gpt2 / "anything")
    assert read_vocabulary(str(renamed), SMALL_FILES) == list(BPE.table)


def test_a_missing_vocabulary_names_the_places_and_the_way_out(no_gpt2, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(no_gpt2 / "mine"))
    with pytest.raises(UserError) as caught:
        make_tokenizer("gpt2", 50257, CORPUS)
    message = str(caught.value)
    for expected in (
        "r50k_base.tiktoken",
        "vocab.bpe",
        str(no_gpt2 / "mine"),
        "data-gym-cache",
        GPT2_FILES[0].cached_name,
    ):
        assert expected in message
    assert "--config.data.tokenizer=bpe" in message and "\n" not in message
    assert not gpt2_available()


def test_wrong_contents_are_named_and_left_alone(no_gpt2):
    wrong = no_gpt2 / "small.tiktoken"
    wrong.write_bytes(CONTENTS["small.tiktoken"][:-1])
    with pytest.raises(UserError, match=r"small.tiktoken has not the published SHA-256"):
        read_vocabulary(no_gpt2, SMALL_FILES)
    assert wrong.exists()
    (no_gpt2 / "small.bpe").write_bytes(CONTENTS["small.bpe"])
    assert read_vocabulary(no_gpt2, SMALL_FILES) == list(BPE.table)


def test_an_unreadable_file_is_named(no_gpt2):
    (no_gpt2 / "small.tiktoken").mkdir()
    with pytest.raises(UserError, match=r"small.tiktoken cannot be read \(Is a directory\)"):
        read_vocabulary(no_gpt2, SMALL_FILES)


def test_auto_takes_gpt2_where_it_is_and_fits(no_gpt2, monkeypatch):
    asked: list[object] = []

    def found(path: str | Path | None = None) -> list[bytes]:
        asked.append(path)
        return list(BPE.table)

    monkeypatch.setattr(tokenizer, "read_vocabulary", found)
    assert gpt2_available("where") and asked == ["where"]
    assert resolve_tokenizer("auto", 50257) == ("gpt2", 50257)
    assert resolve_tokenizer("auto", 50256) == ("bpe", 50256)
    made = make_tokenizer("auto", 50257, iter(()), "where")
    assert (made.kind, made.fingerprint()) == ("gpt2", Gpt2Tokenizer(BPE.table).fingerprint()) and asked[-1] == "where"
    monkeypatch.setattr(tokenizer, "find_spec", lambda name: None)
    assert resolve_tokenizer("auto", 50257) == ("bpe", 50257)
    with pytest.raises(UserError, match=r"needs the package tiktoken: install altgrad_jax\[gpt2\]"):
        make_tokenizer("gpt2", 50257, ())


@pytest.mark.parametrize(
    ("kind", "vocab_size", "resolved"),
    [
        ("bytes", 257, ("bytes", 257)),
        ("bytes", 50257, ("bytes", 257)),
        ("bpe", 4096, ("bpe", 4096)),
        ("gpt2", 50304, ("gpt2", 50257)),
        ("auto", 50257, ("bpe", 50257)),
    ],
)
def test_resolution(no_gpt2, kind, vocab_size, resolved):
    assert resolve_tokenizer(kind, vocab_size) == resolved


@pytest.mark.parametrize(
    ("kind", "vocab_size", "message"),
    [
        ("gtp2", 50257, "unknown tokenizer 'gtp2': data.tokenizer is one of auto, bytes, bpe, gpt2"),
        ("bytes", 256, "vocabulary of 256 is too small for the tokenizer 'bytes', which needs 257"),
        ("bpe", 256, "which needs 257"),
        ("auto", 100, "which needs 257"),
        ("gpt2", 50256, "which needs 50257: set model.vocab_size to 50257 or more, or data.tokenizer to bpe or bytes"),
    ],
)
def test_requests_that_cannot_be_met(no_gpt2, kind, vocab_size, message):
    with pytest.raises(UsageError, match=message):
        make_tokenizer(kind, vocab_size, CORPUS)


def test_make_tokenizer(no_gpt2):
    assert make_tokenizer("bytes", 300, iter(())).kind == "bytes"
    assert make_tokenizer("bpe", 300, iter(CORPUS)).fingerprint() == BPE.fingerprint()
    assert make_tokenizer("auto", 50257, CORPUS).kind == "bpe"
