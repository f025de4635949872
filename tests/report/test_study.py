"""Who is compared with whom: conditions read from runs, groups, baselines, runs set apart, matrices with holes."""

import json
import math
from pathlib import Path

import pytest

from altgrad_jax.errors import UsageError
from altgrad_jax.report.answer import answer, question
from altgrad_jax.report.conditions import condition_of, optimizer_name
from altgrad_jax.report.curves import arrives_early, seconds_at, tokens_to_reach, training_series, validation_series
from altgrad_jax.report.facts import command as command_of
from altgrad_jax.report.facts import search_table
from altgrad_jax.report.failures import first_failure_table, heat_maps, sweet_spots
from altgrad_jax.report.results import (
    equal_loss_table,
    format_table,
    gains_table,
    other_windows,
    results_table,
    same_grids,
)
from altgrad_jax.report.runs import read_run, read_runs
from altgrad_jax.report.study import Study, make_study
from tests.report.made import BATCH, BLOCK, falling, make_matrix, make_run


def study_of(folder: Path, baseline: str | None = None, margin: float = 0.05) -> Study:
    return make_study(read_runs([str(folder)]), [folder], folder / "report.html", baseline, margin)


def names(study: Study) -> list[str]:
    return [group.name for group in study.groups]


def test_the_condition_is_read_from_the_configuration(tmp_path):
    run = read_run(make_run(tmp_path / "a", recipe="e5m2 w.pow2=1", optimizer="relative", seed=7))
    found = condition_of(run)
    assert (found.recipe, found.optimizer, found.layers, found.seed) == ("e5m2 w.pow2=1", "relative", "all", 7)
    assert found.learning_rate == 3e-3 and found.together == 1
    assert condition_of(read_run(make_run(tmp_path / "b"))).recipe == "bf16"
    rules = {"precision": {"compute": "bfloat16", "rules": [["lm_head", "bf16"], ["blocks.*", "hybrid"]]}}
    mixed = condition_of(read_run(make_run(tmp_path / "c", config=rules)))
    assert mixed.recipe == "bf16 + hybrid" and "lm_head: bf16" in mixed.layers
    one = {"precision": {"compute": "bfloat16", "rules": [[r".*mlp\.up", "e5m2"]]}}
    assert condition_of(read_run(make_run(tmp_path / "d", config=one))).layers == r".*mlp\.up"


def test_a_stated_condition_wins_and_a_broken_one_does_not(tmp_path):
    stated = {"recipe": "e5m2", "optimizer": "grid", "seed": 3, "layers": "lm_head", "together": 8, "matrix": "m"}
    found = condition_of(read_run(make_run(tmp_path / "a", condition=stated)))
    assert (found.recipe, found.optimizer, found.seed, found.layers, found.together) == (
        "e5m2",
        "grid",
        3,
        "lm_head",
        8,
    )
    broken = {"recipe": ["x"], "optimizer": None, "seed": "one", "together": -1, "learning_rate": "fast"}
    found = condition_of(read_run(make_run(tmp_path / "b", condition=broken)))
    assert (found.recipe, found.optimizer, found.seed, found.together) == ("bf16", "adamw", None, 1)
    assert math.isnan(found.learning_rate)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"name": "adamw"}, "adamw"),
        ({"name": "manifold_adamw", "placement": "before", "form": "relative"}, "before"),
        ({"name": "manifold_adamw", "placement": "after", "form": "ulps"}, "ulps"),
        ({"name": "adamw_sr"}, "sr"),
        ({}, "unknown"),
    ],
)
def test_optimizers_have_the_names_of_their_configs(settings, name):
    assert optimizer_name(settings) == name


def test_the_gap_is_the_one_that_was_put_in(tmp_path):
    """Seeds differ by 0.1, the format by 0.05 in each: the pairs see 0.05 and nothing of the seeds."""
    for seed in (1, 2, 3):
        make_run(tmp_path / f"a{seed}", falling(3 + 0.1 * seed), seed=seed)
        make_run(tmp_path / f"b{seed}", falling(3.05 + 0.1 * seed + 0.001 * seed), "e5m2", seed=seed)
        make_run(tmp_path / f"c{seed}", falling(3.03 + 0.1 * seed - 0.001 * seed), "e5m2", "relative", seed=seed)
    study = study_of(tmp_path)
    assert names(study) == ["bf16, adamw", "e5m2, adamw", "e5m2, relative"]
    assert study.baseline is study.groups[0]
    gap = study.gap(study.groups[1])
    assert gap.n == 3 and gap.mean == pytest.approx(0.052) and gap.low < 0.052 < gap.high and gap.high < 0.055
    gains = gains_table(study)
    assert [row.name for row in gains.rows] == ["e5m2, relative"]
    assert gains.rows[0].cells[3].value == pytest.approx(0.024)
    assert gains.rows[0].cells[7].text == "equivalent within 0.05 (better by less)"
    strict = study_of(tmp_path, margin=0.02)
    assert gains_table(strict).rows[0].cells[7].text == "better"
    said = " ".join(answer(strict))
    assert "worse (1): e5m2; Holm-corrected for 1 different" in said
    assert "better (1): e5m2, relative" in said


