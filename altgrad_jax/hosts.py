"""Processes that train together: they join, agree on what they run, and end together.

Process 0 listens at `config.parallel.coordinator`. Each of the others keeps one connection to it, on which they say who
they are, what they are about to run, that they are still there, and how they end. A host whose connection closes, or of
which nothing is heard for `config.parallel.timeout` seconds, ends all of them with one line. JAX's own connections take
the same way (see `relay`), so no other port must be open for them.
"""

import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, NoReturn

import jax
from ml_collections import ConfigDict

from altgrad_jax import provenance, relay
from altgrad_jax.errors import UsageError, UserError
from altgrad_jax.interrupt import end_process
from altgrad_jax.relay import Link, in_background

# Settings that may differ between hosts: which host it is, what only one of them does, and paths on its own disks. Of
# the data the hash is compared.
OF_ONE_HOST = (
    *("config.parallel.host", "config.parallel.coordinator", "config.runtime.compilation_cache"),
    *("config.tracking.", "config.data.data_dir", "config.data.path", "config.data.cache"),
)
# Environment variables that change what is computed.
ENVIRONMENT = (
    *("XLA_FLAGS", "JAX_ENABLE_X64", "JAX_DEFAULT_MATMUL_PRECISION", "JAX_DEFAULT_PRNG_IMPL"),
    *("JAX_THREEFRY_PARTITIONABLE", "JAX_RANDOM_SEED_OFFSET", "JAX_NUMPY_DTYPE_PROMOTION"),
    *("JAX_PLATFORMS", "NVIDIA_TF32_OVERRIDE"),
)
MOST_DIFFERENCES, LONGEST_VALUE = 6, 60
_JAX_TIMEOUT = 10**6  # seconds: JAX's own limits end processes with a C++ stack, so this module's come first
_ABSENT = object()
_joined: "Hosts | None" = None


