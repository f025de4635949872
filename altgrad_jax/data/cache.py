"""The token cache: a corpus as flat files of token ids, mapped into memory.

A cache is a folder `<root>/<source>-<kind><vocabulary>-<key>` that is complete or absent, and never changed:

  header.json         counts, entropies and hashes of all that follows (`cache_header`)
  tokenizer.json      the tokenizer, so that samples can be decoded anywhere
  <split>.bin         the token ids of all documents, each document followed by end-of-text
  <split>.starts.npy  where each document starts in it: int64, in tokens
  <split>.ids.txt     the documents' ids, one a line
  labels.json         the documents' labels, see `labels`
  overlap.json        how many documents two splits share, see `overlap`

Reading one needs NumPy alone. `cache_build` writes them.
"""

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from altgrad_jax import files
from altgrad_jax.data.cache_header import CacheHeader, SplitHeader, parse_header
from altgrad_jax.data.tokenizer import BYTES_VOCABULARY, GPT2_VOCABULARY, Tokenizer, load_tokenizer
from altgrad_jax.errors import UserError

FOLDER_NAME = re.compile(r"(?P<source>.+)-(?P<kind>bytes|bpe|gpt2)(?P<vocab_size>[0-9]{1,9})-[0-9a-f]{12}")
_CHUNK_TOKENS = 1 << 22
LINE_BREAKERS = re.compile(r"[\\\x00-\x1f\x7f\x85\u2028\u2029\ud800-\udfff]")


@dataclass(frozen=True)
class TokenCache:
    """An opened cache. Cheap to pickle: the files are mapped anew by each call that reads them.

    Attributes:
      path: its folder.
      header: its verified header.
    """

    path: Path
    header: CacheHeader

    @property
    def sha256(self) -> str:
        """The data hash: equal for two caches if and only if training on them sees the same tokens."""
        return self.header.sha256

    @property
    def vocab_size(self) -> int:
        """Number of token ids, end-of-text included."""
        return self.header.tokenizer.vocab_size

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits."""
        return tuple(split.name for split in self.header.splits)

    def split_header(self, split: str) -> SplitHeader:
        """Counts and hashes of a split. Raises UserError if the corpus has no such split."""
        for header in self.header.splits:
            if header.name == split:
                return header
        raise UserError(
            f"the corpus {self.header.source.name!r} has no split {split!r}; it has {', '.join(self.splits)}"
        )

    def tokens(self, split: str) -> np.memmap:
        """All tokens of a split, uint16 or uint32, mapped read-only."""
        header = self.split_header(split)
        file = self.path / f"{split}.bin"
        try:
            return np.memmap(file, np.dtype(self.header.dtype).newbyteorder("<"), "r", shape=(header.tokens,))
        except OSError as error:
            raise _refused(file, error) from error
        except ValueError as error:
            raise _corrupt(file, f"cannot be mapped ({error})") from error

    def document_starts(self, split: str) -> npt.NDArray[np.int64]:
        """Index in `tokens` of each document's first token, ascending from 0."""
        header = self.split_header(split)
        file = self.path / f"{split}.starts.npy"
        try:
            # Not np.load: that would also take a zip archive.
            starts = np.array(np.lib.format.open_memmap(file, mode="r"))
        except OSError as error:
            raise _refused(file, error) from error
        except Exception as error:  # NumPy's header parser lets through whatever Python's own parser raises
            raise _corrupt(file, f"cannot be read ({error})") from error
        ascending = (
            starts.dtype == np.int64 and starts.shape == (header.documents,) and bool((np.diff(starts) > 0).all())
        )
        if not ascending or starts[0] != 0 or starts[-1] >= header.tokens:
            raise _corrupt(file, "does not hold the start of each document")
        return starts

    def document_ids(self, split: str) -> list[str]:
        """Ids of the documents, in the order of their tokens; read from the file at each call."""
        header = self.split_header(split)
        file = self.path / f"{split}.ids.txt"
        try:
            lines = _read(file).decode().split("\n")
        except UnicodeDecodeError as error:
            raise _corrupt(file, "is not UTF-8") from error
        if len(lines) != header.documents + 1 or lines[-1]:
            raise _corrupt(file, "does not hold one id for each document")
        return [unescape_id(line) for line in lines[:-1]]

    def documents_in(self, split: str, start: int, stop: int) -> list[str]:
        """Ids of the documents that have a token in `tokens(split)[start:stop]`, a document's end-of-text included."""
        if not 0 <= start <= stop <= self.split_header(split).tokens:
            raise IndexError(f"no token range {start}:{stop} in the split {split!r}")
        if start == stop:
            return []
        starts = self.document_starts(split)
        first = int(np.searchsorted(starts, start, side="right")) - 1
        last = int(np.searchsorted(starts, stop, side="left"))
        return self.document_ids(split)[first:last]

    def entropy_floor(self, split: str) -> float | None:
        """The lowest loss, in nats per token, that any model can expect on a split; None where it is not known."""
        header = self.split_header(split)
        return None if header.nats is None else header.nats / header.tokens

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the tokens. Raises UserError if its file is damaged."""
        file = self.path / "tokenizer.json"
        try:
            tokenizer = load_tokenizer(files.parse_json(_read(file)))
        except files.UnreadableError:
            raise
        except ValueError as error:
            raise _corrupt(file, f"cannot be used: {error}") from error
        except UserError as error:
            raise _corrupt(file, f"cannot be used: {error}") from error
        if tokenizer.fingerprint() != self.header.tokenizer.fingerprint:
            raise _corrupt(file, "is not the tokenizer that the header names")
        return tokenizer


def open_cache(path: str | os.PathLike[str], verify: bool = True) -> TokenCache:
    """Opens a cache and checks it.

    Args:
      path: the cache's folder.
      verify: hash every file and check the tables of documents; otherwise only the header and the files' sizes are
        checked.

    Raises:
      UserError: the folder is missing, or not a whole and undamaged cache; names the file and what is wrong with it.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise UserError(f"no token cache at {folder}: `python -m altgrad_jax.data prepare` builds one")
    try:
        header = parse_header(_read(folder / "header.json"))
    except ValueError as error:
        raise _corrupt(folder / "header.json", str(error)) from error
    cache = TokenCache(folder, header)
    itemsize = np.dtype(header.dtype).itemsize
    for split in header.splits:
        file = folder / f"{split.name}.bin"
        size, expected = _size(file), split.tokens * itemsize
        if size != expected:
            raise _corrupt(file, f"has {size} bytes instead of {expected}")
    expected_hashes = {"tokenizer.json": header.tokenizer.file_sha256}
    for split in header.splits:
        expected_hashes[f"{split.name}.bin"] = split.tokens_sha256
        expected_hashes[f"{split.name}.starts.npy"] = split.starts_sha256
        expected_hashes[f"{split.name}.ids.txt"] = split.ids_sha256
    for name, expected_hash in expected_hashes.items():
        _size(folder / name)
        if verify and _sha256(folder / name) != expected_hash:
            raise _corrupt(folder / name, "has not the SHA-256 that the header records: it was damaged or changed")
    if verify:
        for name in cache.splits:
            cache.document_starts(name)
            cache.document_ids(name)
            _check_tokens(cache, name)
    return cache


