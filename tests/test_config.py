"""The configuration: its defaults are the published baseline, it is checked, and every setting of it is used."""

import json
import math
import subprocess
import sys

import ml_collections
import pytest

from altgrad_jax.config import CHOICES, check_devices, check_keys, get, load_config, validate
from altgrad_jax.errors import UsageError
from tests.runs import ROOT

ARGUMENTS = {"format": "e3m4", "optimizer": "relative,e3m4"}
BF16 = str(ROOT / "configs" / "bf16.py")


def leaves(config, prefix: str = "") -> set[str]:
    names = set()
    for key in config:
        inner = config[key]
        names |= (
            leaves(inner, f"{prefix}{key}.") if isinstance(inner, ml_collections.ConfigDict) else {f"{prefix}{key}"}
        )
    return names


def changed(**changes) -> ml_collections.ConfigDict:
    config = load_config(BF16)
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    return config


def test_the_defaults_are_the_published_baseline():
    config = load_config(BF16).to_dict()
    assert config["seed"] == 42
    expected = {
        "model": dict(n_layer=6, n_head=6, n_embd=384, block_size=256, vocab_size=50257, dropout=0.0, bias=False),
        "train": dict(steps=2000, batch_size=12, grad_accumulation=1, log_every=1, eval_every=100),
        "optimizer": dict(name="adamw", learning_rate=6e-4, warmup_steps=100, schedule="cosine", min_lr_ratio=0.1)
        | dict(b1=0.9, b2=0.95, weight_decay=0.1, grad_clip=1.0),
        "precision": dict(compute="bfloat16"),
        "checkpoint": dict(every=100, max_to_keep=3),
        "stability": dict(nan_patience=10),
        "tracking": dict(wandb="offline", project="altgrad", name="bf16-baseline", tags=("baseline", "bf16")),
        "data": dict(name="eurlex", tokenizer="auto", vocab_size=0),
    }
    for section, values in expected.items():
        assert values.items() <= config[section].items(), section
    assert config["model"]["tie_embeddings"] is True


