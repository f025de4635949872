"""A tiny source for the tests of the token cache."""

import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from altgrad_jax.data.documents import Document

TEXTS = {
    "train": ["The Member States shall ensure it.", "", "naïve façade €5 <|endoftext|>", "The Member States shall."],
    "validation": ["The authority shall ensure that."],
    "test": ["a", "bc"],
}


@dataclass
class TinySource:
    """A source that keeps a record of the splits read, in memory and, for other processes, in a file."""

    texts: dict[str, list[str]] = field(default_factory=lambda: TEXTS)
    name: str = "tiny"
    description: str = "a few lines"
    log: Path | None = None
    pause: float = 0.0
    read: list[str] = field(default_factory=list)

    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.texts, sort_keys=True).encode()).hexdigest()

    def splits(self) -> tuple[str, ...]:
        return tuple(self.texts)

    def documents(self, split: str) -> Iterator[Document]:
        self.read.append(split)
        if self.log is not None:
            with open(self.log, "a") as log:
                log.write(f"{split}\n")
        for i, text in enumerate(self.texts[split]):
            time.sleep(self.pause)
            yield Document(id=f"{split}/{i}", text=text)


class KnownSource(TinySource):
    def nats(self, split: str) -> float:
        return 10.0 * len(self.texts[split])


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def flat_ids(texts: list[str], end: int = 256) -> list[int]:
    return [i for text in texts for i in [*text.encode(), end]]
