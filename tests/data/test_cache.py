"""The token cache: what is in it, that damage is always told, and that building is atomic."""

import copy
import dataclasses
import errno
import hashlib
import json
import math
import multiprocessing
import os
import pickle
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from altgrad_jax.data import cache_build, hashed_files
from altgrad_jax.data.cache import TokenCache, escape_id, find_caches, open_cache, unescape_id
from altgrad_jax.data.cache_build import build_cache
from altgrad_jax.data.cache_header import CacheHeader, cache_key, parse_header, token_dtype
from altgrad_jax.data.documents import Document
from altgrad_jax.data.locks import exclusive
from altgrad_jax.data.tokenizer import BpeTokenizer, BytesTokenizer
from altgrad_jax.errors import UsageError, UserError

TEXTS = {
    "train": ["The Member States shall ensure it.", "", "naïve façade €5 <|endoftext|>", "The Member States shall."],
    "validation": ["The authority shall ensure that."],
    "test": ["a", "bc"],
}


@dataclass
class TinySource:
    """A source that keeps a record of the splits read, in memory and, for other processes, in a file."""

    texts: dict[str, list[str]] = field(default_factory=lambda: TEXTS)
    name: str = "tiny"
    description: str = "a few lines"
    log: Path | None = None
    pause: float = 0.0
    read: list[str] = field(default_factory=list)

    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.texts, sort_keys=True).encode()).hexdigest()

    def splits(self) -> tuple[str, ...]:
        return tuple(self.texts)

    def documents(self, split: str) -> Iterator[Document]:
        self.read.append(split)
        if self.log is not None:
            with open(self.log, "a") as log:
                log.write(f"{split}\n")
        for i, text in enumerate(self.texts[split]):
            time.sleep(self.pause)
            yield Document(id=f"{split}/{i}", text=text)


class KnownSource(TinySource):
    def nats(self, split: str) -> float:
        return 10.0 * len(self.texts[split])


@pytest.fixture
def built(tmp_path) -> TokenCache:
    return build_cache(KnownSource(), "bytes", 257, tmp_path, progress=False)


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def flat_ids(texts: list[str], end: int = 256) -> list[int]:
    return [i for text in texts for i in [*text.encode(), end]]


def test_contents(built):
    assert built.splits == ("train", "validation", "test")
    assert (built.vocab_size, built.header.dtype, built.tokenizer().kind) == (257, "uint16", "bytes")
    for split, texts in TEXTS.items():
        tokens = built.tokens(split)
        assert isinstance(tokens, np.memmap) and tokens.dtype == np.uint16 and not tokens.flags.writeable
        assert tokens.tolist() == flat_ids(texts)
        assert (built.path / f"{split}.bin").read_bytes() == np.array(flat_ids(texts), "<u2").tobytes()
        lengths = [len(text.encode()) + 1 for text in texts]
        assert built.document_starts(split).tolist() == [sum(lengths[:i]) for i in range(len(lengths))]
        assert built.document_ids(split) == [f"{split}/{i}" for i in range(len(texts))]
        header = built.split_header(split)
        assert (header.documents, header.tokens) == (len(texts), sum(lengths))
        assert header.utf8_bytes == sum(lengths) - len(texts)
    with pytest.raises(UserError, match="'tiny' has no split 'dev'; it has train, validation, test"):
        built.tokens("dev")


def test_entropies(built):
    counts = Counter(flat_ids(TEXTS["train"]))
    total = sum(counts.values())
    expected = -math.fsum(n / total * math.log(n / total) for n in counts.values())
    assert built.split_header("train").unigram_nats == pytest.approx(expected, rel=1e-12)
    assert built.entropy_floor("train") == 10.0 * 4 / total
    assert built.entropy_floor("test") == 10.0 * 2 / 5


def test_entropy_floor_is_unknown_for_most_sources(tmp_path):
    assert build_cache(TinySource(), "bytes", 257, tmp_path, progress=False).entropy_floor("train") is None


