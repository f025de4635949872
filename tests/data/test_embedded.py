"""The embedded corpus: its bytes, its entropy against an independent reader, and the structure it promises."""

import hashlib
import math
import re
import statistics
from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from altgrad_jax.data.documents import SPLITS
from altgrad_jax.data.embedded import EmbeddedCorpus, act
from altgrad_jax.data.grammar import Bind, Choice, Node, Recall, Seq
from altgrad_jax.errors import UserError
from tests.data.test_grammar import derivations, minus_log, readings

# If one of these changes, so did the corpus: raise `embedded.VERSION`, then write the new hashes here.
HASHES = {
    "train": "845439f473fa6f6df63d04fe52735f82fab56f06f5fd34a717d7cc3bf96b8f84",
    "validation": "e68b99c4fbc541e693b95758dac83842bd19226deace9be5b5688df8330bb17a",
    "test": "469e006906e53d53e9ccfe84818cfd50e673c5e74b5e7004e229f1b20c306081",
}
FINGERPRINT = "20308ff8d36500d4fe05d60fb6f12546ba34b7cc9e502c59c2d265ca8b33b7d0"


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [document.text for document in EmbeddedCorpus(200).documents("train")]


@pytest.mark.parametrize("split", SPLITS)
def test_the_default_corpus_is_these_bytes(split):
    digest = hashlib.sha256()
    for document in EmbeddedCorpus().documents(split):
        digest.update(document.text.encode() + b"\0")
    assert digest.hexdigest() == HASHES[split]


def test_the_default_fingerprint():
    assert EmbeddedCorpus().fingerprint() == FINGERPRINT


def test_fingerprint_tells_corpora_apart():
    corpora = [EmbeddedCorpus(n, seed) for n in (20, 21, 1000) for seed in (0, 1, -1)]
    assert len({corpus.fingerprint() for corpus in corpora}) == len(corpora)
    assert EmbeddedCorpus(20, 1).fingerprint() == EmbeddedCorpus(20, 1).fingerprint()


@pytest.mark.parametrize("documents, sizes", [(3, (1, 1, 1)), (39, (37, 1, 1)), (200, (180, 10, 10))])
def test_split_sizes(documents, sizes):
    corpus = EmbeddedCorpus(documents)
    assert corpus.splits() == SPLITS
    assert tuple(len(list(corpus.documents(split))) for split in SPLITS) == sizes


@pytest.mark.parametrize("documents", [2, 0, -5])
def test_too_few_documents(documents):
    with pytest.raises(UserError, match=f"at least 3 documents.*not {documents}"):
        EmbeddedCorpus(documents)


def test_documents_are_distinct_across_splits_and_seeds():
    documents = [
        (document.id, document.text)
        for seed in range(3)
        for split in SPLITS
        for document in EmbeddedCorpus(60, seed).documents(split)
    ]
    assert len({text for _, text in documents}) == len(documents) == 180
    assert len({id for id, _ in documents}) == 60


def test_documents_are_random_access_and_do_not_depend_on_the_corpus_size():
    small, large = EmbeddedCorpus(20, seed=7), EmbeddedCorpus(200, seed=7)
    for split in SPLITS:
        documents = list(small.documents(split))
        assert documents == list(large.documents(split))[: len(documents)] == list(small.documents(split))
        assert [document.text for document in documents] == [large.draw(split, i).text for i in range(len(documents))]


def test_the_stated_nats_are_those_an_independent_reader_finds():
    corpus = EmbeddedCorpus(60, seed=3)
    for split in SPLITS:
        total = 0.0
        for index, document in enumerate(corpus.documents(split)):
            (p,) = readings(act(), document.text)  # exactly one way to write it
            assert corpus.draw(split, index).nats == pytest.approx(minus_log(p), rel=1e-12)
            total += minus_log(p)
        assert corpus.nats(split) == pytest.approx(total, rel=1e-12)


def test_expected_nats_against_the_sample_mean():
    corpus = EmbeddedCorpus(seed=11)
    nats = [corpus.draw("train", index).nats for index in range(2000)]
    standard_error = statistics.stdev(nats) / math.sqrt(len(nats))
    assert abs(statistics.mean(nats) - corpus.expected_nats()) < 4 * standard_error
    assert standard_error < 0.01 * corpus.expected_nats()


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(), split=st.sampled_from(SPLITS), index=st.integers(0, 10_000))
def test_any_document_of_any_seed(seed, split, index):
    drawn = EmbeddedCorpus(seed=seed).draw(split, index)
    assert drawn == EmbeddedCorpus(3, seed=seed).draw(split, index)
    assert drawn.text.isascii() and "{" not in drawn.text and "  " not in drawn.text
    (p,) = readings(act(), drawn.text)
    assert drawn.nats == pytest.approx(minus_log(p), rel=1e-12)
    assert_references_point_back(drawn.text)


