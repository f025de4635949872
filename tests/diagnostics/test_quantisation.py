"""What the formats did, from counts to names: by hand, and as a run writes it."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from altgrad_jax.diagnostics import quantisation
from altgrad_jax.diagnostics.questions import is_of_one_layer
from altgrad_jax.precision.formats import get_format
from altgrad_jax.precision.policy import resolve
from altgrad_jax.precision.statistics import RoleStats
from altgrad_jax.tracking import Wandb, read_metrics
from tests.runs import summary

ROLES = ("activation", "weight", "gradient")
WHATS = (
    "underflow",
    "overflow",
    "nan",
    "nonfinite",
    "amax",
    "amax_mean",
    "scale",
    "energy_lost",
    "sum_lost",
    "codes_used",
)
SHAPES = {"a": (2, 3), "lm_head": (3, 5), "wte": (5, 3)}
POLICY = resolve([("a", "e2m1fn"), ("lm_head", "bf16"), ("wte", "e5m10 scaling=none")], SHAPES)


def stats(
    amax: float, scale: float, shares: list[float], codes: dict[int, float] | None, of_x=(1.0, 0.0, 1.0, 0.0)
) -> RoleStats:
    """`shares`: nonzero, underflow, overflow, nan, nonfinite; `of_x`: magnitude, sum lost, energy, that lost."""
    counted = None if codes is None else jnp.zeros(16).at[jnp.asarray(list(codes))].set(jnp.asarray([*codes.values()]))
    of_shares, magnitudes = jnp.asarray(shares, jnp.float32), jnp.asarray(of_x, jnp.float32)
    return RoleStats(jnp.float32(amax), jnp.float32(scale), of_shares, counted, magnitudes)


# e2m1's codes 0 to 7 are 0, 0.5, 1, 1.5, 2, 3, 4, 6; with 8 added they are negative.
SEEN = {
    "a": {
        "activation": stats(
            12.0, 0.5, [0.75, 0.25, 0.0, 0.0, 0.0], {0: 0.5, 7: 0.25, 15: 0.25}, (8.0, -0.5, 0.25, 0.125)
        ),
        "weight": stats(3.0, 2.0, [1.0, 0.0, 0.125, 0.0, 0.0], {0: 0.25, 8: 0.25, 1: 0.5}),
        "gradient": stats(0.0, 1.0, [0.0, 0.0, 0.0, 0.5, 0.25], {0: 1.0}, (0.0,) * 4),
    },
    "wte": {"weight": stats(8.0, 1.0, [0.5, 0.1, 0.0, 0.0, 0.0], None)},
}


def named(state=None) -> dict[str, float | str]:
    state = POLICY.update(POLICY.init(), SEEN) if state is None else state
    return quantisation.name(POLICY, *map(np.asarray, quantisation.measure(POLICY, SEEN, state)))


def test_measures_of_layers_by_hand():
    record = named()
    layer = {key.removeprefix("quant/a/"): value for key, value in record.items() if key.startswith("quant/a/")}
    assert set(layer) == {f"{role}/{what}" for role in ROLES for what in (*WHATS, "codes")}
    # Of the elements that were not zero, a third became it; of no such elements, none.
    rates = [layer[f"{role}/underflow"] for role in ROLES]
    assert rates == pytest.approx([1 / 3, 0.0, 0.0])
    assert [layer[f"{role}/sum_lost"] for role in ROLES] == [0.0625, 0.0, 0.0]
    assert [layer[f"{role}/energy_lost"] for role in ROLES] == [0.5, 0.0, 0.0]
    assert [layer[f"{role}/overflow"] for role in ROLES] == [0.0, 0.125, 0.0]
    assert [layer[f"{role}/nan"] for role in ROLES] == [0.0, 0.0, 0.5]
    assert [layer[f"{role}/nonfinite"] for role in ROLES] == [0.0, 0.0, 0.25]
    assert [layer[f"{role}/amax"] for role in ROLES] == [12.0, 3.0, 0.0]
    assert [layer[f"{role}/scale"] for role in ROLES] == [0.5, 2.0, 1.0]
    # 15 different values, the two zeros being one.
    assert [layer[f"{role}/codes_used"] for role in ROLES] == pytest.approx([3 / 15, 2 / 15, 1 / 15])
    assert [layer[f"{role}/codes"] for role in ROLES] == ["8101", "c080", "8000"]


def test_tables_have_a_weight_and_wide_formats_no_codes():
    table = {key.removeprefix("quant/wte/"): value for key, value in named().items() if key.startswith("quant/wte/")}
    assert table == pytest.approx(
        {
            **{"weight/underflow": 0.2, "weight/overflow": 0.0, "weight/nan": 0.0, "weight/nonfinite": 0.0},
            **{"weight/amax": 8.0, "weight/amax_mean": 8.0, "weight/scale": 1.0},
            **{"weight/energy_lost": 0.0, "weight/sum_lost": 0.0},
        }
    )


def test_totals_over_layers():
    totals = {key: value for key, value in named().items() if not is_of_one_layer(key)}
    expected = {
        f"quant/{role}/{what}" for role in ROLES for what in ("underflow", "overflow", "nan", "nonfinite", "amax")
    }
    expected |= {f"quant/{role}/{what}" for role in ROLES for what in ("codes_used", "energy_lost", "sum_lost")}
    assert set(totals) == expected
    assert totals["quant/weight/amax"] == 8.0 and totals["quant/activation/amax"] == 12.0  # the largest
    assert totals["quant/weight/underflow"] == pytest.approx(0.1)  # the mean
    assert totals["quant/weight/codes_used"] == pytest.approx(2 / 15)  # of those that have it
    assert list(named())[: len(totals)] == list(totals), "first, where people look"


def test_the_moving_average_of_amax_decays_by_a_tenth():
    state = POLICY.init()
    expected = None
    for amax in (2.0, 4.0, 0.0, 1e-3, np.inf, np.nan, 5.0):
        seen = {"a": SEEN["a"] | {"weight": stats(amax, 1.0, [1.0, 0, 0, 0, 0], {1: 1.0})}, "wte": SEEN["wte"]}
        state = POLICY.update(state, seen)
        if np.isfinite(amax):
            expected = amax if expected is None else 0.9 * expected + 0.1 * amax
        assert named(state)["quant/a/weight/amax_mean"] == pytest.approx(expected, rel=1e-6)


def test_bitmaps_put_the_lowest_code_first():
    e5m2 = get_format("e5m2")
    used = np.zeros(256, bool)
    used[[0, 1, 9, 255]] = True
    assert quantisation.bitmap(used, e5m2) == "c040" + "00" * 29 + "01"
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(quantisation.bitmap(used, e5m2)), np.uint8))
    assert np.flatnonzero(bits).tolist() == [0, 1, 9, 255]
    assert quantisation.bitmap([True] * 256, get_format("e2m1fn")) == "ffff"  # as many bits as codes


@pytest.mark.parametrize("fmt", ["e5m2", "e4m3fn", "e7m0", "e4m3fnuz", "binary8p3"])
def test_share_of_codes(fmt):
    fmt = get_format(fmt)
    values = fmt.values()
    assert quantisation.codes_used(fmt, np.ones(256)) == 1.0
    assert quantisation.codes_used(fmt, np.where(np.isfinite(values), 0.0, 1.0)) == 0.0, "inf and NaN are not counted"
    assert quantisation.codes_used(fmt, np.where(values > 0, 1e-9, 0.0)) == pytest.approx(0.5, abs=0.01)


def test_which_names_are_of_one_layer():
    of_one = ["quant/lm_head/weight/amax", "quant/blocks.0.attn.qkv/gradient/codes", "grads/blocks.3.mlp.up/cosine"]
    of_all = ["quant/weight/amax", "quant/gradient/underflow", "grads/cosine", "train/loss", "val/loss", "step"]
    assert all(map(is_of_one_layer, of_one)) and not any(map(is_of_one_layer, of_all))


# A run.


@pytest.fixture(scope="module")
def run(lab, tmp_path_factory) -> Path:
    """Six steps in E5M2, counted at every second and compared with float32 at every fourth. Not to be changed."""
    workdir = tmp_path_factory.mktemp("diagnosed") / "run"
    rules = ((r"blocks\..*|lm_head", "e5m2 history=4"),)
    every = {"diagnostics__quant_every": 2, "diagnostics__shadow_every": 4, "train__log_every": 3}
    changes = {"precision__rules": rules, "optimizer__decay_steps": 20, "train__eval_every": 3, **every}
    assert lab.train(workdir, train__steps=6, **changes) == 0
    return workdir


LAYERS = [*(f"blocks.0.{name}" for name in ("attn.qkv", "attn.proj", "mlp.up", "mlp.down")), "lm_head"]


def test_a_run_asks_at_its_steps_only(run):
    records = {r["step"]: r for r in read_metrics(run / "metrics.jsonl")}
    # Asked of the step about to be taken, the first being step 0, and logged with its other metrics, due or not.
    assert list(records) == [0, 1, 3, 5, 6]
    asked = {step: {key.split("/")[0] for key in r} & {"quant", "grads"} for step, r in records.items()}
    assert asked == {0: set(), 1: {"quant", "grads"}, 3: {"quant"}, 5: {"quant", "grads"}, 6: set()}
    assert all("train/loss" in records[step] for step in (1, 3, 5))
    names = {key for key in records[3] if key.startswith("quant/")}
    assert {f"quant/{layer}/{role}/{what}" for layer in LAYERS for role in ROLES for what in (*WHATS, "codes")} < names
    assert len(names) == len(LAYERS) * 3 * 11 + 3 * 8
    assert {key for key in records[1] if key.startswith("quant/")} == names


def test_a_runs_measures_fit_together(run):
    records = {r["step"]: r for r in read_metrics(run / "metrics.jsonl")}
    e5m2 = get_format("e5m2")
    for step, r in records.items():
        for layer in LAYERS if "quant/weight/amax" in r else ():
            for role in ROLES:
                here = {what: r[f"quant/{layer}/{role}/{what}"] for what in (*WHATS, "codes")}
                assert here["nan"] == here["nonfinite"] == 0 and here["amax"] > 0 and 0 <= here["underflow"] < 0.5
                used = np.unpackbits(np.frombuffer(bytes.fromhex(here["codes"]), np.uint8))
                values = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e5m2).astype(np.float64)
                assert here["codes_used"] == pytest.approx(np.unique(values[used > 0]).size / 247)
                if step == 1:  # its own scale: the largest value is reached and nothing lies beyond
                    assert here["scale"] == pytest.approx(e5m2.max / here["amax"], rel=1e-6)
                    assert here["overflow"] == 0 and here["amax_mean"] == here["amax"]
                    assert np.abs(values[used > 0]).max() == e5m2.max
                else:
                    assert here["amax_mean"] != here["amax"]


def test_texts_stay_in_the_file(run, monkeypatch):
    """W&B plots numbers; the summary holds what is of the whole network; every line is JSON."""
    final = summary(run)["final"]
    assert final["quant/weight/amax"] > 0 and 0 < final["grads/cosine"] < 1
    assert not [key for key in final if is_of_one_layer(key)]
    sent = []
    sink = Wandb.__new__(Wandb)
    sink._caller = ThreadPoolExecutor(max_workers=1)
    sink._run, sink._offline = SimpleNamespace(log=lambda record, step: sent.append((record, step))), True
    records = read_metrics(run / "metrics.jsonl")
    for record in records:
        sink.log(record)
    assert [step for _, step in sent] == [0, 1, 3, 5, 6]
    assert not [value for record, _ in sent for value in record.values() if isinstance(value, str)]
    assert any(isinstance(value, str) for record in records for value in record.values())
    assert sent[1][0].keys() == {key for key in records[1] if not key.endswith("/codes")}


def test_the_manifest_has_the_table(run):
    layers = {row["layer"]: row for row in json.loads((run / "manifest.json").read_text())["layers"]}
    assert set(layers) == {*LAYERS, "wte", "wpe"}
    assert layers["lm_head"]["gradient"] == "e5m2 delayed(4)" and layers["lm_head"]["backend"] == "emulated"
    assert layers["lm_head"]["note"] == "no FP8 matrix units on this machine" and layers["wte"]["recipe"] == "bf16"