def test_a_null_matrix_shows_no_effect(tmp_path):
    """Two names for one condition: the same up to noise that knows nothing of the name, and the same to the bit."""
    noise = {("bf16", 1): 0.01, ("bf16", 2): -0.02, ("bf16", 3): 0.005, ("e5m2", 1): -0.01, ("e5m2", 2): 0.01}
    for seed in (1, 2, 3):
        for recipe in ("bf16", "e5m2", "e0m7", "e1m6"):
            end = 3 + 0.1 * seed + noise.get((recipe, seed), 0.0)
            make_run(tmp_path / f"{recipe}{seed}", falling(end), recipe, seed=seed)
        make_run(tmp_path / f"grid{seed}", falling(3 + 0.1 * seed), "e0m7", "grid", seed=seed)
    study = study_of(tmp_path)
    assert all(c.p_holm > 0.05 for c in study.gaps)
    assert [row.cells[7].text for row in gains_table(study).rows] == ["equivalent within 0.05"]
    found = {g.name: g for g in study.groups}
    same = study.gap(found["e0m7, adamw"]), study.gap(found["e1m6, adamw"])
    assert same[0] == same[1]
    said = answer(study)
    # e0m7 and e1m6 have the same losses: they are one comparison.
    assert {c.tested.family for c in study.gaps if c.group.optimizer == "adamw"} == {2}
    assert "worse" not in said[0] and "better" not in said[0] and "for 2 different comparisons" in said[0]
    assert "equivalent within 0.05 nats (1): e0m7, grid" in said[1]
    assert any("e1m6 is e0m7 times 4" in note for note in same_grids(study))


def test_without_a_scale_two_grids_are_two_experiments(tmp_path):
    for recipe in ("e0m7 scaling=none", "e1m6 scaling=none", "e5m2", "no such format"):
        make_run(tmp_path / recipe, recipe=recipe)
    assert same_grids(study_of(tmp_path)) == []


def test_one_seed_says_so(tmp_path):
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", falling(3.5), "e5m2")
    study = study_of(tmp_path)
    assert "one seed" in answer(study)[0] and math.isnan(study.gaps[0].p_holm)
    assert study.gap(study.groups[1]).mean == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"identity": {"data.sha256": "b" * 64}}, "data.sha256"),
        ({"identity": {"optimizer.schedule": "linear"}}, "optimizer.schedule"),
        ({"identity": {"optimizer.warmup_steps": 50}}, "optimizer.warmup_steps"),
        ({"identity": {"train.batch_size": 16}}, "train.batch_size"),
        ({"identity": {"train.eval_batches": 40}}, "train.eval_batches: 20 -> 40"),
        ({"config": {"train": {"eval_batches": 2}}}, "train.eval_batches: 20 -> 2"),  # one of an older version
        ({"logged": 50, "status": "interrupted"}, "steps: 100 -> 50"),
    ],
)
def test_runs_that_cannot_be_compared_are_set_apart(tmp_path, change, says):
    for seed in (1, 2):
        make_run(tmp_path / f"a{seed}", seed=seed)
    odd = make_run(tmp_path / "b", recipe="e5m2", **change)
    study = study_of(tmp_path)
    ((entry, reasons),) = study.apart
    assert entry.run.path == odd and says in "; ".join(reasons) and names(study) == ["bf16, adamw"]


def test_diagnostics_of_other_windows_are_named(tmp_path):
    for name, windows in (("a", 0), ("b", 4)):
        make_run(tmp_path / name, recipe="e3m4" * (windows > 0) or "bf16", config={"diagnostics": {"windows": windows}})
    with (tmp_path / "b" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 100, "event": "measured", "event/reason": "diagnostics.windows: 0 -> 4"}\n')
    differs, within = other_windows(study_of(tmp_path))
    assert "0 (runs 1); 4 (runs 2)" in differs and "Within runs 2 " in within
    assert other_windows(study_of(tmp_path / "a")) == []


