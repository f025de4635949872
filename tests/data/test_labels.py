"""Labels beside the token cache, the set that is learned, and documents as rows."""

import hashlib
import json
import shutil

import numpy as np
import pytest

from altgrad_jax.data import lexglue
from altgrad_jax.data.cache import open_cache
from altgrad_jax.data.cache_build import build_cache
from altgrad_jax.data.eurlex import prepare
from altgrad_jax.data.examples import Cutting, ExampleBatches, Examples, evaluation_rows
from altgrad_jax.data.label_set import choose_labels
from altgrad_jax.data.labels import open_labels
from altgrad_jax.errors import UserError
from tests.data.tiny_source import TinySource
from tests.planted import PlantedSource, planted_cache

DOCUMENTS = {split: list(PlantedSource().documents(split)) for split in PlantedSource().splits()}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return planted_cache(tmp_path_factory.mktemp("planted"))


@pytest.fixture
def copied(cache, tmp_path):
    return open_cache(shutil.copytree(cache.path, tmp_path / cache.path.name))


def test_labels_come_back(cache):
    labels = open_labels(cache)
    assert labels.header.labels == ("A", "B", "C", "rare", "unseen")
    assert labels.header.names == ("the letter A", "", "", "", "")
    for split, documents in DOCUMENTS.items():
        found = [[] for _ in documents]
        for document, label in labels.pairs(split):
            found[document].append(labels.header.labels[label])
        assert found == [sorted(set(document.labels)) for document in documents]


def test_the_labels_that_are_learned(cache):
    labels = open_labels(cache)
    assert choose_labels(labels, 3).ids == ("A", "B", "C")
    assert choose_labels(labels, 1).ids == ("A", "B", "C", "rare")
    assert choose_labels(labels, 0).ids == labels.header.labels
    with pytest.raises(UserError, match="min_documents=401, but the most frequent label of 'planted' is that of"):
        choose_labels(labels, 401)
    chosen = choose_labels(labels, 3)
    assert chosen.names == ("the letter A", "", "") and chosen.sha256 != choose_labels(labels, 1).sha256
    for split, documents in DOCUMENTS.items():
        expected = [[label in document.labels for label in "ABC"] for document in documents]
        np.testing.assert_array_equal(chosen.targets(split), expected)
    rate = 1 / (1 + np.exp(-chosen.log_odds()))
    np.testing.assert_allclose(rate, chosen.targets("train").mean(0), atol=2e-3)
    assert np.isfinite(choose_labels(labels, 0).log_odds()).all()


def test_a_cache_of_before_there_were_labels_still_serves_language_models(copied):
    (copied.path / "labels.json").unlink()
    assert open_cache(copied.path).sha256 == copied.sha256
    with pytest.raises(UserError, match=f"{copied.path} has no labels: it was built by an older version.*delete that"):
        open_labels(copied)


def test_a_corpus_without_labels_says_so(tmp_path):
    cache = build_cache(TinySource(), "bytes", 257, tmp_path, progress=False)
    with pytest.raises(UserError, match="documents of 'tiny' carry no labels.*prepare --name=eurlex"):
        open_labels(cache)


