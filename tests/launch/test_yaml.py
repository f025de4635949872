"""launch/jobset.yaml and sky.yaml: keys, what must agree in them, and what their commands start."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.forks import ROOT
from tests.launch.stubs import Desk
from tests.launch.test_files import shellcheck

CLAIM, JOBSET = yaml.safe_load_all((ROOT / "launch" / "jobset.yaml").read_text())
SKY = yaml.safe_load((ROOT / "launch" / "sky.yaml").read_text())
JOB = JOBSET["spec"]["replicatedJobs"][0]["template"]["spec"]
POD = JOB["template"]["spec"]
CONTAINER = POD["containers"][0]
ENVIRONMENT = {variable["name"]: variable["value"] for variable in CONTAINER["env"]}


def mistakes(document: Any, schema: str) -> list[str]:
    loaded = json.loads((Path(__file__).parent / f"{schema}.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(loaded)
    return [error.message for error in jsonschema.Draft202012Validator(loaded).iter_errors(document)]


def keys(document: Any, path: tuple = ()) -> list[tuple]:
    """Paths of all keys of mappings."""
    items = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    found = [(*path, key) for key, _ in items] if isinstance(document, dict) else []
    for key, value in items:
        found += keys(value, (*path, key))
    return found


@pytest.mark.parametrize(("document", "schema"), [(JOBSET, "jobset"), (SKY, "sky")], ids=["jobset", "sky"])
def test_keys_and_values(document, schema):
    assert mistakes(document, schema) == []
    free = ("envs", "file_mounts")  # names in there are one's own
    for path in keys(document):
        if path[-2:-1] in [(name,) for name in free]:
            continue
        changed = copy.deepcopy(document)
        inner = changed
        for key in path[:-1]:
            inner = inner[key]
        inner[f"{path[-1]}s"] = inner.pop(path[-1])
        assert mistakes(changed, schema), f"a mistyped {'.'.join(map(str, path))} is found"


def test_the_claim():
    assert (CLAIM["apiVersion"], CLAIM["kind"]) == ("v1", "PersistentVolumeClaim")
    assert CLAIM["spec"]["accessModes"] == ["ReadWriteMany"]
    [volume] = [volume for volume in POD["volumes"] if "persistentVolumeClaim" in volume]
    assert volume["persistentVolumeClaim"]["claimName"] == CLAIM["metadata"]["name"]


def test_what_must_agree_in_the_jobset():
    name, job = JOBSET["metadata"]["name"], JOBSET["spec"]["replicatedJobs"][0]["name"]
    assert ENVIRONMENT["COORDINATOR"].rpartition(":")[0] == f"{name}-{job}-0-0.{name}"
    assert JOBSET["spec"]["network"]["enableDNSHostnames"] and JOB["completionMode"] == "Indexed"
    assert str(JOB["parallelism"]) == str(JOB["completions"]) == ENVIRONMENT["HOSTS"]
    assert {mount["name"] for mount in CONTAINER["volumeMounts"]} == {volume["name"] for volume in POD["volumes"]}
    assert POD["terminationGracePeriodSeconds"] == 120
    assert POD["restartPolicy"] == "Never", "Kubernetes wants it for a podFailurePolicy"
    # What is no accident ends the JobSet; all else, 143 among it, starts all pods anew.
    [rule] = JOB["podFailurePolicy"]["rules"]
    assert rule == {
        "action": "FailJob",
        "onExitCodes": {"containerName": CONTAINER["name"], "operator": "In", "values": [1, 2]},
    }
    [policy] = JOBSET["spec"]["failurePolicy"]["rules"]
    assert (policy["action"], policy["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert JOB["backoffLimit"] == 0 and JOBSET["spec"]["failurePolicy"]["maxRestarts"] > 0


def test_what_the_pods_start(desk: Desk):
    """Run as a pod runs it, with the image's python and the index that Kubernetes gives."""
    shutil.copy(desk.bin / "python3.11", desk.bin / "python")
    [script] = CONTAINER["args"]
    assert CONTAINER["command"] == ["bash", "-euo", "pipefail", "-c"]
    done = desk.run(f"set -euo pipefail\n{script}", **ENVIRONMENT, JOB_COMPLETION_INDEX="1")
    assert done.code == 0 and done.err == "", done
    assert desk.calls == [
        "python -m altgrad_jax.data prepare --config=configs/hybrid.py --config.data.data_dir=/altgrad/data",
        "python -m altgrad_jax.main --config=configs/hybrid.py --workdir=/altgrad/runs/hybrid"
        " --config.data.data_dir=/altgrad/data --config.runtime.compilation_cache=/altgrad/runs/.compiled"
        " --config.parallel.coordinator=altgrad-host-0-0.altgrad:12345 --config.parallel.hosts=2"
        " --config.parallel.host=1 --config.parallel.timeout=300",
        "XLA_FLAGS=--xla_gpu_enable_latency_hiding_scheduler=true",
    ]


def test_what_sky_starts(desk: Desk):
    environment = {name: value for name, value in SKY["envs"].items() if value is not None}
    done = desk.run(SKY["setup"], **environment)
    assert done.code == 0, done
    before = len(desk.calls)
    environment |= {
        "ARGS": "--config=configs/format.py:e3m4 --config.train.steps=5",
        "XLA_MODES": "deterministic triton",
    }
    done = desk.run(SKY["run"], **environment, MAIN="exit 143")
    assert done.code == 143 and done.code in SKY["resources"]["job_recovery"]["recover_on_exit_codes"]
    assert desk.calls[before + 1 :] == [
        "python -m altgrad_jax.data prepare --config=configs/format.py:e3m4 --config.train.steps=5"
        " --config.data.data_dir=/altgrad/data",
        "python -m altgrad_jax.main --config=configs/format.py:e3m4 --config.train.steps=5"
        " --workdir=/altgrad/runs/hybrid --config.data.data_dir=/altgrad/data"
        " --config.runtime.compilation_cache=/altgrad/runs/.compiled",
        "XLA_FLAGS=--xla_gpu_enable_latency_hiding_scheduler=true --xla_gpu_deterministic_ops=true"
        " --xla_gpu_cublas_fallback=false",
    ]


def test_a_bucket_must_be_given_and_takes_appended_files():
    assert SKY["envs"]["BUCKET"] is None, "SkyPilot then asks for it"
    assert SKY["file_mounts"]["/altgrad"] == {"name": "${BUCKET}", "mode": "MOUNT_CACHED"}
    assert SKY["resources"]["use_spot"] and SKY["resources"]["accelerators"] == ["H100:1", "H200:1"]


@pytest.mark.parametrize("script", [CONTAINER["args"][0], SKY["setup"], SKY["run"]], ids=["jobset", "setup", "run"])
def test_shellcheck_has_nothing_to_say_of_their_scripts(script):
    # Words of ARGS and XLA_MODES are separate words; variables come from outside.
    done = shellcheck("--shell=bash", "--exclude=SC2086,SC2153,SC2154", "-", input=script)
    assert done.stdout == ""
