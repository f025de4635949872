"""Documents that two splits share. A loss on them says what was memorised, so how many there are is counted and told.

They are counted as a token cache is built (`cache_build`), and lie beside its tokens in `overlap.json`. Two documents
are the same if their texts are equal to the byte, or if the source calls them the same (two versions of one act). Of
each document eight bytes a kind are kept: the first 64 bits of a hash. A cache without the file was built before there
was one.
"""

import dataclasses
import hashlib
import itertools
import json
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from altgrad_jax.data.cache import TokenCache
from altgrad_jax.data.cache_header import hash_of, parse_as
from altgrad_jax.files import DamagedFileError, read_json

FORMAT_VERSION = 1
FILE = "overlap.json"


@dataclass(frozen=True)
class Shared:
    """What two splits share.

    Attributes:
      split: the later of the two.
      earlier: the other.
      texts: documents of `split` whose text a document of `earlier` has too.
      ids: documents of `split` that are called as one of `earlier` is, whatever their texts.
    """

    split: str
    earlier: str
    texts: int
    ids: int


@dataclass(frozen=True)
class Overlap:
    """All of `overlap.json`.

    Attributes:
      format_version: of this file.
      tokens_sha256: data hash of the token cache it belongs to.
      pairs: for every two splits.
      checksum: of all other fields.
    """

    format_version: int
    tokens_sha256: str
    pairs: tuple[Shared, ...]
    checksum: str = ""

    def sealed(self) -> "Overlap":
        """The same with its checksum set."""
        bare = dataclasses.replace(self, checksum="")
        return dataclasses.replace(bare, checksum=hash_of(dataclasses.asdict(bare)))

    def line(self) -> str:
        """The counts that are not zero, in words; "" if there is none."""
        told = []
        for pair in self.pairs:
            counts = [f"{pair.texts:,} by text"] * bool(pair.texts) + [f"{pair.ids:,} by id"] * bool(pair.ids)
            if counts:
                told.append(f"documents of {pair.split} that are in {pair.earlier} too: {', '.join(counts)}")
        return "; ".join(told)

    def to_json(self) -> str:
        """The text of the file."""
        return json.dumps(dataclasses.asdict(self.sealed()), indent=1) + "\n"


class Marks:
    """Collects what is compared, split by split."""

    def __init__(self) -> None:
        self._texts: dict[str, array[int]] = {}
        self._ids: dict[str, array[int]] = {}

    def add(self, split: str, text: bytes, identity: str | None) -> None:
        """Takes a document's text, and what the source calls it, if it does. An empty text is like no other."""
        texts = self._texts.setdefault(split, array("Q"))
        if text:
            texts.append(_mark(text))
        if identity is not None:
            self._ids.setdefault(split, array("Q")).append(_mark(identity.encode()))

    def compare(self, tokens_sha256: str, splits: Sequence[str]) -> Overlap:
        """Every split with those before it, in the order of `splits`."""
        pairs = []
        for earlier, split in itertools.combinations(splits, 2):
            texts, ids = (_count(marks.get(split), marks.get(earlier)) for marks in (self._texts, self._ids))
            pairs.append(Shared(split, earlier, texts, ids))
        return Overlap(FORMAT_VERSION, tokens_sha256, tuple(pairs)).sealed()


def _mark(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest())


def _count(later: "array[int] | None", earlier: "array[int] | None") -> int:
    """How many of the later are among the earlier."""
    if later is None or earlier is None:
        return 0
    found: npt.NDArray[np.bool_] = np.isin(np.array(later, np.uint64), np.array(earlier, np.uint64))
    return int(found.sum())


def open_overlap(cache: TokenCache) -> Overlap | None:
    """What the splits of a token cache share; None if it was built before that was counted.

    Raises:
      UserError: the file cannot be read, is damaged, or belongs to other tokens.
    """
    path, way_out = cache.path / FILE, "delete its folder, and the next run builds the token cache again"
    content = read_json(path, way_out=way_out)
    if content is None:
        return None
    try:
        overlap = parse_as(Overlap, content, "it")
    except ValueError as error:
        raise DamagedFileError(f"{path} is damaged: it {error}; {way_out}") from error
    if overlap != overlap.sealed() or overlap.format_version != FORMAT_VERSION or overlap.tokens_sha256 != cache.sha256:
        raise DamagedFileError(f"{path} is damaged, or belongs to other tokens; {way_out}")
    return overlap