@pytest.mark.parametrize("variant", ["", "quick"])
def test_every_config_file_is_valid_and_locked(variant):
    for path in (ROOT / "configs").glob("*.py"):
        if path.stem == "causes":  # many configurations, and no quick ones: tests/benchmarks/test_causes.py
            continue
        argument = ",".join(part for part in (ARGUMENTS.get(path.stem, ""), variant) if part)
        config = load_config(f"{path}:{argument}" if argument else str(path))
        if path.stem == "matrix":  # many configurations, checked in tests/sweep
            continue
        validate(config)
        assert config.is_locked
        with pytest.raises(AttributeError):
            config.model.layers = 3
        with pytest.raises(TypeError):
            config.train.steps = "many"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"train__steps": 0}, "config.train.steps=0 must be at least 1"),
        ({"stability__nan_patience": 0}, "config.stability.nan_patience=0 must be at least 1"),
        ({"checkpoint__max_to_keep": 0}, "config.checkpoint.max_to_keep=0 must be at least 1"),
        ({"optimizer__learning_rate": math.inf}, "config.optimizer.learning_rate=inf must be finite"),
        ({"optimizer__grad_clip": -1.0}, "config.optimizer.grad_clip=-1.0 must be 0 or more"),
        ({"optimizer__b1": 1.0}, "config.optimizer.b1=1.0 must lie between 0 and 1"),
        ({"model__dropout": -0.1}, "config.model.dropout=-0.1 must lie between 0 and 1"),
        ({"optimizer__eps": 0.0}, "config.optimizer.eps=0.0 must be above 0"),
        ({"model__n_embd": 100}, "n_embd=100 is not divisible by config.model.n_head=6; n_embd=102 would be"),
        ({"train__grad_accumulation": 5}, "batch_size=12 is not divisible by config.train.grad_accumulation=5"),
        ({"data__vocab_size": 50258}, "config.data.vocab_size=50258 is larger than config.model.vocab_size=50257"),
        ({"data__name": "files"}, "config.data.name=files needs config.data.path"),
        ({"data__path": "x.txt"}, "config.data.path is read only with config.data.name=files"),
        ({"optimizer__decay_steps": 100}, "decay_steps=100 is not above config.optimizer.warmup_steps=100"),
        ({"optimizer__decay_steps": 7}, "the rate would fall to its floor in one step"),
        (
            {"optimizer__schedule": "constant", "optimizer__decay_steps": 500},
            "does nothing with config.optimizer.sched",
        ),
        ({"tracking__tags": ("a", " ")}, "config.tracking.tags: ' ' is empty; tags have 1 to 64 characters"),
        ({"tracking__tags": ("x" * 65,)}, "has 65 characters; tags have 1 to 64"),
        ({"tracking__tags": (None,)}, "config.tracking.tags: None is no text"),
        ({"tracking__project": "team/fp8"}, "for a project of 'team': config.tracking.entity=team, project=fp8"),
        ({"tracking__project": "50%?"}, "config.tracking.project='50%?' has % ? in it"),
        ({"tracking__project": ""}, "config.tracking.project is empty"),
        ({"tracking__project": "p" * 129}, "config.tracking.project has 129 characters, and W&B takes up to 128"),
        ({"tracking__name": "n" * 129}, "config.tracking.name has 129 characters"),
        ({"tracking__name": "a\nb"}, "holds characters that cannot be seen"),
        ({"tracking__entity": " "}, "holds characters that cannot be seen"),
        ({"checkpoint__restore_from": "None"}, "restore_from=None is taken for a name: leave it out"),
        ({"data__cache": "null"}, "config.data.cache=null is taken for a name"),
        ({"data__data_dir": ""}, "config.data.data_dir is empty"),
        ({"checkpoint__restore_from": "r/checkpoints/600/state"}, "write r@600, the run and the step"),
        *(({key.replace(".", "__"): "other"}, f"config.{key}='other' is not one of") for key in CHOICES),
    ],
)
def test_values_that_cannot_work_are_named(changes, says):
    with pytest.raises(UsageError) as caught:
        validate(changed(**changes))
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_texts_that_are_fine():
    validate(changed(checkpoint__restore_from="checkpoints@6", tracking__tags=("x" * 64, "é")))
    validate(changed(checkpoint__restore_from="", data__cache="", tracking__entity=""))
    validate(changed(tracking__wandb="disabled", tracking__name="n" * 200))
    validate(changed(checkpoint__restore_from="runs/nonesuch/checkpoints"))


def test_all_violations_are_reported_at_once():
    with pytest.raises(UsageError, match=r"seed=-1 .*; .*train.steps=0 .*; .*n_embd=100 "):
        validate(changed(train__steps=0, seed=-1, model__n_embd=100))


REALS = [key for key in sorted(leaves(load_config(BF16))) if isinstance(get(load_config(BF16), key), float)]
NO_FLOAT32 = {
    math.nan: "must be finite",
    -math.inf: "must be finite",
    3.5e38: "must be finite in float32, whose largest number is 3.4e+38",
    1e-46: "must be 0 or at least 1.18e-38, below which float32 may be taken for 0",
    1e-39: "must be 0 or at least 1.18e-38, below which float32 may be taken for 0",
}


@pytest.mark.parametrize("key", REALS)
def test_reals_that_float32_lacks_are_refused(key):
    assert len(REALS) > 15
    for value, says in NO_FLOAT32.items():
        with pytest.raises(UsageError) as caught:
            validate(changed(**{key.replace(".", "__"): value}))
        assert f"config.{key}={value} {says}" in str(caught.value)


def test_fractions_that_are_one_in_float32():
    for key in ("optimizer__b2", "model__dropout", "optimizer__momentum"):
        with pytest.raises(UsageError, match=r"=0\.99999999 must lie between 0 and 1, in float32 too"):
            validate(changed(**{key: 0.99999999, "optimizer__name": "grid"}))


def test_seeds_that_would_repeat_others():
    for seed in (0, 2**31, 2**32 - 1):
        validate(changed(seed=seed))
    for seed in (-1, 2**32, 2**32 + 7, 2**63, 2**70):
        with pytest.raises(UsageError, match=rf"^config.seed={seed} must lie between 0 and 4294967295 \(2\^32 - 1\); "):
            validate(changed(seed=seed))


