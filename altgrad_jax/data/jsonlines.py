"""Reading JSON lines with errors that name the file and the line.

A `.jsonl` or `.jsonl.gz` file holds one JSON object a line, in UTF-8; blank lines are skipped. Nothing is trusted: bad
UTF-8, bad JSON, a line without end, blank lines without end, a truncated gzip stream and a field of the wrong type each
raise one UserError.
"""

import gzip
import io
import json
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from altgrad_jax.errors import UserError

MAX_LINE_BYTES = 16 << 20  # what is made of a line takes some twenty times its memory
MAX_BLANK_BYTES = 1 << 20  # of blank lines in a row
SUFFIXES = (".jsonl", ".jsonl.gz")


@dataclass(frozen=True)
class JsonRecord:
    """One JSON object, and where it came from ("file, line n") for messages."""

    where: str
    values: Mapping[str, object]

    def text(self, field: str, default: str | None = None) -> str:
        """A field that must be a string; `default` if it is absent or null.

        Raises:
          UserError: it is absent without a default, of another type, or no valid Unicode.
        """
        return self._checked(field, self._get(field, default))

    def identifier(self, field: str, default: str | None = None) -> str:
        """A field that names something: a string, or an integer, which becomes one.

        Raises:
          UserError: as `text`; or it is empty, or has white space around it, so that it looks like another.
        """
        return self._identifier(field, self._get(field, default))

    def identifiers(self, field: str, default: tuple[str, ...] | None = None) -> tuple[str, ...]:
        """A field that must be a list of names as `identifier` takes them; `default` if absent or null.

        Raises:
          UserError: as `identifier`, or it is no list.
        """
        return tuple(self._identifier(where, value) for where, value in self._items(field, default))

    def names(self) -> dict[str, str]:
        """The whole object as identifier -> string.

        Raises:
          UserError: as `identifier` and `text`.
        """
        return {self._identifier(repr(field), field): self.text(field) for field in self.values}

    def _items(self, field: str, default: tuple[str, ...] | None) -> Iterator[tuple[str, object]]:
        """The members of a list, each with what to call it."""
        values = self._get(field, default)
        if not isinstance(values, list | tuple):
            raise UserError(f"{self.where}: field {field!r} should be a list, not {type(values).__name__}")
        return ((f"{field}[{index}]", value) for index, value in enumerate(values))

    def paragraphs(self, field: str) -> tuple[str, ...]:
        """A field that may be a string, a list of strings, or absent: the strings, empty ones left out."""
        value = self._get(field, ())
        items = ((field, value),) if isinstance(value, str) else self._items(field, ())
        parts = (self._checked(name, item) for name, item in items)
        return tuple(part for part in parts if part.strip())

    def _get(self, field: str, default: object) -> object:
        value = self.values.get(field)
        if value is None and default is None:
            found = ", ".join([repr(name) for name in self.values][:10]) or "an empty object"
            what = "is null" if field in self.values else f"is missing; found {found}"
            raise UserError(f"{self.where}: field {field!r} {what}")
        return default if value is None else value

    def _identifier(self, field: str, value: object) -> str:
        # bool is a subclass of int, but true is no identifier.
        name = str(value) if type(value) is int else self._checked(field, value)
        if not name or name != name.strip():
            what = f"has white space around it: {name!r}" if name.strip() else "is empty or blank"
            raise UserError(f"{self.where}: field {field!r} {what}; mend or remove it")
        return name

    def _checked(self, field: str, value: object) -> str:
        if not isinstance(value, str):
            kind = "null" if value is None else type(value).__name__
            raise UserError(f"{self.where}: field {field!r} should be a string, not {kind}")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{self.where}: field {field!r} holds half a surrogate pair at character {error.start}"
            ) from error
        return value


def read_json_lines(path: Path) -> Iterator[JsonRecord]:
    """The objects of a `.jsonl` or `.jsonl.gz` file, in order, one in memory at a time.

    Raises:
      UserError: as the module says, while iterating.
    """
    number = offset = blank = 0
    with open_binary(path) as file:
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            where = f"{path}, line {number}"
            if len(line) > MAX_LINE_BYTES:
                raise UserError(f"{where} is longer than {MAX_LINE_BYTES:,} bytes: not JSON lines")
            blank = 0 if line.strip() else blank + len(line)
            if blank > MAX_BLANK_BYTES:
                raise UserError(f"{where} ends more than {MAX_BLANK_BYTES:,} bytes of blank lines: not JSON lines")
            if not blank:
                yield _parse(line, where, offset)
            offset += len(line)


def read_json_file(path: Path) -> JsonRecord:
    """The one object of a JSON file.

    Raises:
      UserError: it cannot be read, is too long, or is no JSON object in UTF-8.
    """
    with open_binary(path) as file:
        content = file.read(MAX_LINE_BYTES + 1)
    if len(content) > MAX_LINE_BYTES:
        raise UserError(f"{path} is longer than {MAX_LINE_BYTES:,} bytes")
    return _parse(content, str(path), 0)


@contextmanager
def open_binary(path: Path) -> Iterator[io.BufferedIOBase]:
    """Opens a file for reading bytes, through gzip if it ends in `.gz`; read errors in the block become UserErrors."""
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            yield file
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} is a truncated or damaged gzip file ({error}); copy it again") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def _parse(line: bytes, where: str, offset: int) -> JsonRecord:
    try:
        values = json.loads(line.decode("utf-8-sig" if offset == 0 else "utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 (at byte {offset + error.start} of the file)") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{where} should be a JSON object, not {type(values).__name__}")
    return JsonRecord(where, values)
