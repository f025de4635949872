"""The labels that a classifier learns: those of the corpus with enough documents to learn them from."""

import hashlib
import json
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from altgrad_jax.data.labels import Labels
from altgrad_jax.errors import UserError


@dataclass(frozen=True)
class LabelSet:
    """Some of a corpus's labels, in a fixed order: a classifier's outputs.

    Attributes:
      labels: all of the corpus's.
      chosen: ascending indices of those that are learned.
    """

    labels: Labels
    chosen: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def ids(self) -> tuple[str, ...]:
        """Their identifiers, in the order of the outputs."""
        return tuple(self.labels.header.labels[i] for i in self.chosen)

    @property
    def names(self) -> tuple[str, ...]:
        """What they are called; "" where the corpus does not say."""
        return tuple(self.labels.header.names[i] for i in self.chosen)

    @property
    def sha256(self) -> str:
        """Hash of their identifiers in order: equal exactly where the outputs of two classifiers mean the same."""
        return hashlib.sha256(json.dumps(self.ids).encode()).hexdigest()

    def targets(self, split: str) -> npt.NDArray[np.bool_]:
        """Which document of a split carries which label, [documents, labels]."""
        place = np.full(len(self.labels.header.labels), -1)
        place[list(self.chosen)] = np.arange(len(self))
        pairs = self.labels.pairs(split)
        columns = place[pairs[:, 1]]
        made = np.zeros((self.labels.cache.split_header(split).documents, len(self)), bool)
        made[pairs[columns >= 0, 0], columns[columns >= 0]] = True
        return made

    def log_odds(self) -> npt.NDArray[np.float32]:
        """Each label's log odds among the training documents, with half a document added on either side."""
        targets = self.targets("train")
        having = targets.sum(0)
        return np.log((having + 0.5) / (len(targets) - having + 0.5)).astype(np.float32)


def choose_labels(labels: Labels, min_documents: int) -> LabelSet:
    """The labels that at least `min_documents` training documents carry; 0: the data set's own list, all of them.

    Raises:
      UserError: no label has so many.
    """
    counts = np.bincount(labels.pairs("train")[:, 1], minlength=len(labels.header.labels))
    chosen = tuple(int(i) for i in np.flatnonzero(counts >= min_documents))
    if not chosen:
        raise UserError(
            f"config.classify.min_documents={min_documents}, but the most frequent label of"
            f" {labels.cache.header.source.name!r} is that of {counts.max()} training documents; lower it"
        )
    return LabelSet(labels, chosen)
