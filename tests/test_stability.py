"""Interventions: failures injected into real runs, and what is done, said and kept of them."""

import math
from pathlib import Path
from unittest import mock

import jax.numpy as jnp
import pytest

from altgrad_jax import experiment, loss_scale, program
from altgrad_jax.config import validate
from altgrad_jax.errors import UsageError
from altgrad_jax.stability import Fallback, batch_of, event, rewinds, unhealthy
from altgrad_jax.tracking import read_metrics
from tests.runs import bits, checkpoint_steps, summary

E5M2 = {"precision__rules": ((r"blocks\..*|lm_head", "e5m2"),)}
E7M0 = {"precision__rules": ((r"blocks\..*|lm_head", "e7m0"),)}
FALLBACK = {"stability__fallback": True}
SKIP = {"stability__skip_nonfinite": True}


def spoil(steps, value=math.nan):
    """Makes gradients of these steps, counted from 1, hold a value that is no number."""
    make_train_step = program.make_train_step

    def make_spoilt(graphdef, optimizer, *args, **kwargs):
        from altgrad_jax import step

        inner, gradients = make_train_step(graphdef, optimizer, *args, **kwargs), step.gradients

        def train_step(state, tokens):
            def spoilt(*args, **kwargs):
                loss, grads, seen = gradients(*args, **kwargs)
                bad = jnp.isin(state.step + 1, jnp.asarray(list(steps)))
                return loss, grads | {"wpe": grads["wpe"].at[0, 0].add(jnp.where(bad, value, 0.0))}, seen

            with mock.patch.object(step, "gradients", spoilt):
                return inner(state, tokens)

        return train_step

    return mock.patch.object(program, "make_train_step", make_spoilt)


def events(workdir: Path, kind: str | None = None) -> list[dict]:
    records = read_metrics(workdir / "metrics.jsonl")
    return [r for r in records if "event" in r and kind in (None, r["event"])]


def losses(workdir: Path) -> dict[int, float]:
    return {r["step"]: r["train/loss"] for r in read_metrics(workdir / "metrics.jsonl") if "train/loss" in r}


def test_steps_with_a_gradient_that_is_no_number_are_left_out(lab, tmp_path, capsys):
    with spoil({4, 5, 9}):
        assert lab.train(tmp_path / "run", train__steps=12, **SKIP) == 0
    end = summary(tmp_path / "run")
    assert end["status"] == "finished" and end["final"]["train/skipped_steps"] == 3
    assert [(e["step"], e["event"]) for e in end["events"]] == [(4, "skip"), (5, "skip"), (9, "skip")]
    assert events(tmp_path / "run") == end["events"]
    assert "step      4/12  skip: a loss or gradient that is not finite" in capsys.readouterr().out
    seen = {r["step"]: r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "train/skipped" in r}
    assert [seen[i]["train/skipped_in_a_row"] for i in (3, 4, 5, 6)] == [0, 1, 2, 0]
    assert all(math.isfinite(loss) for loss in losses(tmp_path / "run").values())


@pytest.mark.slow
def test_skipping_changes_no_bit_where_all_is_finite(lab, tmp_path):
    for name, changes in (("on", SKIP), ("off", {})):
        assert lab.train(tmp_path / name, train__steps=6, **changes) == 0
    assert bits(tmp_path / "on") == bits(tmp_path / "off")
    assert summary(tmp_path / "on")["parameter_sha256"] == summary(tmp_path / "off")["parameter_sha256"]


def test_too_many_steps_left_out_in_a_row_end_the_run(lab, tmp_path):
    with spoil(range(3, 30)):
        assert lab.train(tmp_path / "run", stability__nan_patience=4, **SKIP) == 1
    assert (summary(tmp_path / "run")["status"], summary(tmp_path / "run")["step"]) == ("diverged", 6)


def test_a_run_that_took_no_step_has_diverged_and_has_no_best(lab, tmp_path, capsys):
    with spoil(range(1, 4)):
        assert lab.train(tmp_path / "run", train__steps=3, **SKIP) == 1
    end, out = summary(tmp_path / "run"), capsys.readouterr().out
    assert (end["status"], end["reason"]) == ("diverged", "no step was taken: all 3 were left out")
    assert end["best_val_loss"] == "NaN" and end["parameter_sha256"] is None
    assert "best" not in out and "no diagnostic crossed" not in out
    assert "diverged: no step was taken: all 3 were left out" in out


def test_a_run_whose_last_update_spoils_the_weights_has_diverged(lab, tmp_path, capsys):
    """The loss of its last step is still finite, and so are all others."""
    with spoil({6}, math.inf):
        assert lab.train(tmp_path / "run", train__steps=6, train__eval_every=3) == 1
    end = summary(tmp_path / "run")
    assert (end["status"], end["step"], end["parameter_sha256"]) == ("diverged", 6, None)
    assert end["reason"] == "not finite at step 6: the weights, the gradient, the validation loss"
    assert checkpoint_steps(tmp_path / "run") == [5] and math.isfinite(end["best_val_loss"])


