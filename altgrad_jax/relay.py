"""Sockets between hosts: JSON lines to talk by, and relays that carry JAX's own connections.

JAX's client ends its process with SIGABRT and a C++ stack as soon as its connection to the coordination service breaks.
Between the two lies a relay that does not pass this on, so that the process has time to say in one line what happened.
"""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

GRPC = b"P"  # what a client of JAX's service sends first: HTTP/2's "PRI"; a `Link` begins with a brace
_CHUNK, _RETRY_SECONDS = 1 << 16, 0.05


def in_background(function: Callable[..., None], *arguments: Any) -> None:
    """Starts a thread that does not keep the process from ending."""
    threading.Thread(target=function, args=arguments, daemon=True).start()


class Link:
    """JSON objects over a socket, one a line."""

    def __init__(self, connection: socket.socket, timeout: float):
        """Takes over a connection; to hear nothing for `timeout` seconds is an error."""
        connection.settimeout(timeout)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection, self._lines, self._sending = connection, connection.makefile("rb"), threading.Lock()

    def send(self, **message: Any) -> None:
        """Sends an object. A broken connection is no error here: who reads from it learns of it."""
        with self._sending, suppress(OSError):
            self._connection.sendall(json.dumps(message).encode() + b"\n")

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The objects that come, to the end of the connection.

        Raises:
          OSError: the connection broke, or (TimeoutError) nothing came for too long.
          ValueError: what came is no such object.
        """
        for line in self._lines:
            message = json.loads(line)
            if not isinstance(message, dict):
                raise ValueError("no JSON object")
            yield message

    def close(self) -> None:
        """Ends the connection."""
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)


def listen(port: int) -> socket.socket:
    """A listening socket on all addresses of this machine. Raises OSError."""
    if socket.has_dualstack_ipv6():
        with suppress(OSError):  # a machine without IPv6 addresses
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def connect(address: tuple[str, int], deadline: float) -> socket.socket:
    """A connection, tried until `time.monotonic()` reaches the deadline. Raises the last OSError."""
    while True:
        try:
            found = socket.create_connection(address, timeout=max(0.1, deadline - time.monotonic()))
            if found.getsockname() != found.getpeername():
                return found
            found.close()  # where nobody listens on a port of this machine, a socket may meet itself
        except OSError:
            if time.monotonic() + _RETRY_SECONDS >= deadline:
                raise
            time.sleep(_RETRY_SECONDS)


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def relay_to(address: tuple[str, int], timeout: float) -> int:
    """Opens a port of this machine whose connections lead to an address; returns its number.

    When the far end closes a connection, the near one is left open.
    """
    server = socket.create_server(("127.0.0.1", 0))
    kept = []  # a socket that nothing refers to is closed

    def serve() -> None:
        while True:
            near, _ = server.accept()
            kept.append(near)
            in_background(join, near, address, timeout, False)

    in_background(serve)
    return server.getsockname()[1]


def join(near: socket.socket, address: tuple[str, int], timeout: float, pass_on_end: bool = True) -> None:
    """Carries bytes between a connection and an address until one of them closes.

    Args:
      near: the connection.
      address: where the other one leads; tried for `timeout` seconds.
      timeout: in seconds.
      pass_on_end: whether the near one is closed when the far one is.
    """
    near.settimeout(None)
    try:
        far = connect(address, time.monotonic() + timeout)
    except OSError:
        near.close()
        return
    far.settimeout(None)
    in_background(_carry, far, near, pass_on_end)
    _carry(near, far, True)


def _carry(source: socket.socket, sink: socket.socket, pass_on_end: bool) -> None:
    with suppress(OSError):
        while data := source.recv(_CHUNK):
            sink.sendall(data)
    if pass_on_end:
        with suppress(OSError):
            sink.shutdown(socket.SHUT_WR)