def assert_references_point_back(text: str) -> None:
    """Articles, paragraphs and recitals count up from 1, and articles name only earlier ones of theirs."""
    recitals = text.partition("Whereas:\n")[2].partition("HAS ADOPTED")[0]
    assert re.findall(r"^\((\d+)\) ", recitals, re.M) == [str(n + 1) for n in range(recitals.strip().count("\n") + 1)]
    articles = re.split(r"^Article (\d+)\n", text, flags=re.M)[1:]
    assert [int(number) for number in articles[::2]] == list(range(1, len(articles) // 2 + 1))
    for number, body in zip(map(int, articles[::2]), articles[1::2], strict=True):
        assert all(1 <= int(earlier) < number for earlier in re.findall(r"Article (\d+)", body))
        paragraphs = re.findall(r"^(\d)\. (.*)$", body, re.M)
        assert [int(k) for k, _ in paragraphs] == list(range(1, len(paragraphs) + 1))
        for k, paragraph in paragraphs:
            assert all(1 <= int(earlier) < int(k) for earlier in re.findall(r"paragraph (\d)", paragraph))


def test_references_point_back_and_there_are_many(texts):
    for text in texts:
        assert_references_point_back(text)
    assert statistics.mean(len(re.findall(r"[a-z] Article \d+[,.]", text)) for text in texts) > 3


def test_what_the_title_and_the_definitions_settle_comes_back(texts):
    for text in texts:
        author, kind, year, date = re.match(r"(\w+) (\w+) \(EU\) (\d{4})/\d{3}\nof (.*)\n", text).groups()
        assert f"HAS ADOPTED THIS {kind.upper()}:" in text and f"\nThis {kind} " in text
        assert not any(f"his {other}" in text for other in {"Regulation", "Directive", "Decision"} - {kind})
        assert re.search(rf"\nDone at \w+, {date}\.\nFor the {author}\n", text) and date.endswith(year)
        assert set(re.findall(r"apply from 1 January (\d+)", text)) <= {str(int(year) + 1)}
        assert set(re.findall(r"by 31 December (\d+)", text)) <= {str(int(year) + 3)}
        actor, paper, goods = re.findall(r"^\([abc]\) '(.*?)' means", text, re.M)
        assert text.partition("\n\n")[0].endswith(f" of {goods}")
        assert set(re.findall(r"^Obligations of the (.*)$", text, re.M)) <= {actor}
        assert set(re.findall(r"^Issue of the (.*)$", text, re.M)) <= {paper}
        outdated, fate = re.search(r"^\(\d\) (\w+ \(EC\) \d{4}/\d{3}) .* should be (\w+)\.\n\nHAS", text, re.M).groups()
        assert re.search(rf"^{re.escape(outdated)} is {fate}", text, re.M)
        field = re.search(r"^on (.*), as regards", text, re.M)[1]
        concepts = text.rpartition("\nConcepts: ")[2]
        assert re.match(rf"C\d\d00 {field}; C\d\d1\d {goods}; C\d\d4\d {paper}[.;]", concepts)


def test_labels_are_the_printed_concepts_and_mean_the_same_everywhere():
    names = defaultdict(set)
    for document in EmbeddedCorpus(400).documents("train"):
        printed = [
            concept.split(" ", 1) for concept in document.text.rpartition("Concepts: ")[2].rstrip(".").split("; ")
        ]
        assert document.labels == tuple(label for label, _ in printed)
        assert 3 <= len(set(document.labels)) == len(document.labels) <= 4
        assert len({label[:3] for label in document.labels}) == 1  # all of one field
        for label, concept in printed:
            names[label].add(concept)
    assert all(len(meanings) == 1 for meanings in names.values())
    assert sum(label.endswith("00") for label in names) == 10


def test_the_field_steers_words_that_every_field_uses(texts):
    """The favourite period differs between fields, by the text alone."""
    periods = ("ten days", "three months", "one year", "thirty days", "six weeks", "two years", "five working days")
    counts = defaultdict(lambda: dict.fromkeys(periods, 0))
    for text in texts:
        for period in periods:
            counts[re.search(r"^on (.*), as", text, re.M)[1]][period] += text.count(period)
    assert len({max(count, key=count.__getitem__) for count in counts.values()}) >= 5


def test_lengths(texts):
    """About 2.7 MB of training text by default, in documents of very different lengths."""
    lengths = [len(text) for text in texts]
    assert 2700 < statistics.mean(lengths) < 3300
    assert min(lengths) < 2000 and max(lengths) > 4500


def test_every_memory_is_filled_before_it_is_recalled_and_every_table_covers_it():
    """On every path through the grammar, sampled or not."""
    seen: dict[tuple[int, frozenset[Bind]], frozenset[Bind]] = {}
    tables: set[Recall] = set()

    def bound_after(node: Node, bound: frozenset[Bind]) -> frozenset[Bind]:
        if isinstance(node, str):
            return bound
        if (id(node), bound) not in seen:
            after = bound
            match node:
                case Seq():
                    for part in node.parts:
                        after = bound_after(part, after)
                case Choice():
                    after = frozenset.intersection(*(bound_after(option, bound) for option in node.options))
                case Bind():
                    after = bound_after(node.body, bound) | {node}
                case Recall():
                    assert node.bound in bound
                    if node.table is not None:
                        tables.add(node)
            seen[id(node), bound] = after
        return seen[id(node), bound]

    bound_after(act(), frozenset())
    assert len(tables) > 10
    for recall in tables:
        assert {text for text, _, _ in derivations(recall.bound.body)} == set(recall.table)
