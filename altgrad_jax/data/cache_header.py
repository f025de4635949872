"""What a token cache says of itself: `header.json`, typed, hashed and checked.

Two hashes close the header. `sha256` is the data hash of a run: it covers what decides the token stream (the documents,
their ids, the tokenizer), and nothing that differs between two machines that prepared the same data, such as a
description with a path in it, the version of this package or the last bit of an entropy. `checksum` covers every field,
`sha256` included, so no damage to the header goes unseen.
"""

import dataclasses
import hashlib
import json
import math
import re
import types
import typing
from dataclasses import dataclass
from typing import Any, TypeVar

from altgrad_jax.data.documents import SPLITS
from altgrad_jax.data.tokenizer import BYTES_VOCABULARY, KINDS
from altgrad_jax.files import parse_json

FORMAT_VERSION = 1

Parsed = TypeVar("Parsed")


@dataclass(frozen=True)
class SourceHeader:
    """The source the documents came from; members as in `documents.Source`."""

    name: str
    description: str
    fingerprint: str


@dataclass(frozen=True)
class TokenizerHeader:
    """The tokenizer.

    Attributes:
      kind: one of `tokenizer.KINDS`.
      vocab_size: number of ids, end-of-text included.
      requested_vocab_size: what the vocabulary was allowed to be; more than `vocab_size` if the corpus was too small.
      fingerprint: `Tokenizer.fingerprint()`.
      file_sha256: of `tokenizer.json`.
    """

    kind: str
    vocab_size: int
    requested_vocab_size: int
    fingerprint: str
    file_sha256: str


@dataclass(frozen=True)
class SplitHeader:
    """One split.

    Attributes:
      name: one of `documents.SPLITS`.
      documents: how many.
      tokens: how many, with one end-of-text for each document.
      utf8_bytes: of the text, end-of-text not counted.
      unigram_nats: entropy of the split's own token frequencies, in nats per token: the loss of the best model that
        ignores context.
      nats: entropy of the split's text under the source's own model, in nats in all; None where it is not known.
      tokens_sha256: of `<split>.bin`.
      starts_sha256: of `<split>.starts.npy`.
      ids_sha256: of `<split>.ids.txt`.
    """

    name: str
    documents: int
    tokens: int
    utf8_bytes: int
    unigram_nats: float
    nats: float | None
    tokens_sha256: str
    starts_sha256: str
    ids_sha256: str


@dataclass(frozen=True)
class CacheHeader:
    """All of `header.json`.

    Attributes:
      format_version: of the layout of the cache; this version of the package reads `FORMAT_VERSION`.
      key: hex SHA-256 of the request (`cache_key`).
      created_by: package and version that built it.
      dtype: "uint16" or "uint32", little-endian on disk.
      splits: those of the source, "train" among them.
      sha256: the data hash.
      checksum: of all other fields.
    """

    format_version: int
    key: str
    created_by: str
    source: SourceHeader
    tokenizer: TokenizerHeader
    dtype: str
    splits: tuple[SplitHeader, ...]
    sha256: str = ""
    checksum: str = ""

    def sealed(self) -> "CacheHeader":
        """The same header with both hashes set."""
        hashed = dataclasses.replace(self, sha256=hash_of(self._identity()), checksum="")
        return dataclasses.replace(hashed, checksum=hash_of(dataclasses.asdict(hashed)))

    def _identity(self) -> dict[str, Any]:
        return {
            "format_version": self.format_version,
            "source": [self.source.name, self.source.fingerprint],
            "tokenizer": [self.tokenizer.kind, self.tokenizer.vocab_size, self.tokenizer.fingerprint],
            "dtype": self.dtype,
            "splits": [[s.name, s.documents, s.tokens, s.tokens_sha256, s.ids_sha256] for s in self.splits],
        }

    def to_json(self) -> str:
        """The text of `header.json`."""
        return json.dumps(dataclasses.asdict(self), indent=2, allow_nan=False) + "\n"


def cache_key(source_fingerprint: str, tokenizer_kind: str, vocab_size: int) -> str:
    """Hex SHA-256 of what was asked for: which documents, in which tokens, in which layout."""
    return hash_of([FORMAT_VERSION, source_fingerprint, tokenizer_kind, vocab_size])


def token_dtype(vocab_size: int) -> str:
    """The smallest type that holds every id: "uint16" up to 65,536 of them, else "uint32"."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


def parse_header(text: bytes) -> CacheHeader:
    """The header that `CacheHeader.to_json` wrote, byte for byte.

    Raises:
      ValueError: it is not one; the message completes "header.json ...".
    """
    try:
        fields = parse_json(text)
    except ValueError as error:
        raise ValueError(f"cannot be used: {error}") from error
    version = fields.get("format_version") if isinstance(fields, dict) else None
    if type(version) is int and version != FORMAT_VERSION:
        raise ValueError(f"has format version {version}, and this version of altgrad_jax reads {FORMAT_VERSION}")
    header = parse_as(CacheHeader, fields, "the header")
    if header != header.sealed():
        raise ValueError("does not match its own checksum")
    _check(header)
    if text != header.to_json().encode():
        raise ValueError("is not laid out as it was written")
    return header


def _check(header: CacheHeader) -> None:
    """Sanity of the values, for a header whose types and checksum are right."""
    names = [split.name for split in header.splits]
    if len(set(names)) != len(names) or not set(names) <= set(SPLITS) or "train" not in names:
        raise ValueError("does not name splits of a corpus")
    if header.tokenizer.kind not in KINDS or header.dtype != token_dtype(header.tokenizer.vocab_size):
        raise ValueError("does not describe a known tokenizer and its number type")
    if not BYTES_VOCABULARY <= header.tokenizer.vocab_size <= header.tokenizer.requested_vocab_size < 2**32:
        raise ValueError("has an impossible vocabulary size")
    for split in header.splits:
        if not 1 <= split.documents <= split.tokens < 2**60:
            raise ValueError(f"has impossible counts for the split {split.name}")
        if not all(math.isfinite(nats) and nats >= 0 for nats in (split.unigram_nats, split.nats or 0.0)):
            raise ValueError(f"has an impossible entropy for the split {split.name}")
    if not re.fullmatch("[0-9a-f]{64}", header.key):
        raise ValueError("has a malformed key")


def hash_of(value: Any) -> str:
    """Hex SHA-256 of a value that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def parse_as(kind: type[Parsed], value: Any, where: str) -> Parsed:
    """Builds a tree of dataclasses from parsed JSON, every field present and of exactly its declared type."""
    built: Any
    if dataclasses.is_dataclass(kind):
        members = typing.get_type_hints(kind)
        if not isinstance(value, dict) or value.keys() != members.keys():
            raise ValueError(f"has not the fields of version {FORMAT_VERSION} in {where}")
        built = kind(**{name: parse_as(member, value[name], f"{where}.{name}") for name, member in members.items()})
    elif typing.get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise ValueError(f"has no list in {where}")
        member = typing.get_args(kind)[0]
        built = tuple(parse_as(member, item, f"{where}[{i}]") for i, item in enumerate(value))
    elif isinstance(kind, types.UnionType):
        inner = next(arm for arm in typing.get_args(kind) if arm is not types.NoneType)
        built = None if value is None else parse_as(inner, value, where)
    else:
        if type(value) is not kind:
            raise ValueError(f"has no {kind.__name__} in {where}")
        built = value
    return typing.cast(Parsed, built)
