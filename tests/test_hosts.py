"""Several processes that train together, on one machine."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from altgrad_jax.hosts import differences
from tests.runs import Ended, Lab, bits, checkpoint_steps, ended, summary, train_losses, wait_for_step

ENDLESS = {"train.steps": 200_000, "optimizer.decay_steps": 20, "checkpoint.every": 100_000}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_hosts(
    lab: Lab,
    workdir: Path,
    changes: Mapping[str, object] = {},
    of_host_1: Mapping[str, object] = {},
    environment_1: Mapping[str, str] = {},
) -> list[subprocess.Popen]:
    """Both processes, each with one device; the second with further changes."""
    together = {"parallel.coordinator": f"127.0.0.1:{free_port()}", "parallel.hosts": 2, "parallel.timeout": 8}
    shared = together | dict(changes)
    return [
        lab.start(workdir, shared | {"parallel.host": 0}),
        lab.start(workdir, shared | {"parallel.host": 1} | dict(of_host_1), environment_1),
    ]


def run_two_hosts(lab: Lab, workdir: Path, **changes: object) -> list[Ended]:
    """Both processes to their end."""
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    return [ended(process) for process in start_hosts(lab, workdir, dotted)]


@pytest.mark.slow
def test_two_hosts_train_as_one_and_resume_to_the_bit(lab: Lab, tmp_path: Path) -> None:
    alone = {"precision.compute": "float32"}
    assert ended(lab.start(tmp_path / "one", alone)).code == 0
    straight = run_two_hosts(lab, tmp_path / "two", precision__compute="float32")
    assert [done.code for done in straight] == [0, 0], straight
    one, two = train_losses(tmp_path / "one"), train_losses(tmp_path / "two")
    assert [step for step, _ in two] == list(range(1, 21))
    # The same windows, split differently: only the order of float32 sums differs.
    assert [loss for _, loss in two] == pytest.approx([loss for _, loss in one], rel=1e-5)
    # One of the two speaks and writes.
    assert "finished at step 20" in straight[0].out
    assert "step" not in straight[1].out

    halves = {"precision__compute": "float32", "optimizer__decay_steps": 20}
    for steps in (10, 20):
        done = run_two_hosts(lab, tmp_path / "resumed", train__steps=steps, **halves)
        assert [one.code for one in done] == [0, 0], done
    assert summary(tmp_path / "resumed")["parameter_sha256"] == summary(tmp_path / "two")["parameter_sha256"]
    assert train_losses(tmp_path / "resumed") == two
    assert bits(tmp_path / "resumed")[-1] == bits(tmp_path / "two")[-1]


@pytest.mark.slow
def test_a_malformed_coordinator(lab: Lab, tmp_path: Path) -> None:
    done = ended(
        lab.start(tmp_path / "run", {"parallel.coordinator": "no port", "parallel.hosts": 2, "parallel.host": 1})
    )
    assert done.code == 2
    assert done.err.splitlines() == ["error: config.parallel.coordinator='no port' is not host:port"]
    assert not (tmp_path / "run").exists()


def test_what_differs_is_named_with_both_values():
    alike = {"config.seed": 1, "config.data.tokenizer": "auto"}
    assert differences([alike, dict(alike)]) == ""
    others = alike | {"config.seed": 2}
    assert differences([alike, alike, others]) == "config.seed: 1 on host 0, 2 on host 2"
    assert differences([alike, {"config.seed": 1}]) == "config.data.tokenizer: auto on host 0, absent on host 1"
    many = differences([dict.fromkeys("abcdefgh", 0), dict.fromkeys("abcdefgh", 1)])
    assert many.count(" on host 1") == 6 and many.endswith("; and 2 more")
    assert len(differences([{"a": "x" * 500}, {"a": None}])) < 120


@pytest.mark.slow
def test_hosts_that_would_not_run_the_same_are_refused_alike(lab: Lab, tmp_path: Path) -> None:
    """A rate decides the result, an interval would have them wait for each other, and a variable changes products."""
    other = {"train.eval_every": 7, "tracking.tags": "of-host-1"}
    variable = {"JAX_DEFAULT_MATMUL_PRECISION": "float32"}
    done = [ended(process) for process in start_hosts(lab, tmp_path / "run", {}, other, variable)]
    assert [one.code for one in done] == [2, 2], done
    assert (
        done[0].err
        == done[1].err
        == (
            "error: the hosts do not run the same: JAX_DEFAULT_MATMUL_PRECISION: not set on host 0, float32 on host 1;"
            " config.train.eval_every: 10 on host 0, 7 on host 1\n"
        )
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("host", "told"), [(1, "could not reach host 0 at"), (0, "host 1 of 2 did not join at")])
def test_a_host_that_is_alone_says_so_in_time(lab: Lab, tmp_path: Path, host: int, told: str) -> None:
    alone = {"parallel.coordinator": f"127.0.0.1:{free_port()}", "parallel.hosts": 2, "parallel.host": host}
    began = time.monotonic()
    done = ended(lab.start(tmp_path / "run", alone | {"parallel.timeout": 2}))
    assert time.monotonic() - began < 40, "two seconds, and what starting takes"
    assert done.code == 75 and done.err.count("\n") == 1 and told in done.err and "within 2 s" in done.err, done


@pytest.mark.slow
def test_a_host_that_is_killed_takes_the_other_with_it(lab: Lab, tmp_path: Path) -> None:
    """Host 0 holds JAX's coordination service, without which JAX's client would abort with a C++ stack."""
    hosts = start_hosts(lab, tmp_path / "run", ENDLESS)
    wait_for_step(hosts[0], tmp_path / "run", 3)
    os.kill(hosts[0].pid, signal.SIGKILL)
    left = ended(hosts[1], timeout=40)
    assert left.code == 75, left
    assert left.err == (
        "error: host 0 is gone (its connection closed); run the same command again on all hosts to go on\n"
    )
    ended(hosts[0])


@pytest.mark.slow
def test_a_signal_to_one_host_stops_both_with_one_checkpoint(lab: Lab, tmp_path: Path) -> None:
    hosts = start_hosts(lab, tmp_path / "run", ENDLESS)
    wait_for_step(hosts[0], tmp_path / "run", 3)
    hosts[1].terminate()
    done = [ended(process) for process in hosts]
    assert [one.code for one in done] == [143, 143], done
    assert summary(tmp_path / "run")["status"] == "interrupted"
    assert checkpoint_steps(tmp_path / "run") == [summary(tmp_path / "run")["step"]]
