"""A run goes on from its own checkpoint or not at all, and begins anew only when it is told to."""

import json
import shutil

import pytest

from altgrad_jax.checkpoint_files import ancestor
from altgrad_jax.errors import UserError
from altgrad_jax.files import write_json
from altgrad_jax.kin import is_lost, refuse_strangers
from altgrad_jax.train import train
from altgrad_jax.workdir import Workdir
from tests.runs import checkpoint_steps, snapshot, summary

LOST = r"has the records of a run, and its checkpoints are gone from .*; bring them back, or give --restart"


def everything(folder) -> dict[str, bytes]:
    return {name: data for name, data in snapshot(folder).items() if name != ".lock"}


@pytest.mark.parametrize("also", [[], ["manifest.json"], ["summary.json"], ["manifest.json", "metrics.jsonl"]])
def test_records_without_a_checkpoint_are_not_written_over(lab, copied, also):
    """Neither by the same command nor by that of another run, whatever else is gone."""
    shutil.rmtree(copied / "checkpoints")
    for name in also:
        (copied / name).unlink()
    before = everything(copied)
    for changes in ({}, {"seed": 7}):
        with pytest.raises(UserError, match=LOST):
            lab.train(copied, **changes)
        assert everything(copied) == before


def test_a_run_begins_anew_when_told_to(lab, copied):
    before = everything(copied)
    with lab.compiled_programs():
        assert train(lab.config(seed=7), str(copied), restart=True) == 0
    assert everything(copied / "earlier" / "0") == before
    assert summary(copied)["status"] == "finished" and checkpoint_steps(copied) == [10, 15, 20]
    assert json.loads((copied / "config.json").read_text())["seed"] == 7
    assert json.loads((copied / "manifest.json").read_text())["checkpointed"] is True


def test_a_run_killed_before_its_first_checkpoint_begins_again(lab, tmp_path):
    """No nuisance: nothing was saved, so nothing is lost."""

    def killed(*_):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("altgrad_jax.loop.Loop._save", killed)
        with pytest.raises(KeyboardInterrupt):
            lab.train(tmp_path / "run")
    assert summary(tmp_path / "run")["status"] == "failed" and not (tmp_path / "run" / "checkpoints").exists()
    assert lab.train(tmp_path / "run") == 0 and not (tmp_path / "run" / "earlier").exists()


def test_what_says_that_a_checkpoint_was_lost(tmp_path):
    workdir = Workdir(tmp_path)
    assert not is_lost(workdir)
    write_json(tmp_path / "summary.json", {})
    assert is_lost(workdir), "records of nobody knows what"
    write_json(tmp_path / "manifest.json", {"run_id": "a"})
    assert not is_lost(workdir)
    workdir.note_checkpoint()
    assert is_lost(workdir)
    workdir.forget_checkpoint()
    assert not is_lost(workdir)
    workdir.close()


def test_a_checkpoint_of_another_run_is_refused(lab, finished, copied, tmp_path):
    """Two runs of the same settings are two runs; one whose manifest is gone goes by its checkpoints."""
    manifest = json.loads((copied / "manifest.json").read_text())
    write_json(copied / "manifest.json", manifest | {"run_id": "0badcafe"})
    before = everything(copied)
    with pytest.raises(UserError, match=rf"20 belongs to another run \(run_id {manifest['run_id']}, .*0badcafe\)"):
        lab.train(copied)
    assert everything(copied) == before
    (copied / "manifest.json").unlink()
    assert lab.train(copied, train__steps=25, optimizer__decay_steps=20) == 0
    assert json.loads((copied / "manifest.json").read_text())["run_id"] == manifest["run_id"]


def test_weights_of_another_origin_are_refused(finished, tmp_path):
    twenty, ten = ancestor(str(finished)), ancestor(f"{finished}@10")
    assert (twenty["step"], ten["step"]) == (20, 10) and twenty["weights_sha256"] != ten["weights_sha256"]
    sealed = {"run_id": "a", "ancestor": ten}
    for source in (None, "", f"{finished}@10", str(finished), str(tmp_path / "gone"), f"{tmp_path}@10"):
        refuse_strangers(None, source, sealed, tmp_path)
    with pytest.raises(UserError, match=r"began with other weights \(step 10, .*\) than .* has now \(step 20, "):
        refuse_strangers(None, f"{finished}@20", sealed, tmp_path)
    with pytest.raises(UserError, match=r"began with new weights, not with those of .*; leave that out"):
        refuse_strangers({"run_id": "a"}, str(finished), sealed | {"ancestor": None}, tmp_path)
