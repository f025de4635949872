"""What a token cache gives to who reads it, and how it is found."""

import math
import os
import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from altgrad_jax.data.cache import TokenCache, escape_id, find_caches, open_cache, unescape_id
from altgrad_jax.data.cache_build import build_cache
from altgrad_jax.data.cache_header import parse_header
from altgrad_jax.data.tokenizer import BytesTokenizer
from altgrad_jax.errors import UserError
from tests.data.tiny_source import TEXTS, KnownSource, TinySource, flat_ids


@pytest.fixture
def built(tmp_path) -> TokenCache:
    return build_cache(KnownSource(), "bytes", 257, tmp_path, progress=False)


def test_contents(built):
    assert built.splits == ("train", "validation", "test")
    assert (built.vocab_size, built.header.dtype, built.tokenizer().kind) == (257, "uint16", "bytes")
    for split, texts in TEXTS.items():
        tokens = built.tokens(split)
        assert isinstance(tokens, np.memmap) and tokens.dtype == np.uint16 and not tokens.flags.writeable
        assert tokens.tolist() == flat_ids(texts)
        assert (built.path / f"{split}.bin").read_bytes() == np.array(flat_ids(texts), "<u2").tobytes()
        lengths = [len(text.encode()) + 1 for text in texts]
        assert built.document_starts(split).tolist() == [sum(lengths[:i]) for i in range(len(lengths))]
        assert built.document_ids(split) == [f"{split}/{i}" for i in range(len(texts))]
        header = built.split_header(split)
        assert (header.documents, header.tokens) == (len(texts), sum(lengths))
        assert header.utf8_bytes == sum(lengths) - len(texts)
    with pytest.raises(UserError, match="'tiny' has no split 'dev'; it has train, validation, test"):
        built.tokens("dev")


def test_entropies(built):
    counts = Counter(flat_ids(TEXTS["train"]))
    total = sum(counts.values())
    expected = -math.fsum(n / total * math.log(n / total) for n in counts.values())
    assert built.split_header("train").unigram_nats == pytest.approx(expected, rel=1e-12)
    assert built.entropy_floor("train") == 10.0 * 4 / total
    assert built.entropy_floor("test") == 10.0 * 2 / 5


def test_entropy_floor_is_unknown_for_most_sources(tmp_path):
    assert build_cache(TinySource(), "bytes", 257, tmp_path, progress=False).entropy_floor("train") is None


def test_documents_of_every_range(tmp_path):
    texts = ["ab", "", "c", "", "", "def"]
    built = build_cache(TinySource({"train": texts}), "bytes", 257, tmp_path, progress=False)
    owner = [f"train/{i}" for i, text in enumerate(texts) for _ in range(len(text.encode()) + 1)]
    for start in range(len(owner) + 1):
        for stop in range(start, len(owner) + 1):
            assert built.documents_in("train", start, stop) == list(dict.fromkeys(owner[start:stop]))
    for start, stop in ((-1, 3), (3, 2), (0, len(owner) + 1)):
        with pytest.raises(IndexError):
            built.documents_in("train", start, stop)


def test_header_round_trip_and_pickling(built):
    text = (built.path / "header.json").read_bytes()
    assert parse_header(text) == built.header
    assert built.header.to_json().encode() == text and built.header.sealed() == built.header
    assert pickle.loads(pickle.dumps(built)) == built
    assert built.header.created_by.startswith("altgrad_jax ")


@given(st.lists(st.text(st.characters()), min_size=1))
@example(["\u2028\u2029\x85\r\x0b\x1c", "\\u0041", "\udc80", "", "é"])
def test_ids_of_any_kind_take_one_line_each(ids):
    lines = "".join(f"{escape_id(i)}\n" for i in ids).encode().decode().splitlines()
    assert [unescape_id(line) for line in lines] == ids


def test_reading_needs_no_optional_library(built):
    program = f"""
import sys
for name in ("tokenizers", "tiktoken", "tensorflow_datasets", "array_record", "rich", "jax"): sys.modules[name] = None
from altgrad_jax.data.cache import open_cache
cache = open_cache({str(built.path)!r})
assert cache.tokenizer().decode(cache.tokens("test")[:1]) == "a"
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_find_caches(tmp_path):
    def build(name: str, kind: str, size: int, texts: list[str]) -> Path:
        return build_cache(TinySource({"train": texts}, name=name), kind, size, tmp_path, progress=False).path

    local = build("eurlex-local", "bpe", 300, ["a"])
    big = build("eurlex-local", "bpe", 400, ["a"])
    plain = build("eurlex", "bytes", 257, ["a"])
    odd = build("my texts/1", "bytes", 257, ["a"])
    newer = build("eurlex", "bytes", 257, ["b"])
    gpt2 = tmp_path / "eurlex57k-gpt250257-0123456789ab"
    gpt2.mkdir()
    (tmp_path / "notes-bytes257-0123456789ab").write_text("a file")
    (tmp_path / "something else").mkdir()
    for age, path in enumerate((newer, odd, plain, big, local, gpt2)):
        os.utime(path, (1e9 - age, 1e9 - age))

    assert odd.name.startswith("my_texts_1-bytes257-")
    assert find_caches(tmp_path) == [newer, odd, plain, big, local, gpt2]
    assert find_caches(tmp_path, "eurlex") == [newer, plain, big, local, gpt2]
    assert find_caches(tmp_path, "eurlex-local") == [big, local]
    assert find_caches(tmp_path, "my texts/1") == [odd]
    assert find_caches(tmp_path, "eurlex", "bytes") == [newer, plain]
    assert find_caches(tmp_path, "eurlex", "auto") == [big, local, gpt2]
    assert find_caches(tmp_path, "eurlex", "bpe", 300) == [local]
    assert find_caches(tmp_path, "eurlex", None, 50257) == [newer, plain, gpt2]
    assert find_caches(tmp_path, "eurlex", "bytes", 256) == []
    assert find_caches(tmp_path / "nowhere") == []
    # A beginning that is not a whole name comes after a whole name, however new it is.
    os.utime(gpt2, (2e9, 2e9))
    assert find_caches(tmp_path, "eurlex") == [newer, plain, gpt2, big, local]


def test_tokenizer_of_a_found_cache_decodes(tmp_path):
    build_cache(TinySource(), "bytes", 257, tmp_path, progress=False)
    [path] = find_caches(tmp_path, "tiny")
    assert open_cache(path).tokenizer().fingerprint() == BytesTokenizer().fingerprint()
