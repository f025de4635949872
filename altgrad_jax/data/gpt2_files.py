"""GPT-2's vocabulary, read from a file that is already on this machine.

GPT-2's tokens are published as two equivalent files: `r50k_base.tiktoken` (each token with its rank) and `vocab.bpe`
(the merges in order of rank, of which `encoder.json` is only a second copy). `tiktoken` keeps what it has downloaded
in a folder under the SHA-1 of its URL. We look there and never download: a training job must not depend on the
network, nor hang on a machine without one. A file counts only if its SHA-256 is the one `tiktoken` publishes.

Source of the addresses and hashes: `tiktoken_ext/openai_public.py` in tiktoken 0.14.
"""

import base64
import hashlib
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from altgrad_jax.errors import UserError


def byte_characters() -> tuple[str, ...]:
    """The printable character GPT-2's files write for each byte value: item b stands for byte b.

    Bytes that are printable and not a space in Latin-1 stand for themselves; the others take U+0100 onwards, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return tuple(chr(byte) if byte in printable else chr(next(spare)) for byte in range(256))


def base_tokens() -> tuple[bytes, ...]:
    """The 256 single-byte tokens in the order of GPT-2's ids 0..255: by code point of `byte_characters`."""
    characters = byte_characters()
    return tuple(bytes([byte]) for byte in sorted(range(256), key=characters.__getitem__))


def parse_merges(data: bytes) -> list[bytes]:
    """Tokens in order of rank from a `vocab.bpe`: a version line, then one merge "left right" a line."""
    byte_of = {character: byte for byte, character in enumerate(byte_characters())}
    tokens = list(base_tokens())
    for line in data.decode().strip("\n").split("\n")[1:]:
        tokens.append(bytes(byte_of[character] for character in line if character != " "))
    return tokens


def parse_ranks(data: bytes) -> list[bytes]:
    """Tokens in order of rank from a `.tiktoken` file: a line each, the token in base64 and its rank."""
    ranked = [line.split() for line in data.splitlines() if line]
    return [base64.b64decode(token) for token, _ in sorted(ranked, key=lambda pair: int(pair[1]))]


@dataclass(frozen=True)
class VocabularyFile:
    """A published file that holds a vocabulary.

    Attributes:
      name: what it is called where it was published.
      url: its address; never opened, but its SHA-1 is the name under which tiktoken caches it.
      sha256: hash of the right contents.
      parse: turns the contents into tokens in order of rank.
    """

    name: str
    url: str
    sha256: str
    parse: Callable[[bytes], list[bytes]]

    @property
    def cached_name(self) -> str:
        """File name in tiktoken's cache folder."""
        return hashlib.sha1(self.url.encode(), usedforsecurity=False).hexdigest()


GPT2_FILES = (
    VocabularyFile(
        name="r50k_base.tiktoken",
        url="https://openaipublic.blob.core.windows.net/encodings/r50k_base.tiktoken",
        sha256="306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930",
        parse=parse_ranks,
    ),
    VocabularyFile(
        name="vocab.bpe",
        url="https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe",
        sha256="1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
        parse=parse_merges,
    ),
)


def search_folders() -> list[Path]:
    """Where tiktoken may have kept a file: $TIKTOKEN_CACHE_DIR, $DATA_GYM_CACHE_DIR, its folder for temporary files."""
    named = [os.environ.get(variable) for variable in ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR")]
    return [*(Path(folder) for folder in named if folder), Path(tempfile.gettempdir()) / "data-gym-cache"]


def read_vocabulary(
    path: str | os.PathLike[str] | None = None, files: Sequence[VocabularyFile] = GPT2_FILES
) -> list[bytes]:
    """Tokens in order of rank, from the first file found whose hash is right.

    Args:
      path: a file, or a folder that holds one under its published or its cached name; looked at alone. None: the
        `search_folders`.
      files: what to accept.

    Raises:
      UserError: there is none; names the places looked at, the files there with wrong contents, and the way out.
    """
    given = None if path is None else Path(path).expanduser()
    if given is not None and not given.is_dir():
        places, candidates = [given], [(given, file) for file in files]
    else:
        places = search_folders() if given is None else [given]
        candidates = [(place / name, f) for place in places for f in files for name in (f.name, f.cached_name)]
    rejected: dict[Path, str] = {}
    for candidate, file in candidates:
        try:
            data = candidate.read_bytes()
        except FileNotFoundError:
            continue
        except OSError as error:
            rejected[candidate] = f"{candidate} cannot be read ({error.strerror})"
            continue
        if hashlib.sha256(data).hexdigest() == file.sha256:
            return file.parse(data)
        rejected[candidate] = f"{candidate} has not the published SHA-256"
    wanted = " or ".join(f"{file.name} (in tiktoken's cache: {file.cached_name})" for file in files)
    reasons = "".join(f"; {reason}" for reason in rejected.values())
    raise UserError(
        f"GPT-2's vocabulary is not on this machine: looked for {wanted} in {', '.join(map(str, places))}{reasons}; "
        "put the file there, or train a vocabulary on the corpus with --config.data.tokenizer=bpe"
    )