def test_documents_of_every_range(tmp_path):
    texts = ["ab", "", "c", "", "", "def"]
    built = build_cache(TinySource({"train": texts}), "bytes", 257, tmp_path, progress=False)
    owner = [f"train/{i}" for i, text in enumerate(texts) for _ in range(len(text.encode()) + 1)]
    for start in range(len(owner) + 1):
        for stop in range(start, len(owner) + 1):
            assert built.documents_in("train", start, stop) == list(dict.fromkeys(owner[start:stop]))
    for start, stop in ((-1, 3), (3, 2), (0, len(owner) + 1)):
        with pytest.raises(IndexError):
            built.documents_in("train", start, stop)


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


def test_header_round_trip_and_pickling(built):
    text = (built.path / "header.json").read_bytes()
    assert parse_header(text) == built.header
    assert built.header.to_json().encode() == text and built.header.sealed() == built.header
    assert pickle.loads(pickle.dumps(built)) == built
    assert built.header.created_by.startswith("altgrad_jax ")


def test_ids_come_back_as_the_source_gave_them(tmp_path, monkeypatch):
    source, ids = TinySource({"train": ["a", "b", "c"]}), ["two\nlines", "", "name \udc80\\u000a"]
    monkeypatch.setattr(source, "documents", lambda split: iter([Document(id=i, text="x") for i in ids]))
    assert build_cache(source, "bytes", 257, tmp_path, progress=False).document_ids("train") == ids


@given(st.lists(st.text(st.characters()), min_size=1))
@example(["\u2028\u2029\x85\r\x0b\x1c", "\\u0041", "\udc80", "", "é"])
def test_ids_of_any_kind_take_one_line_each(ids):
    lines = "".join(f"{escape_id(i)}\n" for i in ids).encode().decode().splitlines()
    assert [unescape_id(line) for line in lines] == ids


def test_reading_needs_no_optional_library(built):
    program = f"""
import sys
for name in ("tokenizers", "tiktoken", "tensorflow_datasets", "array_record", "rich", "jax"): sys.modules[name] = None
from altgrad_jax.data.cache import open_cache
cache = open_cache({str(built.path)!r})
assert cache.tokenizer().decode(cache.tokens("test")[:1]) == "a"
"""
    subprocess.run([sys.executable, "-c", program], check=True)


# Damage.

FILES = ["header.json", "tokenizer.json"] + [f"{s}{end}" for s in TEXTS for end in (".bin", ".starts.npy", ".ids.txt")]


def open_and_use(path: Path, verify: bool) -> None:
    cache = open_cache(path, verify)
    cache.tokenizer()
    for split in cache.splits:
        cache.tokens(split)
        cache.document_starts(split)
        cache.document_ids(split)
        cache.documents_in(split, 0, 1)
        cache.entropy_floor(split)


def assert_told(path: Path, file: str) -> None:
    with pytest.raises(UserError) as caught:
        open_cache(path)
    message = str(caught.value)
    assert file in message and str(path) in message and "\n" not in message
    assert "delete that folder, and the next run builds it again" in message


