"""Checked downloads: a file is either whole, with the size and hash it should have, or not there at all."""

import hashlib
import http.client
import os
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from altgrad_jax import files
from altgrad_jax.data.locks import exclusive
from altgrad_jax.data.progress import progress_bar
from altgrad_jax.errors import UserError

_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class RemoteFile:
    """A published file whose content is known beforehand.

    Attributes:
      url: where it is fetched from.
      name: the file name it gets on disk.
      size: its length in bytes.
      sha256: its SHA-256, in lower-case hex.
    """

    url: str
    name: str
    size: int
    sha256: str


def sha256_of(path: Path) -> str:
    """The hex SHA-256 of a file's bytes.

    Raises:
      UserError: the file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def fetch(
    remote: RemoteFile,
    directory: Path,
    *,
    progress: bool = True,
    schemes: tuple[str, ...] = ("http", "https"),
    timeout: float = 60.0,
) -> Path:
    """Downloads a file into `directory` and returns its path.

    A whole file already there is kept, a damaged one replaced.

    The bytes go to `<name>.part`, are counted and hashed on the way, and get their final name only once both are right.
    Two processes may ask for the same file: the second waits for the first.

    Args:
      remote: what to download and what it must be.
      directory: where to; created if absent.
      progress: whether a progress line is drawn.
      schemes: URL schemes allowed.
      timeout: seconds without any byte after which the server is given up.

    Raises:
      UserError: no connection, an error status, a wrong size or hash (nothing is left behind), an unwritable directory.
      ValueError: the URL has another scheme than those allowed.
    """
    if urllib.parse.urlsplit(remote.url).scheme not in schemes:
        raise ValueError(f"{remote.url}: only {', '.join(schemes)} URLs are downloaded")
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise files.unwritable(directory, error, "or choose another folder") from error
    target = directory / remote.name
    with exclusive(directory / f".{remote.name}.lock"):
        if target.is_file() and target.stat().st_size == remote.size and sha256_of(target) == remote.sha256:
            return target
        part = directory / f"{remote.name}.part"
        try:
            _download(remote, part, progress, timeout)
            os.replace(part, target)
            files.sync_folder(directory)
        except OSError as error:
            raise files.unwritable(target, error) from error
        finally:
            part.unlink(missing_ok=True)
    return target


def _download(remote: RemoteFile, part: Path, progress: bool, timeout: float) -> None:
    """Writes the file's bytes to `part`, synced to disk, or raises UserError."""
    digest, received = hashlib.sha256(), 0
    request = urllib.request.Request(remote.url, headers={"User-Agent": "altgrad_jax"})
    with (
        _connect(request, timeout) as response,
        open(part, "wb") as file,
        progress_bar(f"downloading {remote.name}", total=remote.size, unit="bytes", show=progress) as advance,
    ):
        # One chunk past the expected end is enough to know that the file is too long.
        while received <= remote.size and (chunk := _read(response, remote)):
            file.write(chunk)
            digest.update(chunk)
            received += len(chunk)
            advance(len(chunk))
        file.flush()
        os.fsync(file.fileno())
    if received != remote.size:
        got = f"{received:,}" if received < remote.size else f"more than {remote.size:,}"
        raise UserError(
            f"{remote.name} from {remote.url} is not the published file: expected {remote.size:,} bytes, got {got}; "
            f"try again, or pass a copy of the data with --source=DIR"
        )
    if digest.hexdigest() != remote.sha256:
        raise UserError(
            f"{remote.name} from {remote.url} is not the published file: expected sha256 {remote.sha256}, "
            f"got {digest.hexdigest()}; try again, or pass a copy of the data with --source=DIR"
        )


def _connect(request: urllib.request.Request, timeout: float) -> BinaryIO:
    """Opens the URL; every way of failing is one UserError."""
    try:
        return urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        raise _unreachable(request.full_url, f"the server answered {error.code} {error.reason}") from error
    except urllib.error.URLError as error:
        raise _unreachable(request.full_url, error.reason) from error
    except (OSError, http.client.HTTPException) as error:
        raise _unreachable(request.full_url, error) from error


def _read(response: BinaryIO, remote: RemoteFile) -> bytes:
    try:
        return response.read(_CHUNK_BYTES)
    except http.client.IncompleteRead as error:
        return error.partial  # the size check reports it
    except (OSError, http.client.HTTPException) as error:
        raise _unreachable(remote.url, error) from error


def _unreachable(url: str, reason: object) -> UserError:
    return UserError(
        f"cannot download {url} ({reason}); without a connection, fetch it on another machine and pass the folder "
        f"that holds it with --source=DIR"
    )
