"""Every layout of the EUR-Lex corpora is found, told apart and read into the same records; what is broken is named."""

import gzip
import io
import json
import tarfile
import zipfile
from pathlib import Path

import pytest

from altgrad_jax.data.documents import SPLITS
from altgrad_jax.data.eurlex_corpora import CORPORA, EURLEX57K, LEXGLUE, LOCAL, Record
from altgrad_jax.data.eurlex_layouts import find_layout, published
from altgrad_jax.errors import UserError

ACTS = {
    split: [
        {
            "celex_id": f"3{split}{number}",
            "type": "Regulation",
            "title": f" On prices {number}\n",
            "header": "THE COUNCIL,",
            "recitals": "Whereas:\n(1) prices rise;",
            "main_body": ["Article 1", "Article 2 – späten €"],
            "attachments": "Annex" if number else "",
            "eurovoc_concepts": ["1000", "2771"][: number + 1],
        }
        for number in range(count)
    ]
    for split, count in (("train", 3), ("dev", 2), ("test", 1))
}
ACT_TEXT = "On prices 0\n\nTHE COUNCIL,\nWhereas:\n(1) prices rise;\nArticle 1\nArticle 2 – späten €"

LEX_ACTS = [
    {"data_type": split, "text": f"Decision {number} \n", "labels": [100163 + number, "100168"]}
    for number, split in enumerate(["train", "train", "dev", "test", "train"])
]

LOCAL_ACTS = {
    split: [{"celex_id": f"{split}{number}", "date": "1999-12-31", "title": "Title", "concepts": ["1"], "text": "Body"}]
    for number, split in enumerate(["train", "dev", "test"])
}


def _lines(acts: list[dict]) -> bytes:
    return "".join(json.dumps(act, ensure_ascii=False) + "\n" for act in acts).encode()


def _eurlex57k_files(kind: str) -> dict[str, bytes]:
    """File name -> content, as JSON lines or as one JSON file per act (written in another order than read)."""
    if kind == "lines":
        return {f"{split}.jsonl": _lines(acts) for split, acts in ACTS.items()}
    return {
        f"{split}/{act['celex_id']}.json": json.dumps(act, indent=1).encode()
        for split, acts in ACTS.items()
        for act in reversed(acts)
    }