def test_a_diverged_run_is_a_result_without_a_loss(tmp_path):
    for seed in (1, 2):
        make_run(tmp_path / f"a{seed}", seed=seed)
        make_run(tmp_path / f"b{seed}", recipe="e5m2", seed=seed)
    make_run(tmp_path / "c", recipe="e5m2", seed=3, logged=30, status="diverged", reason="loss is NaN")
    study = study_of(tmp_path)
    group = study.groups[1]
    assert not study.apart and group.lost == 1 and group.status == "1 diverged, 2 finished"
    row = next(row for row in results_table(study).rows if row.name == group.name)
    assert row.cells[2].value == 1 and row.cells[9].text == "1 of 3 lost"
    assert "1 of 5 runs diverged or failed" in answer(study)[2]


def test_the_larger_experiment_is_compared(tmp_path):
    make_run(tmp_path / "a", identity={"data.sha256": "b" * 64})
    for seed in (1, 2):
        make_run(tmp_path / f"b{seed}", seed=seed)
    study = study_of(tmp_path)
    assert [e.run.name for e in study.compared] == ["b1", "b2"] and [e.run.name for e, _ in study.apart] == ["a"]


def test_what_else_differs_names_the_group_and_a_second_run_is_set_apart(tmp_path):
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", identity={"model.dropout": 0.1})
    make_run(tmp_path / "c")
    study = study_of(tmp_path)
    assert names(study) == ["bf16, dropout unknown, adamw", "bf16, dropout 0.1, adamw"]
    ((entry, reasons),) = study.again
    assert entry.run.name == "c" and "run 1" in reasons[0]


def test_the_baseline_can_be_chosen(tmp_path):
    make_run(tmp_path / "a", recipe="e5m2", optimizer="grid")
    make_run(tmp_path / "b", recipe="e5m2")
    make_run(tmp_path / "c", recipe="e4m3fn")
    assert study_of(tmp_path).baseline.name == "e5m2, grid"
    for name in ("e5m2", "e5m2, adamw", "b"):
        chosen = study_of(tmp_path, name)
        assert chosen.baseline.name == "e5m2, adamw" and chosen.groups[0] is chosen.baseline
    with pytest.raises(UsageError, match="no group or run has this name"):
        study_of(tmp_path, "e9m9")


def test_a_matrix_names_its_holes_and_its_search(tmp_path):
    folder = make_matrix(tmp_path / "m", ("e5m2",), ("adamw", "madam"), (1, 2), missing=["e5m2-adamw-2"], steps=40)
    for factor, end in ((0.5, 3.2), (1.0, 3.0)):
        rate = 3e-3 * factor
        condition = {"optimizer": "adamw", "recipe": "e5m2", "seed": 41, "rate": factor, "learning_rate": rate}
        make_run(folder / "search" / f"adamw-{factor}", falling(end), "e5m2", seed=41, condition=condition)
    (folder / "search" / "rates.json").write_text(json.dumps({"notes": ["adamw: at the end of those tried"]}))
    study = study_of(folder)
    assert question(study).startswith("Which 8-bit formats")
    assert study.missing == ["e5m2-adamw-2 (recipe e5m2, optimizer adamw, layers all, seed 2)"]
    assert len(study.searches) == 2 and all(entry.run.path.parent.name != "search" for entry in study.entries)
    tried = search_table(study)
    assert [(row.cells[2].value, row.cells[4].value, row.cells[6].text) for row in tried.rows] == [
        (0.5, pytest.approx(3.2), "–"),
        (1.0, pytest.approx(3.0), "used"),
    ]
    assert "at the end of those tried" in tried.note
    (folder / "matrix.json").write_text("{half")
    assert "is damaged" in study_of(folder).matrices[0].problems[0]


