"""Unpacking archives that nobody vouches for.

The rules: every member is looked at before any is used, and one bad member condemns the archive. A member is bad if its
name could leave the folder it is unpacked into (absolute, `..`, a drive letter, a backslash) or if it is neither a
plain file nor a folder (links, devices, pipes). Archives that declare too many members or too many bytes are refused
before they fill the disk, and those with headers longer than names need be before they fill memory and time. Files are
created new, with default permissions, and never longer than declared.
"""

import gzip
import re
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any

from altgrad_jax.errors import UserError

_CHUNK_BYTES = 1 << 20
_TAR_BLOCK = 512
_BROKEN = (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, gzip.BadGzipFile, NotImplementedError)


@dataclass(frozen=True)
class Limits:
    """What an archive may declare.

    Attributes:
      members: how many.
      total_bytes: of all members together, once unpacked.
      header_bytes: of one further header of a tar: a long name, say. Python takes time with the square of them.
      all_header_bytes: of all these together.
    """

    members: int = 250_000
    total_bytes: int = 8 << 30
    header_bytes: int = 8 << 10
    all_header_bytes: int = 1 << 20


@dataclass(frozen=True)
class _Member:
    name: str
    size: int
    kind: str  # "file", "folder" or what else it is
    open: Callable[[], IO[bytes]]


def extract(archive: Path, wanted: Callable[[str], bool], destination: Path, limits: Limits | None = None) -> None:
    """Unpacks some members of a zip or gzipped tar archive.

    Args:
      archive: a file named `*.zip` or `*.tar.gz`.
      wanted: told a member's name (with `/`, without a leading `./`), says whether to unpack it.
      destination: a folder that does not exist yet; removed again if anything is wrong.
      limits: what the archive may declare.

    Raises:
      UserError: the archive is damaged, too large, or breaks a rule above; names the archive and the member.
    """
    try:
        destination.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"cannot unpack {archive} into {destination}: {error.strerror}") from error
    try:
        # Two passes: every name is checked before the first file is written.
        for write in (False, True):
            with _opened(archive, None if write else limits or Limits()) as members:
                _walk(archive, members, wanted if write else (lambda name: False), destination, limits or Limits())
    except BaseException:
        shutil.rmtree(destination)
        raise


@contextmanager
def _opened(archive: Path, limits: Limits | None) -> Iterator[Iterator[_Member]]:
    """The members in order; whatever the libraries raise on a damaged archive becomes a UserError.

    `limits` bound the headers of a tar; None, for one that was looked through already, lets members be read.
    """
    try:
        if archive.suffix == ".zip":
            with zipfile.ZipFile(archive) as zipped:
                yield _zip_members(zipped)
        else:
            with gzip.open(archive) as stream:
                headers: Any = _Headers(stream, archive, limits) if limits else stream
                with tarfile.open(fileobj=headers, mode="r:") as tar:
                    yield _tar_members(tar)
                # The tar ends before the gzip stream does, whose last bytes are the checksum of it all.
                if len(stream.read(_CHUNK_BYTES)) == _CHUNK_BYTES:
                    raise UserError(f"{archive} is refused: much data follows the end of its last member")
    except _BROKEN as error:
        raise UserError(
            f"cannot unpack {archive}: it is damaged or cut short ({error or type(error).__name__}); "
            f"delete it and fetch it again"
        ) from error
    except OSError as error:
        raise UserError(f"cannot unpack {archive}: {error.strerror or error}") from error


class _Headers:
    """What `tarfile` reads headers from, which takes each whole, however long it says it is.

    A header is one block. Of one that says that more belong to it (names too long for a block, further properties) all
    are read in one call, which is refused here. Members cannot be read through it.
    """

    def __init__(self, stream: gzip.GzipFile, archive: Path, limits: Limits):
        self._stream, self._archive, self._limits = stream, archive, limits
        self._long = 0
        self.seek, self.tell = stream.seek, stream.tell

    def read(self, size: int) -> bytes:
        """So many bytes, as a file does. Raises UserError if they are those of too long a header."""
        if size > _TAR_BLOCK:
            self._long += size
            if size > self._limits.header_bytes or self._long > self._limits.all_header_bytes:
                most = f"{self._limits.header_bytes:,} bytes, or {self._limits.all_header_bytes:,} together"
                raise UserError(f"{self._archive} is refused: it has further headers of more than {most}")
        return self._stream.read(size)


def _zip_members(zipped: zipfile.ZipFile) -> Iterator[_Member]:
    for info in zipped.infolist():
        mode = stat.S_IFMT(info.external_attr >> 16)  # 0 in archives made on systems without Unix modes
        kind = "folder" if info.is_dir() else "file" if mode in (0, stat.S_IFREG) else "link or device"
        if info.flag_bits & 0x1:
            kind = "encrypted file"
        yield _Member(info.filename, info.file_size, kind, partial(zipped.open, info))


def _tar_members(tar: tarfile.TarFile) -> Iterator[_Member]:
    for info in tar:
        kind = "file" if info.isreg() else "folder" if info.isdir() else "link or device"
        yield _Member(info.name, info.size, kind, partial(_tar_stream, tar, info))


def _tar_stream(tar: tarfile.TarFile, info: tarfile.TarInfo) -> IO[bytes]:
    stream = tar.extractfile(info)
    assert stream is not None, "only members that are files are opened"
    return stream


def _walk(
    archive: Path, members: Iterator[_Member], wanted: Callable[[str], bool], destination: Path, limits: Limits
) -> None:
    """Checks every member against the rules, and writes those wanted."""
    total = 0
    for number, member in enumerate(members, start=1):
        total += member.size
        if number > limits.members:
            raise UserError(f"{archive} is refused: it has more than {limits.members:,} members")
        if total > limits.total_bytes:
            raise UserError(f"{archive} is refused: it would unpack to more than {limits.total_bytes:,} bytes")
        path = PurePosixPath(member.name)
        if path.is_absolute() or ".." in path.parts or "\\" in member.name or re.match("[A-Za-z]:", member.name):
            raise UserError(f"{archive} is refused: its member {member.name!r} would be written outside its folder")
        if member.kind not in ("file", "folder"):
            raise UserError(f"{archive} is refused: its member {member.name!r} is a {member.kind}, not a plain file")
        if member.kind == "file" and wanted(str(path)):
            _write(archive, member, destination / path)


def _write(archive: Path, member: _Member, target: Path) -> None:
    """Copies one member, no longer than it declared to be."""
    if target.exists():
        raise UserError(f"{archive} is refused: it holds {member.name!r} twice")
    target.parent.mkdir(parents=True, exist_ok=True)
    written = 0
    with member.open() as stream, open(target, "xb") as file:
        while written <= member.size and (chunk := stream.read(_CHUNK_BYTES)):
            file.write(chunk)
            written += len(chunk)
    if written != member.size:
        raise UserError(f"{archive} is refused: its member {member.name!r} is not as long as declared")