@pytest.mark.parametrize("name", ["labels.json", "train.labels.npy", "test.labels.npy"])
def test_damage_is_told(copied, name):
    file = copied.path / name
    whole = file.read_bytes()
    for place in range(0, len(whole), max(1, len(whole) // 60)):
        for damaged in (whole[:place], whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]):
            file.write_bytes(damaged)
            with pytest.raises(UserError, match=f"{copied.path} is damaged: {name}.*delete that folder"):
                open_labels(copied)
    file.unlink()
    with pytest.raises(UserError, match="delete that folder"):
        open_labels(copied)


def test_labels_of_other_tokens_are_refused(copied, tmp_path):
    sizes = (("train", 400), ("validation", 50), ("test", 61))
    other = planted_cache(tmp_path / "other", sizes=sizes, longest=20)
    for file in other.path.glob("*labels*"):
        shutil.copy(file, copied.path)
    with pytest.raises(UserError, match="belongs to other tokens"):
        open_labels(copied)


def test_the_data_hash_is_that_of_the_tokens(cache, copied):
    """Labels beside it leave a language model's data what it was."""
    header = json.loads((cache.path / "header.json").read_text())
    assert header["format_version"] == 1 and not [key for key in header if "label" in key]


@pytest.mark.parametrize("cutting", [Cutting(8), Cutting(8, "split", 2), Cutting(8, "split"), Cutting(40)])
def test_documents_become_rows(cache, cutting):
    examples = Examples(cache, "train", cutting)
    expected, owners, cut = [], [], 0
    for i, document in enumerate(DOCUMENTS["train"]):
        tokens = list(document.text.encode()) or [256]  # end-of-text stands for a document without text
        windows = [tokens[k : k + cutting.block_size] for k in range(0, len(tokens), cutting.block_size)]
        kept = windows[: 1 if cutting.long_documents == "cut" else cutting.max_windows or None]
        cut += len(kept) < len(windows)
        for window in kept:
            padding = [256] * (cutting.block_size - len(window))
            expected.append([*window, *padding, len(window) - 1])
            owners.append(i)
    assert examples.cut_documents == cut and len(examples) == len(owners) and examples.documents == 400
    np.testing.assert_array_equal(examples.document, owners)
    np.testing.assert_array_equal(examples.rows(range(len(owners))), expected)
    targets = choose_labels(open_labels(cache), 0).targets("train")
    rows = examples.rows([5, 3], targets)
    assert rows.dtype == np.int32
    np.testing.assert_array_equal(rows[:, cutting.block_size + 1 :], targets[examples.document[[5, 3]]])


def test_the_last_document_ends_with_the_split(cache):
    for split in cache.splits:
        examples = Examples(cache, split, Cutting(64))
        text = DOCUMENTS[split][-1].text.encode()
        assert list(examples.rows([len(examples) - 1])[0][: len(text)]) == list(text)


def batches(cache, **options):
    label_set = choose_labels(open_labels(cache), 1)
    return ExampleBatches(cache, label_set, Cutting(8, "split", 2), batch_size=12, seed=3, **options)


def test_every_example_comes_once_an_epoch_from_any_step(cache):
    made = batches(cache)
    count = len(made.examples)
    steps = -(-count // 12)
    stream = made.from_step(0)
    rows = [next(stream) for _ in range(steps + 1)]
    first = np.concatenate(rows)[:count]
    everything = made.examples.rows(range(count), made.label_set.targets("train"))
    assert sorted(map(tuple, first)) == sorted(map(tuple, everything)) and not np.array_equal(first, everything)
    np.testing.assert_array_equal(next(made.from_step(7)), rows[7])
    assert made.epoch_of(steps) == pytest.approx(steps * 12 / count)
    ids = made.documents_of(7)
    texts = {document.id: document.text for document in DOCUMENTS["train"]}
    for name, (first, last), row in zip(ids, made.tokens_of(7), rows[7], strict=True):
        window = bytes(token for token in row[: row[8] + 1] if token < 256).decode()
        assert window == texts[name][first:last]


def test_hosts_share_a_step(cache):
    whole = next(batches(cache).from_step(5))
    shares = [next(batches(cache, host=host, hosts=3).from_step(5)) for host in range(3)]
    for host, share in enumerate(shares):
        np.testing.assert_array_equal(share, whole[host::3])


def test_evaluation_sees_every_document(cache):
    examples = Examples(cache, "test", Cutting(8, "split"))
    rows = np.concatenate(evaluation_rows(examples, 16))
    assert len(rows) % 16 == 0
    np.testing.assert_array_equal(rows[: len(examples)], examples.rows(range(len(examples))))


def lines(*records: dict) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


SPLITS = ("train", "dev", "test")
NUMBERS = range(3)
BODY = {"local": "text", "eurlex57k": "main_body"}
CONCEPTS = {"local": "concepts", "eurlex57k": "eurovoc_concepts"}


LEXGLUE = {"0": "100168", "1": "100169", "2": "100170", "5": "100285"}  # which stand for the others' there


def acts(corpus: str, split: str) -> str:
    """Three acts as one of the corpora has them: act i carries the labels "5" and i; in LexGLUE also one too many."""
    if corpus == "lexglue":
        labels = [[LEXGLUE["5"], LEXGLUE[f"{i}"], "100289"] for i in NUMBERS]
        return lines(*({"data_type": split, "text": f"Act {i}", "labels": labels[i]} for i in NUMBERS))
    body, concepts = BODY[corpus], CONCEPTS[corpus]
    return lines(
        *({"celex_id": f"{split}{i}", "title": "Act", body: f"of law {i}", concepts: ["5", f"{i}"]} for i in NUMBERS)
    )


CORPORA = {
    "local": {f"{split}.jsonl": acts("local", split) for split in SPLITS}
    | {"concepts.json": json.dumps({"5": "price", "7": "no document's"})},
    "eurlex57k": {f"{split}.jsonl": acts("eurlex57k", split) for split in SPLITS},
    "lexglue": {"eurlex.jsonl": "".join(acts("lexglue", split) for split in SPLITS)},
}


@pytest.mark.parametrize("name", CORPORA)
def test_every_eurlex_corpus_brings_its_labels(tmp_path, name):
    source = tmp_path / "source"
    source.mkdir()
    for file, text in CORPORA[name].items():
        (source / file).write_text(text)
    prepared = prepare(tmp_path / "data", source=source, progress=False)
    assert prepared.name == f"eurlex-{name}"
    labels = open_labels(build_cache(prepared, "bytes", 257, tmp_path / "cache", progress=False))
    expected = tuple(LEXGLUE) if name != "lexglue" else lexglue.LABELS
    assert labels.header.labels == expected
    assert labels.header.names == tuple("price" if name == "local" and label == "5" else "" for label in expected)
    called = {label: expected.index(LEXGLUE[label] if name == "lexglue" else label) for label in LEXGLUE}
    pairs = [[i, called[label]] for i in NUMBERS for label in (f"{i}", "5")]
    for split in ("train", "validation", "test"):
        np.testing.assert_array_equal(labels.pairs(split), pairs)
    assert choose_labels(labels, 3).ids == (expected[called["5"]],)
    assert choose_labels(labels, 0).ids == expected, "those that no document carries too"


def test_the_labels_of_lexglue_are_its_loaders():
    assert len(set(lexglue.LABELS)) == 100 and list(lexglue.LABELS) == sorted(lexglue.LABELS)
    digest = hashlib.sha256(" ".join(lexglue.LABELS).encode()).hexdigest()
    assert digest == "752a758a06d619985f6fbd6c484099a3cb53ce8ab68087fcae2589adf8f54e7f"


ARABIC = "\u0661\u0660\u0660\u0661\u0666\u0668"


@pytest.mark.parametrize("label", ["3", "99", "0100168", "100290", "100162", "2771", ARABIC, "x"])
def test_what_is_no_label_of_lexglue_is_refused(label):
    with pytest.raises(UserError, match="^here: label '.*' is no concept of LexGLUE"):
        lexglue.split_labels(("100168", label), "here")
    assert lexglue.split_labels(("100168", "100267"), "here") == (("100168",), ("100267",))