def test_a_condition_that_failed_before_it_began_is_a_result(tmp_path):
    """A sweep writes no identity of one that did not fit into memory."""
    for seed in (0, 1):
        make_run(tmp_path / f"a{seed}", seed=seed)
        made = make_run(tmp_path / f"b{seed}", seed=seed, status="failed", reason="out of memory")
        config = json.loads((made / "manifest.json").read_text())["config"]
        config["precision"]["rules"] = [["lm_head", "e5m2 w.pow2=1"]]
        condition = {"recipe": "five", "optimizer": "adamw", "layers": "lm_head", "rate": 1.0, "seed": seed}
        command = ["python", "-m", "altgrad_jax.main", f"--config.seed={seed}"]
        left = {"condition": condition, "config": config, "command": command}
        (made / "manifest.json").write_text(json.dumps(left))
        (made / "metrics.jsonl").unlink()
    study = study_of(tmp_path)
    assert not study.apart and names(study) == ["bf16, adamw", "five, in lm_head, adamw"]
    group = study.groups[1]
    assert (group.status, group.lost, group.text) == ("failed", 2, "e5m2 w.pow2=1")
    assert format_table(study).rows[1].cells[1].value == 8  # bits, of the recipe behind the name
    assert command_of(group.entries[1]) == "python -m altgrad_jax.main --config.seed=1"
    assert "no final loss to compare has five" in answer(study)[0]


def test_tokens_to_reach_a_loss_are_interpolated(tmp_path):
    run = read_run(make_run(tmp_path / "a", lambda step: 6 - 0.03 * step))
    # 4.35 is reached at step 55.
    assert tokens_to_reach(run, 4.35) == pytest.approx(55 * BATCH * BLOCK)
    assert math.isnan(tokens_to_reach(run, 1.0)) and not arrives_early(run, 1.0) and not arrives_early(run, 4.35)
    # 5.85 is reached at step 5, between step 0 and the first evaluation at 10: nobody has seen when.
    assert math.isnan(tokens_to_reach(run, 5.85)) and arrives_early(run, 5.85)
    # Low at step 10, high at 20, and from there down by 0.05 a step: 4.5 for good at step 50.
    rebound = read_run(make_run(tmp_path / "b", lambda step: 3.0 if step == 10 else 7.0 - 0.05 * step))
    assert tokens_to_reach(rebound, 4.5) == pytest.approx(50 * BATCH * BLOCK)


def test_equal_loss_speed(tmp_path):
    """A run that falls twice as fast needs half the tokens."""
    make_run(tmp_path / "a", lambda step: 6 - 0.02 * step)
    make_run(tmp_path / "b", lambda step: 6 - 0.04 * step, "e5m2")
    table, target = equal_loss_table(study_of(tmp_path))
    assert target == pytest.approx(4.0)
    assert [row.cells[0].value for row in table.rows] == pytest.approx([100 * BATCH * BLOCK, 50 * BATCH * BLOCK])
    assert table.rows[1].cells[2].value == pytest.approx(2.0)


def test_curves_are_thinned_and_true(tmp_path):
    run = read_run(make_run(tmp_path / "a", falling(3.0), steps=1000, measured=False))
    series = training_series(run, 1000)
    assert len(series) <= 150 and max(series) == 1000
    losses = {r["step"]: r["train/loss"] for r in run.records if "train/loss" in r}
    first = min(series)
    assert series[first] == pytest.approx(sum(losses[s] for s in range(1, first + 1)) / first)
    assert max(validation_series(run)) == 1000 and 0 not in validation_series(run)
    expected = sum(BATCH * BLOCK / (5000 + step) for step in range(1, 1001))
    assert seconds_at(run)[1000] == pytest.approx(expected)


def test_heat_maps_and_a_format_for_each_layer(tmp_path):
    """e0m7 loses 30 % of the last layer's gradients and 3 % of the others'; e5m2 is rounder than both need."""
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", recipe="e0m7", underflow=0.6, cosine=0.99)
    make_run(tmp_path / "c", recipe="e5m2", underflow=0.01, cosine=0.95)
    make_run(tmp_path / "d", recipe="e7m0", underflow=0.0, cosine=0.8)
    study = study_of(tmp_path)
    maps = heat_maps(study)
    assert set(maps) == set(names(study)) and set(maps["bf16, adamw"]) == {"gradient cosine", "stall"}
    of_e0m7 = maps["e0m7, adamw"]["underflow"]
    assert of_e0m7["rows"][0] == "blocks.0.attn.qkv · weight" and of_e0m7["rows"][-1] == "lm_head · gradient"
    assert of_e0m7["steps"] == list(range(1, 101, 10))
    assert of_e0m7["values"][-1][-1] == pytest.approx(0.6 * 0.91, rel=1e-2)
    spots = {row.name: row.cells for row in sweet_spots(study).rows}
    assert {layer: cells[0].text for layer, cells in spots.items()} == {
        "blocks.0.attn.qkv": "e0m7",
        "blocks.0.mlp.up": "e0m7",
        "blocks.1.attn.qkv": "e0m7",
        "blocks.1.mlp.up": "e0m7",
        "lm_head": "e5m2",
    }
    assert "e0m7: energy lost 0.27" in spots["lm_head"][8].text and "e7m0: cosine 0.800" in spots["lm_head"][8].text