@pytest.mark.parametrize(("patience", "step", "why"), [(2, 2, "2 steps in a row were left out"), (9, 3, "smallest")])
def test_what_a_dynamic_loss_scale_leaves_out_ends_a_run(lab, tmp_path, monkeypatch, patience, step, why):
    """Steps in a row, or one at the smallest scale. All gradients saturate: that is seen, though none is infinite."""
    monkeypatch.setattr(loss_scale, "INITIAL", 4.0)
    rules = ((r"blocks\..*|lm_head", "e4m3 g.scaling=static g.scale=1e30"),)
    changes = {"precision__rules": rules, "train__loss_scale": "dynamic", "stability__nan_patience": patience}
    assert lab.train(tmp_path / "run", train__steps=6, **changes) == 1
    end = summary(tmp_path / "run")
    assert (end["status"], end["step"]) == ("diverged", step) and why in end["reason"]
    assert end["final"]["train/skipped_steps"] == step and end["events"][-1]["event/reason"] == end["reason"]


def test_what_a_state_is_worth():
    record = {"step": 7, "train/loss": 2.0, "train/grad_norm": math.inf}
    for taken in (record, record | {"train/skipped": 0.0}):
        assert unhealthy(taken, True) == "not finite at step 7: the gradient"
    left_out = record | {"train/loss": math.nan, "train/skipped": 1.0}  # changed nothing
    assert not unhealthy(left_out, True) and not unhealthy(record | {"train/grad_norm": 1.0}, True)
    spoilt = "not finite at step 7: the weights, the validation loss"
    assert unhealthy(left_out | {"val/loss": math.nan}, False) == spoilt


def fallback_run(lab, workdir, steps=12, **changes):
    settings = E7M0 | SKIP | FALLBACK | {"stability__fallback_patience": 2, "optimizer__schedule": "constant"}
    return lab.train(workdir, train__steps=steps, **settings | changes)


def formats_of(workdir: Path) -> dict[str, str]:
    return {e["event/layer"]: e["event/change"] for e in events(workdir, "fallback")}


@pytest.fixture(scope="module")
def fallen(lab, tmp_path_factory):
    """Steps 4 to 7 are spoilt: after 5, and after 7, all layers gain a mantissa bit. Not to be changed."""
    workdir = tmp_path_factory.mktemp("fallen") / "run"
    made = []
    make = program.make_train_step

    def counted(*args, **kwargs):
        inner = make(*args, **kwargs)

        def train_step(state, tokens):
            made.append(1)
            return inner(state, tokens)

        return train_step

    with mock.patch.object(program, "make_train_step", counted), spoil({4, 5, 6, 7}):
        assert fallback_run(lab, workdir) == 0
    return workdir, len(made)


@pytest.mark.slow
def test_formats_give_way_without_compiling_again(fallen):
    workdir, traced = fallen
    assert traced == 1
    found = events(workdir, "fallback")
    assert [e["step"] for e in found] == [5] * 5 + [7] * 5
    assert {e["event/change"] for e in found[:5]} == {"activation to e6m1, weight to e6m1, gradient to e6m1"}
    assert {e["event/change"] for e in found[5:]} == {"activation to e5m2, weight to e5m2, gradient to e5m2"}
    assert {e["event/reason"] for e in found} == {"steps left out without a layer to blame"}
    assert [e for e in summary(workdir)["events"] if e["event"] == "fallback"] == found


@pytest.mark.slow
def test_formats_that_gave_way_are_resumed(lab, fallen, tmp_path):
    """Stopped before and between the changes, a run ends with the same bits."""
    workdir, _ = fallen
    with spoil({4, 5, 6, 7}):
        for steps in (4, 6, 12):
            assert fallback_run(lab, tmp_path / "run", steps) == 0
    assert losses(tmp_path / "run") == losses(workdir) and events(tmp_path / "run") == events(workdir)
    assert summary(tmp_path / "run")["parameter_sha256"] == summary(workdir)["parameter_sha256"]


@pytest.mark.slow
def test_a_layer_whose_weights_stand_still_falls_back_alone(lab, tmp_path):
    changes = FALLBACK | {"stability__fallback_stall": 0.5, "diagnostics__questions": ("weights:4",)}
    changes |= {
        "precision__rules": ((r".*mlp.up", "e7m0"), (r".*mlp.down", "e0m7 w.margin=1")),
        "optimizer__learning_rate": 1e-3,
    }
    assert lab.train(tmp_path / "run", train__steps=9, **changes) == 0
    found = events(tmp_path / "run", "fallback")
    assert {e["event/layer"] for e in found if e["step"] == 1} >= {"blocks.0.mlp.up"}
    assert found[0]["event/reason"].startswith("stall ratio 0.")
    ups = [e["event/change"].split(", ")[0] for e in found if e["event/layer"] == "blocks.0.mlp.up"]
    assert ups[:2] == ["activation to e6m1", "activation to e5m2"]
    assert "blocks.0.mlp.down" not in formats_of(tmp_path / "run")  # the end of the list


