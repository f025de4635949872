"""launch/setup.sh: what it checks and installs."""

import pytest

from tests.launch.stubs import H100, Desk

PIP = "python -m pip install --quiet --no-cache-dir -e .[{}] -c constraints.txt"


@pytest.mark.parametrize(
    ("gpu", "cuda"),
    [
        (H100, "cuda13"),
        ("580.65.06, 7.0, Tesla V100-SXM2-16GB", "cuda12"),
        ("570.86.15, 9.0, NVIDIA H200", "cuda12"),
        ("525.60.13, 8.9, NVIDIA L40S", "cuda12"),
    ],
)
def test_driver_and_gpu_decide_the_build(desk: Desk, gpu, cuda):
    done = desk.run("setup.sh", GPUS=gpu)
    assert done.code == 0 and done.err == "", done
    assert desk.called("python3.11")[-1] == "python3.11 -m venv .venv"
    pip, jax = desk.called("python")
    assert pip == PIP.format(cuda)
    assert jax.startswith("python -c import jax")
    assert "CudaDevice" in done.out and done.out.endswith("ready: launch/run.sh --config=configs/hybrid.py\n")


def test_several_gpus_are_as_old_as_the_oldest(desk: Desk):
    done = desk.run("setup.sh", GPUS=f"{H100}\n580.65.06, 8.0, NVIDIA A100-SXM4-80GB")
    assert "GPU: NVIDIA A100-SXM4-80GB, compute capability 8.0, driver 580.65.06\n" in done.out
    assert "note: no FP8 matrix units below compute capability 8.9" in done.out


@pytest.mark.parametrize("gpu", [H100, "580.65.06, 8.9, NVIDIA L40S", "580.65.06, 10.0, NVIDIA B200"])
def test_gpus_with_fp8_units_get_no_note(desk: Desk, gpu):
    done = desk.run("setup.sh", GPUS=gpu)
    assert done.code == 0 and "note:" not in done.out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"GPUS": "470.82.01, 8.0, NVIDIA A100"}, "NVIDIA driver 470 is too old: 525 or later is needed"),
        ({"GPUS": ""}, "nvidia-smi does not work: "),
        ({"DISK_GB": "7"}, "7 GB free in "),
        ({"VERSION": "3, 10"}, "Python 3.11 or later is needed, and python3 is not: install one and give PYTHON=..."),
        ({"PYTHON": "python3"}, "Python 3.11 or later is needed, and python3 is not"),
        ({"VENV_STATUS": "1"}, "python3.11 cannot make a virtual environment: on Debian and Ubuntu, apt-get install"),
        ({"PIP_STATUS": "1"}, "pip could not install .[cuda13]: its reason is above"),
        ({"NO_GPU": "1"}, "JAX does not see the GPU\n"),
        ({"NO_GPU": "1", "LD_LIBRARY_PATH": "/cuda"}, "JAX does not see the GPU; LD_LIBRARY_PATH is set, which hides"),
    ],
)
def test_a_mistake_is_one_line(desk: Desk, change, message):
    done = desk.run("setup.sh", **change)
    assert done.code == 1
    assert done.err.startswith(f"error: {message}") and len(done.err.splitlines()) == 1, done.err


def test_no_driver_at_all(desk: Desk, tmp_path):
    desk.remove("nvidia-smi")
    done = desk.run("setup.sh")
    assert done.err == "error: no nvidia-smi: this machine has no NVIDIA driver; rent one with a GPU\n"
    assert desk.calls == []


def test_a_failed_environment_leaves_nothing_and_a_made_one_is_kept(desk: Desk):
    assert desk.run("setup.sh", VENV_STATUS="1").code == 1
    assert not (desk.root / ".venv").exists()
    assert desk.run("setup.sh").code == 0
    before = desk.calls
    assert desk.run("setup.sh", DISK_GB="1").code == 0, "what is installed needs no more room"
    assert not any("venv" in call or call.startswith("df") for call in desk.calls[len(before) :])


def test_uv_helps_out(desk: Desk):
    desk.stub("uv", f'[[ $2 != find ]] || echo "{desk.bin}/python3.11"')
    assert desk.run("setup.sh", VERSION="3, 10").code == 0
    assert desk.called("uv") == ["uv python install --quiet 3.11", "uv python find 3.11"]
    assert (desk.root / ".venv" / "bin" / "python").exists()


def test_a_newer_python_will_do(desk: Desk):
    (desk.bin / "python3.11").rename(desk.bin / "python3.12")
    desk.stub("python3.11", "exit 1")
    assert desk.run("setup.sh", VERSION="3, 12").code == 0
    assert desk.called("python3.12")[-1] == "python3.12 -m venv .venv"


def test_eurlex(desk: Desk):
    assert desk.run("setup.sh", "--eurlex").code == 0
    assert desk.calls[-1] == "python -m altgrad_jax.data prepare --name=eurlex"
    done = desk.run("setup.sh", "--eurolex")
    assert (done.code, done.err) == (2, "error: unknown option --eurolex: setup.sh takes --eurlex\n")


def test_from_a_laptop(desk: Desk):
    done = desk.run("setup.sh", "root@203.0.113.7:22034", "--eurlex")
    assert done.code == 0, done
    assert (desk.box / "altgrad_jax" / ".venv").exists() and not (desk.root / ".venv").exists()
    ssh = desk.called("ssh")
    assert all(call.startswith("ssh -p 22034 root@203.0.113.7 ") for call in ssh)
    assert ssh[-1].endswith(" cd altgrad_jax && env launch/setup.sh --eurlex ")
    [rsync] = desk.called("rsync")
    assert rsync.startswith("rsync -rlptz --filter=:- .gitignore --exclude=/.git/config ")
    assert rsync.endswith(" -e ssh -p 22034 ./ root@203.0.113.7:altgrad_jax/")


def test_from_a_laptop_into_another_folder(desk: Desk):
    done = desk.run("setup.sh", "mybox", BOX_DIR="work space/altgrad")
    assert done.code == 0, done
    assert (desk.box / "work space" / "altgrad" / ".venv").exists()


@pytest.mark.parametrize(
    ("box", "stub", "message"),
    [
        ("root@host:port", ("ssh", "exit 0"), "'root@host:port' is not [user@]host[:port]"),
        (
            "root@host:22",
            ("ssh", "exit 255"),
            "root@host cannot be reached: check address, port and key with: ssh -p 22 root",
        ),
        ("root@host", ("ssh", "exit 127"), "rsync is missing on root@host: there, apt-get install rsync"),
        ("root@host", ("rsync", "exit 12"), "the upload to root@host:altgrad_jax failed"),
    ],
)
def test_a_machine_that_does_not_answer_is_one_line(desk: Desk, box, stub, message):
    desk.stub(*stub)
    done = desk.run("setup.sh", box)
    assert done.code in (1, 2)
    assert done.err.startswith(f"error: {message}") and len(done.err.splitlines()) == 1, done.err
