"""Damage to a token cache is always told, and in one sentence."""

import copy
import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from altgrad_jax.data import cache_header
from altgrad_jax.data.cache import TokenCache, open_cache
from altgrad_jax.data.cache_build import build_cache
from altgrad_jax.data.cache_header import CacheHeader, parse_header
from altgrad_jax.data.tokenizer import BpeTokenizer
from altgrad_jax.errors import UserError
from tests.data.tiny_source import TEXTS, KnownSource


@pytest.fixture
def built(tmp_path) -> TokenCache:
    return build_cache(KnownSource(), "bytes", 257, tmp_path, progress=False)


FILES = ["header.json", "tokenizer.json"] + [f"{s}{end}" for s in TEXTS for end in (".bin", ".starts.npy", ".ids.txt")]


def open_and_use(path: Path, verify: bool) -> None:
    cache = open_cache(path, verify)
    cache.tokenizer()
    for split in cache.splits:
        cache.tokens(split)
        cache.document_starts(split)
        cache.document_ids(split)
        cache.documents_in(split, 0, 1)
        cache.entropy_floor(split)


def assert_told(path: Path, file: str) -> None:
    with pytest.raises(UserError) as caught:
        open_cache(path)
    message = str(caught.value)
    assert file in message and str(path) in message and "\n" not in message
    assert "delete that folder, and the next run builds it again" in message


@pytest.mark.parametrize("file", FILES)
def test_every_flipped_bit_and_every_cut_is_told(built, file):
    path = built.path / file
    data = path.read_bytes()
    places = sorted({*range(0, len(data), max(1, len(data) // 40)), len(data) - 1})
    for place in places:
        flipped = bytearray(data)
        flipped[place] ^= 1 << (place % 8)
        path.write_bytes(flipped)
        assert_told(built.path, file)
        path.write_bytes(data[:place])
        assert_told(built.path, file)
    path.write_bytes(data + b"\x00")
    assert_told(built.path, file)
    path.unlink()
    assert_told(built.path, file)
    path.mkdir()
    assert_told(built.path, file)
    path.rmdir()
    path.write_bytes(data)
    assert open_cache(built.path) == built


@pytest.mark.filterwarnings("ignore")  # from NumPy's reading of a damaged .npy header
@pytest.mark.parametrize("file", FILES)
@given(data=st.data())
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_without_verification_damage_is_a_user_error_or_harmless(built, file, data):
    path = built.path / file
    original = path.read_bytes()
    edits = st.tuples(st.integers(0, len(original) - 1), st.integers(0, len(original)), st.binary(max_size=20))
    start, stop, middle = data.draw(edits)
    path.write_bytes(original[:start] + middle + original[max(start, stop) :])
    try:
        open_and_use(built.path, verify=False)
    except UserError:
        pass
    finally:
        path.write_bytes(original)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)


def paths_in(value: object, path: tuple = ()) -> Iterator[tuple]:
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from paths_in(inner, (*path, key))


def replaced(tree: object, path: tuple, value: object) -> object:
    if not path:
        return value
    tree = copy.copy(tree)
    tree[path[0]] = replaced(tree[path[0]], path[1:], value)  # type: ignore[index]  # a JSON tree, as loose as it is
    return tree


@given(data=st.data())
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_mutated_header_is_believed(built, data):
    """With the old hashes it is refused; with hashes made to fit, it is refused or the files fit it."""
    path = built.path / "header.json"
    original = path.read_text()
    fields = json.loads(original)
    where = data.draw(st.sampled_from(list(paths_in(fields))))
    mutated = replaced(fields, where, data.draw(JSON | st.sampled_from([-1, 0, 1, 2**63, 10**4000, "e0m7", math.nan])))
    try:
        for refit in (False, True):
            if refit:
                try:
                    mutated = dataclasses.asdict(sealed_again(mutated))
                except (TypeError, KeyError, AttributeError, ValueError, RecursionError):
                    break  # too far from a header to have hashes
            path.write_text(json.dumps(mutated, indent=2) + "\n")
            try:
                open_and_use(built.path, verify=True)
            except UserError:
                continue
            assert refit or parse_header(path.read_bytes()) == built.header
    finally:
        path.write_text(original)


def sealed_again(fields: Any) -> CacheHeader:
    return CacheHeader(
        **{
            **fields,
            "source": cache_header.SourceHeader(**fields["source"]),
            "tokenizer": cache_header.TokenizerHeader(**fields["tokenizer"]),
            "splits": tuple(cache_header.SplitHeader(**split) for split in fields["splits"]),
        }
    ).sealed()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"splits": "train"}, "has no list in the header.splits"),
        ({"dtype": "uint32"}, "does not describe a known tokenizer and its number type"),
        ({"key": "../.."}, "has a malformed key"),
        ({"splits": []}, "does not name splits of a corpus"),
        ({"format_version": True}, "has no int in the header.format_version"),
        ({"created_by": None}, "has no str in the header.created_by"),
        ({"extra": 1}, "has not the fields of version 1 in the header"),
        ({"format_version": 2}, "has format version 2, and this version of altgrad_jax reads 1"),
        ({"sha256": "0" * 64}, "does not match its own checksum"),
    ],
)
def test_headers_that_are_refused(built, change, message):
    fields = json.loads(built.header.to_json()) | change
    if {"dtype", "key", "splits"} & change.keys() and change.get("splits") != "train":
        fields = dataclasses.asdict(sealed_again(fields))
    with pytest.raises(ValueError, match=message):
        parse_header(json.dumps(fields).encode())


