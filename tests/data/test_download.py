"""Downloads against a local server: whole, truncated, corrupted, too long, refused, unreachable."""

import contextlib
import hashlib
import http.server
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from altgrad_jax.data import download
from altgrad_jax.data.download import RemoteFile, fetch, sha256_of
from altgrad_jax.errors import UserError

BODY = bytes(range(256)) * 12_000  # 3 MB: more than one chunk
SHA256 = hashlib.sha256(BODY).hexdigest()


class _Handler(http.server.BaseHTTPRequestHandler):
    """Serves BODY in the way its path names."""

    def do_GET(self) -> None:
        self.server.requests.append(self.path)  # type: ignore[attr-defined]  # set by the fixture
        if self.path == "/missing":
            self.send_error(404, "no such file")
            return
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/good")
            self.end_headers()
            return
        body = {
            "/corrupt": BODY[:1_500_000] + b"\xff" + BODY[1_500_001:],
            "/short": BODY[:-1],
            "/long": BODY + b"x",
        }.get(self.path, BODY)
        self.send_response(200)
        if self.path != "/endless":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.path == "/endless":
            with contextlib.suppress(ConnectionError):  # the client hangs up
                for _ in range(100):
                    self.wfile.write(BODY)
                self.server.requests.append("read 300 MB")  # type: ignore[attr-defined]
            return
        # "/cut": the connection ends long before the announced length.
        self.wfile.write(body[:1_200_000] if self.path == "/cut" else body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[http.server.ThreadingHTTPServer]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.requests = []  # type: ignore[attr-defined]  # what was asked for
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def _remote(server: http.server.HTTPServer, path: str) -> RemoteFile:
    return RemoteFile(f"http://127.0.0.1:{server.server_port}{path}", "body.bin", len(BODY), SHA256)


def _left(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if not path.name.startswith(".")]


@pytest.mark.parametrize("path", ["/good", "/moved"])
def test_whole_file_arrives(server, tmp_path, path):
    target = fetch(_remote(server, path), tmp_path / "new" / "folder", progress=False)
    assert target == tmp_path / "new" / "folder" / "body.bin"
    assert target.read_bytes() == BODY
    assert _left(target.parent) == ["body.bin"]


def test_file_already_there_is_not_fetched_again(server, tmp_path):
    for _ in range(2):
        fetch(_remote(server, "/good"), tmp_path, progress=False)
    assert server.requests == ["/good"]


@pytest.mark.parametrize("damage", [lambda body: body[:-5], lambda body: b"x" + body[1:]], ids=["short", "changed"])
def test_damaged_file_already_there_is_replaced(server, tmp_path, damage):
    (tmp_path / "body.bin").write_bytes(damage(BODY))
    assert fetch(_remote(server, "/good"), tmp_path, progress=False).read_bytes() == BODY


@pytest.mark.parametrize(
    ("path", "got"),
    [
        ("/corrupt", hashlib.sha256(BODY[:1_500_000] + b"\xff" + BODY[1_500_001:]).hexdigest()),
        ("/short", f"got {len(BODY) - 1:,}"),
        ("/cut", "got 1,200,000"),
        ("/long", f"got more than {len(BODY):,}"),
        ("/endless", f"got more than {len(BODY):,}"),
    ],
)
def test_wrong_content_is_named_and_removed(server, tmp_path, path, got):
    with pytest.raises(UserError) as caught:
        fetch(_remote(server, path), tmp_path, progress=False)
    message = str(caught.value)
    assert "body.bin" in message and got in message and "--source=DIR" in message
    assert (SHA256 if path == "/corrupt" else f"expected {len(BODY):,}") in message
    assert "\n" not in message
    assert _left(tmp_path) == []
    assert server.requests == [path]


def test_error_status_is_one_line(server, tmp_path):
    with pytest.raises(UserError, match=r"/missing \(the server answered 404 .*--source=DIR"):
        fetch(_remote(server, "/missing"), tmp_path, progress=False)
    assert _left(tmp_path) == []


def test_no_connection_says_how_to_go_on(tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/x"
        with pytest.raises(UserError, match=r"cannot download http.*--source=DIR") as caught:
            fetch(RemoteFile(url, "x", 1, "0"), tmp_path, progress=False)
    assert "\n" not in str(caught.value)
    assert _left(tmp_path) == []


def test_silent_server_is_given_up(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/x"
        with pytest.raises(UserError, match="timed out"):
            fetch(RemoteFile(url, "x", 1, "0"), tmp_path, progress=False, timeout=0.2)


def test_interrupted_download_leaves_nothing(server, tmp_path, monkeypatch):
    sizes = []

    def advance(size: int) -> None:
        assert _left(tmp_path) == ["body.bin.part"]
        sizes.append(size)
        if len(sizes) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(download, "progress_bar", lambda *args, **options: contextlib.nullcontext(advance))
    with pytest.raises(KeyboardInterrupt):
        fetch(_remote(server, "/good"), tmp_path)
    assert len(sizes) == 2 and _left(tmp_path) == []


def test_file_urls_need_permission(tmp_path):
    (tmp_path / "body").write_bytes(BODY)
    remote = RemoteFile((tmp_path / "body").as_uri(), "copy", len(BODY), SHA256)
    with pytest.raises(ValueError, match="only http, https"):
        fetch(remote, tmp_path, progress=False)
    assert fetch(remote, tmp_path, progress=False, schemes=("file",)).read_bytes() == BODY


def test_two_at_once_download_once(server, tmp_path):
    remote = _remote(server, "/good")
    threads = [threading.Thread(target=fetch, args=(remote, tmp_path), kwargs={"progress": False}) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.requests == ["/good"]
    assert (tmp_path / "body.bin").read_bytes() == BODY


def test_unwritable_directory(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file.* cannot be written: .*Not a directory|File exists"):
        fetch(RemoteFile("http://127.0.0.1:9/x", "x", 1, "0"), tmp_path / "file" / "below", progress=False)


def test_progress_goes_to_stderr(server, tmp_path, capfd):
    fetch(_remote(server, "/good"), tmp_path, progress=True)
    out, err = capfd.readouterr()
    assert out == "" and "downloading body.bin" in err and "3.1/3.1 MB" in err


def test_hash_of_a_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*absent"):
        sha256_of(tmp_path / "absent")
