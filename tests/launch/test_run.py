"""launch/run.sh: trains in a session of its own; launch/fetch.sh: brings it home."""

import os
import signal
import time

import pytest

from tests.launch.stubs import Desk, alive

CONFIG = "--config=configs/hybrid.py"
OVERLAP = "--xla_gpu_enable_latency_hiding_scheduler=true"
UNTIL_TERM = 'echo step 1; trap "echo saved; exit 143" TERM; for _ in {1..600}; do sleep 0.05; done'


@pytest.fixture
def box(desk: Desk) -> Desk:
    """On the machine, after setup.sh."""
    desk.installed()
    return desk


def wait_for(condition, timeout: float = 20.0):
    deadline = time.monotonic() + timeout
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.02)
    return found


def test_the_command_its_flags_and_its_log(box: Desk):
    done = box.run("run.sh", CONFIG, "--config.train.steps=5", XLA_MODES="deterministic")
    assert done.code == 0 and done.err == "", done
    assert box.called("python", "XLA_FLAGS=" + OVERLAP) == [
        "python -m altgrad_jax.data prepare --config=configs/hybrid.py --config.train.steps=5",
        "python -m altgrad_jax.main --workdir=runs/hybrid --config=configs/hybrid.py --config.train.steps=5"
        " --config.runtime.compilation_cache=runs/.compiled",
        f"XLA_FLAGS={OVERLAP} --xla_gpu_deterministic_ops=true",
    ]
    assert done.out.startswith("training in runs/hybrid (pid ") and done.out.endswith("\nstep 1\n")
    assert (box.root / "runs" / "hybrid.log").read_text() == "step 1\n"
    assert not (box.root / "runs" / "hybrid.pid").exists()


@pytest.mark.parametrize(
    ("arguments", "workdir"),
    [
        (["--config=configs/format.py:e3m4,quick"], "runs/format-e3m4-quick"),
        (["--workdir=elsewhere/mine/", CONFIG], "elsewhere/mine"),
    ],
)
def test_names_of_runs(box: Desk, arguments, workdir):
    assert box.run("run.sh", *arguments).code == 0
    assert (box.root / f"{workdir}.log").exists()
    parent = workdir.rpartition("/")[0]
    assert f"--config.runtime.compilation_cache={parent}/.compiled" in box.called("python")[1]


def test_what_the_user_says_of_compiled_programs_and_flags_stands(box: Desk):
    done = box.run("run.sh", CONFIG, "--config.runtime.compilation_cache=mine", XLA_FLAGS="--xla_mine=1", CHIP="gpu")
    assert done.code == 0
    assert box.calls[-2].count("compilation_cache") == 1
    assert box.calls[-1] == "XLA_FLAGS=--xla_mine=1"


def test_without_its_corpus_nothing_is_started(box: Desk):
    wanted = [CONFIG, "--config.data.name=lexglue", "--noconfig.profile"]
    assert box.run("run.sh", *wanted, "--workdir=runs/x", DATA_STATUS="1").code == 1
    assert box.called("python") == [f"python -m altgrad_jax.data prepare {' '.join(wanted)}"]
    assert not (box.root / "runs" / "x.pid").exists()


@pytest.mark.parametrize("status", [0, 1, 2, 130, 137, 143])
def test_the_exit_status_is_the_programs(box: Desk, status):
    done = box.run("run.sh", CONFIG, MAIN=f"echo error: so; exit {status}")
    assert done.code == status and "error: so" in done.out
    assert ("the same command resumes" in done.out + done.err) == (status > 128)


def test_the_run_outlives_the_terminal_and_is_found_again(box: Desk):
    first = box.start("run.sh", CONFIG, MAIN=UNTIL_TERM)
    log, pid_file = box.root / "runs" / "hybrid.log", box.root / "runs" / "hybrid.pid"
    wait_for(lambda: log.exists() and "step 1" in log.read_text())
    pid = int(pid_file.read_text())
    assert os.getsid(pid) == pid != os.getsid(first.pid)
    os.killpg(first.pid, signal.SIGHUP)
    first.communicate(timeout=20)
    assert alive(pid)

    second = box.start("run.sh", CONFIG)
    assert second.stdout.readline() == f"runs/hybrid is training already (pid {pid}); its log:\n"
    os.kill(pid, signal.SIGTERM)
    out, _ = second.communicate(timeout=20)
    assert out.endswith("saved\n") and second.returncode == 0
    assert len(box.called("python")) == 2, "it was not started twice"

    third = box.run("run.sh", CONFIG)
    assert third.code == 0 and third.out.endswith("\nstep 1\n") and "saved" not in third.out, "from where it goes on"
    assert log.read_text() == "step 1\nsaved\nstep 1\n"
    assert box.called("python")[:2] == box.called("python")[2:]


def test_ctrl_c_ends_the_looking_on(box: Desk):
    process = box.start("run.sh", CONFIG, MAIN=UNTIL_TERM)
    log = box.root / "runs" / "hybrid.log"
    wait_for(lambda: log.exists() and "step 1" in log.read_text())
    time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=20)
    pid = int((box.root / "runs" / "hybrid.pid").read_text())
    assert process.returncode == 0 and out.endswith(f"the run goes on; stop it with: kill {pid}\n")
    time.sleep(0.5)
    assert alive(pid)
    os.kill(pid, signal.SIGTERM)
    wait_for(lambda: not alive(pid))


