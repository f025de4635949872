"""metrics.jsonl is whole whatever happens; W&B gets the same records; the console shows them."""

import hashlib
import io
import json
import math
import os
import shutil
import signal
import struct
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ml_collections import ConfigDict
from rich.console import Console

from altgrad_jax.console import ConsoleSink
from altgrad_jax.errors import UserError
from altgrad_jax.records import Extent, line_of
from altgrad_jax.tracking import MetricsFile, Wandb, read_metrics, require_login, wandb_mode
from tests.runs import SECRET, SECRETS, checkpoint_steps, ended, summary, train_losses, wait_for_step

RECORDS = [
    {"step": 1, "train/loss": 2.0000000000000004, "train/nonfinite_steps": 0},
    {"step": 2, "train/loss": math.nan, "train/grad_norm": math.inf},
    {"step": 3, "train/loss": -math.inf, "val/loss": 1e-300},
    {"step": 4, "train/loss": 0.1, "quant/lm_head/gradient/codes": "7ff7ffe2", "weights/wte/stiffness": "1,99"},
]


@pytest.fixture
def path(tmp_path) -> Path:
    return write(tmp_path / "metrics.jsonl", RECORDS)


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    file = MetricsFile(path)
    for record in records:
        file.log(record)
    file.sync()
    file.close("finished")
    return path


