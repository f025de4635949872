"""Building token caches: what is built, once, and whole or not at all."""

import dataclasses
import errno
import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from altgrad_jax.data import cache_build, hashed_files
from altgrad_jax.data.cache import TokenCache, find_caches, open_cache
from altgrad_jax.data.cache_build import build_cache
from altgrad_jax.data.cache_header import cache_key, token_dtype
from altgrad_jax.data.documents import Document
from altgrad_jax.data.locks import exclusive
from altgrad_jax.data.tokenizer import BpeTokenizer
from altgrad_jax.errors import UsageError, UserError
from tests.data.tiny_source import TEXTS, KnownSource, TinySource, flat_ids, listing


@pytest.fixture
def built(tmp_path) -> TokenCache:
    return build_cache(KnownSource(), "bytes", 257, tmp_path, progress=False)


def test_batches_of_documents_make_no_difference(tmp_path, monkeypatch):
    texts = {"train": ["x" * n for n in range(40)]}
    whole = build_cache(TinySource(texts), "bytes", 257, tmp_path / "a", progress=False)
    monkeypatch.setattr(cache_build, "BATCH_DOCUMENTS", 3)
    monkeypatch.setattr(cache_build, "BATCH_CHARACTERS", 50)
    assert build_cache(TinySource(texts), "bytes", 257, tmp_path / "b", progress=False) == dataclasses.replace(
        whole, path=tmp_path / "b" / whole.path.name
    )
    assert whole.tokens("train").tolist() == flat_ids(texts["train"])


def test_bpe_is_trained_on_the_train_split_and_noted_when_small(tmp_path, capsys):
    source = TinySource()
    cache = build_cache(source, "bpe", 1000, tmp_path)
    assert source.read == ["train", "train", "validation", "test"]
    assert cache.tokenizer().fingerprint() == BpeTokenizer.train(TEXTS["train"], 1000).fingerprint()
    told = cache.header.tokenizer
    assert (told.kind, told.requested_vocab_size) == ("bpe", 1000) and 257 < told.vocab_size < 1000
    assert f"a vocabulary of {told.vocab_size}, less than the 1000 asked for" in capsys.readouterr().err
    ids, end = cache.tokens("train").tolist(), cache.tokenizer().end_of_text
    assert cache.tokenizer().decode(ids).split("<|endoftext|>")[0] == TEXTS["train"][0]
    assert ids.count(end) == len(TEXTS["train"])  # not also for the text that looks like it


def test_large_vocabularies_take_four_bytes(tmp_path, monkeypatch):
    assert [token_dtype(n) for n in (257, 65536, 65537)] == ["uint16", "uint16", "uint32"]
    every_pair = BpeTokenizer((left, right) for left in range(256) for right in range(256))
    monkeypatch.setattr(cache_build, "make_tokenizer", lambda *args: every_pair)
    cache = build_cache(TinySource(), "bpe", 70000, tmp_path, progress=False)
    assert cache.tokens("train").dtype == np.uint32 and cache.vocab_size == 256 + 65536 + 1
    assert cache.tokens("train").max() == 65792
    assert cache.tokenizer().decode(cache.tokens("validation")[:-1]) == TEXTS["validation"][0]


def test_progress_is_silent_when_told_so(tmp_path, capfd):
    build_cache(TinySource(), "bpe", 1000, tmp_path, progress=False)
    assert capfd.readouterr() == ("", "")


def test_a_cache_is_reused_and_a_different_request_is_not(tmp_path):
    first = build_cache(TinySource(), "bytes", 257, tmp_path, progress=False)
    again = TinySource()
    assert build_cache(again, "bytes", 50257, tmp_path, progress=False) == first  # bytes are 257 whatever is asked
    assert again.read == []
    changed = {**TEXTS, "test": ["other"]}
    others = [
        build_cache(TinySource(changed), "bytes", 257, tmp_path, progress=False),
        build_cache(TinySource(), "bpe", 262, tmp_path, progress=False),
        build_cache(TinySource(), "bpe", 261, tmp_path, progress=False),
    ]
    assert len({cache.path for cache in [first, *others]}) == len({cache.sha256 for cache in [first, *others]}) == 4
    assert first.path.name == f"tiny-bytes257-{cache_key(TinySource().fingerprint(), 'bytes', 257)[:12]}"
    with pytest.raises(UsageError, match="unknown tokenizer"):
        build_cache(TinySource(), "words", 257, tmp_path)


