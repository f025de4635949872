"""JSON lines: what is written is read back, and what is broken is named by file and line."""

import gzip
import json
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from altgrad_jax.data import jsonlines
from altgrad_jax.data.jsonlines import JsonRecord, read_json_file, read_json_lines
from altgrad_jax.errors import UserError

LEAF = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
JSON = LEAF | st.lists(LEAF, max_size=3) | st.dictionaries(st.text(), LEAF, max_size=3)
OBJECTS = st.lists(st.dictionaries(st.text(), JSON, max_size=4), max_size=6)


def _write(path: Path, content: bytes) -> Path:
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@settings(deadline=None)
@given(
    objects=OBJECTS, name=st.sampled_from(["x.jsonl", "x.jsonl.gz"]), blank=st.sampled_from(["\n", "\n\n \n", "\r\n"])
)
def test_round_trip(tmp_path_factory, objects, name, blank):
    content = blank.join(json.dumps(one, ensure_ascii=False) for one in objects)
    path = _write(tmp_path_factory.mktemp("json") / name, content.encode())
    assert [record.values for record in read_json_lines(path)] == objects


def test_lines_are_counted_with_blank_ones(tmp_path):
    path = _write(tmp_path / "x.jsonl", b'{"a": 1}\n\n{"a": 2}')
    assert [record.where for record in read_json_lines(path)] == [f"{path}, line 1", f"{path}, line 3"]


def test_byte_order_mark_is_skipped(tmp_path):
    path = _write(tmp_path / "x.jsonl", b'\xef\xbb\xbf{"a": 1}\n')
    assert [record.values for record in read_json_lines(path)] == [{"a": 1}]


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz"])
@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"a": 1', "line 2 is not valid JSON"),
        (b"nonsense", "line 2 is not valid JSON"),
        (b"[1, 2]", "line 2 should be a JSON object, not list"),
        (b"\xff\xfe", "line 2 is not UTF-8 .at byte 11 of the file."),
        (b'{"a": "\xe2\x82"}', "line 2 is not UTF-8 .at byte 18 of the file."),
        (b"[" * 200_000, "line 2 is not valid JSON"),
        (b"1" * 10_000, "line 2 is not valid JSON"),
    ],
)
def test_broken_line(tmp_path, name, line, message):
    path = _write(tmp_path / name, b'{"a": "k"}\n' + line + b"\n")
    records = read_json_lines(path)
    assert next(records).values == {"a": "k"}
    with pytest.raises(UserError, match=message) as caught:
        next(records)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("blank", [b"\n", b" \t\r\n", b" " * 300 + b"\n"])
def test_blank_lines_without_end(tmp_path, monkeypatch, blank):
    monkeypatch.setattr(jsonlines, "MAX_BLANK_BYTES", 1000)
    few = blank * (1000 // len(blank))
    path = _write(tmp_path / "x.jsonl.gz", (b'{"a": 1}\n' + few) * 3)
    assert len(list(read_json_lines(path))) == 3, "a thousand bytes in a row are few"
    path = _write(tmp_path / "x.jsonl.gz", b'{"a": 1}\n' + few + blank * 50)
    line = 2 + len(few) // len(blank)
    with pytest.raises(UserError, match=f"line {line} ends more than 1,000 bytes of blank lines"):
        list(read_json_lines(path))


def test_line_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonlines, "MAX_LINE_BYTES", 1000)
    path = _write(tmp_path / "x.jsonl.gz", b'{"a": "' + b"x" * 990 + b'"}\n' + b" " * 1001)
    with pytest.raises(UserError, match="line 2 is longer than 1,000 bytes"):
        list(read_json_lines(path))


def test_a_long_line_costs_little_memory(tmp_path):
    path = _write(tmp_path / "x.jsonl.gz", b'{"text": "' + b"x" * (50 << 20) + b'"}\n')
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="line 1 is longer than 16,777,216 bytes"):
            list(read_json_lines(path))
        assert tracemalloc.get_traced_memory()[1] < 48 << 20
    finally:
        tracemalloc.stop()


