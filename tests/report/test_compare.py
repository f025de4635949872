"""Runs side by side, made by hand: good ones, diverged, torn, hostile and foreign ones."""

import json
import math
from pathlib import Path

import pytest

from altgrad_jax.errors import UserError
from altgrad_jax.report.compare import Row, compare, decisions, notes, number
from altgrad_jax.report.runs import Run, read_run, read_runs, speed
from altgrad_jax.report.study import Study, make_study
from tests.forks import run_module
from tests.report.made import falling
from tests.report.made import make_run as whole_run
from tests.test_cli_errors import assert_one_line

IDENTITY = {
    "data.sha256": "a" * 64,
    "model.n_embd": 128,
    "model.block_size": 128,
    "train.batch_size": 16,
    "optimizer.decay_steps": 20,
}


def make_run(folder: Path, val_losses, status: str | None = "finished", identity=IDENTITY, **last) -> Path:
    """A work directory with a validation loss at steps 0, 10, 20, ...; `last` goes into the last record."""
    folder.mkdir(parents=True)
    records = [{"step": 10 * i, "val/loss": loss} for i, loss in enumerate(val_losses)]
    records[-1] |= {name.replace("__", "/"): value for name, value in last.items()}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "manifest.json").write_text(json.dumps({"identity": identity}))
    if status:
        (folder / "summary.json").write_text(json.dumps({"status": status}))
    return folder


def study_of(runs: list[Run]) -> Study:
    return make_study(runs, [], Path("report.html"), first=True)


def rows_of(folder: Path) -> list[Row]:
    return compare(study_of(read_runs([str(folder)])))


def test_gaps_and_verdicts(tmp_path):
    make_run(tmp_path / "a", [6.0, 5.0, 4.0])
    make_run(tmp_path / "b", [6.0, 5.0, 4.4], grads__cosine=0.9, weights__stall=0.5, quant__gradient__overflow=1e-3)
    make_run(tmp_path / "c", [6.0, 5.0, 4.5], quant__gradient__overflow=0.1, quant__weight__overflow=0.2)
    make_run(tmp_path / "d", [6.0, "NaN"], status="diverged")
    rows = rows_of(tmp_path)
    assert [row.verdict for row in rows] == ["baseline", "", "", "diverged"]
    assert [row.gap for row in rows[:3]] == pytest.approx([0.0, 0.4, 0.5]) and math.isnan(rows[3].loss)
    assert rows[1].run.last("grads/cosine") == 0.9 and rows[2].run.highest("quant", "overflow") == 0.2
    assert rows[0].run.tokens == 20 * 16 * 128
    assert notes(rows) == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"data.sha256": "b" * 64}, "data.sha256: aaaaaaaa... -> bbbbbbbb..."),
        ({"model.n_embd": 64}, "model.n_embd: 128 -> 64"),
        ({"optimizer.decay_steps": 40}, "optimizer.decay_steps: 20 -> 40"),
    ],
)
def test_runs_that_cannot_be_compared(tmp_path, change, says):
    make_run(tmp_path / "a", [6.0, 4.0])
    make_run(tmp_path / "b", [6.0, 3.9], identity=IDENTITY | change)
    rows = rows_of(tmp_path)
    assert rows[1].verdict == "not comparable" and math.isnan(rows[1].gap)
    assert notes(rows) == [f"b is not compared with a: {says}"]


def test_a_shorter_run_is_not_compared_but_a_diverged_one_is_a_result(tmp_path):
    make_run(tmp_path / "a", [6.0, 5.0, 4.0])
    make_run(tmp_path / "b", [6.0, 5.0], status="interrupted")
    make_run(tmp_path / "c", [6.0, 7.0], status="diverged")
    rows = rows_of(tmp_path)
    assert [row.verdict for row in rows] == ["baseline", "not comparable", "diverged"]
    assert notes(rows) == ["b is not compared with a: steps: 20 -> 10"]
    assert rows[2].gap == 3.0


