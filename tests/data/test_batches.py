"""Batches: every window once an epoch, the same whenever and wherever they are read."""

import itertools

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from altgrad_jax.data.batches import TrainBatches, Windows, evaluation_batches, validation_split
from altgrad_jax.data.cache import TokenCache
from altgrad_jax.data.cache_build import build_cache
from altgrad_jax.errors import UserError
from tests.data.tiny_source import TinySource

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def texts(tokens: int) -> list[str]:
    """Documents of uneven length that make so many tokens, an end-of-text after each included."""
    rng = np.random.default_rng(tokens)
    out, left = [], tokens
    while left:
        length = min(left, int(rng.integers(1, 30)))
        out.append("".join(rng.choice(list(LETTERS), length - 1)))
        left -= length
    return out


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """(tokens in train, tokens in validation) -> a token cache, built once."""
    root, built = tmp_path_factory.mktemp("caches"), {}

    def get(train: int, validation: int = 20) -> TokenCache:
        if (train, validation) not in built:
            splits = {"train": texts(train), "validation": texts(validation)}
            built[train, validation] = build_cache(TinySource(splits), "bytes", 257, root, progress=False)
        return built[train, validation]

    return get


def windows_by_hand(cache: TokenCache, split: str, block_size: int) -> list[list[int]]:
    tokens = cache.tokens(split).tolist()
    starts = range(0, len(tokens) - block_size, block_size)
    return [tokens[start : start + block_size + 1] for start in starts]


def take(iterator, count: int) -> list[np.ndarray]:
    return list(itertools.islice(iterator, count))


sizes = st.sampled_from([9, 30, 67])
blocks = st.integers(1, 8)
batch_sizes = st.integers(1, 8)
seeds = st.integers(0, 2**32 - 1)


@given(tokens=sizes, block_size=blocks)
@settings(max_examples=30, deadline=None)
def test_every_token_is_predicted_once(corpus, tokens, block_size):
    cache = corpus(tokens)
    windows = Windows(cache, "train", block_size)
    assert [windows[i].tolist() for i in range(len(windows))] == windows_by_hand(cache, "train", block_size)
    assert windows[0].dtype == np.int32
    targets = [position for i in range(len(windows)) for position in range(*windows.token_range(i))[1:]]
    # All but the first token, and at most block_size - 1 at the end.
    assert targets == list(range(1, len(targets) + 1)) and 0 <= tokens - 1 - len(targets) < block_size


