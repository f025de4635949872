"""Plain files as a text source: `.txt`, `.jsonl` and `.jsonl.gz`, one file or a folder of them.

**Documents.** A line of a JSON lines file is one: its field `text`, and `id` and `labels` where it has them. A text
file of at most 64 KiB that is not alone in its split is one. Any other text file is cut into documents at blank lines:
each ends at the first blank line after 4,096 characters (or after 1 Mi characters, blank line or not). Files are UTF-8;
CRLF line ends become LF, and newlines around a document are dropped.

**Splits.** A folder that holds `train` and `validation` (or `dev`) or `test`, as files or as folders, is split so;
other files in it are left alone. Otherwise each document's split follows from the first 64 bits of its id's SHA-256,
read as a fraction of 2^64: below 0.90 train, below 0.95 validation, else test. In a corpus of a few documents that
could leave nothing to train on or to validate with, so the document with the lowest hash is always train, and if no
other is validation, the one with the highest hash is. An id is the JSON field, or the file's path below the folder,
with "#" and a number where the file holds several.

Files are read as they are iterated over: never more than one document is in memory.
"""

import codecs
import hashlib
import json
import os
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from altgrad_jax.data.documents import SPLITS, Document
from altgrad_jax.data.download import sha256_of
from altgrad_jax.data.jsonlines import MAX_BLANK_BYTES, SUFFIXES, JsonRecord, open_binary, read_json_lines
from altgrad_jax.errors import UsageError, UserError

WHOLE_FILE_BYTES = 64 << 10
DOCUMENT_CHARACTERS = 4096
LONGEST_DOCUMENT = 1 << 20
_VERSION = 1  # of the rules above: raise it with every change to them
_ALL_SUFFIXES = (".txt", *SUFFIXES)
_SPLIT_NAMES = {"train": ("train",), "validation": ("validation", "dev"), "test": ("test",)}


@dataclass(frozen=True)
class _File:
    """A file to read: its path, its name below the root, and whether it is one document as it stands."""

    path: Path
    name: str
    whole: bool


class TextFiles:
    """A corpus of plain files (a `Source`).

    Attributes:
      name: "text-" and the path's last part.
      description: the path, the number of files, and how they are split.
    """

    def __init__(self, path: str | os.PathLike[str]):
        """Lists the files; their content is read later.

        Raises:
          UserError: nothing to read at `path`, an empty file, or splits without train or with two meanings.
        """
        root = Path(path)
        if root.is_dir():
            named = _named_splits(root)
            groups = {split: _files(entry, root) for split, entry in named.items()} or {"": _files(root, root)}
        elif root.is_file():
            groups = {"": _files(root, root.parent)}
        else:
            raise UsageError(f"{root} does not exist: give a text file, a JSON lines file or a folder of them")
        if not any(groups.values()):
            raise UserError(f"{root} holds nothing to read: looked for {', '.join(_ALL_SUFFIXES)} files")
        self._groups = groups
        self._by_name = "" not in groups
        stem = re.sub(r"(\.txt|\.jsonl|\.jsonl\.gz)$", "", root.resolve().name)
        self.name = "text-" + (re.sub(r"[^a-z0-9]+", "-", stem.lower()).strip("-") or "files")
        count = sum(map(len, groups.values()))
        how = "file names" if self._by_name else "hash of the document id, 90/5/5"
        self.description = f"{count:,} file{'s' if count != 1 else ''} in {root}, split by {how}"

    def fingerprint(self) -> str:
        """Hex SHA-256 over the files' names, splits and bytes; they are hashed on the first call."""
        return self._fingerprint

    def splits(self) -> tuple[str, ...]:
        """The splits that have documents. Without named splits, the first call reads all files once.

        Raises:
          UserError: a file is broken.
        """
        present = self._groups if self._by_name else self._hash_split.present
        return tuple(split for split in SPLITS if split in present)

    def documents(self, split: str) -> Iterator[Document]:
        """The documents of a split, by file name and then in the file's order.

        Raises:
          UserError: there is no such split, or a file is empty, is not UTF-8 (names the byte), or has a broken line.
        """
        if split not in self.splits():
            raise UserError(f"{self.name} has no {split} split: it has {', '.join(self.splits())}")
        if self._by_name:
            return _read_all(self._groups[split])
        choose = self._hash_split.split_of
        return (document for document in _read_all(self._groups[""]) if choose(_hash(document.id)) == split)

    @cached_property
    def _fingerprint(self) -> str:
        files = [(split, file.name, sha256_of(file.path)) for split, group in self._groups.items() for file in group]
        return hashlib.sha256(json.dumps([_VERSION, files]).encode()).hexdigest()

    @cached_property
    def _hash_split(self) -> "_HashSplit":
        files = self._groups[""]
        hashes = array("Q", (_hash(document.id) for document in _read_all(files)))
        values, counts = np.unique(np.array(hashes), return_counts=True)
        if repeated := frozenset(values[counts > 1].tolist()):
            raise _told_twice(files, repeated)
        return _HashSplit(hashes)


