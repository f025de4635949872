"""Writes token caches: whole or not at all, once even if several processes ask at once.

A cache is written into a hidden sibling folder `.<name>.building` and renamed into place when every byte is on disk.
Whoever builds holds the lock `.<name>.lock`; a second process waits for it and then reuses what the first has built.
Only the holder of the lock has any business with the folder `.<name>.building`, so one that is found by whoever gets
the lock was left by a process that died, and is removed.
"""

import dataclasses
import io
import json
import os
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from altgrad_jax import __version__
from altgrad_jax.data.cache import TokenCache, escape_id, open_cache, safe_name
from altgrad_jax.data.cache_header import (
    FORMAT_VERSION,
    CacheHeader,
    SourceHeader,
    SplitHeader,
    TokenizerHeader,
    cache_key,
    token_dtype,
)
from altgrad_jax.data.documents import Document, Source
from altgrad_jax.data.hashed_files import HashedFile, move_into_place, remove_folder, unwritable, write_file
from altgrad_jax.data.labels import write_labels
from altgrad_jax.data.locks import exclusive
from altgrad_jax.data.overlap import FILE as OVERLAP_FILE
from altgrad_jax.data.overlap import Marks
from altgrad_jax.data.progress import progress_bar
from altgrad_jax.data.tokenizer import Tokenizer, checked_utf8, make_tokenizer, resolve_tokenizer
from altgrad_jax.errors import UserError

BATCH_CHARACTERS = 2**20  # text handed to `encode_batch` at once: enough to keep its threads busy, little to hold
BATCH_DOCUMENTS = 1024


@runtime_checkable
class NamedLabels(Protocol):
    """A source that knows what its labels are called, such as EUR-Lex."""

    def concepts(self) -> dict[str, str]:
        """Label -> its name."""
        ...


@runtime_checkable
class ListedLabels(Protocol):
    """A source whose labels are settled, whether or not a document carries them."""

    def labels(self) -> tuple[str, ...]:
        """All of them; () where they are those that the documents carry."""
        ...


@runtime_checkable
class KnownIdentities(Protocol):
    """A source in which a document's id is that of a thing in the world, such as an act of law."""

    def identity(self, document_id: str) -> str:
        """The thing's name: equal for two documents of the same thing."""
        ...


@runtime_checkable
class KnownEntropy(Protocol):
    """A source that knows the entropy of its text, such as the embedded corpus."""

    def nats(self, split: str) -> float:
        """Entropy of all documents of the split together, in nats."""
        ...


def build_cache(
    source: Source,
    tokenizer_kind: str,
    vocab_size: int,
    root: str | os.PathLike[str],
    progress: bool = True,
    gpt2_path: str | os.PathLike[str] | None = None,
) -> TokenCache:
    """The token cache of a source: the one that exists, or a new one.

    Documents are read as a stream, and their tokens go to disk batch by batch, so memory does not grow with the corpus
    (training bpe keeps the counts of its distinct words).

    Args:
      source: the corpus. Its train split is read twice if bpe is trained.
      tokenizer_kind: "auto", "bytes", "bpe" or "gpt2"; see `tokenizer.resolve_tokenizer`.
      vocab_size: the most token ids the model has room for.
      root: the folder that holds caches, `<data_dir>/cache`; made if missing.
      progress: whether to show progress on stderr.
      gpt2_path: file or folder with GPT-2's vocabulary, if not in tiktoken's cache.

    Raises:
      UsageError: unknown tokenizer, or `vocab_size` too small for it.
      UserError: the cache exists and is damaged; the folder cannot be written; a split is empty; a document is not
        Unicode text; the source changes meanwhile; GPT-2's vocabulary is not to be had.
    """
    kind, size = resolve_tokenizer(tokenizer_kind, vocab_size, gpt2_path)
    key = cache_key(source.fingerprint(), kind, size)
    folder = Path(root) / f"{safe_name(source.name)}-{kind}{size}-{key[:12]}"
    if folder.exists():
        return _reopen(folder, key)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(folder.parent, error) from error
    _remove_abandoned(folder.parent)

    def say_waiting() -> None:
        _say(f"another process is building {folder}; waiting for it", progress)

    with exclusive(_lock_file(folder), on_wait=say_waiting):
        if folder.exists():
            return _reopen(folder, key)
        unfinished = _unfinished_folder(folder)
        remove_folder(unfinished)
        try:
            _write_cache(unfinished, source, kind, size, key, progress, gpt2_path)
            cache = open_cache(unfinished)  # hashed again from the file system before anyone can see it
            move_into_place(unfinished, folder)
        finally:
            remove_folder(unfinished)
    return dataclasses.replace(cache, path=folder)


def _reopen(folder: Path, key: str) -> TokenCache:
    cache = open_cache(folder)
    if cache.header.key != key:
        raise UserError(
            f"the token cache {folder} was built from something else than its name says; delete that folder, and the "
            "next run builds it again"
        )
    return cache