def test_a_number_that_is_another_programs_now(box: Desk):
    (box.root / "runs").mkdir()
    (box.root / "runs" / "hybrid.pid").write_text(f"{os.getpid()}\n")
    assert box.run("run.sh", CONFIG).out.startswith("training in runs/hybrid")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--config=FILE is missing, e.g. launch/run.sh --config=configs/hybrid.py"),
        (["--config=configs/hybird.py"], "--config: there is no file configs/hybird.py in "),
        (["--config", "configs/hybrid.py"], "write --config=VALUE, with an equals sign"),
    ],
)
def test_a_mistake_is_one_line(box: Desk, arguments, message):
    done = box.run("run.sh", *arguments)
    assert done.code == 2 and done.err.startswith(f"error: {message}") and len(done.err.splitlines()) == 1, done.err
    assert box.calls == []


def test_before_setup(desk: Desk):
    done = desk.run("run.sh", CONFIG)
    assert done.code == 1 and done.err.endswith("run launch/setup.sh first\n")


def test_wandb_online_wants_a_login_first(box: Desk):
    online = "--config.tracking.wandb=online"
    assert box.run("run.sh", CONFIG, online).code == 0
    assert box.called("python")[0] == "python -m wandb login"
    done = box.run("run.sh", CONFIG, online, WANDB_STATUS="1")
    assert done.code == 1 and done.err.startswith("error: no W&B login: ") and len(done.err.splitlines()) == 1
    before = len(box.called("python"))
    assert box.run("run.sh", CONFIG, online, WANDB_API_KEY="key").code == 0
    assert box.run("run.sh", CONFIG).code == 0
    assert not any("wandb login" in call for call in box.called("python")[before:])


def test_from_a_laptop_it_uploads_installs_and_trains(desk: Desk):
    desk.environment["GPUS"] = "580.65.06, 10.0, NVIDIA B200"
    done = desk.run(
        "run.sh",
        "root@203.0.113.7",
        CONFIG,
        "--config.optimizer.b1=0.9",
        XLA_MODES="triton deterministic",
        XLA_FLAGS="--xla_mine=1",
        CHIP="h200",
    )
    assert done.code == 0, done
    names = [call.split()[0] for call in desk.calls]
    assert names.index("rsync") < names.index("python3.11") < names.index("python")
    assert desk.calls[-2].startswith("python -m altgrad_jax.main --workdir=runs/hybrid --config=configs/hybrid.py")
    assert (
        desk.calls[-1]
        == f"XLA_FLAGS={OVERLAP} --xla_gpu_cublas_fallback=false --xla_gpu_deterministic_ops=true --xla_mine=1"
    )
    assert (desk.box / "altgrad_jax" / "runs" / "hybrid.log").exists()
    assert not (desk.root / "runs").exists()


def test_from_a_laptop_the_status_comes_home(desk: Desk):
    assert desk.run("run.sh", "box", CONFIG, MAIN="exit 143").code == 143
    assert desk.run("run.sh", "box", CONFIG, GPUS="").code == 1


def test_fetch_leaves_checkpoints_unless_asked(desk: Desk):
    (desk.box / "altgrad_jax" / "runs" / "hybrid").mkdir(parents=True)
    done = desk.run("fetch.sh", "root@203.0.113.7:22034")
    assert (done.code, done.out) == (0, "fetched into runs/203.0.113.7\n")
    assert desk.run("fetch.sh", "mybox", "--checkpoints", "--to=here", "hybrid").code == 0
    assert desk.called("rsync") == [
        "rsync -rltz --partial --exclude=/.compiled --exclude=/*.pid --exclude=/*/checkpoints --exclude=/*/damaged"
        " -e ssh -p 22034 root@203.0.113.7:altgrad_jax/runs/ runs/203.0.113.7/",
        "rsync -rltz --partial --exclude=/.compiled --exclude=/*.pid --include=/hybrid/*** --include=/hybrid.log"
        " --exclude=* -e ssh mybox:altgrad_jax/runs/ here/",
    ]
    assert desk.run("fetch.sh", "mybox", RSYNC_STATUS="24").code == 0, "a checkpoint went away meanwhile"


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        ([], {}, "say from where: launch/fetch.sh [user@]host[:port] [--checkpoints] [RUN ...]"),
        (["--checkpoints"], {}, "say from where: "),
        (["box", "--checkpoint"], {}, "unknown option --checkpoint: fetch.sh takes --checkpoints and --to=DIR"),
        (["box", "hybird"], {}, "box:altgrad_jax/runs has no run hybird"),
        (["box"], {"RSYNC_STATUS": "23"}, "not all could be fetched from box:altgrad_jax/runs: is it there?"),
    ],
)
def test_a_mistake_in_fetching_is_one_line(desk: Desk, arguments, environment, message):
    (desk.box / "altgrad_jax" / "runs" / "hybrid").mkdir(parents=True)
    done = desk.run("fetch.sh", *arguments, **environment)
    assert done.code in (1, 2)
    assert done.err.startswith(f"error: {message}") and len(done.err.splitlines()) == 1, done.err