@pytest.mark.parametrize("text", [b"", b"\xff", b"[" * 100_000, b"9" * 5000, b"{", b'{"format_version": "1"}'])
def test_what_is_no_header_at_all(built, text):
    (built.path / "header.json").write_bytes(text)
    assert_told(built.path, "header.json")


def test_tables_that_do_not_fit_are_told_though_their_hashes_do(built):
    """As a defect of ours, or a forger, would write them."""

    def reseal(file: str, member: str, content: bytes) -> None:
        (built.path / file).write_bytes(content)
        fields = json.loads(built.header.to_json())
        fields["splits"][0][member] = hashlib.sha256(content).hexdigest()
        (built.path / "header.json").write_text(sealed_again(fields).to_json())

    ids = (built.path / "train.ids.txt").read_bytes()
    for lines in (ids + b"one too many\n", ids[:-1], b"", b"\xff\n\n\n\n", b"0\n1\n2\n3\n4"):
        reseal("train.ids.txt", "ids_sha256", lines)
        assert_told(built.path, "train.ids.txt")
    (built.path / "train.ids.txt").write_bytes(ids)
    starts = built.document_starts("train")
    for i, table in enumerate(
        (starts + 1, starts[::-1], starts[:-1], starts * 1000, starts.astype(np.float64), np.int64(0))
    ):
        np.save(built.path / f"{i}.npy", table)
        reseal("train.starts.npy", "starts_sha256", (built.path / f"{i}.npy").read_bytes())
        assert_told(built.path, "train.starts.npy")
    np.save(built.path / "pickled.npy", np.array([{}] * 4, dtype=object), allow_pickle=True)
    reseal("train.starts.npy", "starts_sha256", (built.path / "pickled.npy").read_bytes())
    assert_told(built.path, "train.starts.npy")


@pytest.mark.parametrize("place", [0, 7, -2])
@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("token", [257, 300, 65535])
def test_tokens_that_no_tokenizer_has_are_told_though_their_hash_fits(built, split, place, token):
    _reseal_tokens(built, split, place, token)
    with pytest.raises(
        UserError, match=rf"{split}.bin holds the token id {token}, and the tokenizer has ids up to 256"
    ):
        open_cache(built.path)


def test_documents_without_an_end_are_told(built):
    _reseal_tokens(built, "validation", -1, 65)
    with pytest.raises(UserError, match="validation.bin has documents that do not end with end-of-text"):
        open_cache(built.path)


def _reseal_tokens(built: TokenCache, split: str, place: int, token: int) -> None:
    tokens = np.array(built.tokens(split))
    tokens[place % len(tokens)] = token
    (built.path / f"{split}.bin").write_bytes(tokens.tobytes())
    fields = json.loads(built.header.to_json())
    [header] = [one for one in fields["splits"] if one["name"] == split]
    header["tokens_sha256"] = hashlib.sha256(tokens.tobytes()).hexdigest()
    (built.path / "header.json").write_text(sealed_again(fields).to_json())


def test_a_tokenizer_that_is_not_the_headers_is_told(built):
    (built.path / "tokenizer.json").write_text(json.dumps(BpeTokenizer([(0, 1)]).to_json()))
    with pytest.raises(UserError, match=r"tokenizer.json is not the tokenizer that the header names"):
        open_cache(built.path, verify=False).tokenizer()


def test_a_missing_cache(tmp_path):
    with pytest.raises(
        UserError, match=r"no token cache at .*nowhere: `python -m altgrad_jax.data prepare` builds one"
    ):
        open_cache(tmp_path / "nowhere")
