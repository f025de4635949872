"""A labelled corpus with a rule that a small classifier can learn: a label is the presence of a letter."""

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from altgrad_jax.data.cache import TokenCache
from altgrad_jax.data.cache_build import build_cache
from altgrad_jax.data.documents import Document

LABELS = ("A", "B", "C")
SIZES = {"train": 400, "validation": 50, "test": 61}


@dataclass(frozen=True)
class PlantedSource:
    """Documents of 0 to 28 letters; "rare" is a label of two training documents, and "unseen" of a test document."""

    sizes: tuple[tuple[str, int], ...] = tuple(SIZES.items())
    longest: int = 28
    name: str = "planted"
    description: str = "letters"

    def fingerprint(self) -> str:
        return hashlib.sha256(repr((self.sizes, self.longest)).encode()).hexdigest()

    def splits(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.sizes)

    def concepts(self) -> dict[str, str]:
        return {"A": "the letter A", "unknown": "of no document"}

    def documents(self, split: str) -> Iterator[Document]:
        draw = random.Random(split)
        for i in range(dict(self.sizes)[split]):
            letters = draw.choices("defghij", k=draw.randrange(self.longest))
            for place in range(len(letters)):
                if draw.random() < 0.06:
                    letters[place] = draw.choice(LABELS)
            labels = [label for label in LABELS if label in letters]
            labels += ["rare"] * (split == "train" and i < 2) + ["unseen"] * (split == "test" and i == 0)
            yield Document(f"{split}/{i}", "".join(letters), tuple(labels[::-1]))


def planted_cache(root: Path, **options) -> TokenCache:
    """Its token cache, a token a letter."""
    return build_cache(PlantedSource(**options), "bytes", 257, root, progress=False)