def _put(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def _put_zip(folder: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(folder / "dataset.zip", "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return folder


def _put_tar(folder: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(folder / "eurlex.tar.gz", "w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return folder


def _all(layout, work: Path) -> dict[str, list[Record]]:
    opened = layout.unpacked(work)
    return {split: list(opened.records(split)) for split in SPLITS}


@pytest.mark.parametrize("named", [False, True], ids=["detected", "named"])
@pytest.mark.parametrize("put", [_put, _put_zip], ids=["open", "zip"])
@pytest.mark.parametrize("inner", ["", "dataset/"])
@pytest.mark.parametrize("kind", ["lines", "folders"])
def test_eurlex57k(tmp_path, named, put, inner, kind):
    files = {inner + name: content for name, content in _eurlex57k_files(kind).items()}
    decoys = {"__MACOSX/._train.jsonl": b"\0", f"{inner}train/._x.json": b"\0", "README.md": b"x"}
    layout = find_layout(put(tmp_path, files | decoys), EURLEX57K if named else None)
    assert layout.corpus is EURLEX57K
    records = _all(layout, tmp_path / "work")
    assert [[record.id for record in records[split]] for split in SPLITS] == [
        ["3train0", "3train1", "3train2"],
        ["3dev0", "3dev1"],
        ["3test0"],
    ]
    assert records["train"][0] == Record("3train0", "On prices 0", ACT_TEXT, "", ("1000",))
    assert records["validation"][1].text.endswith("€\nAnnex") and records["validation"][1].labels == ("1000", "2771")


@pytest.mark.parametrize(
    ("put", "name"),
    [
        (_put, "eurlex.jsonl"),
        (_put, "eurlex.jsonl.gz"),
        (_put, "eurlex/eurlex.jsonl"),
        (_put_tar, "eurlex.jsonl"),
        (_put_tar, "./eurlex/eurlex.jsonl"),
    ],
)
@pytest.mark.parametrize("dev", ["dev", "validation"])
def test_lexglue(tmp_path, put, name, dev):
    content = _lines(LEX_ACTS).replace(b'"dev"', f'"{dev}"'.encode())
    layout = find_layout(put(tmp_path, {name: gzip.compress(content) if name.endswith("gz") else content}))
    assert layout.corpus is LEXGLUE
    assert _all(layout, tmp_path / "work") == {
        "train": [
            Record("train-1", "", "Decision 0", "", ("100163", "100168")),
            Record("train-2", "", "Decision 1", "", ("100168",), ("100164",)),
            Record("train-5", "", "Decision 4", "", ("100168",), ("100167",)),
        ],
        "validation": [Record("validation-3", "", "Decision 2", "", ("100168",), ("100165",))],
        "test": [Record("test-4", "", "Decision 3", "", ("100168",), ("100166",))],
    }


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
@pytest.mark.parametrize("dev", ["dev", "validation"])
@pytest.mark.parametrize("concepts", [{}, {"1": "prix", "2": "coût"}])
def test_local(tmp_path, suffix, dev, concepts):
    for split, acts in LOCAL_ACTS.items():
        content = _lines(acts)
        name = dev if split == "dev" else split
        (tmp_path / f"{name}{suffix}").write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    if concepts:
        (tmp_path / "concepts.json").write_text(json.dumps(concepts, ensure_ascii=False), encoding="utf-8")
    layout = find_layout(tmp_path)
    assert layout.corpus is LOCAL and layout.concepts() == concepts
    expected = {name: [Record(f"{file}{n}", "Title", "Title\n\nBody", "1999-12-31", ("1",))]
                for n, (name, file) in enumerate(zip(SPLITS, ("train", "dev", "test"), strict=True))}  # fmt: skip
    assert _all(layout, tmp_path / "work") == expected
    assert set(layout.digests()) == {path.name for path in tmp_path.iterdir()}


def test_local_needs_only_id_and_text(tmp_path):
    for split in ("train", "dev", "test"):
        (tmp_path / f"{split}.jsonl").write_text('{"celex_id": "a", "text": " Body "}')
    assert next(find_layout(tmp_path).records("train")) == Record("a", "", "Body", "", ())


def test_digests_follow_the_content(tmp_path):
    folder = _put(tmp_path, _eurlex57k_files("folders"))
    before = find_layout(folder).digests()
    assert sorted(before) == ["dev", "test", "train"]
    act = folder / "dev" / "3dev1.json"
    act.write_bytes(act.read_bytes() + b" ")
    changed = find_layout(folder).digests()
    assert {name for name in before if before[name] != changed[name]} == {"dev"}
    act.rename(folder / "dev" / "3dev9.json")
    assert find_layout(folder).digests()["dev"] != changed["dev"]


def test_broken_records_are_named(tmp_path):
    folder = _put(tmp_path, _eurlex57k_files("lines"))
    with open(folder / "dev.jsonl", "a") as file:
        file.write('{"celex_id": "x"}\n')
    with pytest.raises(UserError, match=r"dev.jsonl, line 3: field 'title' is missing"):
        list(find_layout(folder).records("validation"))


def test_unknown_data_type(tmp_path):
    (tmp_path / "eurlex.jsonl").write_bytes(_lines([*LEX_ACTS, {"data_type": "val", "text": "", "labels": []}]))
    with pytest.raises(UserError, match=r"eurlex.jsonl, line 6: field 'data_type' should be .*, not 'val'"):
        list(find_layout(tmp_path).records("train"))


def test_split_without_documents(tmp_path):
    (tmp_path / "eurlex.jsonl").write_bytes(_lines(LEX_ACTS[:2]))
    with pytest.raises(UserError, match=r"eurlex.jsonl holds no document of the test split"):
        list(find_layout(tmp_path).records("test"))


@pytest.mark.parametrize(
    ("files", "corpus", "message"),
    [
        ({}, None, r"no EUR-Lex corpus in .*; looked for eurlex57k: dataset.zip or train.jsonl\[.gz\], dev.*lexglue:"),
        ({"notes.txt": b"x"}, LEXGLUE, r"looked for lexglue: eurlex.tar.gz or eurlex.jsonl\[.gz\]"),
        ({"train.jsonl": b"{}", "test.jsonl": b"{}"}, None, r"has train.jsonl but lacks dev.jsonl.*validation.jsonl"),
        ({"dev.jsonl": b"{}"}, EURLEX57K, r"has dev.jsonl but lacks train.jsonl\[.gz\], test.jsonl"),
        (
            {f"{s}.jsonl": b'\n{"x": 1}' for s in ACTS},
            None,
            r"train.jsonl, line 2: the first record.* no field 'main_body' \(as in eurlex57k\) or 'text' \(.*found 'x'",
        ),
        ({"eurlex.jsonl": b'{"text": "x"}'}, None, "eurlex.jsonl, line 1: .* no field 'data_type'.*found 'text'"),
        ({f"{s}/1.json": b"{}" for s in ACTS}, None, "train/1.json: the first record.*found an empty object"),
        ({f"{s}.jsonl": b" \n" for s in ACTS}, None, "train.jsonl holds no record: is it empty"),
        ({"train.jsonl": b"", "train.jsonl.gz": b""}, LOCAL, r"both train.jsonl and train.jsonl.gz"),
        ({"dev.jsonl": b"", "validation.jsonl": b""}, LOCAL, r"both dev.jsonl and validation.jsonl"),
        ({"eurlex.tar.gz": b"", "dataset.zip": b""}, None, "more than one corpus: say which, eurlex57k or lexglue"),
    ],
)
def test_nothing_to_find(tmp_path, files, corpus, message):
    with pytest.raises(UserError, match=message):
        find_layout(_put(tmp_path, files), corpus)


def test_folder_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"absent is not a folder: --source"):
        find_layout(tmp_path / "absent")


def test_archive_of_something_else(tmp_path):
    layout = find_layout(_put_zip(tmp_path, {"other/file.txt": b"x"}))
    with pytest.raises(UserError, match=r"dataset.zip does not hold train.jsonl"):
        layout.unpacked(tmp_path / "work")


def test_archive_unpacks_only_the_data(tmp_path):
    files = _eurlex57k_files("lines") | {"concepts.json": b"{}", "huge.bin": b"\0" * 1000, "sub/train.jsonl": b""}
    find_layout(_put_zip(tmp_path, files)).unpacked(tmp_path / "work")
    unpacked = {path.relative_to(tmp_path / "work").as_posix() for path in (tmp_path / "work").rglob("*")}
    assert unpacked == {"train.jsonl", "dev.jsonl", "test.jsonl", "concepts.json"}


def test_local_is_not_published(tmp_path):
    with pytest.raises(UserError, match=r"local corpus is published nowhere.*--source=DIR"):
        published(LOCAL, tmp_path)


def test_published_files_are_well_formed():
    for corpus in CORPORA.values():
        if corpus.remote:
            assert corpus.remote.url.endswith("/" + corpus.remote.name)
            assert len(bytes.fromhex(corpus.remote.sha256)) == 32 and corpus.remote.size > 50_000_000
