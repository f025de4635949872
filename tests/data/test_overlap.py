"""Documents that two splits share are counted as the cache is built, told, and kept with it."""

import json
import shutil

import pytest

from altgrad_jax import provenance
from altgrad_jax.data.cache import open_cache
from altgrad_jax.data.cache_build import build_cache
from altgrad_jax.data.eurlex import prepare
from altgrad_jax.data.overlap import FILE, Shared, open_overlap
from altgrad_jax.errors import UserError
from tests.data.tiny_source import TinySource

TEXTS = {
    "train": ["Goods are kept.", "", "Goods  are kept.", "naïve", "twice", "twice"],
    "validation": ["naïve", "", "Goods are kept", "twice", "of its own"],
    "test": ["of its own", "Goods are kept.", "twice", "of its own", "alone"],
}


class Named(TinySource):
    """Its documents are called "act 0", "act 1" ... in every split, whatever text they have."""

    def identity(self, document_id: str) -> str:
        return document_id.partition("/")[2]


def test_equal_texts_are_counted_and_told(tmp_path, capsys):
    cache = build_cache(TinySource(TEXTS), "bytes", 257, tmp_path)
    overlap = open_overlap(cache)
    assert overlap is not None and overlap.pairs == (
        Shared("validation", "train", 2, 0),
        Shared("test", "train", 2, 0),
        Shared("test", "validation", 3, 0),
    ), "to the byte, an empty text being like no other"
    line = (
        "documents of validation that are in train too: 2 by text; documents of test that are in train too: 2 by text"
    )
    assert overlap.line().startswith(line) and f"note: {overlap.line()}\n" in capsys.readouterr().err
    stored = provenance.corpus(cache, "validation")["shared_documents"]
    assert stored[0] == {"split": "validation", "earlier": "train", "texts": 2, "ids": 0}
    assert open_overlap(open_cache(cache.path)) == overlap


def test_equal_names_are_counted_where_they_name_a_thing(tmp_path):
    different = {"train": ["a", "b", "c"], "validation": ["d", "b"]}
    overlap = open_overlap(build_cache(Named(different), "bytes", 257, tmp_path, progress=False))
    assert overlap is not None and overlap.pairs == (Shared("validation", "train", 1, 2),)
    assert overlap.line() == "documents of validation that are in train too: 1 by text, 2 by id"


def test_nothing_shared_says_nothing(tmp_path, capsys):
    cache = build_cache(TinySource({"train": ["a"], "test": ["b"]}), "bytes", 257, tmp_path)
    overlap = open_overlap(cache)
    assert overlap is not None and overlap.line() == "" and "note" not in capsys.readouterr().err


def test_one_act_in_two_splits_of_eurlex(tmp_path, capsys):
    """A later version of an act: another text, the same CELEX number, and so renamed."""
    acts = {
        "train": [{"celex_id": f"3{i}", "text": f"act {i}"} for i in range(4)] + [{"celex_id": "31", "text": "1 anew"}],
        "dev": [{"celex_id": "32", "text": "act 2, amended"}, {"celex_id": "39", "text": "act 0"}],
        "test": [{"celex_id": "38", "text": "act 8"}],
    }
    for split, records in acts.items():
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    prepared = prepare(tmp_path / "data", source=tmp_path)
    told = "documents whose id another has before them, and that got a number: 1 in train, 1 in validation"
    assert f"note: {told}\n" in capsys.readouterr().err and prepared.description.endswith(told)
    overlap = open_overlap(build_cache(prepared, "bytes", 257, tmp_path / "cache", progress=False))
    assert overlap is not None and overlap.pairs[0] == Shared("validation", "train", 1, 1)


def test_damage_is_told_and_absence_is_age(tmp_path):
    cache = build_cache(TinySource(), "bytes", 257, tmp_path / "a", progress=False)
    other = build_cache(TinySource(TEXTS), "bytes", 257, tmp_path / "b", progress=False)
    file = cache.path / FILE
    whole = file.read_bytes()
    for content in (
        b"",
        b"[]",
        b"[" * 100_000,
        whole.replace(b"0", b"1"),
        whole[:-9],
        (other.path / FILE).read_bytes(),
    ):
        file.write_bytes(content)
        with pytest.raises(UserError, match=f"^{file} is damaged.*delete its folder"):
            open_overlap(cache)
    file.unlink()
    assert open_overlap(cache) is None and provenance.corpus(cache, "validation")["shared_documents"] is None
    file.mkdir()
    with pytest.raises(UserError, match=f"^{file} is a folder"):
        open_overlap(cache)
    shutil.rmtree(cache.path)
