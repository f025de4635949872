"""Several steps in one dispatch: the same training, the same records, the same resuming."""

import pytest

from altgrad_jax.config import validate
from altgrad_jax.errors import UsageError
from altgrad_jax.tracking import read_metrics
from tests.runs import bits, checkpoint_steps, summary, train_losses

HYBRID = {"precision__rules": (("blocks.*", "hybrid"),), "diagnostics__quant_every": 10}


@pytest.mark.parametrize(
    "devices", [pytest.param(1, marks=pytest.mark.slow), pytest.param(8, marks=pytest.mark.exhaustive)]
)
def test_five_at_a_time_train_as_one_at_a_time(lab, tmp_path, devices):
    for count in (1, 5):
        changes = HYBRID | {"train__steps_per_dispatch": count, "parallel__devices": devices}
        assert lab.train(tmp_path / str(count), **changes) == 0
    one, five = (read_metrics(tmp_path / str(count) / "metrics.jsonl") for count in (1, 5))
    assert [set(record) for record in one] == [set(record) for record in five]
    assert [record["step"] for record in one] == [record["step"] for record in five] == list(range(21))
    losses = [[loss for _, loss in train_losses(tmp_path / str(count))] for count in (1, 5)]
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)  # another program, whose sums XLA orders otherwise
    for name in ("quant/gradient/underflow", "quant/activation/amax"):
        assert five[11][name] == pytest.approx(one[11][name], rel=0.1, abs=1e-3)


@pytest.mark.slow
def test_resumed_to_the_bit(lab, tmp_path):
    changes = HYBRID | {"train__steps_per_dispatch": 5, "optimizer__decay_steps": 20}
    assert lab.train(tmp_path / "whole", **changes) == 0
    for steps in (10, 20):
        assert lab.train(tmp_path / "parts", train__steps=steps, **changes) == 0
    assert bits(tmp_path / "parts") == bits(tmp_path / "whole")
    assert summary(tmp_path / "parts")["parameter_sha256"] == summary(tmp_path / "whole")["parameter_sha256"]
    assert checkpoint_steps(tmp_path / "whole") == [10, 15, 20]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"train__steps": 21}, "config.train.steps=21 is no multiple of config.train.steps_per_dispatch=5"),
        ({"train__eval_every": 7}, "config.train.eval_every=7 is no multiple"),
        ({"checkpoint__every": 4}, "config.checkpoint.every=4 is no multiple"),
        ({"diagnostics__shadow_every": 2}, "config.diagnostics.shadow_every=2 is no multiple"),
        ({"diagnostics__questions": ("spectra:7",)}, "config.diagnostics.questions, spectra,=7 is no multiple"),
        ({"diagnostics__questions": ("weights:10",)}, "the question 'weights' looks at single steps"),
        ({"stability__fallback": True}, "config.stability.fallback looks at single steps"),
    ],
)
def test_what_happens_between_steps_is_refused(lab, changes, says):
    config = lab.config()
    config.train.steps_per_dispatch = 5
    validate(config)
    with config.unlocked():
        config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    with pytest.raises(UsageError) as caught:
        validate(config)
    assert says in str(caught.value)