def test_damaged_lines_are_left_out_and_named(tmp_path):
    folder = make_run(tmp_path / "a")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('nonsense\n[1]\n{"step": -1}\n{"step": 101, "val/loss": "soon", "train/loss": {}}\n')
        file.write('{"step": 102, "val')
    run = read_run(folder)
    assert run.last("val/loss") == pytest.approx(3.0) and run.step == 101
    count = len((folder / "metrics.jsonl").read_text().splitlines())
    assert f"no record in line {count - 4}, {count - 3}, {count - 2}" in run.problems[0]


def test_nothing_to_compare(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("")
    (folder / "manifest.json").write_text(json.dumps({"identity": 3, "config": [], "sessions": [1]}))
    study = study_of(tmp_path)
    assert study.baseline is None or not study.baseline.final_losses
    assert len(answer(study)) == 3


def test_names_of_one_arithmetic_are_one_row(tmp_path):
    """Other special codes are nothing under saturation; and a binade that no value reaches changes no loss."""
    for seed in (1, 2):
        make_run(tmp_path / f"a{seed}", seed=seed)
        make_run(tmp_path / f"b{seed}", falling(3.1), "e4m3fn", seed=seed)
        make_run(tmp_path / f"c{seed}", falling(3.1), "e3m4", seed=seed)
        make_run(tmp_path / f"d{seed}", falling(3.1), "e3m4:inf=0,nan=0", seed=seed)
        make_run(tmp_path / f"e{seed}", falling(3.1), "e2m5", seed=seed)
    make_run(tmp_path / "f", falling(3.2), "e4m3:inf=0,nan=top", seed=3)
    study = study_of(tmp_path)
    assert [group.curve for group in study.groups] == ["bf16", "e4m3fn", "e3m4", "e2m5"]
    assert len(study.groups[1].entries) == 3, "a seed under another name is a seed"
    assert study.groups[2].also == ("e3m4:inf=0,nan=0",) and [e.run.name for e, _ in study.again] == ["d1", "d2"]
    spelt, coincided = study.merged
    assert "e4m3:inf=0,nan=top: the same arithmetic as e4m3fn" in spelt and "e3m4:inf=0,nan=0 is e3m4 here" in coincided
    with pytest.raises(UsageError):
        study_of(tmp_path, "e3m4:bias=5")
    assert study_of(tmp_path, "e3m4:inf=0,nan=0").baseline.curve == "e3m4"


def test_formats_that_end_elsewhere_are_two_where_that_mattered(tmp_path):
    for seed in (1, 2):
        make_run(tmp_path / f"a{seed}", falling(3.1), "e3m4", seed=seed)
        make_run(tmp_path / f"b{seed}", falling(3.1 + 1e-12 * seed), "e3m4:inf=0,nan=0", seed=seed)
        make_run(tmp_path / f"c{seed}", falling(3.1), "e3m4 overflow=special", seed=seed)
    assert len(study_of(tmp_path).groups) == 3


def test_the_answer_agrees_with_the_table_on_what_failed(tmp_path):
    """Every kind counts in both, the collapse of a matrix too: of three runs in two a threshold was crossed."""
    for name, cosine in (("a", 0.99), ("b", 0.5), ("c", 0.99)):
        made = make_run(tmp_path / name, recipe={"a": "bf16", "b": "e5m2", "c": "e4m3fn"}[name], cosine=cosine)
        with (made / "metrics.jsonl").open("a") as file:
            for step, rank in ((0, 10.0), (1, 1.0)) if name == "a" else ():
                file.write(json.dumps({"step": step, "spectra/lm_head/effective_rank": rank}) + "\n")
    study = study_of(tmp_path)
    assert "of the 2 runs of 3 in which a threshold was crossed" in answer(study)[2]
    rows = {row.name: row.cells[3].text for row in first_failure_table(study).rows}
    assert rows == {"bf16, adamw": "rank", "e5m2, adamw": "gradient", "e4m3fn, adamw": "–"}