@given(tokens=sizes, block_size=blocks, batch_size=batch_sizes, seed=seeds)
@settings(max_examples=15, deadline=None)
def test_every_window_once_in_every_epoch(corpus, tokens, block_size, batch_size, seed):
    cache = corpus(tokens)
    windows = windows_by_hand(cache, "train", block_size)
    batches = TrainBatches(cache, block_size, batch_size, seed)
    steps = -(-3 * len(windows) // batch_size)
    sequence = [i for step in range(steps) for i in batches.windows_of(step)]
    for epoch in range(3):
        assert sorted(sequence[epoch * len(windows) :][: len(windows)]) == list(range(len(windows)))
        assert batches.epoch_of(epoch * len(windows)) == epoch * batch_size
    # What the iterator gives is what windows_of says, also where an epoch ends within a batch.
    steps = min(steps, 15)
    read = take(batches.from_step(0), steps)
    assert [row.tolist() for batch in read for row in batch] == [windows[i] for i in sequence[: steps * batch_size]]
    assert all(batch.shape == (batch_size, block_size + 1) and batch.dtype == np.int32 for batch in read)


@given(tokens=sizes, block_size=blocks, batch_size=batch_sizes, seed=seeds, step=st.integers(0, 20))
@settings(max_examples=8, deadline=None)
def test_starting_at_a_step_is_skipping_to_it(corpus, tokens, block_size, batch_size, seed, step):
    batches = TrainBatches(corpus(tokens), block_size, batch_size, seed)
    skipped = take(batches.from_step(0), step + 3)[step:]
    np.testing.assert_array_equal(take(batches.from_step(step), 3), skipped)


@given(hosts=st.integers(1, 4), per_host=st.integers(1, 4), seed=seeds, step=st.integers(0, 30))
@settings(max_examples=10, deadline=None)
def test_hosts_share_the_batch_of_one(corpus, hosts, per_host, seed, step):
    cache, batch_size = corpus(101), hosts * per_host
    whole = take(TrainBatches(cache, 3, batch_size, seed).from_step(step), 2)
    shares = [take(TrainBatches(cache, 3, batch_size, seed, host, hosts).from_step(step), 2) for host in range(hosts)]
    for i, batch in enumerate(whole):
        assert all(share[i].shape == (per_host, 4) for share in shares)
        # Host k has the rows k, k + hosts, ...: put back in turn, they are the batch.
        np.testing.assert_array_equal(np.stack([share[i] for share in shares], axis=1).reshape(batch_size, 4), batch)
    for host in range(hosts):
        assert TrainBatches(cache, 3, batch_size, seed, host, hosts).windows_of(step) == TrainBatches(
            cache, 3, batch_size, seed
        ).windows_of(step)


def test_order_depends_on_seed_and_epoch(corpus):
    cache = corpus(257)
    count = len(Windows(cache, "train", 2))
    first, second = (TrainBatches(cache, 2, count, seed=0).windows_of(epoch) for epoch in (0, 1))
    other = TrainBatches(cache, 2, count, seed=1).windows_of(0)
    assert len({tuple(order) for order in (first, second, other, range(count))}) == 4
    # Shuffled, not only moved along: neighbours in the text are seldom neighbours in an epoch.
    assert sum(abs(a - b) == 1 for a, b in itertools.pairwise(first)) < count / 8


def test_order_is_the_same_in_every_version(corpus):
    # If this fails, runs begun with an earlier version of grain or of this package cannot be continued with this one.
    assert TrainBatches(corpus(101), 8, 12, seed=42).windows_of(0) == [1, 7, 6, 11, 0, 8, 4, 10, 3, 2, 5, 9]


def test_documents_of_a_step(corpus):
    cache = corpus(257)
    owner = [f"train/{i}" for i, text in enumerate(texts(257)) for _ in range(len(text) + 1)]
    batches = TrainBatches(cache, 7, 4, seed=3)
    for step in range(20):
        expected = [list(dict.fromkeys(owner[i * 7 : i * 7 + 8])) for i in batches.windows_of(step)]
        assert batches.documents_of(step) == expected


@given(block_size=st.integers(4, 8), batch_size=st.integers(1, 7), batches=st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_evaluation_windows_are_fixed_and_spread(corpus, block_size, batch_size, batches):
    cache = corpus(9, 257)
    windows = windows_by_hand(cache, "validation", block_size)
    assume(len({tuple(window) for window in windows}) == len(windows))
    read = evaluation_batches(cache, "validation", block_size, batch_size, batches)
    assert len(read) == min(batches, len(windows) // batch_size)
    assert all(batch.shape == (batch_size, block_size + 1) and batch.dtype == np.int32 for batch in read)
    chosen = [windows.index(row.tolist()) for batch in read for row in batch]
    assert chosen == sorted(set(chosen))  # in order, each once
    assert chosen[0] == 0 and (len(chosen) == 1 or chosen[-1] == len(windows) - 1)
    gaps = np.diff(chosen)
    assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1
    np.testing.assert_array_equal(evaluation_batches(cache, "validation", block_size, batch_size, batches), read)


def test_corpora_that_are_too_short(corpus):
    cache = corpus(9, 20)
    assert len(Windows(cache, "train", 8)) == 1
    with pytest.raises(UserError, match="the train split of 'tiny' has 9 tokens, fewer than the 10 that one window"):
        Windows(cache, "train", 9)
    with pytest.raises(UserError, match=r"lower config\.model\.block_size"):
        TrainBatches(cache, 9, 1, seed=0).from_step(0)
    with pytest.raises(
        UserError, match=r"2 windows of 8 tokens, fewer than a batch of 3; lower config\.train\.batch_size"
    ):
        evaluation_batches(cache, "validation", 8, 3, 1)


def test_validation_split(tmp_path):
    def splits(*names: str) -> TokenCache:
        source = TinySource({name: ["text"] for name in names})
        return build_cache(source, "bytes", 257, tmp_path, progress=False)

    assert validation_split(splits("train", "validation", "test")) == "validation"
    assert validation_split(splits("train", "test")) == "test"
    with pytest.raises(UserError, match="'tiny' has no validation split"):
        validation_split(splits("train"))