@pytest.mark.parametrize("file", FILES)
def test_every_flipped_bit_and_every_cut_is_told(built, file):
    path = built.path / file
    data = path.read_bytes()
    places = sorted({*range(0, len(data), max(1, len(data) // 40)), len(data) - 1})
    for place in places:
        flipped = bytearray(data)
        flipped[place] ^= 1 << (place % 8)
        path.write_bytes(flipped)
        assert_told(built.path, file)
        path.write_bytes(data[:place])
        assert_told(built.path, file)
    path.write_bytes(data + b"\x00")
    assert_told(built.path, file)
    path.unlink()
    assert_told(built.path, file)
    path.mkdir()
    assert_told(built.path, file)
    path.rmdir()
    path.write_bytes(data)
    assert open_cache(built.path) == built


@pytest.mark.filterwarnings("ignore:invalid escape sequence")  # from NumPy's reading of a damaged .npy header
@pytest.mark.parametrize("file", FILES)
@given(data=st.data())
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_without_verification_damage_is_a_user_error_or_harmless(built, file, data):
    path = built.path / file
    original = path.read_bytes()
    edits = st.tuples(st.integers(0, len(original) - 1), st.integers(0, len(original)), st.binary(max_size=20))
    start, stop, middle = data.draw(edits)
    path.write_bytes(original[:start] + middle + original[max(start, stop) :])
    try:
        open_and_use(built.path, verify=False)
    except UserError:
        pass
    finally:
        path.write_bytes(original)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)


def paths_in(value: object, path: tuple = ()) -> Iterator[tuple]:
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from paths_in(inner, (*path, key))


def replaced(tree: object, path: tuple, value: object) -> object:
    if not path:
        return value
    tree = copy.copy(tree)
    tree[path[0]] = replaced(tree[path[0]], path[1:], value)  # type: ignore[index]  # a JSON tree, as loose as it is
    return tree


@given(data=st.data())
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_mutated_header_is_believed(built, data):
    """With the old hashes it is refused; with hashes made to fit, it is refused or the files fit it."""
    path = built.path / "header.json"
    original = path.read_text()
    fields = json.loads(original)
    where = data.draw(st.sampled_from(list(paths_in(fields))))
    mutated = replaced(fields, where, data.draw(JSON | st.sampled_from([-1, 0, 1, 2**63, 10**4000, "e0m7", math.nan])))
    try:
        for refit in (False, True):
            if refit:
                try:
                    mutated = dataclasses.asdict(sealed_again(mutated))
                except (TypeError, KeyError, AttributeError, ValueError, RecursionError):
                    break  # too far from a header to have hashes
            path.write_text(json.dumps(mutated, indent=2) + "\n")
            try:
                open_and_use(built.path, verify=True)
            except UserError:
                continue
            assert refit or parse_header(path.read_bytes()) == built.header
    finally:
        path.write_text(original)


def sealed_again(fields: Any) -> CacheHeader:
    from altgrad_jax.data import cache_header as h

    return CacheHeader(
        **{
            **fields,
            "source": h.SourceHeader(**fields["source"]),
            "tokenizer": h.TokenizerHeader(**fields["tokenizer"]),
            "splits": tuple(h.SplitHeader(**split) for split in fields["splits"]),
        }
    ).sealed()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"splits": "train"}, "has no list in the header.splits"),
        ({"dtype": "uint32"}, "does not describe a known tokenizer and its number type"),
        ({"key": "../.."}, "has a malformed key"),
        ({"splits": []}, "does not name splits of a corpus"),
        ({"format_version": True}, "has no int in the header.format_version"),
        ({"created_by": None}, "has no str in the header.created_by"),
        ({"extra": 1}, "has not the fields of version 1 in the header"),
        ({"format_version": 2}, "has format version 2, and this version of altgrad_jax reads 1"),
        ({"sha256": "0" * 64}, "does not match its own checksum"),
    ],
)
def test_headers_that_are_refused(built, change, message):
    fields = json.loads(built.header.to_json()) | change
    if {"dtype", "key", "splits"} & change.keys() and change.get("splits") != "train":
        fields = dataclasses.asdict(sealed_again(fields))
    with pytest.raises(ValueError, match=message):
        parse_header(json.dumps(fields).encode())


@pytest.mark.parametrize("text", [b"", b"\xff", b"[" * 100_000, b"9" * 5000, b"{", b'{"format_version": "1"}'])
def test_what_is_no_header_at_all(built, text):
    (built.path / "header.json").write_bytes(text)
    assert_told(built.path, "header.json")


def test_tables_that_do_not_fit_are_told_though_their_hashes_do(built):
    """As a defect of ours, or a forger, would write them."""

    def reseal(file: str, member: str, content: bytes) -> None:
        (built.path / file).write_bytes(content)
        fields = json.loads(built.header.to_json())
        fields["splits"][0][member] = hashlib.sha256(content).hexdigest()
        (built.path / "header.json").write_text(sealed_again(fields).to_json())

    ids = (built.path / "train.ids.txt").read_bytes()
    for lines in (ids + b"one too many\n", ids[:-1], b"", b"\xff\n\n\n\n", b"0\n1\n2\n3\n4"):
        reseal("train.ids.txt", "ids_sha256", lines)
        assert_told(built.path, "train.ids.txt")
    (built.path / "train.ids.txt").write_bytes(ids)
    starts = built.document_starts("train")
    for i, table in enumerate(
        (starts + 1, starts[::-1], starts[:-1], starts * 1000, starts.astype(np.float64), np.int64(0))
    ):
        np.save(built.path / f"{i}.npy", table)
        reseal("train.starts.npy", "starts_sha256", (built.path / f"{i}.npy").read_bytes())
        assert_told(built.path, "train.starts.npy")
    np.save(built.path / "pickled.npy", np.array([{}] * 4, dtype=object), allow_pickle=True)
    reseal("train.starts.npy", "starts_sha256", (built.path / "pickled.npy").read_bytes())
    assert_told(built.path, "train.starts.npy")