class LostHostError(UserError):
    """Another host is absent or gone: no fault of this run, and starting all of them again may well do."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h; a launcher that gives up at 1 starts this one again


@contextmanager
def together(config: ConfigDict, workdir: str, options: Mapping[str, Any] = MappingProxyType({})) -> Iterator[None]:
    """Joins the other hosts, if there are any, and ends with them; enter it before JAX touches a device.

    The configuration, the folder and other `options` of the command must be those of all hosts.

    An error in here ends the process, and with it the others.

    Raises:
      UsageError: the hosts do not run the same.
      LostHostError: not all of them joined.
    """
    global _joined
    parallel = config.parallel
    if parallel.hosts == 1:
        yield
        return
    _joined = Hosts(parallel.coordinator, parallel.hosts, parallel.host, parallel.timeout)
    try:
        _joined.join(_settings(config, workdir) | dict(options))
        yield
        _joined.leave()
    except BaseException as e:  # whatever it is, the others must hear of it
        _joined.fail(e)


def agree(stage: str, facts: Mapping[str, Any]) -> None:
    """Waits until all hosts have come to this stage, and compares what each of them says there.

    Raises:
      UsageError: they differ; the same line on all hosts.
    """
    if _joined is not None:
        _joined.agree(stage, facts)


def _settings(config: ConfigDict, workdir: str) -> dict[str, Any]:
    """What every host must have alike before it looks at data or devices."""
    facts: dict[str, Any] = {
        "--workdir": os.path.abspath(os.path.expanduser(workdir)),
        "code": provenance.code_sha256()[:12],
    }
    facts |= {f"{name} version": version for name, version in provenance.versions().items()}
    facts |= {name: os.environ.get(name) for name in ENVIRONMENT}
    return facts | {k: v for k, v in _flat("config", provenance.config_dict(config)) if not k.startswith(OF_ONE_HOST)}


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(f"{prefix}.{key}", inner)
    else:
        yield prefix, value


def differences(contents: list[dict[str, Any]]) -> str:
    """Where hosts differ, as "key: value on host 0, value on host 1; ..."; empty if they do not."""
    found = []
    for key in dict.fromkeys(key for content in contents for key in content):
        values = [content.get(key, _ABSENT) for content in contents]
        different = next((host for host, value in enumerate(values) if value != values[0]), None)
        if different is not None:
            found.append(f"{key}: {_shown(values[0])} on host 0, {_shown(values[different])} on host {different}")
    more = len(found) - MOST_DIFFERENCES
    return "; ".join([*found[:MOST_DIFFERENCES], *([f"and {more} more"] if more > 0 else [])])


def _shown(value: Any) -> str:
    text = "absent" if value is _ABSENT else "not set" if value is None else str(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}..."


class Hosts:
    """This process among those that train together."""

    def __init__(self, coordinator: str, hosts: int, host: int, timeout: float):
        """Of `hosts` processes this is number `host`; number 0 listens at `coordinator`, host:port."""
        name, _, port = coordinator.rpartition(":")
        self._coordinator, self._address = coordinator, (name.strip("[]"), int(port))
        self._hosts, self._host, self._timeout = hosts, host, timeout
        self._links: dict[int, Link] = {}
        self._said: dict[str, dict[int, dict[str, Any]]] = {}  # stage -> host -> its facts; kept by process 0
        self._all: dict[str, list[dict[str, Any]]] = {}  # stage -> the facts of all, by host
        self._changed = threading.Condition()
        self._ending = threading.Lock()  # held by whoever has the last word of this process
        self._apart = False  # the others' ends are no news any more
        self._jax_port = 0

    def join(self, facts: Mapping[str, Any]) -> None:
        """Meets the other hosts, compares facts with theirs, and starts JAX among them.

        Raises:
          UsageError: they differ.
          LostHostError: not all hosts came in time.
        """
        deadline = time.monotonic() + self._timeout
        if self._host == 0:
            self._open()
        else:
            self._links[0] = Link(self._reach(deadline), self._timeout)
            self._links[0].send(host=self._host, hosts=self._hosts)
            in_background(self._hear, 0, self._links[0])
        in_background(self._beat)
        self.agree("start", facts, deadline if self._host == 0 else None)  # process 0 speaks for the others
        self._start_jax()

    def _open(self) -> None:
        self._jax_port = relay.free_port()
        try:
            server = relay.listen(self._address[1])
        except OSError as e:
            raise UserError(
                f"config.parallel.coordinator={self._coordinator}: cannot listen there: {e.strerror}"
            ) from e
        in_background(self._accept, server)

    def _reach(self, deadline: float) -> socket.socket:
        try:
            return relay.connect(self._address, deadline)
        except OSError as e:
            raise LostHostError(
                f"host {self._host} of {self._hosts} could not reach host 0 at {self._coordinator} within"
                f" {self._timeout:g} s ({e.strerror or e}); config.parallel.timeout is how long it tries"
            ) from e

    def _accept(self, server: socket.socket) -> None:
        while True:
            connection, _ = server.accept()
            in_background(self._greet, connection)

    def _greet(self, connection: socket.socket) -> None:
        """Takes in another host, or leads JAX's client to JAX's service."""
        connection.settimeout(self._timeout)
        try:
            if connection.recv(1, socket.MSG_PEEK) == relay.GRPC:
                relay.join(connection, ("127.0.0.1", self._jax_port), self._timeout)
                return
            link = Link(connection, self._timeout)
            hello = next(iter(link))
            host, hosts = int(hello["host"]), int(hello["hosts"])
        except (OSError, ValueError, KeyError, TypeError, StopIteration):
            connection.close()  # not one of us
            return
        if hosts != self._hosts:
            line = f"config.parallel.hosts: {self._hosts} on host 0, {hosts} on host {host}"
            link.send(over=line, code=UsageError.exit_code)
            self._end(line, UsageError.exit_code)
        with self._changed:
            refused = host in self._links or not 0 < host < hosts
            if not refused:
                self._links[host] = link
        if refused:
            reason = f"config.parallel.host={host}: that host has joined already; every process needs its own number"
            link.send(over=reason, code=UsageError.exit_code)
        else:
            self._hear(host, link)

    def _beat(self) -> None:
        while True:
            time.sleep(min(5.0, self._timeout / 4))
            for link in list(self._links.values()):
                link.send(beat=True)

    def _hear(self, host: int, link: Link) -> None:
        """Takes what a host says, until it is gone."""
        try:
            for message in link:
                self._take(host, message)
            why = "its connection closed"
        except ConnectionError:
            why = "its connection closed"
        except TimeoutError:
            why = f"nothing was heard of it for {self._timeout:g} s"
        except (OSError, ValueError) as e:
            why = f"its connection broke: {e}"
        if not self._apart:
            line = f"host {host} is gone ({why}); run the same command again on all hosts to go on"
            self._end(line, LostHostError.exit_code)

    def _take(self, host: int, message: dict[str, Any]) -> None:
        if "over" in message:
            self._end(message["over"], message["code"])
        elif "all" in message:
            self._settle(message["stage"], message["all"])
        elif "facts" in message:
            self._collect(host, message["stage"], message["facts"])

    def _collect(self, host: int, stage: str, facts: dict[str, Any]) -> None:
        """Process 0: keeps what a host says at a stage; the last one's completes it."""
        with self._changed:
            said = self._said.setdefault(stage, {})
            said[host] = facts
            if len(said) < self._hosts:
                return
            contents = [said[i] for i in range(self._hosts)]
        self._tell(stage=stage, all=contents)
        self._settle(stage, contents)

    def _settle(self, stage: str, contents: list[dict[str, Any]]) -> None:
        with self._changed:
            # Hosts that differ, or leave, end by themselves.
            self._apart = stage == "end" or bool(differences(contents))
            self._all[stage] = contents
            self._changed.notify_all()

    def _tell(self, **message: Any) -> None:
        for link in list(self._links.values()):
            link.send(**message)

    def agree(self, stage: str, facts: Mapping[str, Any], deadline: float | None = None) -> None:
        """See `agree`; at the deadline (of `time.monotonic`) the absent are named."""
        said = json.loads(json.dumps(facts))  # as the others will see them
        if self._host == 0:
            self._collect(0, stage, said)
        else:
            self._links[0].send(stage=stage, facts=said)
        with self._changed:
            wait = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not self._changed.wait_for(lambda: stage in self._all, wait):
                absent = [str(i) for i in range(self._hosts) if i not in self._said.get(stage, {})]
                raise LostHostError(
                    f"host {' and '.join(absent)} of {self._hosts} did not join at {self._coordinator} within"
                    f" {self._timeout:g} s (config.parallel.timeout)"
                )
            contents = self._all[stage]
        if different := differences(contents):
            raise UsageError(f"the hosts do not run the same: {different}")

    def _start_jax(self) -> None:
        port = self._jax_port or relay.relay_to(self._address, self._timeout)
        jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM
        try:
            jax.distributed.initialize(
                f"127.0.0.1:{port}",
                self._hosts,
                self._host,
                coordinator_bind_address=f"127.0.0.1:{port}",
                initialization_timeout=_JAX_TIMEOUT,
                heartbeat_timeout_seconds=_JAX_TIMEOUT,
            )
        except RuntimeError as e:
            raise UserError(f"host {self._host} of {self._hosts}: JAX could not join: {str(e).splitlines()[0]}") from e

    def leave(self) -> None:
        """Returns when all hosts have come to their end and JAX's connections are closed."""
        self.agree("end", {})
        jax.distributed.shutdown()

    def fail(self, error: BaseException) -> NoReturn:
        """Ends this process for an error, and tells the others."""
        # Where another host is gone, that is the cause, and is known soon: the error is what came of it.
        time.sleep(self._patience(error))
        if isinstance(error, UserError):
            line, code = str(error), error.exit_code
        elif isinstance(error, SystemExit):
            line, code = "it was interrupted", int(error.code or 0)
        else:
            line, code = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}", 1
        self._end(line, code, error)

    def _patience(self, error: BaseException) -> float:
        if isinstance(error, SystemExit | UsageError):
            return 0.0
        if isinstance(error, UserError):
            return min(2.0, self._timeout) if error.__cause__ else 0.0
        return self._timeout

    def _end(self, line: str, code: int, error: BaseException | None = None) -> NoReturn:
        """Says why, tells the others, and ends the process; at once, for its main thread may hang in a collective."""
        if not self._ending.acquire(blocking=False):
            time.sleep(_JAX_TIMEOUT)  # another thread has the word, and ends the process
        if error is None and self._host == 0:
            self._tell(over=line, code=code)
        elif error is not None and not self._apart:
            self._tell(over=f"host {self._host} ended: {line}", code=code)
        if error is None or isinstance(error, UserError):
            print(f"error: {line}", file=sys.stderr)
        elif not isinstance(error, SystemExit):
            traceback.print_exception(error)
        end_process(code)
