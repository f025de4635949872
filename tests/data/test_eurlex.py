"""Preparing EUR-Lex with TFDS: what goes in comes out in order, and no interruption leaves half a corpus."""

import dataclasses
import gzip
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from altgrad_jax.data import eurlex, eurlex_corpora, eurlex_layouts
from altgrad_jax.data.documents import SPLITS, Document
from altgrad_jax.data.download import RemoteFile, sha256_of
from altgrad_jax.data.eurlex import EurlexSource, find_prepared, prepare
from altgrad_jax.errors import UserError
from tests.mounts import mounted

ACTS = {
    split: [
        {"celex_id": f"3{7 * n % count}{split}", "title": f"Act {n}", "text": f"späte {n}\n", "concepts": ["5", f"{n}"]}
        for n in range(count)
    ]
    for split, count in (("train", 12), ("dev", 3), ("test", 2))
}
CONCEPTS = {"5": "prix", "0": "zéro"}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A small corpus in the local layout; ids are out of order."""
    folder = tmp_path / "source"
    folder.mkdir()
    for split, acts in ACTS.items():
        with gzip.open(folder / f"{split}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(act) + "\n" for act in acts)
    (folder / "concepts.json").write_text(json.dumps(CONCEPTS))
    return folder


def _append(source: Path, split: str, line: str) -> None:
    with gzip.open(source / f"{split}.jsonl.gz", "at") as file:
        file.write(line + "\n")


def _documents(prepared: EurlexSource) -> dict[str, list[Document]]:
    return {split: list(prepared.documents(split)) for split in SPLITS}


def _everything(folder: Path) -> set[str]:
    """Every file below, but locks."""
    return {
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"
    }


def test_documents_come_back_in_the_source_order(tmp_path, source):
    prepared = prepare(tmp_path / "data", source=source, progress=False)
    assert prepared.name == "eurlex-local" and prepared.config == "local"
    assert "Decision 2011/833/EU" in prepared.description and "train 12, validation 3, test 2" in prepared.description
    assert prepared.splits() == SPLITS
    assert prepared.concepts() == CONCEPTS
    for split, file in zip(SPLITS, ("train", "dev", "test"), strict=True):
        assert list(prepared.documents(split)) == [
            Document(act["celex_id"], f"{act['title']}\n\n{act['text'].strip()}", tuple(act["concepts"]))
            for act in ACTS[file]
        ]
    with pytest.raises(UserError, match="no split 'dev': it has train, validation, test"):
        prepared.documents("dev")


def test_reads_with_plain_tfds(tmp_path, source):
    import tensorflow_datasets as tfds

    prepared = prepare(tmp_path, source=source, progress=False)
    acts = tfds.builder_from_directory(prepared.folder).as_data_source("validation")
    assert len(acts) == 3
    assert acts[1]["title"] == b"Act 1" and acts[1]["date"] == b"" and list(acts[1]["labels"]) == [b"5", b"1"]


def test_repeated_ids_become_unique(tmp_path, source):
    for split in ("train", "dev"):
        _append(source, split, json.dumps(ACTS["train"][0]))
    documents = _documents(prepare(tmp_path, source=source, progress=False))
    first = ACTS["train"][0]["celex_id"]
    assert documents["train"][-1].id == f"{first}#2" and documents["validation"][-1].id == f"{first}#3"
    ids = [document.id for split in SPLITS for document in documents[split]]
    assert len(ids) == len(set(ids)) == 19


def test_second_time_does_nothing(tmp_path, source):
    first = prepare(tmp_path, source=source, progress=False)
    times = {path: path.stat().st_mtime_ns for path in first.folder.iterdir()}
    again = [prepare(tmp_path, source=source), prepare(tmp_path), prepare(tmp_path, "local")]
    assert {path: path.stat().st_mtime_ns for path in first.folder.iterdir()} == times
    assert {one.fingerprint() for one in [first, *again]} == {first.fingerprint()}


def test_other_files_need_overwrite(tmp_path, source):
    before = prepare(tmp_path / "data", source=source, progress=False)
    _append(source, "dev", json.dumps(ACTS["test"][0] | {"celex_id": "new"}))
    with pytest.raises(UserError, match=r"prepared from other files .*differing: dev.jsonl.gz.*--overwrite"):
        prepare(tmp_path / "data", source=source, progress=False)
    after = prepare(tmp_path / "data", source=source, progress=False, overwrite=True)
    assert [document.id for document in after.documents("validation")][-1] == "new"
    assert after.fingerprint() != before.fingerprint()
    assert not any("incomplete" in name for name in _everything(tmp_path / "data"))


def test_fingerprint_depends_on_content_not_place(tmp_path, source, monkeypatch):
    here = prepare(tmp_path / "here", source=source, progress=False).fingerprint()
    moved = source.rename(tmp_path / "elsewhere")
    assert prepare(tmp_path / "there", source=moved, progress=False).fingerprint() == here
    assert len(bytes.fromhex(here)) == 32
    recorded = json.loads((find_prepared(tmp_path / "here")[0].folder / "source.json").read_text())["files"]
    assert recorded == {path.name: sha256_of(path) for path in moved.iterdir()}
    (moved / "concepts.json").write_text("{}")
    assert prepare(tmp_path / "other", source=moved, progress=False).fingerprint() != here
    prepared = EurlexSource("local", tmp_path / "here")
    newer = dataclasses.replace(eurlex_corpora.LOCAL, version="9.9.9")
    monkeypatch.setattr(eurlex, "CORPORA", {**eurlex.CORPORA, "local": newer})
    assert find_prepared(tmp_path / "here") == [], "it was made by other rules"
    prepared._corpus = newer
    assert prepared.fingerprint() != here


def test_error_in_the_last_split_leaves_nothing(tmp_path, source):
    _append(source, "test", '{"celex_id": ')
    with pytest.raises(UserError, match=r"test.jsonl.gz, line 3 is not valid JSON"):
        prepare(tmp_path / "data", source=source, progress=False)
    assert find_prepared(tmp_path / "data") == []
    assert _everything(tmp_path / "data") <= {"tfds/eurlex/.config/metadata.json"}


def test_error_while_overwriting_keeps_what_was_there(tmp_path, source):
    prepared = prepare(tmp_path / "data", source=source, progress=False)
    before = _documents(prepared)
    _append(source, "test", "broken")
    with pytest.raises(UserError, match="not valid JSON"):
        prepare(tmp_path / "data", source=source, progress=False, overwrite=True)
    assert _documents(find_prepared(tmp_path / "data")[0]) == before
    assert not any("incomplete" in name for name in _everything(tmp_path / "data"))


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_interruption_leaves_nothing(tmp_path, source, monkeypatch, error):
    def interrupted(self, split):
        yield from list(_records(self, split))[:1]
        if split == "validation":
            raise error

    _records = eurlex_layouts.Layout.records
    monkeypatch.setattr(eurlex_layouts.Layout, "records", interrupted)
    with pytest.raises(error):
        prepare(tmp_path / "data", source=source, progress=False)
    assert find_prepared(tmp_path / "data") == []
    monkeypatch.undo()
    assert len(_documents(prepare(tmp_path / "data", source=source, progress=False))["train"]) == 12


KILLED = """
import os, signal, sys
from altgrad_jax.data import eurlex_builder
from altgrad_jax.data.eurlex import prepare
write = eurlex_builder._write_json
def killed(path, content):
    os.kill(os.getpid(), signal.SIGKILL)