def _check_tokens(cache: TokenCache, split: str) -> None:
    """Raises UserError if an id is none of the tokenizer's, or a document does not end with end-of-text.

    A defect of the program that wrote them, or a forger, can make hashes fit such tokens, and a model would not notice.
    """
    tokens, end = cache.tokens(split), cache.vocab_size - 1
    for start in range(0, len(tokens), _CHUNK_TOKENS):
        if (highest := int(tokens[start : start + _CHUNK_TOKENS].max())) > end:
            raise _corrupt(
                cache.path / f"{split}.bin",
                f"holds the token id {highest}, and the tokenizer has ids up to {end}",
            )
    last = np.append(cache.document_starts(split)[1:], len(tokens)) - 1
    if not bool((tokens[last] == end).all()):
        raise _corrupt(cache.path / f"{split}.bin", "has documents that do not end with end-of-text")


def find_caches(
    root: str | os.PathLike[str],
    source_name: str | None = None,
    tokenizer_kind: str | None = None,
    vocab_size: int | None = None,
) -> list[Path]:
    """Folders of caches, for a machine that has a cache and not the source it was built from.

    They are told by their names, not opened: `open_cache` has the say on whether one is whole.

    Args:
      root: the folder that holds caches. A missing one holds none.
      source_name: the source's name, or the beginning of it.
      tokenizer_kind: "auto" for gpt2 or bpe, else the kind itself.
      vocab_size: the vocabulary size asked for: a bpe cache must have been built for exactly it; those of bytes and
        gpt2, whose size is fixed, must fit into it.

    Returns:
      Whole names of the source before beginnings of it, then the latest folder first.
    """
    wanted = None if source_name is None else safe_name(source_name)
    kinds = ("gpt2", "bpe") if tokenizer_kind == "auto" else (tokenizer_kind,)
    found = []
    for folder in Path(root).iterdir() if Path(root).is_dir() else ():
        name = FOLDER_NAME.fullmatch(folder.name)
        if name is None or not folder.is_dir():
            continue
        size, fixed = int(name["vocab_size"]), {"bytes": BYTES_VOCABULARY, "gpt2": GPT2_VOCABULARY}.get(name["kind"])
        if (
            (wanted is None or name["source"].startswith(wanted))
            and (tokenizer_kind is None or name["kind"] in kinds)
            and (vocab_size is None or (size == vocab_size if fixed is None else fixed <= vocab_size))
        ):
            found.append((name["source"] != wanted, -folder.stat().st_mtime_ns, folder))
    return [folder for *_, folder in sorted(found)]


def safe_name(source_name: str) -> str:
    """A source's name as it stands in a folder name: whatever is not a letter, digit, dot, dash or "_" becomes "_"."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", source_name)


def escape_id(document_id: str) -> str:
    r"""An id on one line: backslashes, control characters, line separators and lone surrogates become `\uXXXX`."""
    return LINE_BREAKERS.sub(lambda match: f"\\u{ord(match[0]):04x}", document_id)


def unescape_id(line: str) -> str:
    """The id that `escape_id` wrote."""
    return re.sub(r"\\u([0-9a-f]{4})", lambda match: chr(int(match[1], 16)), line)


def _corrupt(file: Path, what: str) -> UserError:
    return UserError(
        f"the token cache {file.parent} is damaged: {file.name} {what}; delete that folder, and the next run "
        "builds it again"
    )


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError as error:
        raise _refused(file, error) from error


def _refused(file: Path, error: OSError) -> UserError:
    """A file that is missing or none is damage; one that may not be read just now can be whole."""
    if isinstance(error, FileNotFoundError):
        return _corrupt(file, "is missing")
    if isinstance(error, IsADirectoryError):
        return _corrupt(file, "is a folder")
    return files.unreadable(file, error)


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise _refused(file, error) from error


def _sha256(file: Path) -> str:
    try:
        with open(file, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise _refused(file, error) from error
