"""The labels of a token cache's documents: which concepts each document carries.

They lie in the cache's folder beside the tokens, written with them (`cache_build`):

  labels.json         every label, counts and hashes; bound to the tokens by their data hash
  <split>.labels.npy  int32 [pairs, 2]: (document, label), both as indices, ascending

Reading needs NumPy alone. A cache without labels.json was built before there were any; a corpus whose documents carry
none has a labels.json that says so.
"""

import dataclasses
import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from altgrad_jax import files
from altgrad_jax.data.cache import TokenCache
from altgrad_jax.data.cache_header import hash_of, parse_as
from altgrad_jax.data.hashed_files import write_file
from altgrad_jax.errors import UserError

FORMAT_VERSION = 1
FILE = "labels.json"


@dataclass(frozen=True)
class LabelSplit:
    """One split: its documents, the (document, label) pairs, and the hash of the file that holds them."""

    name: str
    documents: int
    pairs: int
    pairs_sha256: str


@dataclass(frozen=True)
class LabelHeader:
    """All of `labels.json`.

    Attributes:
      format_version: of these files.
      tokens_sha256: data hash of the token cache they belong to.
      labels: identifiers of all labels of the corpus, ascending.
      names: what each is called; "" where the corpus does not say.
      splits: in the order of the token cache's.
      checksum: of all other fields.
    """

    format_version: int
    tokens_sha256: str
    labels: tuple[str, ...]
    names: tuple[str, ...]
    splits: tuple[LabelSplit, ...]
    checksum: str = ""

    def sealed(self) -> "LabelHeader":
        """The same with its checksum set."""
        bare = dataclasses.replace(self, checksum="")
        return dataclasses.replace(bare, checksum=hash_of(dataclasses.asdict(bare)))


@dataclass(frozen=True)
class Labels:
    """The labels of a cache, opened.

    Attributes:
      cache: the token cache.
      header: their verified header.
    """

    cache: TokenCache
    header: LabelHeader

    def pairs(self, split: str) -> npt.NDArray[np.int32]:
        """(document, label) pairs of a split, [pairs, 2], ascending."""
        wanted = next(one for one in self.header.splits if one.name == self.cache.split_header(split).name)
        file = self.cache.path / f"{split}.labels.npy"
        try:
            pairs = np.array(np.lib.format.open_memmap(file, mode="r"))
        except OSError as error:
            raise files.unreadable(file, error) from error
        except Exception as error:  # NumPy's header parser lets through whatever Python's own parser raises
            raise _corrupt(file, f"cannot be read ({error})") from error
        size = np.array([wanted.documents, len(self.header.labels)])
        if pairs.dtype != np.int32 or pairs.shape != (wanted.pairs, 2) or not _ascend_within(pairs, size):
            raise _corrupt(file, "does not hold the labels of each document")
        return pairs


def _ascend_within(pairs: npt.NDArray[np.int32], size: npt.NDArray) -> bool:
    places = pairs[:, 0].astype(np.int64) * size[1] + pairs[:, 1]
    return bool((pairs >= 0).all() and (pairs < size).all() and (np.diff(places) > 0).all())


def open_labels(cache: TokenCache) -> Labels:
    """The labels of a token cache, checked.

    Raises:
      UserError: the cache has none, or they are damaged.
    """
    path = cache.path / FILE
    if not path.is_file():
        raise UserError(
            f"the token cache {cache.path} has no labels: it was built by an older version of altgrad_jax; delete that"
            " folder, and the next run on a machine with the corpus builds it again, labels included"
        )
    try:
        header = parse_as(LabelHeader, files.parse_json(files.read_bytes(path) or b""), "the labels")
    except ValueError as error:
        raise _corrupt(path, f"cannot be understood ({error})") from error
    if header.format_version != FORMAT_VERSION:
        raise _corrupt(path, f"has format version {header.format_version}, and this one reads {FORMAT_VERSION}")
    splits = [(split.name, split.documents) for split in header.splits]
    if header != header.sealed() or splits != [(s.name, s.documents) for s in cache.header.splits]:
        raise _corrupt(path, "does not match its own checksum, or the cache's splits")
    if header.tokens_sha256 != cache.sha256:
        raise _corrupt(path, "belongs to other tokens")
    if not header.labels:
        raise UserError(
            f"the documents of {cache.header.source.name!r} carry no labels, so config.task=classify has nothing to"
            " learn from them; use EUR-Lex (python -m altgrad_jax.data prepare --name=eurlex), or JSON lines of your"
            " own with a field 'concepts' (prepare --source=DIR)"
        )
    labels = Labels(cache, header)
    for split in header.splits:
        if _sha256(cache.path / f"{split.name}.labels.npy") != split.pairs_sha256:
            raise _corrupt(cache.path / f"{split.name}.labels.npy", "has not the SHA-256 that labels.json records")
        labels.pairs(split.name)
    return labels


def _sha256(path: Path) -> str:
    data = files.read_bytes(path)
    if data is None:
        raise _corrupt(path, "is missing")
    return hashlib.sha256(data).hexdigest()


def write_labels(
    folder: Path,
    tokens_sha256: str,
    labels_of: Mapping[str, Sequence[Iterable[str]]],
    names: Mapping[str, str],
    listed: Iterable[str] = (),
) -> None:
    """Writes the files into a cache that is being built.

    Args:
      folder: the cache's.
      tokens_sha256: data hash of its tokens.
      labels_of: split -> the labels of its documents, in the order of their tokens.
      names: label -> what it is called, as far as that is known.
      listed: labels that the corpus has, even where no document carries them.
    """
    known = sorted({*listed, *(label for documents in labels_of.values() for labels in documents for label in labels)})
    index = {label: i for i, label in enumerate(known)}
    splits = []
    for split, documents in labels_of.items():
        pairs = [(i, j) for i, labels in enumerate(documents) for j in sorted({index[label] for label in labels})]
        file = io.BytesIO()
        np.save(file, np.array(pairs, "<i4").reshape(-1, 2), allow_pickle=False)
        digest = write_file(folder / f"{split}.labels.npy", file.getvalue())
        splits.append(LabelSplit(split, len(documents), len(pairs), digest))
    header = LabelHeader(
        format_version=FORMAT_VERSION,
        tokens_sha256=tokens_sha256,
        labels=tuple(known),
        names=tuple(names.get(label, "") for label in known),
        splits=tuple(splits),
    )
    text = json.dumps(dataclasses.asdict(header.sealed()), indent=1) + "\n"
    write_file(folder / FILE, text.encode())


def _corrupt(file: Path, what: str) -> UserError:
    return UserError(
        f"the token cache {file.parent} is damaged: {file.name} {what}; delete that folder, and the next run builds it"
        " again"
    )
