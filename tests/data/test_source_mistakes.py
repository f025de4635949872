"""What is wrong in files of one's own is one line with the file, the line and the cause."""

import json
import zipfile
from pathlib import Path

import pytest

from altgrad_jax.data.eurlex import prepare
from altgrad_jax.data.eurlex_layouts import find_layout
from altgrad_jax.data.textfiles import TextFiles
from altgrad_jax.errors import UserError

ACT = {"celex_id": "32019R0001", "title": "On goods", "text": "Goods.", "concepts": ["5", 7], "date": "2019-01-01"}
FULL = {"celex_id": "1", "title": "T", "header": "H", "recitals": "R", "main_body": ["M"], "eurovoc_concepts": ["9"]}
LEX = {"data_type": "train", "text": "Goods.", "labels": ["100168"]}
LAYOUTS = {"local": ACT, "eurlex57k": FULL, "lexglue": LEX}


def write(folder: Path, split: str, records: list) -> Path:
    path = folder / f"{split}.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def corpus(folder: Path, layout: str, record: dict) -> Path:
    """A corpus of the layout, sound but for its training split's second record."""
    sound = LAYOUTS[layout]
    if layout == "lexglue":
        others = [sound | {"data_type": split} for split in ("dev", "test")]
        return write(folder, "eurlex", [sound, record, *others])
    for split in ("dev", "test"):
        write(folder, split, [sound])
    return write(folder, "train", [sound, record])


@pytest.mark.parametrize(
    ("layout", "change", "cause"),
    [
        ("local", {"celex_id": None}, "field 'celex_id' is null"),
        ("local", {"celex_id": ""}, "field 'celex_id' is empty"),
        ("local", {"celex_id": "32019R0001\n"}, "field 'celex_id' has white space around it"),
        ("local", {"celex_id": ["x"]}, "field 'celex_id' should be a string, not list"),
        ("local", {"text": None}, "field 'text' is null"),
        ("local", {"title": 5}, "field 'title' should be a string, not int"),
        ("local", {"date": {}}, "field 'date' should be a string, not dict"),
        ("local", {"concepts": ["5", ""]}, r"field 'concepts\[1\]' is empty"),
        ("local", {"concepts": [" 1"]}, r"field 'concepts\[0\]' has white space around it: ' 1'"),
        ("local", {"concepts": ["\u00a05"]}, r"field 'concepts\[0\]' has white space around it"),
        ("local", {"concepts": [None]}, r"field 'concepts\[0\]' should be a string, not null"),
        ("local", {"concepts": "5"}, "field 'concepts' should be a list, not str"),
        ("eurlex57k", {"eurovoc_concepts": None}, "field 'eurovoc_concepts' is null"),
        ("eurlex57k", {"eurovoc_concepts": ["1", "2 "]}, r"field 'eurovoc_concepts\[1\]' has white space"),
        ("eurlex57k", {"celex_id": " "}, "field 'celex_id' is empty or blank"),
        ("eurlex57k", {"main_body": ["M", None]}, r"field 'main_body\[1\]' should be a string, not null"),
        ("eurlex57k", {"recitals": 3}, "field 'recitals' should be a list, not int"),
        ("lexglue", {"data_type": None}, "field 'data_type' is null"),
        ("lexglue", {"labels": None}, "field 'labels' is null"),
        ("lexglue", {"labels": ["100168", ""]}, r"field 'labels\[1\]' is empty"),
        ("lexglue", {"labels": [4, 20]}, "label '4' is no concept of LexGLUE"),
        ("lexglue", {"text": ["Goods."]}, "field 'text' should be a string, not list"),
    ],
)
def test_every_field_of_every_layout(tmp_path, layout, change, cause):
    path = corpus(tmp_path, layout, LAYOUTS[layout] | change)
    with pytest.raises(UserError, match=f"^{path}, line 2: {cause}"):
        list(find_layout(tmp_path).records("train"))


@pytest.mark.parametrize(
    ("concepts", "cause"),
    [
        ({"5": "price", "2": None}, "field '2' is null"),
        ({"5": ["price"]}, "field '5' should be a string, not list"),
        ({"": "price"}, "is empty"),
        ({"5 ": "price"}, "has white space around it"),
        (["5"], "should be a JSON object, not list"),
    ],
)
def test_names_of_concepts(tmp_path, concepts, cause):
    corpus(tmp_path, "local", ACT)
    (tmp_path / "concepts.json").write_text(json.dumps(concepts))
    with pytest.raises(UserError, match=f"^{tmp_path}/concepts.json.*{cause}"):
        prepare(tmp_path / "data", source=tmp_path, progress=False)


@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_an_empty_file(tmp_path, split):
    corpus(tmp_path, "local", ACT)
    (tmp_path / f"{split}.jsonl").write_text("\n")
    cause = "holds no record" if split == "train" else "holds no document"
    with pytest.raises(UserError, match=f"{split}.jsonl {cause}"):
        prepare(tmp_path / "data", source=tmp_path, progress=False)


def test_ids_that_return_where_they_decide_the_split(tmp_path):
    records = [{"id": f"act {n % 59}", "text": f"Goods {n}."} for n in range(60)]
    path = write(tmp_path, "x", records)
    with pytest.raises(UserError, match=f"^{path}, line 60: the id 'act 0' is that of {path}, line 1 too; ids decide"):
        TextFiles(path).splits()
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub", "a", records[:59])
    later = write(tmp_path / "sub", "b", [{"id": "act 7", "text": "x"}])
    with pytest.raises(UserError, match=f"^{later}, line 1: the id 'act 7' is that of .*a.jsonl, line 8 too"):
        TextFiles(tmp_path / "sub").splits()
    named = tmp_path / "named"
    named.mkdir()
    for split in ("train", "validation"):
        write(named, split, records[:5])
    assert TextFiles(named).splits() == ("train", "validation"), "names of files decide there"


def test_an_archive_of_something_else_is_not_called_the_published_one(tmp_path, capsys):
    with zipfile.ZipFile(tmp_path / "dataset.zip", "w") as archive:
        for split in ("train", "dev", "test"):
            archive.writestr(f"{split}.jsonl", json.dumps(FULL | {"celex_id": split}))
    prepared = prepare(tmp_path / "data", source=tmp_path)
    err = capsys.readouterr().err
    assert f"note: {tmp_path}/dataset.zip is not the archive published at http" in err and "SHA-256" in err
    assert "57,000" not in prepared.description
    assert prepared.description.startswith(
        "EU acts laid out as eurlex57k, from files that are not its published archive"
    )
    assert "train 1, validation 1, test 1" in prepared.description


def test_left_out_labels_are_told(tmp_path, capsys):
    corpus(tmp_path, "lexglue", LEX | {"labels": ["100178", "100168", "100289"]})
    prepared = prepare(tmp_path / "data", source=tmp_path)
    told = "2 labels of 1 documents are none of the 100 and were left out"
    assert f"note: {told}\n" in capsys.readouterr().err and prepared.description.endswith(told)
    assert [document.labels for document in prepared.documents("train")] == [("100168",)] * 2
