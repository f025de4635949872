"""Text to token ids and back.

Three kinds, one interface. In each, id i stands for a fixed byte string and the last id, `vocab_size - 1`, is
end-of-text, which follows every document in the token cache. End-of-text lies outside what text can be encoded to:
a document that contains the characters "<|endoftext|>" gets ordinary tokens for them.

  bytes  the 256 byte values; needs no library at all
  bpe    byte-level byte pair encoding, trained on the corpus at hand with `tokenizers`
  gpt2   GPT-2's published vocabulary of 50,257, encoded with `tiktoken`; only where its file is on the machine

All are lossless for any Unicode text. Decoding needs no library either, so a sample can be printed anywhere.
"""

import hashlib
import json
import os
import re
from abc import ABC, abstractmethod
from base64 import b64decode, b64encode
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from importlib.util import find_spec
from operator import index
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from altgrad_jax.data.gpt2_files import base_tokens, byte_characters, read_vocabulary
from altgrad_jax.errors import UsageError, UserError

if TYPE_CHECKING:
    import tiktoken
    import tokenizers

KINDS = ("bytes", "bpe", "gpt2")
END_OF_TEXT = "<|endoftext|>"
BYTES_VOCABULARY = 257
GPT2_VOCABULARY = 50257

# How GPT-2 cuts text before merging (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"):
# English clitics, then runs of letters, of digits or of other marks, each with one leading space, then white space,
# of which the last character stays with the word it precedes. `tokenizers` has the same rule as its ByteLevel.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

LONG_TEXT = 1 << 20  # characters that are encoded at once
_CUT = re.compile(r"(?<=[!-~])(?=[ \n])")

Ids = npt.NDArray[np.uint32]


class Tokenizer(Protocol):
    """What the token cache and sampling need of a tokenizer."""

    @property
    def kind(self) -> str:
        """One of `KINDS`."""
        ...

    @property
    def vocab_size(self) -> int:
        """Number of ids, end-of-text included."""
        ...

    @property
    def end_of_text(self) -> int:
        """The id written after each document: `vocab_size - 1`."""
        ...

    def encode(self, text: str) -> Ids:
        """Ids of a text, without end-of-text. Raises UserError if the text holds a lone surrogate."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """`encode` of each text, in parallel where the library can."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids: bytes that are no UTF-8, and ids outside the vocabulary, become U+FFFD."""
        ...

    def fingerprint(self) -> str:
        """Hex SHA-256 of all that defines the encoding."""
        ...

    def to_json(self) -> dict[str, Any]:
        """What `load_tokenizer` needs to make the same tokenizer again."""
        ...


def checked_utf8(text: str) -> bytes:
    """The text as UTF-8.

    Raises:
      UserError: it holds a lone surrogate (JSON can smuggle one in), which no encoding could give back.
    """
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"the text holds a lone surrogate (U+{ord(text[error.start]):04X} at character {error.start}), which is "
            "not Unicode text; mend or remove it in the source"
        ) from error


def pieces(text: str) -> Iterator[str]:
    """A text in pieces of about `LONG_TEXT` characters, cut where GPT-2's rule cuts in any case.

    That is before a space or a newline that follows a printable character of ASCII, so the pieces have the tokens of
    the whole. `tokenizers` takes some 130 bytes of memory for a character.
    """
    start = 0
    while len(text) - start > LONG_TEXT and (cut := _CUT.search(text, start + LONG_TEXT)):
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]


class _TableTokenizer(ABC):
    """Decoding and identity, common to all kinds: id i stands for `table[i]`, the next id is end-of-text."""

    kind: str

    def __init__(self, table: Sequence[bytes]):
        self.table = tuple(table)
        self.vocab_size = len(self.table) + 1
        self.end_of_text = len(self.table)

    def encode(self, text: str) -> Ids:
        return self.encode_batch([text])[0]

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[Ids]: ...

    @abstractmethod
    def to_json(self) -> dict[str, Any]: ...

    def decode(self, ids: Iterable[int]) -> str:
        pieces = (*self.table, END_OF_TEXT.encode())
        unknown = "\N{REPLACEMENT CHARACTER}".encode()
        return b"".join(pieces[i] if 0 <= i < len(pieces) else unknown for i in ids).decode(errors="replace")

    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()