def test_the_data_hash_is_of_the_data_alone(tmp_path, monkeypatch):
    one = build_cache(TinySource(), "bpe", 300, tmp_path / "one", progress=False)
    monkeypatch.setattr(cache_build, "__version__", "9.9")
    monkeypatch.setattr(cache_build, "_entropy", lambda counts: 1.0)
    elsewhere = KnownSource(description="the same lines from /another/place")
    two = build_cache(elsewhere, "bpe", 300, tmp_path / "two", progress=False)
    assert two.sha256 == one.sha256 and two.header.checksum != one.header.checksum
    swapped = {**TEXTS, "train": TEXTS["train"][::-1]}
    forgetful = TinySource(swapped)  # its fingerprint does not tell
    monkeypatch.setattr(forgetful, "fingerprint", TinySource().fingerprint)
    three = build_cache(forgetful, "bpe", 300, tmp_path / "three", progress=False)
    assert three.header.tokenizer == one.header.tokenizer and three.sha256 != one.sha256


def test_ids_come_back_as_the_source_gave_them(tmp_path, monkeypatch):
    source, ids = TinySource({"train": ["a", "b", "c"]}), ["two\nlines", "", "name \udc80\\u000a"]
    monkeypatch.setattr(source, "documents", lambda split: iter([Document(id=i, text="x") for i in ids]))
    assert build_cache(source, "bytes", 257, tmp_path, progress=False).document_ids("train") == ids


def test_a_damaged_cache_is_not_rebuilt_behind_the_users_back(built):
    (built.path / "test.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"test.bin has 0 bytes instead of 10"):
        build_cache(KnownSource(), "bytes", 257, built.path.parent, progress=False)


def test_a_cache_under_another_ones_name(built):
    other = TinySource({"train": ["x"]})
    name = f"tiny-bytes257-{cache_key(other.fingerprint(), 'bytes', 257)[:12]}"
    built.path.rename(built.path.with_name(name))
    with pytest.raises(UserError, match="was built from something else than its name says"):
        build_cache(other, "bytes", 257, built.path.parent, progress=False)


class Failing(TinySource):
    """Dies in the middle of the validation split."""

    how: str = "raise"

    def documents(self, split: str) -> Iterator[Document]:
        yield from super().documents(split)
        if split == "validation":
            if self.how == "kill":
                os.kill(os.getpid(), 9)
            raise RuntimeError("the power went")


def kill_yourself(root: Path) -> None:
    source = Failing()
    source.how = "kill"
    build_cache(source, "bytes", 257, root, progress=False)


def test_an_exception_while_building_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError, match="the power went"):
        build_cache(Failing(), "bytes", 257, tmp_path, progress=False)
    assert listing(tmp_path) == [] and find_caches(tmp_path) == []
    assert build_cache(TinySource(), "bytes", 257, tmp_path, progress=False).splits == tuple(TEXTS)


def test_what_a_killed_process_left_is_no_cache_and_is_cleared_away(tmp_path):
    process = multiprocessing.get_context("spawn").Process(target=kill_yourself, args=(tmp_path,))
    process.start()
    process.join(60)
    assert process.exitcode == -9
    [left] = listing(tmp_path)
    assert left.endswith(".building") and (tmp_path / left / "train.bin").exists()
    assert find_caches(tmp_path) == []
    other = build_cache(TinySource({"train": ["x"]}), "bytes", 257, tmp_path, progress=False)  # any build clears it
    assert listing(tmp_path) == [other.path.name]


def test_an_unfinished_cache_whose_builder_lives_is_left_alone(tmp_path):
    alive, dead = tmp_path / ".alive.building", tmp_path / ".dead.building"
    for folder in (alive, dead):
        folder.mkdir()
        (folder / "train.bin").write_bytes(b"..")
    with exclusive(tmp_path / ".alive.lock"):
        build_cache(TinySource(), "bytes", 257, tmp_path, progress=False)
    assert (alive / "train.bin").exists() and not dead.exists()