def _write_cache(
    folder: Path,
    source: Source,
    kind: str,
    vocab_size: int,
    key: str,
    progress: bool,
    gpt2_path: str | os.PathLike[str] | None,
) -> None:
    try:
        folder.mkdir()
    except OSError as error:
        raise unwritable(folder, error) from error
    documents_in_train = None
    if kind == "bpe":
        with progress_bar(f"training a vocabulary of {vocab_size}", unit="documents", show=progress) as advance:
            texts = _CountedTexts(source, advance)
            tokenizer = make_tokenizer(kind, vocab_size, texts, gpt2_path)
        documents_in_train = texts.read
    else:
        tokenizer = make_tokenizer(kind, vocab_size, (), gpt2_path)
    if tokenizer.vocab_size < vocab_size:
        _say(f"the corpus gives a vocabulary of {tokenizer.vocab_size}, less than the {vocab_size} asked for", progress)
    splits, labels, marks = [], dict[str, list[tuple[str, ...]]](), Marks()
    for split in source.splits():
        labels[split] = []
        total = documents_in_train if split == "train" else None
        with progress_bar(f"tokenizing {split}", total=total, unit="documents", show=progress) as advance:
            nats = float(source.nats(split)) if isinstance(source, KnownEntropy) else None
            splits.append(_write_split(folder, source, split, tokenizer, nats, advance, labels[split], marks))
    fingerprint = source.fingerprint()
    if cache_key(fingerprint, kind, vocab_size) != key:
        raise UserError(f"the corpus {source.name!r} changed while it was being read; run the command again")
    header = CacheHeader(
        format_version=FORMAT_VERSION,
        key=key,
        created_by=f"altgrad_jax {__version__}",
        source=SourceHeader(source.name, source.description, fingerprint),
        tokenizer=TokenizerHeader(
            kind=tokenizer.kind,
            vocab_size=tokenizer.vocab_size,
            requested_vocab_size=vocab_size,
            fingerprint=tokenizer.fingerprint(),
            file_sha256=write_file(folder / "tokenizer.json", json.dumps(tokenizer.to_json()).encode()),
        ),
        dtype=token_dtype(tokenizer.vocab_size),
        splits=tuple(splits),
    ).sealed()
    names = source.concepts() if isinstance(source, NamedLabels) else {}
    listed = source.labels() if isinstance(source, ListedLabels) else ()
    write_labels(folder, header.sha256, labels, names, listed)
    overlap = marks.compare(header.sha256, [split.name for split in splits])
    if line := overlap.line():
        _say(f"note: {line}", progress)
    write_file(folder / OVERLAP_FILE, overlap.to_json().encode())
    write_file(folder / "header.json", header.to_json().encode())


def _write_split(
    folder: Path,
    source: Source,
    split: str,
    tokenizer: Tokenizer,
    nats: float | None,
    advance: Callable[[int], None],
    labels: list[tuple[str, ...]],
    marks: Marks,
) -> SplitHeader:
    """Writes a split's tokens and ids; `labels` and `marks` are given those of its documents."""
    dtype = np.dtype(token_dtype(tokenizer.vocab_size)).newbyteorder("<")
    end = np.array([tokenizer.end_of_text], np.uint32)
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    starts, tokens, utf8_bytes = array("q"), 0, 0
    identity = source.identity if isinstance(source, KnownIdentities) else None
    with HashedFile(folder / f"{split}.bin") as token_file, HashedFile(folder / f"{split}.ids.txt") as id_file:
        for batch in _batches(source.documents(split)):
            for document in batch:
                text = _utf8(document)
                utf8_bytes += len(text)
                marks.add(split, text, identity(document.id) if identity else None)
            pieces = [piece for ids in tokenizer.encode_batch([d.text for d in batch]) for piece in (ids, end)]
            for ids in pieces[::2]:
                starts.append(tokens)
                tokens += len(ids) + 1
            flat = np.concatenate(pieces)
            counts += np.bincount(flat, minlength=tokenizer.vocab_size)
            token_file.write(flat.astype(dtype).tobytes())
            labels += [document.labels for document in batch]
            id_file.write("".join(f"{escape_id(document.id)}\n" for document in batch).encode())
            advance(len(batch))
    if not starts:
        raise UserError(f"the split {split!r} of the corpus {source.name!r} has no documents")
    table = io.BytesIO()
    np.save(table, np.array(starts, "<i8"), allow_pickle=False)
    return SplitHeader(
        name=split,
        documents=len(starts),
        tokens=tokens,
        utf8_bytes=utf8_bytes,
        unigram_nats=_entropy(counts),
        nats=nats,
        tokens_sha256=token_file.sha256,
        starts_sha256=write_file(folder / f"{split}.starts.npy", table.getvalue()),
        ids_sha256=id_file.sha256,
    )


def _entropy(counts: np.ndarray) -> float:
    """-sum p ln p of the frequencies."""
    p = counts[counts > 0] / counts.sum()
    return max(0.0, float(-(p * np.log(p)).sum()))


class _CountedTexts:
    """The texts of the train split, checked; counts them, which gives the bar of the next pass its length."""

    def __init__(self, source: Source, advance: Callable[[int], None]):
        self._source = source
        self._advance = advance
        self.read = 0

    def __iter__(self) -> Iterator[str]:
        for document in self._source.documents("train"):
            _utf8(document)
            self.read += 1
            self._advance(1)
            yield document.text


def _utf8(document: Document) -> bytes:
    try:
        return checked_utf8(document.text)
    except UserError as error:
        raise UserError(f"document {document.id!r}: {error}") from error


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS or len(batch) == BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _lock_file(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lock")


def _unfinished_folder(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.building")


class _BeingBuilt(Exception):
    """Another process holds the lock."""


def _remove_abandoned(root: Path) -> None:
    """Removes what dead processes left of unfinished caches. One that is being built is known by its lock, and kept."""

    def skip() -> None:
        raise _BeingBuilt

    for unfinished in root.glob(".*.building"):
        try:
            with exclusive(_lock_file(root / unfinished.name[1 : -len(".building")]), on_wait=skip):
                remove_folder(unfinished)
        except (_BeingBuilt, UserError):
            continue  # alive, or another user's: not ours to remove, and not in our way


def _say(line: str, show: bool) -> None:
    if show:
        print(line, file=sys.stderr)