class BytesTokenizer(_TableTokenizer):
    """One token a byte of UTF-8: ids 0..255, and 256 for end-of-text."""

    kind = "bytes"

    def __init__(self) -> None:
        super().__init__([bytes([byte]) for byte in range(256)])

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """See `Tokenizer`."""
        return [np.frombuffer(checked_utf8(text), np.uint8).astype(np.uint32) for text in texts]

    def to_json(self) -> dict[str, Any]:
        """See `Tokenizer`."""
        return {"kind": self.kind}


class BpeTokenizer(_TableTokenizer):
    """Byte-level byte pair encoding (Sennrich et al. 2016, on bytes as in GPT-2), defined by its merges alone.

    Ids 0..255 are the bytes in `base_tokens` order. Merge k joins two ids that exist by then; the joined bytes get the
    next free id, or keep theirs if an earlier merge has already made them.
    """

    kind = "bpe"

    def __init__(self, merges: Iterable[tuple[int, int]]):
        self.merges = tuple(merges)
        id_of = {token: i for i, token in enumerate(base_tokens())}
        tokens = list(id_of)
        for left, right in self.merges:
            if not (0 <= left < len(tokens) and 0 <= right < len(tokens)):
                raise ValueError(f"the merge {left} {right} joins an id that does not exist yet")
            joined = tokens[left] + tokens[right]
            if joined not in id_of:
                id_of[joined] = len(tokens)
                tokens.append(joined)
        super().__init__(tokens)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "BpeTokenizer":
        """Learns merges from the texts: always the most frequent pair, the lower ids where two are as frequent.

        The result depends on the texts alone. A small corpus runs out of pairs that occur twice; the vocabulary is
        then smaller than asked for.

        Args:
          texts: read once, in order; may be a generator.
          vocab_size: the most ids to use, end-of-text included; at least 257.
        """
        from tokenizers import Tokenizer as Trained
        from tokenizers import models, pre_tokenizers, trainers

        learner = Trained(models.BPE())
        learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - 1,
            min_frequency=2,
            initial_alphabet=sorted(byte_characters()),
            special_tokens=[],
            show_progress=False,
        )
        learner.train_from_iterator((piece for text in _checked(texts) for piece in pieces(text)), trainer)
        id_of = learner.get_vocab()
        learned = json.loads(learner.to_str())["model"]["merges"]
        tokenizer = cls((id_of[left], id_of[right]) for left, right in learned)
        if tokenizer._written() != sorted(id_of, key=id_of.__getitem__):
            raise RuntimeError("`tokenizers` numbers its vocabulary otherwise than BpeTokenizer expects")
        return tokenizer

    def _written(self) -> list[str]:
        """The vocabulary as `tokenizers` writes it: one printable character a byte."""
        characters = byte_characters()
        return ["".join(characters[byte] for byte in token) for token in self.table]

    @cached_property
    def _encoder(self) -> "tokenizers.Tokenizer":
        from tokenizers import Tokenizer as Encoder
        from tokenizers import models, pre_tokenizers

        written = self._written()
        encoder = Encoder(
            models.BPE(
                vocab={token: i for i, token in enumerate(written)},
                merges=[(written[left], written[right]) for left, right in self.merges],
            )
        )
        encoder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        return encoder

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """See `Tokenizer`."""
        checked = list(_checked(texts))
        short = [text for text in checked if len(text) <= LONG_TEXT]
        encoded = iter(self._encoder.encode_batch_fast(short))
        return [self._long_ids(t) if len(t) > LONG_TEXT else np.array(next(encoded).ids, np.uint32) for t in checked]

    def _long_ids(self, text: str) -> Ids:
        """Ids of a text whose encoding would take too much memory at once."""
        return np.concatenate([np.array(self._encoder.encode(piece).ids, np.uint32) for piece in pieces(text)])

    def to_json(self) -> dict[str, Any]:
        """See `Tokenizer`."""
        return {"kind": self.kind, "merges": [list(merge) for merge in self.merges]}