def build_in_process(root: Path, log: Path, results: "multiprocessing.Queue[str]") -> None:
    results.put(build_cache(TinySource(log=log, pause=0.05), "bytes", 257, root, progress=False).sha256)


def test_processes_at_once_build_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    results: multiprocessing.Queue[str] = context.Queue()
    log = tmp_path / "log"
    arguments = (tmp_path / "cache", log, results)
    processes = [context.Process(target=build_in_process, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    hashes = {results.get(timeout=60) for _ in processes}
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert len(hashes) == 1
    assert log.read_text().split() == ["train", "validation", "test"]
    [name] = listing(tmp_path / "cache")
    assert open_cache(tmp_path / "cache" / name).sha256 in hashes


def test_who_waits_says_so_and_reuses(tmp_path, capsys, monkeypatch):
    done = build_cache(TinySource(), "bytes", 257, tmp_path / "other", progress=False)
    folder = tmp_path / "root" / done.path.name

    def wait(path, on_wait):
        on_wait()
        done.path.rename(folder)  # the other process finishes meanwhile
        return exclusive(path)

    monkeypatch.setattr(cache_build, "exclusive", wait)
    source = TinySource()
    assert build_cache(source, "bytes", 257, tmp_path / "root").path == folder
    assert source.read == [] and f"another process is building {folder}; waiting for it" in capsys.readouterr().err


@pytest.mark.parametrize("texts", [{"train": []}, {"train": ["x"], "test": []}])
def test_an_empty_split(tmp_path, texts):
    empty = "test" if "test" in texts else "train"
    with pytest.raises(UserError, match=f"the split '{empty}' of the corpus 'tiny' has no documents"):
        build_cache(TinySource(texts), "bytes", 257, tmp_path, progress=False)
    assert listing(tmp_path) == []


def test_a_source_that_changes_while_it_is_read(tmp_path, monkeypatch):
    source = TinySource()
    monkeypatch.setattr(source, "fingerprint", iter(["a" * 64, "b" * 64]).__next__)
    with pytest.raises(UserError, match="the corpus 'tiny' changed while it was being read"):
        build_cache(source, "bytes", 257, tmp_path, progress=False)
    assert listing(tmp_path) == []


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_a_document_that_is_no_unicode_is_named(tmp_path, kind):
    with pytest.raises(
        UserError, match=r"document 'train/1': the text holds a lone surrogate \(U\+D800 at character 3"
    ):
        build_cache(TinySource({"train": ["fine", "bad\ud800"]}), kind, 300, tmp_path, progress=False)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError,
        match=r"file/cache cannot be written: Not a directory: .*file is a file, .*--config.data.data_dir=DIR",
    ):
        build_cache(TinySource(), "bytes", 257, tmp_path / "file" / "cache", progress=False)


@pytest.mark.parametrize("call", ["open", "fsync", "rename"])
def test_a_full_disk_is_told_and_leaves_nothing(tmp_path, monkeypatch, call):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*((hashed_files, "open") if call == "open" else (hashed_files.os, call)), full, raising=False)
    with pytest.raises(
        UserError, match=r"cannot be written: No space left on device: .*; make more room, or give another"
    ):
        build_cache(TinySource(), "bytes", 257, tmp_path, progress=False)
    monkeypatch.undo()
    assert listing(tmp_path) == []


def test_files_are_on_disk_before_the_name_is(tmp_path, monkeypatch):
    synced: set[str] = set()
    fsync, rename = os.fsync, os.rename

    def noting_fsync(handle):
        synced.add(os.path.basename(os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    def checking_rename(unfinished, folder):
        assert set(os.listdir(unfinished)) | {Path(unfinished).name} <= synced
        rename(unfinished, folder)

    monkeypatch.setattr(hashed_files.os, "fsync", noting_fsync)
    monkeypatch.setattr(hashed_files.os, "rename", checking_rename)
    build_cache(TinySource(), "bytes", 257, tmp_path / "root", progress=False)
    assert {"header.json", "train.bin", "root"} <= synced
