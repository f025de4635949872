"""launch/sweep.sbatch and sweep.yaml: which part of the matrix each task runs, and when one comes back."""

import json
import os
import shutil
import signal
from pathlib import Path

import jsonschema
import pytest
import yaml

from tests.forks import ROOT
from tests.launch.stubs import Desk
from tests.launch.test_files import shellcheck

CONFIG = "--config=configs/matrix.py:formats8"
UNTIL_TERM = 'echo step 1; trap "sleep 0.3; exit 143" TERM; for _ in {1..600}; do sleep 0.05; done'
JOB = yaml.safe_load((ROOT / "launch" / "sweep.yaml").read_text())
POD = JOB["spec"]["template"]["spec"]
CONTAINER = POD["containers"][0]
ENVIRONMENT = {variable["name"]: variable["value"] for variable in CONTAINER["env"]}


@pytest.fixture
def task(desk: Desk) -> Desk:
    """What Slurm sets in the fourth of eight tasks."""
    desk.installed()
    desk.environment |= {
        "SLURM_JOB_ID": "4714",
        "SLURM_ARRAY_JOB_ID": "4711",
        "SLURM_ARRAY_TASK_ID": "3",
        "SLURM_ARRAY_TASK_COUNT": "8",
        "SLURM_ARRAY_TASK_MIN": "0",
        "SLURM_ARRAY_TASK_MAX": "7",
        "STATE": "RUNNING",
    }
    return desk


def requeued(task: Desk) -> bool:
    calls = [call for call in task.called("scontrol") if "requeue" in call]
    assert calls in ([], ["scontrol requeue 4711_3"])
    return bool(calls)


def test_a_task_runs_its_part(task: Desk):
    done = task.run("sweep.sbatch", CONFIG, "--workdir=runs/m", XLA_MODES="deterministic")
    assert done.code == 0 and done.err == "", done
    assert task.called("python") == [
        f"python -m altgrad_jax.data prepare {CONFIG}",
        f"python -m altgrad_jax.sweep {CONFIG} --workdir=runs/m --shard=3/8",
    ]
    assert "deterministic" in task.called("XLA_FLAGS=--xla_gpu_enable_latency_hiding_scheduler=true")[0]
    assert not requeued(task)


def test_without_its_corpus_nothing_is_started(task: Desk):
    assert task.run("sweep.sbatch", CONFIG, DATA_STATUS="1").code == 1
    assert len(task.called("python")) == 1 and not requeued(task)


@pytest.mark.parametrize("status", [1, 2, 130, 137])
def test_other_ends_are_ends(task: Desk, status):
    assert task.run("sweep.sbatch", CONFIG, MAIN=f"exit {status}").code == status
    assert not requeued(task)


def test_before_its_time_is_up_it_saves_and_comes_back(task: Desk):
    process = task.start("sweep.sbatch", CONFIG, MAIN=UNTIL_TERM)
    assert process.stdout.readline() == "step 1\n"
    os.kill(process.pid, signal.SIGTERM)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 143 and out.endswith("saved; task 4711_3 goes back into the queue\n") and err == ""
    assert requeued(task)


def test_a_task_that_slurm_has_ended_stays_away(task: Desk):
    assert task.run("sweep.sbatch", CONFIG, MAIN="exit 143", STATE="CANCELLED").code == 143
    assert not requeued(task)
    done = task.run("sweep.sbatch", CONFIG, MAIN="exit 143", SLURM_RESTART_COUNT="100")
    assert done.code == 2 and "not queued again" in done.err


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"SLURM_ARRAY_TASK_ID": ""}, "this is an array: sbatch --array=0-7"),
        ({"SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_MAX": "8"}, "without gaps: --array=0-7"),
        ({"SLURM_ARRAY_TASK_MAX": "14"}, "without gaps: --array=0-7"),
    ],
)
def test_an_array_that_would_leave_parts_out(task: Desk, environment, message):
    done = task.run("sweep.sbatch", CONFIG, **environment)
    assert done.code == 2 and message in done.err and not task.called("python")


def test_keys_and_values_of_the_job():
    schema = json.loads((Path(__file__).parent / "jobset.schema.json").read_text())
    of_job = {"$ref": "#/$defs/job", "$defs": schema["$defs"]}
    assert not list(jsonschema.Draft202012Validator(of_job).iter_errors(JOB["spec"]))
    assert (JOB["apiVersion"], JOB["kind"]) == ("batch/v1", "Job")
    assert JOB["spec"]["completionMode"] == "Indexed" and str(JOB["spec"]["completions"]) == ENVIRONMENT["SHARDS"]
    assert POD["restartPolicy"] == "Never", "Kubernetes wants it for a podFailurePolicy"
    [rule] = JOB["spec"]["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailIndex" and rule["onExitCodes"]["containerName"] == CONTAINER["name"]
    assert "backoffLimit" not in JOB["spec"] and JOB["spec"]["backoffLimitPerIndex"] > 0, "FailIndex needs the latter"
    assert JOB["spec"]["maxFailedIndexes"] <= JOB["spec"]["completions"]


def test_what_the_pods_start(desk: Desk):
    shutil.copy(desk.bin / "python3.11", desk.bin / "python")
    [script] = CONTAINER["args"]
    done = desk.run(f"set -euo pipefail\n{script}", **ENVIRONMENT, JOB_COMPLETION_INDEX="5")
    assert done.code == 0 and done.err == "", done
    assert desk.called("python") == [
        "python -m altgrad_jax.data prepare --config=configs/matrix.py:formats8"
        " --config.base.data.data_dir=/altgrad/data",
        "python -m altgrad_jax.sweep --config=configs/matrix.py:formats8 --workdir=/altgrad/runs/formats8"
        " --config.base.data.data_dir=/altgrad/data --shard=5/8",
    ]
    assert shellcheck("--shell=bash", "--exclude=SC2086,SC2153,SC2154", "-", input=script).stdout == ""
