"""launch/xla_flags.sh: which flags, whose come last, and whether XLA knows them."""

import os
import re
import subprocess
import sys

import pytest

from tests.forks import ROOT
from tests.launch.stubs import Desk

OVERLAP = "--xla_gpu_enable_latency_hiding_scheduler=true"
DETERMINISTIC = "--xla_gpu_deterministic_ops=true"
TRITON = "--xla_gpu_cublas_fallback=false"
SOURCE = 'set -euo pipefail\nsource launch/xla_flags.sh "$@"\necho "${XLA_FLAGS-unset}"\n'


@pytest.mark.parametrize(
    ("words", "flags"),
    [
        ("h100", [OVERLAP]),
        ("h200 deterministic", [OVERLAP, DETERMINISTIC]),
        ("h100 triton deterministic", [OVERLAP, TRITON, DETERMINISTIC]),
        ("gpu", ["unset"]),
        ("gpu triton", [TRITON]),
        ("cpu deterministic triton", ["unset"]),
    ],
)
def test_flags_of_chips_and_modes(desk: Desk, words, flags):
    done = desk.run(SOURCE, *words.split())
    assert (done.code, done.out.split(), done.err) == (0, flags, "")


@pytest.mark.parametrize(
    ("gpus", "flags"),
    [
        ("580.65.06, 9.0, NVIDIA H100 80GB HBM3", [OVERLAP, TRITON]),
        ("580.65.06, 9.0, NVIDIA H200 NVL", [OVERLAP, TRITON]),
        ("580.65.06, 8.9, NVIDIA L40S", [TRITON]),
        ("", ["unset"]),
    ],
)
def test_auto_asks_the_machine(desk: Desk, gpus, flags):
    assert desk.run(SOURCE, "auto", "triton", GPUS=gpus).out.split() == flags
    desk.stub("nvidia-smi", 'echo "NVIDIA-SMI has failed: no H100 here"; exit 9')
    assert desk.run(SOURCE, "auto").out.split() == ["unset"], "a message is no name"
    desk.remove("nvidia-smi")
    assert desk.run(SOURCE).out.split() == ["unset"]


def test_flags_of_the_user_stay_and_come_last(desk: Desk):
    mine = "--xla_gpu_deterministic_ops=false --xla_dump_to=dump"
    assert desk.run(SOURCE, "h100", "deterministic", XLA_FLAGS=mine).out == f"{OVERLAP} {DETERMINISTIC} {mine}\n"
    assert desk.run(SOURCE, "cpu", XLA_FLAGS=mine).out == f"{mine}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("h1oo", "unknown chip 'h1oo': give h100, h200, gpu, cpu or auto"),
        ("h100 fast", "unknown mode 'fast': give deterministic, triton or both"),
    ],
)
def test_a_mistyped_name_is_one_line(desk: Desk, words, message):
    done = desk.run(SOURCE, *words.split())
    assert (done.code, done.out, done.err) == (2, "", f"error: xla_flags.sh: {message}\n")


def xla(flags: str) -> subprocess.CompletedProcess:
    program = "import jax; jax.jit(lambda x: x + 1)(1.0); print(len(jax.devices()))"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    return subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)


def test_xla_knows_every_flag_and_the_last_wins():
    flags = set(re.findall(r"--xla_\w+=\w+", (ROOT / "launch" / "xla_flags.sh").read_text()))
    assert flags == {OVERLAP, DETERMINISTIC, TRITON}
    devices = "--xla_force_host_platform_device_count"
    done = xla(" ".join([*sorted(flags), f"{devices}=2", f"{devices}=3"]))
    assert (done.returncode, done.stdout) == (0, "3\n"), done.stderr
    assert "Unknown flag" in xla(OVERLAP.replace("hiding", "hidding")).stderr, "it would have said so"
