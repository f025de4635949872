"""Several processes that train together, on one machine."""

import socket
from pathlib import Path

import pytest

from tests.runs import Ended, Lab, bits, ended, summary, train_losses

pytestmark = pytest.mark.slow


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_two_hosts(lab: Lab, workdir: Path, **changes: object) -> list[Ended]:
    """Both processes to their end, each with one device."""
    together = {"parallel.coordinator": f"127.0.0.1:{free_port()}", "parallel.hosts": 2}
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    processes = [lab.start(workdir, dotted | together | {"parallel.host": host}) for host in range(2)]
    return [ended(process) for process in processes]


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


def test_a_malformed_coordinator(lab: Lab, tmp_path: Path) -> None:
    done = ended(
        lab.start(tmp_path / "run", {"parallel.coordinator": "no port", "parallel.hosts": 2, "parallel.host": 1})
    )
    assert done.code == 2
    assert done.err.splitlines() == ["error: config.parallel.coordinator='no port' is not host:port"]
    assert not (tmp_path / "run").exists()
