"""Two processes started by launch/slurm.sbatch really train together, stop and resume."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.forks import ROOT
from tests.launch.stubs import Desk
from tests.runs import Lab, checkpoint_steps, ended, summary, train_losses, wait_for_step

pytestmark = pytest.mark.slow


def job_with_a_free_port() -> int:
    """A job's number decides its port."""
    for port in range(20000, 30000):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port - 20000
    raise AssertionError("no free port")


def submit(lab: Lab, desk: Desk, workdir: Path, **changes: object) -> subprocess.Popen:
    lab.prepare()
    slurm = {
        "SLURM_JOB_ID": str(job_with_a_free_port()),
        "SLURM_JOB_NODELIST": "127.0.0.1,localhost",
        "SLURM_NNODES": "2",
        "NODES": "127.0.0.1 localhost",
        "STATE": "RUNNING",
        "PYTHON": sys.executable,
        "CHIP": "cpu",
    }
    environment = os.environ | {name: desk.environment[name] for name in ("PATH", "CALLS", "TASKS")} | slurm
    arguments = lab.arguments(workdir, {key.replace("__", "."): value for key, value in changes.items()})
    return subprocess.Popen(
        [str(ROOT / "launch" / "slurm.sbatch"), *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_two_nodes_train_as_one_stop_and_resume(lab: Lab, desk: Desk, tmp_path: Path):
    alone = {"precision.compute": "float32", "optimizer.decay_steps": 400}
    assert ended(lab.start(tmp_path / "one", alone)).code == 0
    changes = {"precision__compute": "float32", "train__steps": 400, "optimizer__decay_steps": 400}
    changes |= {"checkpoint__every": 1000, "train__eval_every": 1000}

    job = submit(lab, desk, tmp_path / "two", **changes)
    wait_for_step(job, tmp_path / "two", 20)
    os.kill(job.pid, signal.SIGTERM)
    done = ended(job)
    assert done.code == 143 and done.out.endswith("goes back into the queue\n"), done
    assert any(call.startswith("scontrol requeue ") for call in desk.calls)
    assert summary(tmp_path / "two")["status"] == "interrupted"
    last = checkpoint_steps(tmp_path / "two")[-1]
    assert 20 <= last < 400

    done = ended(submit(lab, desk, tmp_path / "two", **changes))
    assert done.code == 0 and f"from the checkpoint of step {last}" in done.out, done
    losses = train_losses(tmp_path / "two")
    assert [step for step, _ in losses] == list(range(1, 401))
    # The same windows, split differently: only the order of float32 sums differs.
    assert [loss for _, loss in losses[:20]] == pytest.approx([x for _, x in train_losses(tmp_path / "one")], rel=1e-5)