@given(st.data())
def test_truncated_gzip(tmp_path_factory, data):
    whole = gzip.compress(b'{"text": "some words"}\n' * 50)
    path = tmp_path_factory.mktemp("gzip") / "x.jsonl.gz"
    path.write_bytes(whole[: data.draw(st.integers(1, len(whole) - 1))])
    with pytest.raises(UserError, match=r"x.jsonl.gz is a truncated or damaged gzip file"):
        list(read_json_lines(path))


@pytest.mark.parametrize("position", [0, 30, -6])
def test_damaged_gzip(tmp_path, position):
    content = bytearray(gzip.compress(json.dumps({"text": "".join(map(chr, range(32, 2000)))}).encode()))
    content[position] ^= 0x55
    (tmp_path / "x.jsonl.gz").write_bytes(content)
    with pytest.raises(UserError, match="truncated or damaged gzip file"):
        list(read_json_lines(tmp_path / "x.jsonl.gz"))


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*absent.jsonl: No such file"):
        list(read_json_lines(tmp_path / "absent.jsonl"))


def test_single_object(tmp_path, monkeypatch):
    path = _write(tmp_path / "x.json", b'{\n "a":\n "b"\n}\n')
    assert read_json_file(path).text("a") == "b"
    monkeypatch.setattr(jsonlines, "MAX_LINE_BYTES", 5)
    with pytest.raises(UserError, match=r"x.json is longer than 5 bytes"):
        read_json_file(path)


RECORD = JsonRecord(
    "x.jsonl, line 7",
    {"s": "text", "n": None, "i": 5, "b": True, "l": ["a", 2], "m": ["a", 2.5], "u": "\ud800"}
    | {"w": " 7", "e": ["a", ""], "v": [None]},
)


def test_fields():
    assert RECORD.text("s") == "text"
    assert RECORD.text("n", "default") == RECORD.text("absent", "default") == "default"
    assert RECORD.identifiers("l") == ("a", "2")
    assert RECORD.identifiers("absent", ()) == RECORD.identifiers("n", ()) == ()
    assert JsonRecord("", {"5": "price", "x y": ""}).names() == {"5": "price", "x y": ""}
    assert RECORD.identifier("i") == "5" and RECORD.identifier("s") == "text"
    assert RECORD.paragraphs("s") == ("text",) and RECORD.paragraphs("absent") == ()
    assert JsonRecord("", {"p": ["one", " ", "", "two"]}).paragraphs("p") == ("one", "two")


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda: RECORD.text("absent"), "field 'absent' is missing; found 's', 'n', 'i'"),
        (lambda: RECORD.text("n"), "field 'n' is null"),
        (lambda: JsonRecord(RECORD.where, {}).text("n"), "field 'n' is missing; found an empty object"),
        (lambda: RECORD.text("i"), "field 'i' should be a string, not int"),
        (lambda: RECORD.text("u"), "field 'u' holds half a surrogate pair at character 0"),
        (lambda: RECORD.identifier("b"), "field 'b' should be a string, not bool"),
        (lambda: RECORD.identifier("w"), "field 'w' has white space around it: ' 7'"),
        (lambda: RECORD.identifiers("s"), "field 's' should be a list, not str"),
        (lambda: RECORD.identifiers("m"), r"field 'm\[1\]' should be a string, not float"),
        (lambda: RECORD.identifiers("e"), r"field 'e\[1\]' is empty"),
        (lambda: RECORD.identifiers("v"), r"field 'v\[0\]' should be a string, not null"),
        (lambda: RECORD.paragraphs("v"), r"field 'v\[0\]' should be a string, not null"),
        (lambda: JsonRecord(RECORD.where, {"5": None}).names(), "field '5' is null"),
        (lambda: JsonRecord(RECORD.where, {"5\t": "x"}).names(), r"field .*5.* has white space around it"),
        (lambda: RECORD.paragraphs("i"), "field 'i' should be a list, not int"),
    ],
)
def test_wrong_fields(read, message):
    with pytest.raises(UserError, match=f"^x.jsonl, line 7: {message}"):
        read()