def test_the_layer_with_nan_is_the_one_to_blame():
    policy = mock.Mock(plans=[mock.Mock(path=p, roles=("activation", "weight", "gradient")) for p in ("a", "b")])
    fallback = Fallback(("e6m1", "e5m2"), 3, 0.0)
    assert fallback.spoilt({"quant/b/gradient/nan": 0.1, "quant/a/weight/overflow": 0.2}, policy) == {
        "b": "NaN in gradient during steps left out"
    }
    given = {"quant/b/gradient/nan": 1.0, "quant/b/gradient/nonfinite": 0.1}  # by the layer above, which made it
    assert list(fallback.spoilt(given | {"quant/a/gradient/nan": 0.1}, policy)) == ["a"]
    everywhere = {f"quant/{layer}/gradient/nan": 1.0 for layer in "ab"}
    assert list(fallback.spoilt(everywhere | {"quant/a/weight/overflow": 0.2}, policy)) == ["a"]
    assert list(fallback.spoilt(everywhere, policy)) == ["a", "b"]
    assert [fallback.due_by_skips({"train/skipped_in_a_row": n}) for n in (0, 2, 3, 4, 6)] == [0, 0, 1, 0, 1]


def test_a_run_goes_back_and_on_with_other_batches(lab, tmp_path, capsys):
    """Steps 8 to 10 fail whatever the batch; after the second time round there is no third."""
    workdir = tmp_path / "run"
    changes = {"stability__nan_patience": 3, "stability__rewinds": 1, "checkpoint__every": 3, **SKIP}
    with spoil({8, 9, 10}):
        assert lab.train(workdir, train__steps=12, **changes) == 1
    found = events(workdir, "rewind")
    assert [(e["step"], e["event/failed_step"], e["event/skipped_batches"]) for e in found] == [(9, 10, 1)] or found
    assert "rewind: diverged at step 10; batches of" in capsys.readouterr().out
    assert summary(workdir)["status"] == "diverged" and summary(workdir)["events"][-1]["event"] == "diverged"


def once(lab, workdir, steps, fail, keep=3):
    """A run whose batches of the steps `fail`, as first taken, are poison: later ones are not."""
    make = program.make_train_step

    def make_poisoned(*args, **kwargs):
        from altgrad_jax import step

        inner, window_loss = make(*args, **kwargs), step.window_loss
        bad = [int(x) for x in fail]

        def train_step(state, tokens):
            def poisoned(*args):
                total = jnp.sum(args[2])
                return window_loss(*args) + jnp.where(jnp.isin(total, jnp.asarray(bad)), jnp.nan, 0.0)

            with mock.patch.object(step, "window_loss", poisoned):
                return inner(state, tokens)

        return train_step

    changes = {"stability__nan_patience": 2, "stability__rewinds": 3, "checkpoint__every": 3, "train__eval_every": 100}
    changes |= {"checkpoint__max_to_keep": keep}
    with mock.patch.object(program, "make_train_step", make_poisoned):
        return lab.train(workdir, train__steps=steps, **changes)


def batch_sums(lab, steps):
    from altgrad_jax.data.corpus import open_corpus

    config = lab.config()
    exp = experiment.build(config, open_corpus(config))
    batches = exp.batches.from_step(0)
    return [int(next(batches).sum()) for _ in range(steps)]


@pytest.mark.slow
def test_poisonous_batches_are_passed_over(lab, tmp_path):
    sums = batch_sums(lab, 20)
    whole = tmp_path / "whole"
    assert once(lab, whole, 12, sums[7:9]) == 0  # those of steps 8 and 9
    (done,) = events(whole, "rewind")
    assert (done["step"], done["event/failed_step"], done["event/skipped_batches"]) == (6, 9, 3)
    assert done["event/reason"] == "diverged at step 9; batches of 3 steps passed over"
    steps = [r["step"] for r in read_metrics(whole / "metrics.jsonl") if "train/loss" in r]
    assert steps == list(range(1, 13)) and all(math.isfinite(loss) for loss in losses(whole).values())
    assert summary(whole)["status"] == "finished" and checkpoint_steps(whole)[-1] == 12
    records = read_metrics(whole / "metrics.jsonl")
    assert [batch_of(records, step) for step in (1, 6, 7, 12)] == [0, 5, 9, 14]
    # Stopped before, right after and later than the rewind, it ends with the same bits.
    # Where what is stopped at saves beside the regular checkpoints, none of those is pushed out.
    for number, (keep, *stops) in enumerate([(3, 7, 12), (3, 6, 12), (3, 9, 12), (3, 11, 12), (1, 7, 12)]):
        workdir = tmp_path / f"stopped{number}"
        for steps_to_go in stops:
            # Started again with more steps, the schedule being constant here.
            assert once_constant(lab, workdir, steps_to_go, sums[7:9], keep) == 0
        reference = tmp_path / "constant"
        if not reference.exists():
            assert once_constant(lab, reference, 12, sums[7:9]) == 0
        assert summary(workdir)["parameter_sha256"] == summary(reference)["parameter_sha256"]
        assert losses(workdir) == losses(reference) and events(workdir) == events(reference)


def once_constant(lab, workdir, steps, fail, keep=3):
    with mock.patch.dict("tests.runs.TINY", {"optimizer.schedule": "constant"}):
        return once(lab, workdir, steps, fail, keep)


def test_rewinds_counted_from_records():
    records = [{"step": 3}, event(3, "rewind", "x", skipped_batches=4), event(9, "rewind", "y", skipped_batches=7)]
    assert [len(rewinds(records, step)) for step in (3, 4, 9, 10)] == [0, 1, 1, 2]
    assert [batch_of(records, step) for step in (3, 4, 9, 10)] == [2, 7, 12, 16]


CONTRADICTIONS = [
    ({"stability__skip_nonfinite": True, "train__loss_scale": "dynamic"}, "leaves such steps out by itself"),
    ({"stability__relative_clip": True}, "gives no layer a format"),
    (E5M2 | {"stability__relative_clip": True, "optimizer__grad_clip": 0.0}, "needs a threshold"),
    ({"stability__fallback_stall": 0.9}, "does nothing with config.stability.fallback=False"),
    (E5M2 | {"stability__fallback": True}, "has nothing to act on: set config.stability.skip_nonfinite=True"),
    (
        E5M2 | SKIP | {"stability__fallback": True, "stability__fallback_patience": 10},
        "is not below config.stability.nan",
    ),
    (SKIP | {"stability__fallback": True}, "gives no layer a format"),
    (E5M2 | SKIP | {"stability__fallback": True, "precision__backend": "native"}, "cannot run; use auto or emulated"),
    (
        E5M2 | {"stability__fallback": True, "stability__fallback_stall": 0.9, "diagnostics__questions": ()},
        "'weights:N'",
    ),
    (
        E5M2 | SKIP | {"stability__fallback": True, "stability__fallback_formats": ("e5m2", "e6m1")},
        "must gain mantissa bits from each to the next",
    ),
    (E5M2 | SKIP | {"stability__fallback": True, "stability__fallback_formats": ("e5m",)}, "unknown format 'e5m'"),
    (
        E5M2 | SKIP | {"stability__fallback": True, "stability__fallback_formats": ("e5m2", "e5m10")},
        "e5m10 needs float32 operands, and 'e5m2' has bfloat16 ones",
    ),
    ({"stability__rewinds": -1}, "config.stability.rewinds=-1 must be 0 or more"),
    ({"diagnostics__questions": ("weight:10",)}, "unknown question 'weight': did you mean 'weights'?"),
    ({"diagnostics__questions": ("weights:0",)}, "steps of 1 or more, such as 'weights:100'; leave weights out to ask"),
    ({"diagnostics__questions": ("weights",)}, "'weights' is not name:steps"),
    ({"diagnostics__questions": ("weights:1", "weights:2")}, "weights is there twice"),
    ({"optimizer__name": "grid"}, "works on the grids of quantised weights, and config.precision.rules quantises none"),
    (E5M2 | {"optimizer__name": "grid"}, "write the recipe as 'e5m2 w.pow2=1'"),
    ({"optimizer__name": "adamw_sr"}, "keeps no float32 weights: set config.optimizer.weights to bfloat16 or format"),
    ({"optimizer__momentum": 0.5}, "config.optimizer.momentum=0.5 does nothing with config.optimizer.name=adamw"),
    ({"optimizer__weights": "bfloat16"}, "it is an option of grid, adamw_sr"),
    (
        {"precision__rules": (("lm_head", "mxfp8"),), "optimizer__name": "grid"},
        "needs one scale for each weight; the weights of recipe 'mxfp8' have several",
    ),
    ({"optimizer__name": "adam"}, "config.optimizer.name='adam' is not one of adamw, manifold_adamw, grid"),
]


@pytest.mark.parametrize(("changes", "message"), CONTRADICTIONS)
def test_contradictions_are_one_clear_line(lab, changes, message):
    with pytest.raises(UsageError) as caught:
        validate(lab.config(**changes))
    assert message in str(caught.value) and "\n" not in str(caught.value)