class _HashSplit:
    """The hash rule above. Eight bytes a document are kept while it is set up."""

    def __init__(self, hashes: "array[int]"):
        self._lowest, highest = min(hashes), max(hashes)
        self._highest: int | None = None
        self.present = {self.split_of(value) for value in hashes}
        if "validation" not in self.present:
            self._highest = highest
            self.present = {self.split_of(value) for value in hashes}

    def split_of(self, value: int) -> str:
        if value == self._lowest:
            return "train"
        if value == self._highest:
            return "validation"
        fraction = value / 2**64
        return "train" if fraction < 0.90 else "validation" if fraction < 0.95 else "test"


def _hash(name: str) -> int:
    """The first 64 bits of the id's SHA-256."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8])


def _told_twice(files: list[_File], hashes: frozenset[int]) -> UserError:
    """The error for an id that two documents have; `hashes` are those of such ids."""
    first: dict[str, str] = {}
    for name, where in _places(files):
        if name in first:
            return UserError(
                f"{where}: the id {name!r} is that of {first[name]} too; ids decide the splits, so give each document"
                " its own, or name the files train and validation"
            )
        if _hash(name) in hashes:
            first[name] = where
    return UserError("the files changed while they were being read; run the command again")


def _places(files: list[_File]) -> Iterator[tuple[str, str]]:
    """Every document's id, and where it is."""
    for file in files:
        if file.path.suffix == ".txt":
            yield from ((document.id, str(file.path)) for document in _read_text(file))
        else:
            yield from ((_id(record, file, n), record.where) for n, record in _records(file))


def _records(file: _File) -> Iterator[tuple[int, JsonRecord]]:
    return enumerate(read_json_lines(file.path), start=1)


def _id(record: JsonRecord, file: _File, number: int) -> str:
    return record.identifier("id", f"{file.name}#{number}")


def _named_splits(folder: Path) -> dict[str, Path]:
    """Split -> the file or folder named after it; empty if there is none."""
    named = {}
    for split, names in _SPLIT_NAMES.items():
        found = [path for name in names for suffix in _ALL_SUFFIXES if (path := folder / f"{name}{suffix}").is_file()]
        found += [folder / name for name in names if (folder / name).is_dir() and _files(folder / name, folder)]
        if len(found) > 1:
            raise UserError(f"{folder} has both {found[0].name} and {found[1].name}: remove the one that is not meant")
        if found:
            named[split] = found[0]
    if named and "train" not in named:
        raise UserError(f"{folder} has {next(iter(named.values())).name} but no train files")
    return named


def _files(entry: Path, root: Path) -> list[_File]:
    """The files to read at a path, sorted by name; hidden ones are left out."""
    paths = [entry] if entry.is_file() else [path for path in entry.rglob("*") if path.is_file()]
    readable = sorted(
        (path.relative_to(root).as_posix(), path)
        for path in paths
        if path.name.endswith(_ALL_SUFFIXES) and not any(part.startswith(".") for part in path.relative_to(root).parts)
    )
    for _, path in readable:
        if path.stat().st_size == 0:
            raise UserError(f"{path} is empty: remove it or fill it")
    several = len(readable) > 1
    return [_File(path, name, several and path.stat().st_size <= WHOLE_FILE_BYTES) for name, path in readable]


def _read_all(files: list[_File]) -> Iterator[Document]:
    for file in files:
        found = False
        for document in _read_text(file) if file.path.suffix == ".txt" else _read_json(file):
            found = True
            yield document
        if not found:
            raise UserError(f"{file.path} holds no text: remove it or fill it")


def _read_json(file: _File) -> Iterator[Document]:
    for number, record in _records(file):
        yield Document(_id(record, file, number), record.text("text"), record.identifiers("labels", ()))


def _read_text(file: _File) -> Iterator[Document]:
    shortest = LONGEST_DOCUMENT if file.whole else DOCUMENT_CHARACTERS
    texts = (text for text in _cut(_lines(file.path), shortest) if text.strip())
    for number, text in enumerate(texts, start=1):
        yield Document(file.name if file.whole else f"{file.name}#{number}", text.strip("\n"))


def _cut(lines: Iterator[str], shortest: int) -> Iterator[str]:
    """Joins lines into pieces that end at a blank line once they have `shortest` characters."""
    piece: list[str] = []
    size = 0
    for line in lines:
        piece.append(line)
        size += len(line)
        if size >= LONGEST_DOCUMENT or (size >= shortest and not line.strip()):
            yield "".join(piece)
            piece, size = [], 0
    yield "".join(piece)


def _lines(path: Path) -> Iterator[str]:
    """The file's lines, or pieces of lines longer than a document may be."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = blank = 0
    with open_binary(path) as file:
        while True:
            raw = file.readline(LONGEST_DOCUMENT)
            blank = 0 if raw.strip() else blank + len(raw)
            if blank > MAX_BLANK_BYTES:
                raise UserError(f"{path} holds more than {MAX_BLANK_BYTES:,} bytes of blank lines in a row: not text")
            # A piece of a line may end inside a character, whose first bytes the decoder then keeps for the next piece.
            pending = len(decoder.getstate()[0])
            try:
                line = decoder.decode(raw, final=not raw)
            except UnicodeDecodeError as error:
                raise UserError(f"{path} is not UTF-8 (at byte {offset - pending + error.start})") from error
            if not raw:
                break
            line = line.removeprefix("\ufeff") if offset == 0 else line
            offset += len(raw)
            yield line.removesuffix("\r\n") + "\n" if line.endswith("\r\n") else line
