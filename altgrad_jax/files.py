"""The one reader and the one writer of the files that this package keeps.

What is read is checked: it is the JSON it should be, of the shape it should have, or an error names the file, the cause
and the way out. What is written is whole and on disk before it gets its name. A cause is what the operating system
says, with the numbers that it gives, and is never guessed.
"""

import errno
import json
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from altgrad_jax.errors import UserError

ROOM = 2**20  # bytes
REPLACE = "restore it, or delete it to have it written anew"
_ADVICE = {
    errno.EDQUOT: "delete some of your files",
    errno.EROFS: "make it writable, or use another folder",
    errno.EACCES: "change its permissions, or use another folder",
    errno.EPERM: "change its permissions, or use another folder",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.EFBIG: "raise the limit of a file's size (ulimit -f)",
}

# What the operating system refuses for reasons that are not in the file.
REFUSALS = {
    number: os.strerror(number)
    for number in (
        *(errno.EACCES, errno.EPERM, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC, errno.EDQUOT),
        *(errno.EROFS, errno.EFBIG, errno.ESTALE, errno.ETIMEDOUT, errno.ENXIO, errno.ENODEV),
    )
}


class UnreadableError(UserError):
    """The operating system refuses to read a file. What the file holds may be whole."""


class DamagedFileError(UserError):
    """What lies in the place of a file is not what was written there."""


class UnwritableError(UserError):
    """The operating system refuses to write a file."""


def read_bytes(path: Path) -> bytes | None:
    """A file's content, or None if there is no such file.

    Raises:
      DamagedFileError: it is a folder, a device or a pipe.
      UnreadableError: the operating system refuses.
    """
    try:
        kind = os.stat(path).st_mode
        if not stat.S_ISREG(kind):  # a pipe would be waited for, a device read without end
            raise DamagedFileError(f"{path} is {_kind(kind)}, where a file is wanted; move it away")
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as e:
        raise unreadable(path, e) from e


def _kind(mode: int) -> str:
    names = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return names.get(stat.S_IFMT(mode), "a device")


def unreadable(path: Path, error: OSError) -> UnreadableError:
    """The error to raise when the operating system refuses to read `path`."""
    return UnreadableError(f"{path} cannot be read: {cause(path, error)}")


def parse_json(data: bytes) -> Any:
    """The value that JSON in UTF-8 stands for.

    Raises:
      ValueError: what is wrong with it, in one line.
    """
    try:
        return json.loads(data.decode())
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeDecodeError as e:
        raise ValueError(f"it is not UTF-8 from byte {e.start} on") from None
    except ValueError as e:
        if not data.strip():
            raise ValueError("it is empty") from None
        if (nul := data.find(b"\0")) >= 0:
            raise ValueError(f"it has NUL bytes from byte {nul} on") from None
        raise ValueError(f"it is no JSON: {e}") from None


def misfit(value: Any, shape: Any, name: str = "it") -> str:
    """How a JSON value differs from a shape: "sessions is a number, not a list"; "" if it does not.

    Args:
      value: as `json.loads` gives it.
      shape: a type (`float` takes every number, `int` whole ones, `object` anything, `type(None)` null); a tuple of
        shapes, of which one must fit; [shape] for a list of values of that shape; or {key: shape} for an object that
        has these keys, where one written "key?" may be absent.
      name: what to call the value.
    """
    if isinstance(shape, tuple):
        found = [misfit(value, one, name) for one in shape]
        return "" if "" in found else f"{name} is {_called(value)}"
    if isinstance(shape, list):
        if not isinstance(value, list):
            return f"{name} is {_called(value)}, not a list"
        return next((text for v in value if (text := misfit(v, shape[0], f"an entry of {name}"))), "")
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return f"{name} is {_called(value)}, not an object"
        return next((text for key, one in shape.items() if (text := _misfit_of_key(value, key, one, name))), "")
    if shape is float:
        fits = isinstance(value, (int, float)) and not isinstance(value, bool)
    else:
        fits = isinstance(value, shape) and not (shape is int and isinstance(value, bool))
    return "" if fits else f"{name} is {_called(value)}, not {_TYPES.get(shape, shape.__name__)}"


def _misfit_of_key(value: dict[str, Any], key: str, shape: Any, name: str) -> str:
    plain = key.removesuffix("?")
    whole = plain if name == "it" else f"{name}.{plain}"
    if plain not in value:
        return "" if key.endswith("?") else f"{whole} is missing"
    return misfit(value[plain], shape, whole)


_TYPES = {dict: "an object", list: "a list", str: "a text", int: "a whole number", float: "a number", bool: "a truth"}


def _called(value: Any) -> str:
    return "null" if value is None else _TYPES[type(value)]