eurlex_builder._write_json = killed
prepare(sys.argv[1], source=sys.argv[2], progress=False)
"""


def test_killed_process_leaves_nothing_that_looks_prepared(tmp_path, source):
    data = tmp_path / "data"
    done = subprocess.run([sys.executable, "-c", KILLED, str(data), str(source)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert any("array_record" in name for name in _everything(data))  # it was killed late: all records were written
    assert find_prepared(data) == []
    assert len(_documents(prepare(data, source=source, progress=False))["train"]) == 12
    assert not any("incomplete" in name for name in _everything(data))


def test_folder_without_source_file_is_not_trusted(tmp_path, source):
    prepared = prepare(tmp_path, source=source, progress=False)
    (prepared.folder / "source.json").unlink()
    assert find_prepared(tmp_path) == []
    assert len(list(prepare(tmp_path, source=source, progress=False).documents("test"))) == 2


def test_two_at_once(tmp_path, source, monkeypatch):
    builds = []
    build = eurlex._build

    def counted(*args):
        builds.append(args)
        build(*args)

    monkeypatch.setattr(eurlex, "_build", counted)
    with ThreadPoolExecutor() as pool:
        calls = [pool.submit(prepare, tmp_path, "local", source, False) for _ in range(3)]
        assert len({call.result().fingerprint() for call in calls}) == 1
    assert len(builds) == 1
    assert len(_documents(find_prepared(tmp_path)[0])["train"]) == 12


@pytest.mark.slow
def test_two_processes_at_once(tmp_path, source):
    script = "import sys; from altgrad_jax.data.eurlex import prepare; prepare(sys.argv[1], source=sys.argv[2])"
    command = [sys.executable, "-c", script, str(tmp_path / "data"), str(source)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(3)]
    messages = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], messages
    assert sum(b"preparing train" in message for message in messages) == 1
    assert len(_documents(find_prepared(tmp_path / "data")[0])["train"]) == 12


@pytest.fixture
def published(tmp_path, monkeypatch):
    """Makes EURLEX57K a small zip on disk; returns the remote file. Tests alone may fetch file:// URLs."""
    act = {"celex_id": "1", "title": "T", "header": "H", "recitals": "R", "main_body": ["M"], "eurovoc_concepts": ["9"]}
    path = tmp_path / "published.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for split in ("train", "dev", "test"):
            archive.writestr(f"dataset/{split}.jsonl", json.dumps(act | {"celex_id": split}))
    remote = RemoteFile(path.as_uri(), "dataset.zip", path.stat().st_size, sha256_of(path))
    corpus = eurlex_corpora.Corpus(**(vars(eurlex_corpora.EURLEX57K) | {"remote": remote}))
    fetch = eurlex_layouts.fetch
    monkeypatch.setattr(eurlex, "EURLEX57K", corpus)
    monkeypatch.setattr(eurlex, "CORPORA", {**eurlex.CORPORA, "eurlex57k": corpus})
    monkeypatch.setattr(
        eurlex_layouts,
        "fetch",
        lambda remote, folder, progress: fetch(remote, folder, progress=progress, schemes=("file",)),
    )
    return path