def refuse(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def test_every_line_is_json_and_comes_back_equal(path):
    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    assert repr(read_metrics(path)) == repr(RECORDS)


def test_a_line_is_in_the_file_before_the_next_is_logged(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    for number, record in enumerate(RECORDS, 1):
        file.log(record)
        assert len(read_metrics(tmp_path / "metrics.jsonl")) == number
    file.close("failed")


def test_a_file_torn_at_any_byte_keeps_its_whole_lines(path):
    data = path.read_bytes()
    for cut in range(len(data)):
        path.write_bytes(data[:cut])
        whole = data[:cut].count(b"\n") + (data[cut : cut + 1] == b"\n")  # only the line's end is missing: whole, too
        assert repr(read_metrics(path)) == repr(RECORDS[:whole])
    path.write_bytes(data + b"\x00\xff{")
    assert len(read_metrics(path)) == 4


@pytest.mark.parametrize("line", [b"{", b"5", b"{}", b"\xff\xfe", b'{"step": 1} {"step": 2}', b'{"step": null}'])
def test_damage_in_the_middle_is_told(path, line):
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([lines[0], line, *lines[2:]]))
    with pytest.raises(UserError, match=r"metrics.jsonl is damaged in line 2 .*restore it or use a new --workdir"):
        read_metrics(path)


@pytest.mark.parametrize("kept", [0, 2, 4])
def test_lines_past_the_checkpoint_are_cut(path, kept):
    content = b"".join(path.read_bytes().splitlines(keepends=True)[:kept])
    extent = Extent(kept, len(content), hashlib.sha256(content).hexdigest())
    path.write_bytes(path.read_bytes() + b'{"step": 5, "tr')
    file = MetricsFile(path, kept, extent)
    assert file.lost == "" and file.extent == extent
    file.log({"step": 10})
    file.close("finished")
    assert repr(read_metrics(path)) == repr([*RECORDS[:kept], {"step": 10}])
    assert [entry.name for entry in path.parent.iterdir()] == ["metrics.jsonl"]


LINES = [line_of({"step": n, "train/loss": 1 / (n + 1)}) for n in range(6)]
DAMAGE: dict[str, tuple[bytes, list[int], str]] = {  # what the file holds, the steps kept of it, and what is said
    "deleted": (b"", [], "6 of 6 records are missing"),
    "cut": (b"".join(LINES[:3]) + LINES[3][:9], [0, 1, 2], "3 of 6 records are missing"),
    "NUL": (b"".join(LINES[:5]) + bytes(40), [0, 1, 2, 3, 4], "1 of 6 records are missing"),
    "a line less": (b"".join(LINES[:2] + LINES[3:]), [0, 1, 3, 4, 5], "1 of 6 records are missing"),
    "no JSON": (b"".join([*LINES[:2], b"[[[\n", *LINES[3:]]), [0, 1, 3, 4, 5], "1 of 6 records are missing"),
    "another value": (b"".join(LINES).replace(b"0.5", b"0.4"), [0, 1, 2, 3, 4, 5], "records were changed"),
    "twice": (b"".join(LINES + LINES), [0, 1, 2, 3, 4, 5], ""),
    "backwards": (b"".join(reversed(LINES)), [0, 1, 2, 3, 4, 5], "nothing is missing"),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_what_a_checkpoint_saw_and_is_gone_is_told(tmp_path, how):
    content, steps, said = DAMAGE[how]
    later = line_of({"step": 6}) + line_of({"step": 5, "event": "rewind", "event/skipped_batches": 1})
    extent = Extent(6, len(b"".join(LINES)), hashlib.sha256(b"".join(LINES)).hexdigest())
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(content + later)
    rewound = {"step": 3, "event": "rewind", "event/skipped_batches": 2}
    file = MetricsFile(path, 5, extent, [rewound])
    assert file.lost.endswith(said) and bool(file.lost) == bool(said)
    file.close("failed")
    restored = [] if said in ("", "nothing is missing") else [rewound]  # what was sealed comes back
    found = read_metrics(path)
    assert [r["step"] for r in found if "event" not in r] == steps and [r for r in found if "event" in r] == restored
    assert [r["step"] for r in found] == sorted(r["step"] for r in found)


def test_a_full_disk_is_told(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file._file.close()
    file._file = open("/dev/full", "wb")  # noqa: SIM115
    with pytest.raises(
        UserError, match=r"No space left .*; make more room, then run the same command again: the checkpoints are"
    ):
        file.log(RECORDS[0])
    with suppress(OSError):
        file.close("failed")


def read_wandb(folder: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """Run ids and history of an offline run's file: LevelDB's log format, blocks of 32 KiB after 7 bytes of header."""
    from wandb.proto.wandb_internal_pb2 import Record

    [path] = folder.glob("*.wandb")
    data, position, record, ids, history = path.read_bytes(), 7, b"", [], []
    while position + 7 <= len(data):
        if position % 32768 > 32768 - 7:
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            parsed, record = Record.FromString(record), b""
            if parsed.HasField("run"):
                ids.append(parsed.run.run_id)
            if parsed.HasField("history"):
                items = parsed.history.item
                history.append({item.key or item.nested_key[0]: json.loads(item.value_json) for item in items})
    return ids, history


def test_wandb_offline_holds_the_whole_run_in_every_session(lab, tmp_path, monkeypatch):
    """One id; each session's file has every step once, under its own number; and the losses are those without W&B."""
    for name in ("WANDB_MODE", "WANDB_DIR", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    run = tmp_path / "run"
    assert lab.train(run, tracking__wandb="offline", train__log_every=3) == 0
    shutil.rmtree(run / "checkpoints" / "20")
    assert lab.train(run, tracking__wandb="offline", train__log_every=3) == 0
    assert lab.train(tmp_path / "without", train__log_every=3) == 0
    assert train_losses(run) == train_losses(tmp_path / "without")
    manifest = json.loads((run / "manifest.json").read_text())
    assert [session["from_step"] for session in manifest["sessions"]] == [0, 15]
    expected = [(r["step"], r.get("train/loss"), r.get("val/loss")) for r in read_metrics(run / "metrics.jsonl")]
    folders = sorted((run / "wandb").glob("offline-run-*"))
    assert len(folders) == 2
    for folder in folders:
        ids, history = read_wandb(folder)
        assert set(ids) == {manifest["run_id"]}
        assert [(r["step"], r.get("train/loss"), r.get("val/loss")) for r in history] == expected
        assert [r["_step"] for r in history] == [r["step"] for r in history]


@pytest.mark.slow
def test_ctrl_c_leaves_wandb_whole(lab, tmp_path):
    """It reaches every process of the terminal, W&B's too, which must still take the last records."""
    run = tmp_path / "run"
    process = lab.start(run, {"tracking.wandb": "offline", "train.steps": 2000, "optimizer.decay_steps": 20})
    wait_for_step(process, run, 3)
    os.killpg(process.pid, signal.SIGINT)
    done = ended(process)
    assert done.code == 130 and done.err == "", done
    assert summary(run)["status"] == "interrupted"
    [folder] = (run / "wandb").glob("offline-run-*")
    assert [r["step"] for r in read_wandb(folder)[1]] == [r["step"] for r in read_metrics(run / "metrics.jsonl")]


def children(pid: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended
            parent = path.read_text().rpartition(")")[2].split()[1]
            found += [int(path.parent.name)] if parent == str(pid) else []
    return found


@pytest.mark.slow
def test_a_sigterm_that_ends_wandb_too_still_leaves_a_checkpoint(lab, tmp_path):
    """Slurm, and a machine that shuts down, send it to every process."""
    run = tmp_path / "run"
    process = lab.start(run, {"tracking.wandb": "offline", "train.steps": 200_000, "checkpoint.every": 100_000})
    wait_for_step(process, run, 3)
    for pid in children(process.pid):
        os.kill(pid, signal.SIGTERM)
    process.terminate()
    done = ended(process)
    assert done.code == 143 and summary(run)["status"] == "interrupted", done
    assert checkpoint_steps(run) == [read_metrics(run / "metrics.jsonl")[-1]["step"]]
    # Nothing, where the run has ended before it needed W&B again.
    assert done.err == "" or done.err.startswith("warning: W&B's process is gone"), done.err
    assert done.err.count("\n") <= 1


@pytest.mark.parametrize(
    ("variable", "config", "mode", "why"),
    [
        ("disabled", "online", "disabled", "WANDB_MODE=disabled, in place of config.tracking.wandb=online"),
        ("dryrun", "online", "offline", "WANDB_MODE=dryrun, in place of config.tracking.wandb=online"),
        ("online", "offline", "offline", "config.tracking.wandb; WANDB_MODE=online asks for more and is not followed"),
        ("offline", "offline", "offline", ""),
        ("", "online", "online", ""),
    ],
)
def test_wandb_is_as_quiet_as_the_quieter_of_two_wishes(monkeypatch, variable, config, mode, why):
    monkeypatch.setenv("WANDB_MODE", variable)
    assert wandb_mode(ConfigDict({"wandb": config})) == (mode, why)
    monkeypatch.setenv("WANDB_MODE", "quiet")
    with pytest.raises(UserError, match="WANDB_MODE=quiet is not one of disabled, offline, online"):
        wandb_mode(ConfigDict({"wandb": config}))


@pytest.mark.parametrize(
    ("name", "value"), [("WANDB_BASE_URL", "no url"), ("WANDB_DISABLE_GIT", "perhaps"), ("WANDB_SERVICE", "1")]
)
def test_a_variable_that_wandb_refuses_is_named_before_the_start(monkeypatch, name, value):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr("wandb.setup", lambda: (_ for _ in ()).throw(ValueError("Failed to parse WANDB_SERVICE='1'")))
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=name) as caught:
        require_login(ConfigDict({"wandb": "offline"}))
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2


def test_a_wandb_that_stands_still_is_given_up(tmp_path, capsys, monkeypatch):
    """Once, after its time; the records that follow cost nothing."""
    never, ended_programs = threading.Event(), []
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(
        "wandb.init",
        lambda **_: SimpleNamespace(define_metric=lambda *_, **__: None, log=lambda *_, **__: never.wait()),
    )
    monkeypatch.setattr("wandb.teardown", lambda: None)
    monkeypatch.setattr("altgrad_jax.tracking._end_children", ended_programs.append)
    settings = {"wandb": "offline", "project": "p", "entity": None, "name": "n", "tags": ()}
    run = Wandb(ConfigDict(settings), tmp_path, "id", {})
    run._answer_seconds = 0.2
    began = time.monotonic()
    for step in range(5):
        run.log({"step": step, "train/loss": 1.0})
    run.close("finished")
    never.set()
    assert time.monotonic() - began < 2 and ended_programs == ["wandb-core"]
    assert capsys.readouterr().err == (
        "warning: W&B's process has not answered for 0.2 s and was ended; metrics.jsonl has what it lacks\n"
    )


def test_no_secret_of_the_environment_is_written_anywhere(lab, tmp_path):
    run = tmp_path / "run"
    harmless = {"JAX_TRACEBACK_FILTERING": "off", "NCCL_DEBUG": "WARN"}
    done = ended(lab.start(run, {"tracking.wandb": "offline"}, SECRETS | harmless))
    assert done.code == 0 and done.err == "", done.err
    environment = json.loads((run / "manifest.json").read_text())["sessions"][0]["environment"]
    assert harmless.items() <= environment.items(), "what tunes JAX is recorded"
    written = [path for path in run.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in written) and summary(run)["status"] == "finished"
    for path in written:
        assert SECRET.encode() not in path.read_bytes(), path
    assert SECRET not in done.out


def show(records: list[dict[str, Any]], terminal: bool) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=120, highlight=False)
    sink = ConsoleSink(console, 0, 40)
    for record in records:
        sink.log(record)
    sink.close("finished")
    return out.getvalue()


def test_compiling_is_no_part_of_the_time_left(monkeypatch):
    """A minute until the first step is done, then a step a second; and after a pause for other steps the same again."""
    now = [0.0]
    monkeypatch.setattr("altgrad_jax.console.time.monotonic", lambda: now[0])
    out = io.StringIO()
    sink = ConsoleSink(Console(file=out, width=120), 10, 310)
    now[0] = 60.0
    for step in range(11, 23):
        sink.log({"step": step, "train/loss": 1.0, "train/tokens_per_second": 1.0})
        now[0] += 1
    last = out.getvalue().splitlines()[-1]
    assert last.split()[1] == "21/310" and last.endswith("eta 0:04:49"), last


def test_the_console_without_and_with_a_terminal():
    steps = [{"step": n, "train/loss": 3.0 - n / 40, "train/tokens_per_second": 12345.6} for n in range(1, 41)]
    steps[19] |= {"val/loss": 2.5, "val/perplexity": math.exp(2.5), "val/loss_above_floor": 0.25}
    steps[39] |= {"val/loss": 2.75, "val/perplexity": math.exp(2.75)}
    plain = show(steps, terminal=False).splitlines()
    assert [line.split()[1] for line in plain] == ["1/40", "20/40", "40/40"], "one at once, then evaluations"
    assert "loss 2.9750" in plain[0] and "12,346 tokens/s" in plain[0]
    assert "eta" not in plain[0] and "eta 0:0" in plain[1], "the first step compiles: it tells nothing of the others"
    assert "val loss 2.5000  perplexity 12.18  above floor 0.2500  best" in plain[1]
    assert "val loss 2.7500" in plain[2] and "best" not in plain[2] and "eta" not in plain[2]
    live = show(steps, terminal=True)
    assert "40/40" in live and "loss 2.0000" in live and "val loss 2.5000" in live and "\x1b[" in live
