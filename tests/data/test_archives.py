"""Archives: what is wanted comes out, nothing gets out of the folder, damage is one clear line."""

import gzip
import io
import os
import stat
import tarfile
import time
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from altgrad_jax.data import archives
from altgrad_jax.data.archives import Limits, extract
from altgrad_jax.errors import UserError

FILES = {"a.txt": b"first", "sub/b.txt": b"second" * 1000, "sub/c.bin": os.urandom(3000), "empty": b""}


def _zip(path: Path, files: dict[str, bytes], mode: int = 0o644 | stat.S_IFREG) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            info = zipfile.ZipInfo(name)
            info.external_attr, info.compress_type = mode << 16, zipfile.ZIP_DEFLATED
            archive.writestr(info, content)
    return path


def _tar(path: Path, files: dict[str, bytes], kind: bytes = tarfile.REGTYPE) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.type, info.size, info.linkname = kind, len(content), "/etc/passwd"
            archive.addfile(info, io.BytesIO(content))
    return path


MAKERS = [pytest.param((_zip, "x.zip"), id="zip"), pytest.param((_tar, "x.tar.gz"), id="tar")]


@pytest.fixture(params=MAKERS)
def make(request, tmp_path):
    """files -> path of an archive that holds them."""
    maker, name = request.param
    return lambda files, **options: maker(tmp_path / name, files, **options)


def _tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _refused(archive: Path, message: str, **options) -> None:
    """The archive is refused for that reason, and neither the folder nor anything beside it was written."""
    before = sorted(archive.parent.iterdir())
    with pytest.raises(UserError, match=message) as caught:
        extract(archive, lambda name: True, archive.parent / "out", **options)
    assert str(archive) in str(caught.value)
    assert sorted(archive.parent.iterdir()) == before


def test_everything(make, tmp_path):
    extract(make(FILES), lambda name: True, tmp_path / "out")
    assert _tree(tmp_path / "out") == FILES


def test_only_what_is_wanted(make, tmp_path):
    extract(make(FILES), lambda name: name.endswith(".txt"), tmp_path / "out")
    assert sorted(_tree(tmp_path / "out")) == ["a.txt", "sub/b.txt"]


def test_leading_dot_is_dropped(make, tmp_path):
    extract(make({"./sub/a": b"x"}), lambda name: name == "sub/a", tmp_path / "out")
    assert _tree(tmp_path / "out") == {"sub/a": b"x"}


@pytest.mark.parametrize(
    "name", ["/etc/x", "../x", "a/../../x", "a/..", "..", "C:/x", "c:x", "a\\..\\x", "\\\\host\\x"]
)
def test_names_that_lead_outside(make, name):
    _refused(make({"a.txt": b"good", name: b"bad"}), "outside its folder")