@pytest.mark.parametrize("config", [None, "eurlex57k"])
def test_download(tmp_path, published, config):
    prepared = prepare(tmp_path / "data", config, progress=False)
    assert prepared.name == "eurlex-eurlex57k" and "CC BY-SA 4.0" in prepared.description
    assert list(prepared.documents("validation")) == [Document("dev", "T\n\nH\nR\nM", ("9",))]
    assert prepared.concepts() == {}
    assert (tmp_path / "data" / "downloads" / "dataset.zip").is_file()
    assert json.loads((prepared.folder / "source.json").read_text())["files"] == {"dataset.zip": sha256_of(published)}
    assert not (prepared.folder / "archive").exists() and "archive" not in "".join(_everything(tmp_path / "data"))
    # The same file from a folder is the same corpus.
    (tmp_path / "copy").mkdir()
    published.rename(tmp_path / "copy" / "dataset.zip")
    assert prepare(tmp_path / "data", source=tmp_path / "copy", progress=False).fingerprint() == prepared.fingerprint()


def test_failed_download(tmp_path, published):
    published.write_bytes(published.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=r"dataset.zip from .* is not the published file: expected sha256"):
        prepare(tmp_path / "data", progress=False)
    assert find_prepared(tmp_path / "data") == []


def test_several_prepared(tmp_path, source, published):
    assert find_prepared(tmp_path / "data") == [] == find_prepared(tmp_path / "absent")
    prepare(tmp_path / "data", source=source, progress=False)
    prepare(tmp_path / "data", "eurlex57k", progress=False)
    assert [one.config for one in find_prepared(tmp_path / "data")] == ["eurlex57k", "local"]
    assert prepare(tmp_path / "data", progress=False).config == "eurlex57k"


@pytest.mark.parametrize(
    ("config", "message"),
    [("eurlex", "no EUR-Lex config 'eurlex': did you mean 'eurlex57k'"), ("local", "published nowhere")],
)
def test_nothing_to_prepare(tmp_path, config, message):
    with pytest.raises(UserError, match=message):
        prepare(tmp_path, config, progress=False)


def test_not_prepared(tmp_path):
    with pytest.raises(
        UserError, match=r"EUR-Lex \(lexglue\) is not prepared in .*: run python -m altgrad_jax.data prepare"
    ):
        EurlexSource("lexglue", tmp_path)