def read_json(path: Path, shape: Any = dict, way_out: str = REPLACE) -> Any:
    """A JSON file's content, or None if there is no such file.

    Args:
      path: the file.
      shape: what it must hold, see `misfit`.
      way_out: what to do about a damaged one.

    Raises:
      UnreadableError: the operating system refuses.
      DamagedFileError: it is no file, no JSON, or has another shape.
    """
    data = read_bytes(path)
    if data is None:
        return None
    try:
        value = parse_json(data)
    except ValueError as e:
        raise DamagedFileError(f"{path} is damaged: {e}; {way_out}") from None
    if wrong := misfit(value, shape):
        raise DamagedFileError(f"{path} is damaged: {wrong}; {way_out}")
    return value


def write_atomically(path: Path, data: bytes | str) -> None:
    """Replaces a file, so that a reader and a power cut find the old one or the new one, never half of it.

    What is no regular file, such as /dev/stdout, is written to as it is.

    Raises:
      UnwritableError: the operating system refuses; the old file is as it was.
    """
    content = data.encode() if isinstance(data, str) else data
    temporary = None
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            path.write_bytes(content)
            return
        target = Path(os.path.realpath(path))  # a link stays one
        # Containers on several machines share folders, and process ids: a name of its own for every write.
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
        sync_folder(target.parent)
    except OSError as e:
        if temporary is not None:
            with suppress(OSError):  # the error to tell is the first
                temporary.unlink(missing_ok=True)
        raise unwritable(path, e) from e


def write_json(path: Path, content: Any) -> None:
    """Replaces a JSON file, as `write_atomically`."""
    write_atomically(path, json.dumps(content, indent=2, sort_keys=True) + "\n")


def make_folder(path: Path) -> None:
    """Makes a folder and those above it, where they are not there.

    Raises:
      UnwritableError: the operating system refuses, or something else lies there.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise unwritable(path, e) from e


def sync_file(path: Path) -> None:
    """Returns when a file's content is on disk. Raises OSError."""
    _sync(path)


def sync_folder(path: Path) -> None:
    """Returns when a folder's list of names is on disk, without which a power cut loses synced files. Raises OSError.

    Some network file systems cannot be asked, and keep names as they keep them.
    """
    try:
        _sync(path)
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Returns when a folder and all in it are on disk: files first, then folders from the bottom up. Raises OSError."""
    for below, _, names in os.walk(folder, topdown=False, onerror=_raise):
        for name in names:
            sync_file(Path(below) / name)
        sync_folder(Path(below))


def _raise(error: OSError) -> None:
    raise error


def unwritable(path: Path, error: OSError, way_out: str = "") -> UnwritableError:
    """The error to raise when the operating system refuses to write `path`; `way_out` is one more thing to do."""
    return UnwritableError(f"{path} cannot be written: {cause(path, error)}{f', {way_out}' if way_out else ''}")


def system_error(error: BaseException | None) -> OSError | None:
    """The refusal of the operating system that an exception of another library comes from, if it is one."""
    text = ""
    while error is not None:
        if isinstance(error, OSError) and error.errno in REFUSALS:
            return OSError(error.errno, REFUSALS[error.errno])
        text, error = text + str(error), error.__cause__ or error.__context__
    return next((OSError(number, name) for number, name in REFUSALS.items() if name in text), None)


def cause(path: Path, error: OSError) -> str:
    """What the operating system says of a path, the numbers that belong to it, and what to do, if that is known."""
    text, advice = error.strerror or str(error) or type(error).__name__, _ADVICE.get(error.errno or 0, "")
    if error.errno == errno.ENOSPC:
        text, advice = _full(path, text)
    elif error.errno == errno.EEXIST and not path.is_dir():
        text, advice = f"{text}, and is no folder", "move it away"
    elif error.errno in (errno.ENOENT, errno.ENOTDIR):
        missing = next((p for p in reversed((path, *path.parents)) if not p.is_dir()), path)
        if missing != path:
            text += f": {missing} is {'a file' if missing.exists() else 'not there'}"
    return f"{text}; {advice}" if advice else text


def _full(path: Path, text: str) -> tuple[str, str]:
    """What is full, bytes or names of files, and what to do."""
    folder = next((p for p in _upwards(path) if p.is_dir()), Path("/"))
    try:
        disk = os.statvfs(folder)
    except OSError:
        return text, "free some space"
    if disk.f_files and not disk.f_favail:
        return f"{text}: no inode is free in {folder}", "delete some files, of any size"
    free = disk.f_bavail * disk.f_frsize
    if free > ROOM:  # what was written has been removed since, or somebody else has made room
        return f"{text}: by now {free:,} bytes and {disk.f_favail:,} inodes are free in {folder}", "make more room"
    return f"{text}: {free:,} bytes are free in {folder}", "free some space"


def _upwards(path: Path) -> Iterator[Path]:
    yield from (path.absolute(), *path.absolute().parents)