def test_whole_numbers_that_int32_lacks():
    for key in ("train__steps", "optimizer__warmup_steps", "classify__max_windows", "model__n_layer"):
        with pytest.raises(UsageError, match=r"=2147483648 must be at most 2147483647 \(2\^31 - 1\)"):
            validate(changed(**{key: 2**31}))


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("train.step", "train.steps"),
        ("trian.steps", "train.steps"),
        ("optimiser.learning_rate", "optimizer.learning_rate"),
        ("model.n_heads", "model.n_head"),
        ("sead", "seed"),
        ("tracking", "tracking.tags"),
    ],
)
def test_the_nearest_key_is_named(typed, meant):
    config = load_config(BF16)
    check_keys(config, leaves(config))
    with pytest.raises(UsageError, match=rf"unknown config key config.{typed}: did you mean config.{meant}\?"):
        check_keys(config, ["train.steps", typed])


def test_batches_that_do_not_divide():
    check_devices(changed(train__batch_size=12), 4, 3)
    check_devices(changed(train__batch_size=12, parallel__devices=3), 8, 2)
    with pytest.raises(UsageError, match=r"batch_size=12 is not divisible by 8 devices .*batch_size=16 or fewer"):
        check_devices(changed(train__batch_size=12), 8, 1)
    with pytest.raises(UsageError, match=r"8 devices x grad_accumulation=3; use --config.train.batch_size=24"):
        check_devices(changed(train__batch_size=12, train__grad_accumulation=3), 4, 2)
    with pytest.raises(UsageError, match=r"parallel.devices=9, but this host has 8"):
        check_devices(changed(parallel__devices=9), 8, 1)


# The main job, with every read of a setting noted; checks of values and copies of the whole configuration left out.
COUNT_READS = """
import json, sys
from pathlib import Path
from types import SimpleNamespace
from ml_collections import ConfigDict
from altgrad_jax import main
from altgrad_jax.config import load_config
from altgrad_jax.model import GPTConfig
from altgrad_jax.optimizers.factory import OPTIONS, make_optimizer
from altgrad_jax.stability import make_fallback
from altgrad_jax.task import make_task
from tests.planted import planted_cache

file, workdir, changes = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
config = load_config(file)
config.update_from_flattened_dict(changes)
sections = {name: value for name, value in config.items() if isinstance(value, ConfigDict)}
leaves = {f"{name}.{key}" for name, section in sections.items() for key in section} | set(config) - set(sections)
prefixes = {id(config): ""} | {id(section): f"{name}." for name, section in sections.items() if name != "model"}
read, copying = set(), False
getitem, to_dict = ConfigDict.__getitem__, ConfigDict.to_dict

def noted_getitem(self, key):
    if not copying and id(self) in prefixes:
        read.add(prefixes[id(self)] + key)
    return getitem(self, key)

def to_dict_not_noted(self, *args, **kwargs):
    global copying
    copying = True
    try:
        return to_dict(self, *args, **kwargs)
    finally:
        copying = False

def noted_shape(self, name):  # the model's settings count when the model itself reads them
    if sys._getframe(1).f_code.co_name not in ("__hash__", "__eq__"):
        read.add(f"model.{name}")
    return object.__getattribute__(self, name)

ConfigDict.__getitem__, ConfigDict.to_dict = noted_getitem, to_dict_not_noted
GPTConfig.__getattribute__ = noted_shape
main.validate = lambda config: None
main.CONFIG, main.WORKDIR = SimpleNamespace(value=config), SimpleNamespace(value=workdir)
main.DESCRIBE = main.RESTART = SimpleNamespace(value=False)
assert main.main() == 0
for config.optimizer.name in OPTIONS:  # each reads settings of its own
    make_optimizer(config.optimizer, 10)
config.stability.fallback = True
make_fallback(config.stability)
config.task = "classify"
make_task(config, planted_cache(Path(workdir)))
print(json.dumps(sorted(leaves - read)))
"""


def test_every_setting_is_read_by_the_program(lab, tmp_path):
    """A setting that nothing reads does nothing, whatever its comment promises."""
    changes = lab.changes({"tracking.wandb": "offline"})
    command = [sys.executable, "-c", COUNT_READS, BF16, str(tmp_path / "run"), json.dumps(changes)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []
