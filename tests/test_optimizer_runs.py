"""Every optimizer in real runs: resumed to the bit, its weights where they should be, its memory as reported."""

import json

import jax
import numpy as np
import pytest

from altgrad_jax import experiment
from altgrad_jax.data.corpus import open_corpus
from altgrad_jax.precision.formats import get_format
from altgrad_jax.sample import load_run
from altgrad_jax.tracking import read_metrics
from tests.runs import summary

RULES = {"precision__rules": ((r"blocks\..*|lm_head", "e4m3 w.pow2=1"),), "optimizer__schedule": "constant"}
KINDS = {
    "sr": {"optimizer__name": "adamw_sr", "optimizer__weights": "format", "optimizer__moments": "8bit"},
    "bf16 sr": {"optimizer__name": "adamw_sr", "optimizer__weights": "bfloat16"},
    "grid": {"optimizer__name": "grid", "optimizer__learning_rate": 50.0},
    "packed grid": {"optimizer__name": "grid", "optimizer__learning_rate": 50.0, "optimizer__weights": "format"},
    "madam": {"optimizer__name": "madam", "optimizer__learning_rate": 0.1},
    "before": {"optimizer__name": "manifold_adamw", "optimizer__placement": "before"},
    "relative": {"optimizer__name": "manifold_adamw"},
    "ulps": {"optimizer__name": "manifold_adamw", "optimizer__form": "ulps", "optimizer__learning_rate": 2.0},
}


def losses(workdir) -> list[tuple]:
    return [(r["step"], r["train/loss"]) for r in read_metrics(workdir / "metrics.jsonl") if "train/loss" in r]


def cases(kinds, in_ci: tuple[str, ...]) -> list:
    """Those of the daily tests, `slow`, and the others, which are run by hand: two to four compilations each."""
    return [pytest.param(k, marks=pytest.mark.slow if k in in_ci else pytest.mark.exhaustive) for k in kinds]


@pytest.mark.parametrize("kind", cases(KINDS, ("packed grid",)))
def test_resumed_to_the_bit(lab, tmp_path, kind):
    changes = RULES | KINDS[kind]
    assert lab.train(tmp_path / "whole", train__steps=6, **changes) == 0
    for steps in (3, 6):
        assert lab.train(tmp_path / "parts", train__steps=steps, **changes) == 0
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert summary(tmp_path / "parts")["parameter_sha256"] == summary(tmp_path / "whole")["parameter_sha256"]
    first, last = (losses(tmp_path / "whole")[i][1] for i in (0, -1))
    assert last < first
    if kind != "sr":
        return
    # The layers are stored in 8 bits, and are sampled from.
    manifest = json.loads((tmp_path / "whole" / "manifest.json").read_text())
    quantised = 12 * 32 * 32 + 257 * 32
    rest = 4 * (32 * 32 + 3 * 32)
    assert manifest["state_bytes"]["parameters"] == quantised + 5 * 4 + rest
    kernel = load_run(str(tmp_path / "whole"), None).params["blocks"][0]["mlp"]["up"]["kernel"]
    scale = 2.0 ** np.floor(np.log2(448 / 2 / np.abs(np.asarray(kernel)).max()))
    found = [
        np.isin(np.asarray(kernel, np.float64) * s, get_format("e4m3fn").finite_values()).all()
        for s in (scale, 2 * scale)
    ]
    assert any(found)


@pytest.mark.parametrize("kind", cases(("relative", "sr", "grid"), ()))
def test_eight_devices_train_as_one(lab, tmp_path, kind):
    """The gradients' sums are in another order, so not to the bit; stochastic draws are the same on all devices."""
    for devices in (1, 8):
        changes = RULES | KINDS[kind] | {"parallel__devices": devices, "train__steps": 4}
        assert lab.train(tmp_path / str(devices), **changes) == 0
    one, eight = (dict(losses(tmp_path / str(devices))) for devices in (1, 8))
    assert [eight[step] for step in one] == pytest.approx(list(one.values()), rel=5e-3)


@pytest.mark.exhaustive
def test_all_questions_on_eight_devices(lab, tmp_path):
    questions = tuple(f"{name}:2" for name in ("gradients", "weights", "spectra", "curvature", "sensitivity"))
    asked = RULES | {"diagnostics__questions": questions, "diagnostics__tokens": 16, "diagnostics__lanczos_steps": 4}
    for devices in (1, 8):
        assert lab.train(tmp_path / str(devices), parallel__devices=devices, train__steps=3, **asked) == 0
    one, eight = (
        [r for r in read_metrics(tmp_path / str(d) / "metrics.jsonl") if "weights/stall" in r] for d in (1, 8)
    )
    assert [r["step"] for r in one] == [r["step"] for r in eight] == [1, 3]
    for name in ("grads/l2", "weights/stall", "weights/ulps_mean", "spectra/effective_rank", "spectra/spectral_norm"):
        assert eight[0][name] == pytest.approx(one[0][name], rel=2e-2), name
    for record in (*one, *eight):
        assert np.isfinite(record["curvature/largest_eigenvalue"]) and record["sensitivity/worst"]
        assert np.isfinite(record["sensitivity/blocks.0.mlp.up/gradient"])
    assert lab.train(tmp_path / "unasked", train__steps=3, **RULES) == 0
    assert losses(tmp_path / "unasked") == losses(tmp_path / "1")  # measuring changes no bit


@pytest.mark.slow
def test_initial_weights_are_on_the_grid(lab):
    config = lab.config(**RULES, **KINDS["grid"])
    exp = experiment.build(config, open_corpus(config))
    params = exp.fresh_state().params
    grids = exp.weights.grids(params, exp.policy.init())
    assert set(grids) == {f"blocks.0.{name}.kernel" for name in ("attn.qkv", "attn.proj", "mlp.up", "mlp.down")} | {
        "wte"
    }
    for name, leaf in jax.tree_util.tree_leaves_with_path(params):
        text = jax.tree_util.keystr(name, simple=True, separator=".")
        if text in grids:
            np.testing.assert_array_equal(grids[text].fitted(leaf).round(leaf), leaf)