def test_torn_and_missing_files_are_named(tmp_path):
    whole = make_run(tmp_path / "a", [6.0, 4.0])
    torn = make_run(tmp_path / "b", [6.0, 4.0], status=None)
    with (torn / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "val/lo')
    (torn / "manifest.json").write_text('{"identity": ')
    empty = tmp_path / "c"
    empty.mkdir()
    (empty / "metrics.jsonl").write_text("")
    rows = compare(study_of([read_run(path) for path in (whole, torn, empty)]))
    assert [row.loss for row in rows[:2]] == [4.0, 4.0] and math.isnan(rows[2].loss)
    assert [row.verdict for row in rows] == ["baseline", "not comparable", "not comparable"]
    said = "\n".join(notes(rows))
    for text in (
        "b: no summary.json",
        "manifest.json is damaged",
        "c: no manifest.json",
        "c: no step was logged",
    ):
        assert text in said
    assert rows[1].run.status == "unfinished"


def test_a_damaged_line_is_named(tmp_path):
    run = make_run(tmp_path / "a", [6.0, 4.0])
    (run / "metrics.jsonl").write_text('{"step": 0}\nnonsense\n{"step": 1}\n')
    assert any("line 2" in problem for problem in read_run(run).problems)


def test_the_command(tmp_path):
    """Names are shown as they are: no markup is read from them, no control character gets through."""
    make_run(tmp_path / "runs" / "[red]bf16", [6.0, 4.0], train__tokens_per_second=12345.6)
    make_run(tmp_path / "runs" / "e5m2\x1b[31m", [6.0, 4.2])
    shown, nothing, missing, foreign = run_module(
        "altgrad_jax.report.__main__",
        [[str(tmp_path / "runs")], [], [str(tmp_path / "none")], [str(tmp_path)]],
        tmp_path / "forks",
        ["altgrad_jax.console"],
    )
    assert shown.code == 0 and not shown.err
    assert "[red]bf16" in shown.out and "\x1b" not in shown.out
    assert "12,346" in shown.out and "+0.2000" in shown.out and "so nothing is tested" in shown.out
    assert_one_line(nothing, 2, ["name the work directories to compare"])
    assert_one_line(missing, 2, ["there is no folder"])
    assert_one_line(foreign, 2, ["is no work directory and holds none"])


def test_numbers_that_are_not_there():
    assert [number(value, ".2f") for value in (1.0, math.nan, math.inf)] == ["1.00", "-", "inf"]


def test_a_real_run(finished):
    row = compare(study_of([read_run(finished)]))[0]
    assert row.verdict == "baseline" and row.loss > 0 and not row.run.problems
    with pytest.raises(UserError, match="no work directory"):
        read_run(finished / "checkpoints")


def test_seeds_are_paired_and_tested(tmp_path):
    """Seeds differ by 1.0, the format by 0.3: against its own seed a run is 0.3 worse, against the first one 1.3."""
    for seed in (7, 8, 9):
        whole_run(tmp_path / f"a{seed}", falling(3.0 + seed), seed=seed)
        whole_run(tmp_path / f"b{seed}", falling(3.3 + seed + 0.001 * seed), "e3m4", seed=seed)
        whole_run(tmp_path / f"c{seed}", falling(3.0 + seed + 0.0001 * seed), "e4m3fn", seed=seed)
    study = study_of(read_runs([str(tmp_path)]))
    rows = {row.run.name: row for row in compare(study)}
    assert [row.verdict for row in rows.values()] == ["baseline"] * 3 + [""] * 6
    assert rows["b9"].gap == pytest.approx(0.309) and rows["b9"].against.name == "a9"
    worse, equal = decisions(study)
    assert worse.startswith("e3m4, adamw: gap to bf16, adamw +0.3080 [") and "3 seeds: worse (" in worse
    assert "3 seeds: equivalent within 0.05 (" in equal and "2 comparisons" in equal


def test_the_speed_is_the_median_of_plain_steps(tmp_path):
    """Not the last one's, which an evaluation or a busy machine makes; and none of runs that shared a program."""
    run = make_run(tmp_path / "a", [6.0, 4.0])
    speeds = [
        (1, 100.0, {}),
        (2, 110.0, {}),
        (3, 120.0, {}),
        (4, 5.0, {"val/loss": 4.0}),
        (5, 7.0, {"grads/cosine": 1}),
    ]
    lines = [json.dumps({"step": s, "train/tokens_per_second": v} | more) for s, v, more in speeds]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert speed(read_run(run)) == 110.0
    for name in ("x", "y"):
        whole_run(tmp_path / "m" / name, recipe="e5m2", seed=len(name), condition={"recipe": name, "together": 6})
    rows = rows_of(tmp_path / "m")
    assert [row.shared for row in rows] == [True, True]
    assert any("x, y: ran in one program with other conditions" in line for line in notes(rows))


def test_a_condition_run_twice_is_still_compared(tmp_path):
    """Native against emulated, one version against another: the same condition and seed, and two losses."""
    whole_run(tmp_path / "a", falling(3.0))
    whole_run(tmp_path / "b", falling(3.2))
    rows = rows_of(tmp_path)
    assert [row.verdict for row in rows] == ["baseline", "again"] and rows[1].gap == pytest.approx(0.2)
