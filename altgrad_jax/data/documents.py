"""What a text source is: named splits of documents, in a fixed order.

Every source (the EUR-Lex builder, the embedded corpus, plain files) is read through the same three members, so the
tokenizer, the token cache and `python -m altgrad_jax.data show` know nothing of where the text came from.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Document:
    """One document.

    Attributes:
      id: unique within its source (a CELEX number, a file name, a serial number).
      text: what the language model reads, title included.
      labels: concept identifiers (EuroVoc ids for EUR-Lex); empty where the source has none.
    """

    id: str
    text: str
    labels: tuple[str, ...] = ()


class Source(Protocol):
    """A corpus that can be read split by split.

    Attributes:
      name: short name, shown in the run's header and used for the cache's folder.
      description: one line saying what it is and where it came from, licence included where there is one.
    """

    name: str
    description: str

    def fingerprint(self) -> str:
        """Hex SHA-256 that changes whenever the documents could: file hashes, generator version and seed."""
        ...

    def splits(self) -> tuple[str, ...]:
        """The splits present, a subset of `SPLITS`, "train" always among them."""
        ...

    def documents(self, split: str) -> Iterator[Document]:
        """Documents of a split, always in the same order."""
        ...
