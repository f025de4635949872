"""Failures injected into real runs are named at the end, with the right layer, role and step."""

import re
from unittest import mock

import jax.numpy as jnp
import pytest

from altgrad_jax.tracking import read_metrics
from altgrad_jax.weights import Weights
from tests.runs import summary

ASK = ("gradients:1", "weights:1", "spectra:1")
EVERY = {
    "diagnostics__quant_every": 1,
    "diagnostics__shadow_every": 1,
    "diagnostics__questions": ASK,
    "train__steps": 5,
}


def failures(workdir) -> list[tuple]:
    return [(f["step"], f["layer"], f["role"], f["kind"]) for f in summary(workdir)["failures"]]


def tampered():
    """From the first step on mlp.down's update is a thousand times too long, and attn.proj has one direction left."""
    apply = Weights.apply

    def apply_tampered(self, params, updates, grids):
        new = apply(self, params, updates, grids)
        block, old = dict(new["blocks"][0]), params["blocks"][0]
        move = new["blocks"][0]["mlp"]["down"]["kernel"] - old["mlp"]["down"]["kernel"]
        far = old["mlp"]["down"]["kernel"] + 1000 * move
        proj = new["blocks"][0]["attn"]["proj"]["kernel"]
        flat = jnp.outer(proj[:, 0], proj[0]) / jnp.maximum(jnp.abs(proj[0, 0]), 1e-3)
        block["mlp"] = block["mlp"] | {"down": {"kernel": far}}
        block["attn"] = block["attn"] | {"proj": {"kernel": flat}}
        return new | {"blocks": {**new["blocks"], 0: block}}

    return mock.patch.object(Weights, "apply", apply_tampered)


@pytest.mark.slow
def test_overflow_stall_rank_and_blow_up(lab, tmp_path, capsys):
    rules = ((r".*qkv", "e5m2 x.scaling=static x.scale=1e6"), (r".*up", "e7m0"), (r"lm_head", "e5m2"))
    with tampered():
        assert lab.train(tmp_path / "run", precision__rules=rules, optimizer__learning_rate=1e-5, **EVERY) == 0
    found = failures(tmp_path / "run")
    assert (1, "blocks.0.attn.qkv", "activation", "overflow") in found
    assert (2, "blocks.0.attn.proj", "weight", "rank") in found
    kinds = {(layer, kind) for _, layer, _, kind in found}
    assert "stall" not in {kind for _, kind in kinds}, "float32 weights lose no update that their rounded values miss"
    assert ("blocks.0.mlp.up", "overflow") not in kinds and ("blocks.0.mlp.up", "rank") not in kinds
    out = capsys.readouterr().out
    assert re.search(r"warning: .*overflow, .*: blocks.0.attn.qkv activation", out)
    assert any(line.split()[:4] == ["1", "blocks.0.attn.qkv", "activation", "overflow"] for line in out.splitlines())


@pytest.mark.exhaustive
def test_an_update_that_blows_up(lab, tmp_path):
    with tampered():
        assert lab.train(tmp_path / "run", optimizer__learning_rate=1e-2, **EVERY) == 0
    found = failures(tmp_path / "run")
    assert (1, "blocks.0.mlp.down", "update", "blow-up") in found
    assert ("blocks.0.mlp.up", "blow-up") not in {(layer, kind) for _, layer, _, kind in found}


@pytest.mark.parametrize(
    ("rule", "origin"),
    [
        ((r".*mlp.down", "e5m2 g.scaling=static g.scale=1e30 g.overflow=special"), ("blocks.0.mlp.down", "gradient")),
        pytest.param(
            (r".*mlp.down", "e4m3fn w.scaling=static w.scale=1e9 w.overflow=special"),
            ("blocks.0.mlp.down", "weight"),
            marks=pytest.mark.exhaustive,
        ),
    ],
)
def test_the_origin_of_a_nan(lab, tmp_path, rule, origin):
    """Every layer is quantised, so that a NaN shows wherever it comes to; the first row names where it came from."""
    rules = (rule, (r"blocks\..*|lm_head", "e5m2"))
    changes = EVERY | {"precision__rules": rules, "stability__nan_patience": 3, "stability__skip_nonfinite": True}
    assert lab.train(tmp_path / "run", **changes) == 1
    first = next(f for f in failures(tmp_path / "run") if f[3] in ("spoilt", "nan", "gradient"))
    assert first[:3] == (1, *origin) or (origin[1] == "gradient" and first[1] == origin[0])
    (end, *_) = [e for e in summary(tmp_path / "run")["events"] if e["event"] == "skip"]
    assert end["step"] == 1
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert any("spoilt" in str(r.get("event/reason", "")) for r in records if r.get("event") == "warning")
