"""Lanes take the steps that runs of their own take.

Their programs sum in other orders, so what is compared is float32 to 1e-6; once a value falls on the other side of a
rounding boundary, a quantised run is another run, and only close.
"""

import jax
import numpy as np
import pytest

from altgrad_jax import experiment
from altgrad_jax.data.corpus import open_corpus
from altgrad_jax.diagnose import name_answers, name_update
from altgrad_jax.sweep.lanes import Lanes
from altgrad_jax.sweep.matrix import conditions
from tests.runs import Lab
from tests.sweep.matrices import PLAIN, tiny_matrix

STEPS = 6


def experiments(lab: Lab, base=None, **axes):
    found = conditions(tiny_matrix(lab, {"precision__compute": "float32"} | (base or {}), **axes), PLAIN)
    cache = open_corpus(found[0].config)
    return [experiment.build(condition.config, cache) for condition in found]


def losses_alone(exp) -> np.ndarray:
    """Training losses, then the validation loss."""
    state, batches, losses = exp.fresh_state(), exp.batches.from_step(0), []
    for _ in range(STEPS // exp.config.train.steps_per_dispatch):
        state, metrics = exp.run_train(state, exp.next_batch(batches))
        losses.append(metrics["train/loss"])
    return np.array([*np.ravel(jax.device_get(losses)), exp.evaluate(state)["val/loss"]])


def losses_together(exps) -> np.ndarray:
    """The same of every lane, [K, ...]."""
    lanes, programs, losses = None, Lanes(exps), []
    lanes = programs.fresh()
    batches, count = [exp.batches.from_step(0) for exp in exps], exps[0].config.train.steps_per_dispatch
    for _ in range(STEPS // count):
        rows = [[next(source) for _ in range(count)] for source in batches]
        batch = programs.shard([np.stack(r) if count > 1 else r[0] for r in rows])
        lanes, metrics = programs.run_train(lanes, batch)
        losses.append(np.asarray(metrics["train/loss"]).reshape(len(exps), -1))
    return np.concatenate([*losses, programs.evaluate(lanes)[:, None]], axis=1)


@pytest.mark.parametrize(
    "axes",
    [
        {"recipes": (("bf16", "bf16"),), "optimizers": ("adamw",), "rates": (1.0, 3.0), "exclude": ()},
        {"recipes": (("bf16", "bf16"),), "optimizers": ("madam",), "exclude": ()},
    ],
    ids=["seeds-and-rates", "madam"],
)
def test_unquantised_lanes_are_runs_of_their_own_to_1e_6(lab, axes):
    exps = experiments(lab, **axes)
    together = losses_together(exps)
    for i in (0, len(exps) - 1):
        np.testing.assert_allclose(together[i], losses_alone(exps[i]), rtol=1e-6)
    assert len(np.unique(together[:, -1])) == len(exps)


FORMATS = (("e5m2", "e5m2 w.pow2=1"), ("e7m0", "e7m0 w.pow2=1"), ("hybrid", "hybrid w.pow2=1"))


@pytest.mark.exhaustive
@pytest.mark.parametrize("optimizer", ["adamw", "grid", "relative"])
def test_lanes_of_formats_are_runs_of_their_own(lab, optimizer):
    exps = experiments(lab, recipes=FORMATS, optimizers=(optimizer,), seeds=(1,), exclude=())
    together = losses_together(exps)
    for i in (1, 2):
        alone = losses_alone(exps[i])
        np.testing.assert_allclose(together[i][:2], alone[:2], rtol=1e-6)
        np.testing.assert_allclose(together[i], alone, rtol=2e-4)
    assert len(np.unique(together[:, -1])) == len(exps)


def test_stochastic_rounding_draws_by_the_lanes_own_seed(lab):
    """Two lanes of equal formats: equal seeds would give equal losses, and these are those of runs of their own."""
    recipes = (("sr", "e4m3 rounding=stochastic"),)
    exps = experiments(lab, {"model__dropout": 0.1}, recipes=recipes, optimizers=("adamw",), exclude=())
    together = losses_together(exps)
    alone = losses_alone(exps[1])
    np.testing.assert_allclose(together[1][:2], alone[:2], rtol=1e-6)
    assert together[0][0] != together[1][0]


@pytest.mark.slow
def test_lanes_on_two_devices_with_several_steps_in_a_dispatch(lab):
    base = {"parallel__devices": 2, "train__steps_per_dispatch": 3, "train__grad_accumulation": 2}
    base |= {"checkpoint__every": 3, "train__eval_every": 6}
    exps = experiments(lab, base, recipes=(("bf16", "bf16"),), optimizers=("adamw",), exclude=())
    together = losses_together(exps)
    np.testing.assert_allclose(together[1], losses_alone(exps[1]), rtol=1e-6)


@pytest.mark.exhaustive
def test_what_is_asked_of_a_lane_is_answered_as_of_its_run(lab):
    exps = experiments(lab, recipes=FORMATS[:2], optimizers=("relative",), seeds=(1,), exclude=())
    programs, questions = Lanes(exps), frozenset({"quant", "shadow", "gradients", "spectra"})
    lanes, batches = programs.fresh(), [next(exp.batches.from_step(0)) for exp in exps]
    values = programs.diagnose(lanes, programs.shard(batches), questions)
    before = programs.keep(lanes)
    lanes, _ = programs.run_train(lanes, programs.shard(batches))
    updates = programs.measure_update(before, lanes)
    for i, exp in enumerate(exps):
        params = exp.abstract_params()
        answers = name_answers(programs.policies[i], params, jax.tree.map(lambda x, i=i: x[i], values))
        answers |= name_update(params, jax.tree.map(lambda x, i=i: x[i], updates))
        state, batch = exp.fresh_state(), exp.shard(batches[i])
        expected, kept = exp.diagnose(state, batch, questions), exp.keep(state)
        state, _ = exp.run_train(state, batch)
        expected |= exp.measure_update(kept, state)
        # Which codes occur is not counted where the format is a traced value.
        numbers = {k: v for k, v in expected.items() if isinstance(v, float) and not k.endswith("codes_used")}
        assert len(numbers) > 100
        for name, value in numbers.items():
            np.testing.assert_allclose(answers[name], value, rtol=1e-3, atol=1e-5, err_msg=name)