class Gpt2Tokenizer(_TableTokenizer):
    """GPT-2's encoding through `tiktoken`.

    Args:
      tokens: the byte strings in order of rank, as `gpt2_files.read_vocabulary` gives them.
    """

    kind = "gpt2"

    def __init__(self, tokens: Sequence[bytes]):
        if len(set(tokens)) != len(tokens) or not set(base_tokens()) <= set(tokens):
            raise ValueError("the tokens must be distinct, and every single byte among them")
        super().__init__(tokens)

    @cached_property
    def _encoder(self) -> "tiktoken.Encoding":
        import tiktoken

        ranks = {token: rank for rank, token in enumerate(self.table)}
        return tiktoken.Encoding("gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={})

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """See `Tokenizer`."""
        checked = list(_checked(texts))
        try:
            return [np.array(ids, np.uint32) for ids in self._encoder.encode_ordinary_batch(checked)]
        except BaseException as error:  # a Rust panic comes as a BaseException whose class cannot be imported
            if type(error).__name__ != "PanicException":
                raise
            raise UserError(
                "tiktoken gave up on a text (a run of some hundred thousand spaces does that); shorten such runs in "
                "the source, or use --config.data.tokenizer=bpe"
            ) from error

    def to_json(self) -> dict[str, Any]:
        """See `Tokenizer`."""
        return {"kind": self.kind, "tokens": [b64encode(token).decode() for token in self.table]}


def _checked(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        checked_utf8(text)
        yield text


def gpt2_available(gpt2_path: str | os.PathLike[str] | None = None) -> bool:
    """Whether `tiktoken` is installed and GPT-2's vocabulary is on this machine (see `gpt2_files.read_vocabulary`)."""
    if find_spec("tiktoken") is None:
        return False
    try:
        read_vocabulary(gpt2_path)
    except UserError:
        return False
    return True


def resolve_tokenizer(kind: str, vocab_size: int, gpt2_path: str | os.PathLike[str] | None = None) -> tuple[str, int]:
    """The kind and vocabulary size that a request comes to, before any work is done.

    "auto" is gpt2 if it is available and fits into `vocab_size`, else bpe. The size is 257 for bytes, 50257 for gpt2
    and `vocab_size` for bpe.

    Args:
      kind: "auto" or one of `KINDS`.
      vocab_size: the most ids the model has room for.
      gpt2_path: file or folder with GPT-2's vocabulary, if not in tiktoken's cache.

    Raises:
      UsageError: unknown kind, or `vocab_size` is too small for it.
    """
    if kind not in ("auto", *KINDS):
        raise UsageError(f"unknown tokenizer {kind!r}: data.tokenizer is one of auto, {', '.join(KINDS)}")
    if kind == "auto":
        kind = "gpt2" if vocab_size >= GPT2_VOCABULARY and gpt2_available(gpt2_path) else "bpe"
    least = GPT2_VOCABULARY if kind == "gpt2" else BYTES_VOCABULARY
    if vocab_size < least:
        raise UsageError(
            f"a vocabulary of {vocab_size} is too small for the tokenizer {kind!r}, which needs {least}: set "
            f"model.vocab_size to {least} or more" + (", or data.tokenizer to bpe or bytes" if kind == "gpt2" else "")
        )
    return kind, vocab_size if kind == "bpe" else least


def make_tokenizer(
    kind: str,
    vocab_size: int,
    texts: Iterable[str],
    gpt2_path: str | os.PathLike[str] | None = None,
) -> Tokenizer:
    """A tokenizer of the kind asked for; arguments as in `resolve_tokenizer`.

    Args:
      texts: what bpe is trained on (the train split); not read for the other kinds.

    Raises:
      UsageError: as `resolve_tokenizer`.
      UserError: gpt2 is asked for and not to be had here, or a text is not Unicode.
    """
    kind, vocab_size = resolve_tokenizer(kind, vocab_size, gpt2_path)
    if kind == "bytes":
        return BytesTokenizer()
    if kind == "bpe":
        return BpeTokenizer.train(texts, vocab_size)
    if find_spec("tiktoken") is None:
        raise UserError(
            "the tokenizer 'gpt2' needs the package tiktoken: install altgrad_jax[gpt2], or use "
            "--config.data.tokenizer=bpe"
        )
    return Gpt2Tokenizer(read_vocabulary(gpt2_path))


def load_tokenizer(description: object) -> Tokenizer:
    """The tokenizer that `to_json` described.

    Raises:
      UserError: the description is malformed.
    """
    try:
        match description:
            case {"kind": "bytes", **rest} if not rest:
                return BytesTokenizer()
            case {"kind": "bpe", "merges": list(merges), **rest} if not rest:
                return BpeTokenizer((index(left), index(right)) for left, right in merges)
            case {"kind": "gpt2", "tokens": list(tokens), **rest} if not rest:
                return Gpt2Tokenizer([b64decode(token, validate=True) for token in tokens])
    except (TypeError, ValueError) as error:
        raise UserError(f"the description of the tokenizer is malformed: {error}") from error
    raise UserError("the description of the tokenizer is malformed: no known kind with the fields of that kind")