def test_a_tokenizer_that_is_not_the_headers_is_told(built):
    (built.path / "tokenizer.json").write_text(json.dumps(BpeTokenizer([(0, 1)]).to_json()))
    with pytest.raises(UserError, match=r"tokenizer.json is not the tokenizer that the header names"):
        open_cache(built.path, verify=False).tokenizer()


def test_a_missing_cache(tmp_path):
    with pytest.raises(
        UserError, match=r"no token cache at .*nowhere: `python -m altgrad_jax.data prepare` builds one"
    ):
        open_cache(tmp_path / "nowhere")


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


# Building.


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


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_a_document_that_is_no_unicode_is_named(tmp_path, kind):
    with pytest.raises(
        UserError, match=r"document 'train/1': the text holds a lone surrogate \(U\+D800 at character 3"
    ):
        build_cache(TinySource({"train": ["fine", "bad\ud800"]}), kind, 300, tmp_path, progress=False)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file/cache: Not a directory; .*--config.data.data_dir=DIR"):
        build_cache(TinySource(), "bytes", 257, tmp_path / "file" / "cache", progress=False)


@pytest.mark.parametrize("call", ["open", "fsync", "rename"])
def test_a_full_disk_is_told_and_leaves_nothing(tmp_path, monkeypatch, call):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*((hashed_files, "open") if call == "open" else (hashed_files.os, call)), full, raising=False)
    with pytest.raises(UserError, match=r"cannot write .*: No space left on device; make room"):
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


# Finding.


def test_find_caches(tmp_path):
    def build(name: str, kind: str, size: int, texts: list[str]) -> Path:
        return build_cache(TinySource({"train": texts}, name=name), kind, size, tmp_path, progress=False).path

    local = build("eurlex-local", "bpe", 300, ["a"])
    big = build("eurlex-local", "bpe", 400, ["a"])
    plain = build("eurlex", "bytes", 257, ["a"])
    odd = build("my texts/1", "bytes", 257, ["a"])
    newer = build("eurlex", "bytes", 257, ["b"])
    gpt2 = tmp_path / "eurlex57k-gpt250257-0123456789ab"
    gpt2.mkdir()
    (tmp_path / "notes-bytes257-0123456789ab").write_text("a file")
    (tmp_path / "something else").mkdir()
    for age, path in enumerate((newer, odd, plain, big, local, gpt2)):
        os.utime(path, (1e9 - age, 1e9 - age))

    assert odd.name.startswith("my_texts_1-bytes257-")
    assert find_caches(tmp_path) == [newer, odd, plain, big, local, gpt2]
    assert find_caches(tmp_path, "eurlex") == [newer, plain, big, local, gpt2]
    assert find_caches(tmp_path, "eurlex-local") == [big, local]
    assert find_caches(tmp_path, "my texts/1") == [odd]
    assert find_caches(tmp_path, "eurlex", "bytes") == [newer, plain]
    assert find_caches(tmp_path, "eurlex", "auto") == [big, local, gpt2]
    assert find_caches(tmp_path, "eurlex", "bpe", 300) == [local]
    assert find_caches(tmp_path, "eurlex", None, 50257) == [newer, plain, gpt2]
    assert find_caches(tmp_path, "eurlex", "bytes", 256) == []
    assert find_caches(tmp_path / "nowhere") == []
    # A beginning that is not a whole name comes after a whole name, however new it is.
    os.utime(gpt2, (2e9, 2e9))
    assert find_caches(tmp_path, "eurlex") == [newer, plain, gpt2, big, local]


def test_tokenizer_of_a_found_cache_decodes(tmp_path):
    build_cache(TinySource(), "bytes", 257, tmp_path, progress=False)
    [path] = find_caches(tmp_path, "tiny")
    assert open_cache(path).tokenizer().fingerprint() == BytesTokenizer().fingerprint()