def test_bad_member_condemns_even_if_nobody_wants_it(make, tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "_write", None)  # nothing is written before all members are known
    with pytest.raises(UserError, match="outside its folder"):
        extract(make({"a.txt": b"good", "../x": b"bad"}), lambda name: name == "a.txt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK])
def test_zip_members_that_are_no_files(tmp_path, kind):
    _refused(_zip(tmp_path / "x.zip", {"innocent": b"/etc/passwd"}, mode=kind | 0o777), "link or device")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_tar_members_that_are_no_files(tmp_path, kind):
    _refused(_tar(tmp_path / "x.tar.gz", {"innocent": b""}, kind=kind), "link or device")


def test_encrypted_member(tmp_path):
    path = _zip(tmp_path / "x.zip", {"secret": b"content"})
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1  # general purpose flag, bit 0, of the central directory's entry
    path.write_bytes(content)
    _refused(path, "encrypted")


def test_too_many_members(make):
    _refused(make({str(number): b"" for number in range(11)}), "more than 10 members", limits=Limits(members=10))


def test_too_many_bytes(make, tmp_path):
    bomb = make({"a": b"\0" * 600_000, "b": b"\0" * 600_000})
    assert bomb.stat().st_size < 10_000
    _refused(bomb, "more than 1,000,000 bytes", limits=Limits(total_bytes=1_000_000))
    extract(bomb, lambda name: True, tmp_path / "out", Limits(total_bytes=1_200_000))
    assert (tmp_path / "out" / "b").stat().st_size == 600_000


def test_member_longer_than_declared(tmp_path):
    path = _zip(tmp_path / "x.zip", {"liar": b"\0" * 100_000})
    content = bytearray(path.read_bytes())
    entry = content.index(b"PK\x01\x02")
    content[entry + 24 : entry + 28] = (10).to_bytes(4, "little")  # uncompressed size in the central directory
    path.write_bytes(content)
    _refused(path, "damaged|not as long")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_same_name_twice(make, tmp_path):
    _refused(make({"a": b"1", "./a": b"2"}), "twice")


@pytest.mark.parametrize("keep", [0, 10, 0.5, -1])
def test_truncated(make, keep):
    path = make(FILES)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole)) if isinstance(keep, float) else keep])
    _refused(path, "damaged or cut short")


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK])
@pytest.mark.parametrize(("size", "count"), [(9 << 10, 1), (30 << 20, 1), (8000, 200)])
def test_headers_longer_than_names(tmp_path, kind, size, count):
    """Python reads one whole before anyone can ask how long it is, and takes time with the square of some of them."""
    header = tarfile.TarInfo("h")
    header.type, header.size = kind, size
    block = header.tobuf(tarfile.GNU_FORMAT) + b"1" * size + b"\0" * (-size % 512)
    member = tarfile.TarInfo("a").tobuf(tarfile.GNU_FORMAT)
    path = tmp_path / "x.tar.gz"
    path.write_bytes(gzip.compress((block + member) * count + b"\0" * 1024, 1))
    began = time.monotonic()
    if count == 1:
        _refused(path, "further headers of more than 8,192 bytes")
        assert time.monotonic() - began < 10
    else:
        with pytest.raises(UserError, match="further headers of more than"):
            extract(path, lambda name: False, tmp_path / "out", Limits(all_header_bytes=20_000))


def test_a_name_longer_than_a_block(tmp_path):
    name = "/".join(["folder" * 10] * 30)
    extract(_tar(tmp_path / "x.tar.gz", {name: b"x"}), lambda name: True, tmp_path / "out")
    assert _tree(tmp_path / "out") == {name: b"x"}


def test_data_after_the_end_of_a_tar(tmp_path):
    path = _tar(tmp_path / "x.tar.gz", FILES)
    path.write_bytes(path.read_bytes() + gzip.compress(b"\0" * (2 << 20)))
    _refused(path, "much data follows")


def test_flipped_bit_in_a_compressed_tar(tmp_path):
    path = _tar(tmp_path / "x.tar.gz", {"a": os.urandom(20_000)})  # random bytes are stored, not compressed
    content = bytearray(path.read_bytes())
    content[12_000] ^= 1
    path.write_bytes(content)
    _refused(path, "CRC check failed")


def test_missing_archive(tmp_path):
    _refused(tmp_path / "absent.zip", "No such file")


def test_full_disk_is_not_called_damage(make, monkeypatch):
    def full(path: Path, mode: str) -> None:
        raise OSError(28, "No space left on device")

    path = make(FILES)
    monkeypatch.setattr(archives, "open", full, raising=False)
    _refused(path, "cannot unpack .*: No space left")


def test_destination_must_be_new(make, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    _refused(make(FILES), "into .*out: File exists")
    assert (tmp_path / "out" / "mine").read_text() == "keep"


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_archives_never_raise_anything_else(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("damaged")
    if data.draw(st.booleans()):
        path = _zip(folder / "x.zip", FILES)
        content = bytearray(path.read_bytes())
    else:
        with tarfile.open(folder / "x.tar", "w") as archive:
            for name, body in FILES.items():
                info = tarfile.TarInfo(name)
                info.size = len(body)
                archive.addfile(info, io.BytesIO(body))
        path, content = folder / "x.tar.gz", bytearray((folder / "x.tar").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(bytes(content), 1))
    else:
        path.write_bytes(content)
    try:
        extract(path, lambda name: True, folder / "out")
    except UserError:
        assert not (folder / "out").exists()
