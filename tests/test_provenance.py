"""The manifest says what a run was, holds no secret, and no code of ours runs what data says."""

import ast
import json
import sys

import jax
import pytest

from altgrad_jax import provenance
from altgrad_jax.config import load_config
from altgrad_jax.data.cache import open_cache
from altgrad_jax.data.corpus import open_corpus
from altgrad_jax.errors import UserError
from tests.runs import ROOT, SECRET, SECRETS


@pytest.fixture(scope="module")
def cache(lab):
    lab.prepare()
    return open_corpus(lab.config(), progress=False)


def test_the_identity_is_what_decides_the_bits(lab, cache):
    """Each change of a setting either changes the identity, or is known not to change the trajectory."""
    before = provenance.identity(lab.config(), cache)
    assert json.loads(json.dumps(before)) == before, "it must survive being stored"
    assert before["data.sha256"] == cache.sha256
    decisive = {"seed": 1, "train__batch_size": 4, "train__grad_accumulation": 2, "train__loss_chunk": 8}
    decisive |= {"train__steps": 21}  # by way of the schedule
    decisive |= {"model__n_layer": 2, "model__n_embd": 64, "model__bias": True, "model__dropout": 0.1}
    decisive |= {"model__tie_embeddings": False, "model__attention": "xla", "precision__compute": "float32"}
    decisive |= {"optimizer__learning_rate": 1e-5, "optimizer__eps": 1e-6, "optimizer__schedule": "linear"}
    decisive |= {"model__gelu": "exact"}  # and tanh is not named, as in runs from before there was a choice
    decisive |= {"train__eval_batches": 9}  # of which windows val/loss is, and so which is the best
    decisive |= {"optimizer__decay_steps": 7, "optimizer__grad_clip": 0.0, "optimizer__b2": 0.99}
    for key, value in decisive.items():
        after = provenance.identity(lab.config(**{key: value}), cache)
        different = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
        expected = "optimizer.decay_steps" if key == "train__steps" else key.replace("__", ".")
        assert different == {expected}
    falling_back = [lab.config(), lab.config(diagnostics__windows=1)]
    for config in falling_back:
        config.stability.fallback = True  # which looks at these windows for what to blame
    one, other = (provenance.identity(config, cache) for config in falling_back)
    assert {key for key in one if one[key] != other[key]} == {"diagnostics.windows"}
    harmless = {"train__log_every": 9, "train__eval_every": 9, "diagnostics__windows": 1, "checkpoint__every": 9}
    harmless |= {"checkpoint__max_to_keep": 9, "tracking__name": "x", "tracking__wandb": "offline"}
    harmless |= {"parallel__devices": 0, "stability__nan_patience": 9, "data__data_dir": str(lab.folder / "other")}
    for key, value in harmless.items():
        assert provenance.identity(lab.config(**{key: value}), cache) == before, key


def test_more_steps_are_the_same_run_where_the_schedule_does_not_hang_on_them(lab, cache):
    def identity(**changes):
        return provenance.identity(lab.config(**changes), cache)

    assert identity(train__steps=50, optimizer__decay_steps=20) == identity(optimizer__decay_steps=20)
    assert identity(optimizer__decay_steps=20) == identity(), "0 stands for train.steps"
    constant = {"optimizer__schedule": "constant"}
    assert identity(train__steps=50, **constant) == identity(**constant)


def test_the_environment_is_recorded_without_secrets(monkeypatch):
    wanted = {"XLA_FLAGS": "--a", "JAX_PLATFORMS": "cpu", "NCCL_DEBUG": "INFO", "CUDA_VISIBLE_DEVICES": "0"}
    for key, value in (wanted | SECRETS).items():
        monkeypatch.setenv(key, value)
    found = provenance.environment()
    assert wanted.items() <= found.items()
    assert found.keys() <= set(provenance.ENVIRONMENT) | {n for n in found if n.startswith("JAX_")}
    assert SECRET not in json.dumps(found) and not found.keys() & SECRETS.keys()


def test_a_session_can_be_repeated_from_its_record(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["main.py", "--config=configs/bf16.py:quick", "--config.seed=7"])
    session = provenance.session(40)
    assert session["command"] == [
        *("python", "-m", "altgrad_jax.main", "--config=configs/bf16.py:quick", "--config.seed=7")
    ]
    assert session["from_step"] == 40 and session["started"].endswith("+00:00")
    assert session["versions"]["jax"] == jax.__version__ and set(provenance.PACKAGES) < set(session["versions"])
    assert session["devices"]["local"] == jax.local_device_count() and session["devices"]["backend"] == "cpu"
    assert json.loads(json.dumps(session)) == session


def test_a_configuration_as_json_is_the_configuration():
    config = load_config(str(ROOT / "configs" / "bf16.py"))
    stored = json.loads(json.dumps(provenance.config_dict(config)))
    assert stored["tracking"]["tags"] == list(config.tracking.tags) and stored["data"]["cache"] is None
    again = load_config(str(ROOT / "configs" / "bf16.py"))
    again.unlock()
    again.update(stored | {"tracking": stored["tracking"] | {"tags": tuple(stored["tracking"]["tags"])}})
    assert again.to_dict() == config.to_dict()


RUNS_CODE = {"eval", "exec", "compile", "__import__"}
RUNS_CODE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}


def dangers(source: str) -> list[str]:
    """Whatever could run code that data brought along."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in RUNS_CODE:
            found.append(node.func.id)
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            found += [name for name in names if name.split(".")[0] in RUNS_CODE_MODULES]
        if isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "shell"):
            found += [] if isinstance(node.value, ast.Constant) and node.value.value is False else [node.arg]
        if isinstance(node, ast.Attribute) and node.attr in ("loads", "load"):
            owner = ast.unparse(node.value)
            found += [f"{owner}.{node.attr}"] if owner not in ("json",) else []
        if isinstance(node, ast.Attribute) and node.attr in ("system", "popen", "unsafe_load", "extractall"):
            found.append(node.attr)
    return found


def test_no_code_comes_from_data():
    files = sorted((ROOT / "altgrad_jax").rglob("*.py"))
    assert len(files) > 30
    assert {str(file.relative_to(ROOT)): found for file in files if (found := dangers(file.read_text()))} == {}


@pytest.mark.parametrize(
    "source",
    [
        *("eval(x)", "exec(x)", "import pickle", "from pickle import loads", "numpy.load(f)", "yaml.unsafe_load(x)"),
        *("np.memmap(f, allow_pickle=True)", "subprocess.run(c, shell=True)", "os.system(c)", "archive.extractall(d)"),
    ],
)
def test_what_that_would_see(source):
    assert dangers(source)


def test_a_folder_in_the_home_is_named_without_whose_it_is(monkeypatch, tmp_path):
    """And `data batch` and `sample`, which open the cache that the manifest names, find it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert provenance._from_home(tmp_path / "a" / "b") == "~/a/b"
    assert provenance._from_home(tmp_path.parent) == str(tmp_path.parent)
    with pytest.raises(UserError, match=str(tmp_path / "none")):
        open_cache("~/none")
