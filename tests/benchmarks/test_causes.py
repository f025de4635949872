"""The experiments that ask for causes: which conditions they compare, and the arithmetic that they are about."""

import csv
import importlib
import json
import re

import pytest

from altgrad_jax.config import load_config
from altgrad_jax.sweep.matrix import conditions
from tests.forks import ROOT


def of_matrix(name):
    matrix = load_config(str(ROOT / f"configs/causes.py:{name}"))
    return conditions(matrix, load_config(str(ROOT / "configs/bf16.py")))


@pytest.fixture
def benchmark_file(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


@pytest.fixture
def gradient(benchmark_file):
    return benchmark_file("output_gradient")


@pytest.fixture
def causes(benchmark_file):
    return benchmark_file("cause_losses")


def run_of(causes, recipe, optimizer, seed, loss, sweep="mx", **others):
    facts = {"layers": "all", "learning_rate": 1e-3, "width": 64, "vocabulary": 512, "batch": 8, "loss_scale": "1"}
    facts |= {"status": "finished", "zeros": None, "val_loss": loss} | others
    return causes.Run(sweep=sweep, recipe=recipe, optimizer=optimizer, seed=seed, **facts)


def test_the_output_layer_is_asked_alone_and_left_out():
    found = of_matrix("output_layer,tiny")
    rules = {(c.facts["recipe"], c.facts["layers"]): c.config.precision.rules for c in found}
    assert {c.facts["seed"] for c in found} == {42, 43, 44, 45} and len(found) == 4 * len(rules)
    assert [dict(rules[("e2m5", where)]) for where in ("blocks", "lm_head")] == [
        {r"blocks\..*": "e2m5"},
        {"lm_head": "e2m5"},
    ]
    assert {where for recipe, where in rules if "-g" in recipe} == {"lm_head"}
    assert {where for recipe, where in rules if recipe.endswith("-xw")} == {"all"}


def test_the_control_is_run_on_seeds_that_no_published_table_used():
    asked = {c.facts["seed"] for c in of_matrix("control,tiny")}
    published = set()
    for name in ("relative", "report"):
        with open(ROOT / f"docs/results/formats8/{name}.csv", newline="") as file:
            published |= {int(seed) for row in csv.DictReader(file) for seed in re.findall(r"seed(\d+)", row["row"])}
    assert len(asked) == 16 and published and not asked & published


def test_conditions_of_the_control_differ_in_optimizer_and_format_alone():
    rates = {c.facts["optimizer"]: c.facts["learning_rate"] for c in of_matrix("control,tiny")}
    assert rates == {"adamw": 1.5e-3, "relative": 3e-3}, "what the search of formats8 found, in all formats alike"
    plain = {c.facts["recipe"] for c in of_matrix("control,tiny") if c.facts["optimizer"] == "adamw"}
    assert plain == {"bf16", "e8m7", "e3m4", "e4m3", "e5m2"}


def test_entries_vanish_from_the_vocabulary_that_the_smallest_step_gives(gradient):
    assert [gradient.largest_vocabulary(fmt) for fmt in ("e0m7", "e2m5", "e3m4")] == [254, 504, 1984]
    below, above = (gradient.measure("e3m4 scaling=current", 16, v, 0.0) for v in (1976, 1992))
    # Equal logits: every entry but the target's is 1 / V.
    assert below["vanish"] == below["lost"] == 0
    assert above["vanish"] == above["lost"] == 1 and above["row_sum"] < -0.99


def test_mx_saturates_at_powers_of_two_of_tokens_and_a_loss_scale_moves_that(gradient):
    kept = {(n, scale): gradient.measure("mxfp8", n, 512, 0.5, scale)["kept"] for n in (48, 64) for scale in (1, 1.5)}
    assert [key for key, value in kept.items() if value < 0.9] == [(48, 1.5), (64, 1)]


def test_gaps_are_to_the_base_of_the_same_sizes_and_seeds(causes):
    runs = [
        *(run_of(causes, "bf16", "adamw", seed, 4.0 + seed) for seed in (1, 2, 3)),
        *(run_of(causes, "bf16", "adamw", seed, 9.0, batch=12) for seed in (1, 2)),
        *(run_of(causes, "mxfp8", "adamw", seed, 4.2 + seed + 0.01 * (seed == 2), zeros=0.5) for seed in (1, 2)),
        run_of(causes, "mxfp8", "adamw", 3, None, status="diverged"),
        *(run_of(causes, "mxfp8", "adamw", seed, 4.0 + seed, loss_scale="1.5") for seed in (1, 2, 3)),
        *(run_of(causes, "mxfp8", "adamw", seed, 9.5, batch=12) for seed in (1, 2)),
    ]
    saturating, moved, other = causes.gaps(runs, "mx")
    assert (saturating["n"], saturating["loss_scale"], saturating["zeros"]) == (2, "1", 0.5)
    assert saturating["mean"] == pytest.approx(0.205) and saturating["family"] == 3
    assert (moved["n"], moved["mean"], moved["verdict"]) == (3, 0, "equivalent within 0.05")
    assert other["batch"] == 12 and other["mean"] == pytest.approx(0.5)
    with pytest.raises(ValueError, match="two runs of seed 1"):
        causes.gaps([*runs, runs[0]], "mx")


def test_a_gain_counts_less_the_controls(causes):
    gains = {"e8m7": 0.1, "e3m4": 0.3, "e4m3": 0.1, "e5m2": 0.0}
    runs = [run_of(causes, "bf16", "adamw", seed, 5.0 + seed, "control-tiny") for seed in range(4)]
    for recipe, gain in gains.items():
        for seed in range(4):
            noise = 0.001 * (seed - 1.5) * (recipe != "e8m7")
            runs.append(run_of(causes, recipe, "adamw", seed, 5.0 + seed, "control-tiny"))
            runs.append(run_of(causes, recipe, "relative", seed, 5.0 + seed - gain + noise, "control-tiny"))
    found = causes.control(runs)
    [primary] = found["primary: gain of relative less the control's"]
    assert primary["mean"] == pytest.approx(0.2) and primary["family"] == 1 and primary["p_holm"] < 0.001
    nets = {one["recipe"]: one["mean"] for one in found["secondary: gain of relative less the control's"]}
    assert nets == pytest.approx({"e4m3": 0.0, "e5m2": -0.1})
    assert [one["verdict"] for one in found["the control's gap to BF16 with AdamW"]] == ["equivalent within 0.05"]
    assert "| e3m4 | 4 | 1 | +0.200 [" in causes.markdown([primary])


def test_what_was_published_stays_when_sweeps_are_added(causes, tmp_path, monkeypatch):
    published = ROOT / "docs/results/causes.json"
    again = tmp_path / "again.json"
    monkeypatch.setattr("sys.argv", ["cause_losses.py", f"--before={published}", f"--out={again}"])
    causes.main()
    before, after = (json.loads(path.read_text())["results"] for path in (published, again))
    assert before == after


HEADLINE = "**`relative` against AdamW.**"


def test_pages_say_the_headline_in_the_same_words_and_with_the_datas_numbers():
    pages = [ROOT / "README.md", *(ROOT / "docs/results" / name for name in ("optimizers.md", "formats8.md"))]
    [said] = {page.read_text().partition(HEADLINE)[2].partition("\n\n")[0] for page in pages}
    tables = json.loads((ROOT / "docs/results/causes.json").read_text())["results"]["comparisons"]
    found = tables["primary: gain of relative less the control's"] + tables["gain of relative over AdamW"][:1]
    published = json.loads((ROOT / "docs/results/optimizers.json").read_text())["results"]["relative, e5m2"]["to_adamw"]
    for one in found:
        assert one["recipe"] == "e3m4" and one["n"] == 16
        assert f"{one['mean']:.3f}" in said and f"[{one['low']:.3f}, {one['high']:.3f}]" in said
    assert f"{-published['mean']:.3f} in e5m2" in said


def test_one_experiment_under_two_names_is_one_row(benchmark_file):
    rows = {"bf16": [4.0, 4.1], "e2m5": [5.0, 5.1], "e0m7": [6.0, 6.1], "e1m6": [6.0, 6.1], "e3m4": [5.0, 5.2]}
    found = benchmark_file("format_losses").joined({name: {"val_loss": losses} for name, losses in rows.items()})
    assert list(found) == ["bf16", "e2m5", "e0m7, e1m6", "e3m4"]
