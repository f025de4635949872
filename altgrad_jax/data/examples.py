"""Labelled documents as rows of equal length, with random access by step.

An example is at most `block_size` tokens of one document, from the left, padded on the right with end-of-text. A
document that is longer is `cut` to its first block_size tokens, or `split` into consecutive windows, each an example of
its own with the document's labels; at most `max_windows` of them, lest a few very long documents be most of an epoch.

A row, int32, has three parts: T tokens, the place of the last one that is not padding, and, for training, one 0 or 1
a label. That one array holds them all keeps a batch what it is elsewhere, rows to be split over devices.

The order is that of `batches`: epoch after epoch the examples are shuffled anew and laid end to end, and step s takes
[s * batch, (s + 1) * batch) of it, so what a step sees depends on the seed and the step alone.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from altgrad_jax.data.batches import endless, share
from altgrad_jax.data.cache import TokenCache
from altgrad_jax.data.label_set import LabelSet


@dataclass(frozen=True)
class Cutting:
    """How documents become examples.

    Attributes:
      block_size: most tokens of an example.
      long_documents: "cut" or "split".
      max_windows: most examples of a document that is split; 0: as many as it has.
    """

    block_size: int
    long_documents: str = "cut"
    max_windows: int = 0

    def windows(self, length: int) -> int:
        """How many examples a document of `length` tokens makes."""
        if self.long_documents == "cut":
            return 1
        whole = max(1, -(-length // self.block_size))
        return min(whole, self.max_windows) if self.max_windows else whole


class Examples:
    """The examples of a split, in the order of its documents.

    Attributes:
      document: index of each example's document, [examples].
      documents: how many documents there are.
    """

    def __init__(self, cache: TokenCache, split: str, cutting: Cutting):
        self._tokens, self.cutting = cache.tokens(split), cutting
        starts = cache.document_starts(split)
        self.documents, self._starts = len(starts), starts
        ends = np.append(starts[1:], len(self._tokens)) - 1  # where each one's end-of-text is
        self._end = int(self._tokens[ends[0]])
        # End-of-text is no part of a document, but stands for one without any text.
        ends = np.maximum(ends, starts + 1)
        counts = np.array([cutting.windows(int(length)) for length in ends - starts])
        self.document = np.repeat(np.arange(len(starts)), counts)
        place = np.arange(len(self.document)) - np.repeat(np.cumsum(counts) - counts, counts)
        self._first = starts[self.document] + place * cutting.block_size
        self._length = np.minimum(ends[self.document] - self._first, cutting.block_size)
        self.cut_documents = int((ends - starts > counts * cutting.block_size).sum())

    def __len__(self) -> int:
        return len(self.document)

    def token_range(self, index: int) -> tuple[int, int]:
        """First and one past the last token of an example, counted within its document."""
        first = int(self._first[index] - self._starts[self.document[index]])
        return first, first + int(self._length[index])

    def rows(self, indices: Sequence[int] | npt.NDArray, targets: npt.NDArray[np.bool_] | None = None) -> npt.NDArray:
        """Rows of several examples, [len(indices), T + 1], with `targets` of all documents [..., T + 1 + labels]."""
        indices = np.asarray(indices)
        first, length = self._first[indices, None], self._length[indices, None]
        columns = np.arange(self.cutting.block_size)
        inside = columns < length
        tokens = np.where(inside, self._tokens[np.where(inside, first + columns, 0)], self._end)
        parts = [tokens, length - 1]
        if targets is not None:
            parts.append(targets[self.document[indices]])
        return np.concatenate(parts, axis=1).astype(np.int32)


@dataclass(frozen=True)
class ExampleBatches:
    """This host's share of the training batches; hosts share a step as in `batches.TrainBatches`.

    Attributes:
      cache: where the tokens are.
      label_set: the labels.
      cutting: how documents become examples.
      batch_size: examples of a step over all hosts.
      seed: of the shuffle.
      host: this process's index.
      hosts: how many there are; `batch_size` is divisible by it.
    """

    cache: TokenCache
    label_set: LabelSet
    cutting: Cutting
    batch_size: int
    seed: int
    host: int = 0
    hosts: int = 1

    @property
    def examples(self) -> Examples:
        """Those of the train split."""
        return Examples(self.cache, "train", self.cutting)

    def from_step(self, step: int) -> Iterator[npt.NDArray[np.int32]]:
        """Batches of this host from a step on, [batch_size / hosts, T + 1 + labels]."""
        examples, targets = self.examples, self.label_set.targets("train")
        order = endless(len(examples), self.seed)

        def batch(step: int) -> npt.NDArray[np.int32]:
            mine = share(order, step, self.batch_size, self.host, self.hosts)
            return examples.rows(mine, targets)

        return map(batch, itertools.count(step))

    def examples_of(self, step: int) -> list[int]:
        """Indices of the examples of a step, over all hosts."""
        order = endless(len(self.examples), self.seed)
        return [int(i) for i in share(order, step, self.batch_size, 0, 1)]

    def documents_of(self, step: int) -> list[str]:
        """Id of the document of each example of a step."""
        examples, ids = self.examples, self.cache.document_ids("train")
        return [ids[examples.document[i]] for i in self.examples_of(step)]

    def tokens_of(self, step: int) -> list[tuple[int, int]]:
        """First and one past the last token of each example of a step, counted within its document."""
        examples = self.examples
        return [examples.token_range(i) for i in self.examples_of(step)]

    def epoch_of(self, step: int) -> float:
        """Passes over the examples begun before a step, with its fraction."""
        return step * self.batch_size / len(self.examples)


def evaluation_rows(examples: Examples, batch_size: int) -> list[npt.NDArray[np.int32]]:
    """All examples in order, without labels, in arrays of [batch_size, T + 1]; the last is filled up with its last."""
    count = -(-len(examples) // batch_size) * batch_size
    indices = np.minimum(np.arange(count), len(examples) - 1)
    return [examples.rows(part) for part in indices.reshape(-1, batch_size)]
