"""Token cache to batches, with random access by step.

A split is cut into windows of block_size + 1 tokens that overlap by one, so that every token is predicted once. Epoch
after epoch the windows are shuffled anew and laid end to end in one endless sequence; step s takes the windows
[s * batch, (s + 1) * batch) of it. Nothing is lost or repeated within an epoch, a batch may span two epochs, and what a
step sees depends on the seed and the step alone, not on where a run was interrupted or how often it was evaluated.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import grain
import numpy as np
import numpy.typing as npt

from altgrad_jax.data.cache import TokenCache
from altgrad_jax.errors import UserError


class Windows:
    """The windows of a split, (block_size + 1,) int32 arrays by index."""

    def __init__(self, cache: TokenCache, split: str, block_size: int):
        """Raises UserError if the split is too short for one window."""
        self._tokens = cache.tokens(split)
        self._block_size = block_size
        self._count = (len(self._tokens) - 1) // block_size
        if self._count < 1:
            raise UserError(
                f"the {split} split of {cache.header.source.name!r} has {len(self._tokens)} tokens, fewer than the"
                f" {block_size + 1} that one window needs; lower config.model.block_size or use a larger corpus"
            )

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> npt.NDArray[np.int32]:
        start = index * self._block_size
        return self._tokens[start : start + self._block_size + 1].astype(np.int32)

    def rows(self, indices: Sequence[int] | npt.NDArray) -> npt.NDArray[np.int32]:
        """Several windows, [len(indices), block_size + 1], gathered in one go."""
        starts = np.asarray(indices)[:, None] * self._block_size
        return self._tokens[starts + np.arange(self._block_size + 1)].astype(np.int32)

    def token_range(self, index: int) -> tuple[int, int]:
        """First and one past the last token of a window."""
        return index * self._block_size, (index + 1) * self._block_size + 1


def endless(count: int, seed: int) -> grain.MapDataset:
    """Indices below `count`, all of them in a new order each epoch, without end."""
    return grain.MapDataset.source(range(count)).seed(seed).shuffle().repeat()


def share(order: grain.MapDataset, step: int, batch_size: int, host: int, hosts: int) -> list[int]:
    """A host's indices of a step: of the step's `batch_size`, those that are `host` modulo `hosts`."""
    first = step * batch_size
    return [order[i] for i in range(first + host, first + batch_size, hosts)]


@dataclass(frozen=True)
class TrainBatches:
    """This host's share of the training batches.

    With h hosts, host k reads the samples k, k + h, k + 2h ... of the sequence, so a step sees the same windows
    whatever the number of hosts.

    Attributes:
      cache: where the tokens are.
      block_size: tokens predicted in a window.
      batch_size: windows of a step over all hosts.
      seed: of the shuffle.
      host: this process's index.
      hosts: how many there are; `batch_size` is divisible by it.
    """

    cache: TokenCache
    block_size: int
    batch_size: int
    seed: int
    host: int = 0
    hosts: int = 1

    def _order(self) -> grain.MapDataset:
        """The endless sequence of window indices."""
        return endless(len(Windows(self.cache, "train", self.block_size)), self.seed)

    def from_step(self, step: int) -> Iterator[npt.NDArray[np.int32]]:
        """Batches of this host from a step on, [batch_size / hosts, block_size + 1].

        Made when asked for, which the loop does while the devices work on the step before: a batch is one gather from
        the page cache, and threads that read ahead would take more of the interpreter's time than the gather does.
        """
        windows, order = Windows(self.cache, "train", self.block_size), self._order()

        def batch(step: int) -> npt.NDArray[np.int32]:
            return windows.rows(share(order, step, self.batch_size, self.host, self.hosts))

        return map(batch, itertools.count(step))

    def windows_of(self, step: int) -> list[int]:
        """Indices of the windows of a step, over all hosts."""
        order = self._order()
        return [int(i) for i in share(order, step, self.batch_size, 0, 1)]

    def documents_of(self, step: int) -> list[list[str]]:
        """Ids of the documents in each window of a step."""
        windows = Windows(self.cache, "train", self.block_size)
        return [self.cache.documents_in("train", *windows.token_range(i)) for i in self.windows_of(step)]

    def epoch_of(self, step: int) -> float:
        """Passes over the windows begun before a step, with its fraction."""
        return step * self.batch_size / len(Windows(self.cache, "train", self.block_size))


def validation_split(cache: TokenCache) -> str:
    """ "validation" where the corpus has it, else "test".

    Raises:
      UserError: if it has neither.
    """
    for split in ("validation", "test"):
        if split in cache.splits:
            return split
    raise UserError(f"the corpus {cache.header.source.name!r} has no validation split; add one to evaluate on")


def evaluation_batches(
    cache: TokenCache, split: str, block_size: int, batch_size: int, batches: int
) -> list[npt.NDArray[np.int32]]:
    """A fixed set of windows spread evenly over a split: at most `batches` arrays of [batch_size, block_size + 1].

    Raises:
      UserError: if the split has fewer windows than one batch.
    """
    windows = Windows(cache, split, block_size)
    count = min(batches, len(windows) // batch_size)
    if count < 1:
        raise UserError(
            f"the {split} split of {cache.header.source.name!r} has {len(windows)} windows of {block_size} tokens,"
            f" fewer than a batch of {batch_size}; lower config.train.batch_size or config.model.block_size"
        )
    chosen = np.linspace(0, len(windows) - 1, count * batch_size).round().astype(int)
    return [windows.rows(rows) for rows in chosen.reshape(count, batch_size)]