def test_missing_source(tmp_path):
    with pytest.raises(UserError, match="absent is not a folder"):
        prepare(tmp_path, source=tmp_path / "absent", progress=False)


def test_unwritable_data_dir(tmp_path, source):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file.* cannot be written: "):
        prepare(tmp_path / "file", source=source, progress=False)


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "info", "features", "source", "fewer"])
def test_damaged_data_is_named(tmp_path, source, damage):
    folder = prepare(tmp_path, source=source, progress=False).folder
    (records,) = folder.glob("*train.array_record*")
    content = bytearray(records.read_bytes())
    if damage == "flip":
        content[content.rindex(b"Act 11") if b"Act 11" in content else 200] ^= 1
        records.write_bytes(content)
    elif damage == "truncate":
        records.write_bytes(content[: len(content) // 2])
    elif damage == "delete":
        records.unlink()
    elif damage == "info":
        (folder / "dataset_info.json").write_text("{")
    elif damage == "features":
        (folder / "features.json").unlink()
    elif damage == "source":
        (folder / "source.json").write_text('{"files": {}}')
    else:
        (folder / "source.json").write_text((folder / "source.json").read_text().replace("12", "13"))
    with pytest.raises(UserError, match=r"damaged.* prepare"):
        list(EurlexSource("local", tmp_path).documents("train"))


def test_too_large_a_split(tmp_path, source, monkeypatch):
    from altgrad_jax.data import eurlex_builder

    monkeypatch.setattr(eurlex_builder, "MAX_SPLIT_BYTES", 11 * 1024)
    with pytest.raises(UserError, match="the train split is larger than 11,264 bytes"):
        prepare(tmp_path, source=source, progress=False)


def test_no_network_and_no_noise(tmp_path, source, monkeypatch, capfd):
    from tensorflow_datasets.core.utils import tqdm_utils

    def refuse(*args, **options):
        raise AssertionError("no network access is needed")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    level, stdout = logging.getLogger("absl").level, sys.stdout
    list(prepare(tmp_path / "data", source=source, progress=False).documents("train"))
    assert capfd.readouterr() == ("", "")
    assert list(temporary.iterdir()) == []
    assert (tqdm_utils._active, logging.getLogger("absl").level, sys.stdout) == (True, level, stdout)
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["downloads", "tfds"]
    assert list((tmp_path / "data" / "downloads").iterdir()) == []


def test_progress_is_ours_alone(tmp_path, source, capfd):
    prepare(tmp_path, source=source, progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert [line.split("documents")[0].strip() for line in err.splitlines()] == [
        "preparing train 12/12",
        "preparing validation 3/3",
        "preparing test 2/2",
    ]


def test_knowing_what_is_prepared_needs_no_tfds(tmp_path, source):
    prepared = prepare(tmp_path, source=source, progress=False)
    script = (
        "import sys; from altgrad_jax.data.eurlex import find_prepared; (one,) = find_prepared(sys.argv[1]);"
        "print(one.fingerprint(), *one.splits(), one.name, len(one.concepts()));"
        "assert not {'tensorflow_datasets', 'array_record', 'tensorflow'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [prepared.fingerprint(), *SPLITS, "eurlex-local", "2"]


def test_builder_runs_on_its_own(tmp_path, published, monkeypatch):
    from altgrad_jax.data import eurlex_builder

    monkeypatch.setattr(eurlex_builder, "CORPORA", eurlex.CORPORA)
    builder = eurlex_builder.Eurlex(config="eurlex57k", data_dir=tmp_path / "tfds", file_format="array_record")
    builder.download_and_prepare()
    assert [act["id"] for act in builder.as_data_source("test")] == [b"test"]
    assert (tmp_path / "tfds" / "downloads" / "dataset.zip").is_file()
    assert list(eurlex_builder.Eurlex.builder_configs) == ["eurlex57k", "lexglue", "local"]
    assert os.fspath(builder.data_dir).endswith("eurlex/eurlex57k/1.0.0")


@pytest.mark.parametrize("size", ["nr_inodes=12", "size=8k"])
def test_a_disk_that_fills_up_is_one_line(tmp_path, source, size):
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", size, "tmpfs") as folder:
        with pytest.raises(UserError, match=r"cannot be written: No space left on device: ") as caught:
            prepare(folder, source=source, progress=False)
        assert "\n" not in str(caught.value)
