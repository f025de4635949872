"""launch/slurm.sbatch: what it starts, and when it comes back. Its tasks run here, as the stub of srun starts them."""

import os
import signal
import time

import pytest

from tests.launch.stubs import Desk

CONFIG = "--config=configs/hybrid.py"
UNTIL_TERM = 'echo step 1; trap "sleep 0.6; exit 143" TERM; for _ in {1..600}; do sleep 0.05; done'
STEP = (
    "srun --ntasks={nodes} --ntasks-per-node=1 --cpus-per-task=8 --kill-on-bad-exit=0 --wait=60"
    ' bash -c exec "$@" --config.parallel.host="$SLURM_NODEID" bash .venv/bin/python -m altgrad_jax.main {arguments}'
    " --config.runtime.compilation_cache=runs/.compiled --config.parallel.coordinator={first}:{port}"
    " --config.parallel.hosts={nodes}"
)


@pytest.fixture
def job(desk: Desk) -> Desk:
    """What Slurm sets in a job of two nodes."""
    desk.installed()
    desk.environment |= {
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "gpu[07-08]",
        "SLURM_NNODES": "2",
        "SLURM_CPUS_PER_TASK": "8",
        "NODES": "gpu07 gpu08",
        "STATE": "RUNNING",
    }
    return desk


def requeued(job: Desk) -> bool:
    calls = [call for call in job.called("scontrol") if "requeue" in call]
    assert calls in ([], ["scontrol requeue 4711"])
    return bool(calls)


def test_one_process_a_node_with_its_number(job: Desk):
    done = job.run("slurm.sbatch", CONFIG, "--config.train.batch_size=16", XLA_MODES="deterministic")
    assert done.code == 0 and done.err == "", done
    arguments = f"{CONFIG} --config.train.batch_size=16"
    assert job.called("scontrol") == ["scontrol show hostnames gpu[07-08]"]
    assert job.called("srun") == [STEP.format(nodes=2, arguments=arguments, first="gpu07", port=24711)]
    prepare, *trained = job.called("python")
    assert prepare == f"python -m altgrad_jax.data prepare {arguments}"
    hosts = sorted(call.rpartition("--config.parallel.host=")[2] for call in trained)
    assert hosts == ["0", "1"]
    flags = "XLA_FLAGS=--xla_gpu_enable_latency_hiding_scheduler=true --xla_gpu_deterministic_ops=true"
    assert job.called(flags.split()[0]) == [flags] * 2
    assert not requeued(job)


def test_one_node_is_the_same_with_one(job: Desk):
    done = job.run("slurm.sbatch", CONFIG, SLURM_NNODES="1", NODES="gpu07", SLURM_JOB_NODELIST="gpu07")
    assert done.code == 0
    assert job.called("srun") == [STEP.format(nodes=1, arguments=CONFIG, first="gpu07", port=24711)]
    assert job.called("python")[1].endswith(" --config.parallel.hosts=1 --config.parallel.host=0")


def test_without_its_corpus_nothing_is_started(job: Desk):
    assert job.run("slurm.sbatch", CONFIG, DATA_STATUS="1").code == 1
    assert not job.called("srun") and not requeued(job)


@pytest.mark.parametrize("status", [0, 1, 2, 130, 137])
def test_other_ends_are_ends(job: Desk, status):
    assert job.run("slurm.sbatch", CONFIG, MAIN=f"exit {status}").code == status
    assert not requeued(job)


def test_one_process_that_fails_fails_the_job(job: Desk):
    last = "if [[ $* == *parallel.host=1 ]]; then exit 1; fi; exit 0"
    assert job.run("slurm.sbatch", CONFIG, MAIN=last).code == 1
    assert not requeued(job)


def test_saved_by_a_preemption_it_comes_back(job: Desk):
    """Slurm sends SIGTERM to the tasks themselves."""
    done = job.run("slurm.sbatch", CONFIG, MAIN="exit 143")
    assert done.code == 143 and done.out.endswith("saved; job 4711 goes back into the queue\n")
    assert requeued(job) and not job.called("scancel")


@pytest.mark.parametrize("signals", [1, 3])
def test_before_its_time_is_up_it_saves_and_comes_back(job: Desk, signals):
    """However often it is told, the program is told once: a second SIGTERM would end it before it has saved."""
    process = job.start("slurm.sbatch", CONFIG, MAIN=UNTIL_TERM)
    assert [process.stdout.readline() for _ in range(2)] == ["step 1\n"] * 2
    for _ in range(signals):
        os.kill(process.pid, signal.SIGTERM)
        time.sleep(0.1)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 143 and out.endswith("goes back into the queue\n") and err == ""
    assert job.called("scancel") == ["scancel --signal=TERM 4711"]
    assert requeued(job)


def test_told_at_the_last_moment_it_still_knows_how_it_ended(job: Desk):
    process = job.start(
        "slurm.sbatch", CONFIG, MAIN='echo step 1; trap "exit 0" TERM; for _ in {1..600}; do sleep 0.05; done'
    )
    process.stdout.readline()
    process.stdout.readline()
    os.kill(process.pid, signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 0 and not requeued(job)


@pytest.mark.parametrize("state", ["CANCELLED", "COMPLETING", "PREEMPTED"])
def test_a_job_that_slurm_has_ended_stays_away(job: Desk, state):
    """After scancel; and a preempted one is queued by Slurm itself."""
    assert job.run("slurm.sbatch", CONFIG, MAIN="exit 143", STATE=state).code == 143
    assert not requeued(job)


def test_it_does_not_come_back_for_ever(job: Desk):
    done = job.run("slurm.sbatch", CONFIG, MAIN="exit 143", SLURM_RESTART_COUNT="3", MAX_RESTARTS="3")
    assert done.code == 2 and done.err.startswith("error: not queued again after 3 times: is --time too short")
    assert not requeued(job)
    assert job.run("slurm.sbatch", CONFIG, MAIN="exit 143", SLURM_RESTART_COUNT="3").code == 143
    assert requeued(job)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"SLURM_JOB_ID": ""}, "this is a batch script: sbatch launch/slurm.sbatch --config=configs/hybrid.py"),
        ({"PYTHON": "no/python"}, "there is no no/python in "),
        ({"CHIP": "h300"}, "xla_flags.sh: unknown chip 'h300'"),
        ({"NODES": "gpu07"}, "scontrol names 1 of 2 nodes in gpu[07-08]"),
    ],
)
def test_a_mistake_is_one_line(job: Desk, change, message):
    done = job.run("slurm.sbatch", CONFIG, **change)
    assert done.code == 2 and done.err.startswith(f"error: {message}") and len(done.err.splitlines()) == 1, done.err
    assert not job.called("srun")


def test_submitted_elsewhere(job: Desk):
    script = job.root / "launch" / "slurm.sbatch"
    done = job.run(f"cd / \n exec {script} {CONFIG}")
    assert done.code == 2 and done.err.startswith("error: submit from the root of the repository: / has no launch/")


def test_what_slurm_is_asked_for():
    from tests.forks import ROOT

    lines = (ROOT / "launch" / "slurm.sbatch").read_text().splitlines()
    asked = dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in lines if line.startswith("#SBATCH"))
    assert asked["signal"] == "B:TERM@120" and "requeue" in asked and asked["open-mode"] == "append"
    assert asked["ntasks-per-node"] == "1"
    first = next(n for n, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in lines[first:]), "Slurm reads none after the first command"
