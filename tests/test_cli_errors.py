"""A user's mistakes: one clear line on stderr, the right exit status, nothing created, nothing lost."""

import json
import shutil
from pathlib import Path

import pytest

from tests.runs import Ended, Lab, snapshot

BF16 = "--config=configs/bf16.py"


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Lab:
    return Lab(tmp_path_factory.mktemp("lab"))


# What is typed after a command line that would work, the exit status, and what the line must say.
MISTAKES: dict[str, tuple[list[str], int, list[str]]] = {
    "mistyped key": (["--config.train.step=7"], 2, ["unknown config key", "train.step", "Did you mean", "steps"]),
    "unknown section": (["--config.trian.steps=7"], 2, ["unknown config key", "Did you mean", "train"]),
    "key of nothing": (["--config.model.n_experts=7"], 2, ["unknown config key", "n_experts"]),
    "word for an int": (["--config.train.steps=many"], 2, ["config.train.steps", "many"]),
    "fraction for an int": (["--config.train.steps=1.5"], 2, ["config.train.steps", "1.5"]),
    "word for a float": (["--config.optimizer.learning_rate=fast"], 2, ["config.optimizer.learning_rate", "fast"]),
    "word for a bool": (["--config.model.bias=perhaps"], 2, ["config.model.bias", "perhaps"]),
    "unknown variant": (["--config=configs/bf16.py:quik"], 2, ["unknown variant 'quik'", "'quick'"]),
    "missing config file": (["--config=configs/bf61.py"], 2, ["no file configs/bf61.py"]),
    "unknown flag": (["--stepps=3"], 2, ["Unknown command line flag 'stepps'"]),
    "mistyped flag": (["--workdri=x"], 2, ["Unknown command line flag 'workdri'", "workdir"]),
    "positional": (["train"], 2, ["unexpected argument 'train'"]),
    "heads": (["--config.model.n_head=5"], 2, ["n_embd=32", "n_head=5", "n_embd=30 would be"]),
    "devices": (["--config.train.batch_size=8"], 2, ["batch_size=8", "3 devices", "--config.train.batch_size=9"]),
    "too many devices": (["--config.parallel.devices=4"], 2, ["parallel.devices=4", "has 3"]),
    "microbatches": (["--config.train.grad_accumulation=5"], 2, ["batch_size=6", "grad_accumulation=5"]),
    "no steps": (["--config.train.steps=0"], 2, ["config.train.steps=0 must be at least 1"]),
    "negative rate": (["--config.optimizer.learning_rate=-1"], 2, ["learning_rate=-1", "0 or more"]),
    "NaN rate": (["--config.optimizer.learning_rate=nan"], 2, ["learning_rate=nan"]),
    "unknown choice": (["--config.precision.compute=fp8"], 2, ["precision.compute='fp8'", "bfloat16, float32"]),
    "unknown optimizer": (["--config.optimizer.name=adam"], 2, ["optimizer.name='adam'", "adamw"]),
    "two at once": (["--config.train.steps=0", "--config.seed=-1"], 2, ["config.train.steps=0", "config.seed=-1"]),
    "tokenizer over model": (
        ["--config.data.vocab_size=300"],
        2,
        ["config.data.vocab_size=300", "config.model.vocab_size=257"],
    ),
    "model under tokenizer": (["--config.model.vocab_size=256"], 2, ["256", "'bytes'", "257"]),
    "path without files": (["--config.data.name=embedded"], 2, ["data.path is read only with config.data.name=files"]),
    "corpus under a block": (["--config.model.block_size=100000"], 1, ["validation", "tokens", "block_size"]),
    "corpus under a batch": (["--config.train.batch_size=3000"], 1, ["validation", "fewer than a batch of 3000"]),
    "missing text": (["--config.data.path=nowhere.txt"], 1, ["nowhere.txt does not exist"]),
    "missing source": (
        ["--config.data.name=eurlex", "--config.data.path="],
        1,
        ["data.name=eurlex", "not prepared", "altgrad_jax.data prepare --name=eurlex"],
    ),
    "missing cache": (["--config.data.cache=nowhere"], 1, ["no token cache at nowhere"]),
    "no weights": (["--config.checkpoint.restore_from=nowhere"], 1, ["no checkpoint in", "nowhere"]),
    "W&B without login": (["--config.tracking.wandb=online"], 1, ["no W&B login", "--config.tracking.wandb=offline"]),
}


def assert_one_line(done: Ended, code: int, says: list[str]) -> None:
    assert done.code == code, done
    assert done.err.startswith("error: ") and done.err.count("\n") == 1, done
    assert len(done.err) < 600, done
    missing = [text for text in says if text not in done.err]
    assert not missing, (missing, done.err)


def test_every_mistake_is_one_line_and_creates_nothing(lab, tmp_path):
    base = {"train.batch_size": 6}
    lab.run_forks([lab.arguments(tmp_path / "warm", base | {"train.steps": 1})])  # writes the token cache
    cases = [[*lab.arguments(tmp_path / f"run {i}", base), *more] for i, (more, _, _) in enumerate(MISTAKES.values())]
    for (name, (_, code, says)), done in zip(MISTAKES.items(), lab.run_forks(cases), strict=True):
        try:
            assert_one_line(done, code, says)
        except AssertionError as e:
            raise AssertionError(f"{name}: {e}") from None
        assert not done.out, (name, done)
    made = [path for path in tmp_path.glob("run */*") if path.name != ".lock"]
    assert not made
    # What flags and configuration tell is told before the work directory is made.
    usage = [i for i, (_, code, _) in enumerate(MISTAKES.values()) if code == 2]
    assert not [i for i in usage if (tmp_path / f"run {i}").exists()]


def test_config_files_that_are_none(lab, tmp_path):
    files = {
        "broken.py": ("def get_config(:\n", ["broken.py could not be loaded", "SyntaxError"]),
        "raises.py": ("raise RuntimeError('no luck')\n", ["raises.py could not be loaded", "RuntimeError: no luck"]),
        "empty.py": ("", ["empty.py could not be loaded", "get_config"]),
        "dict.py": ("def get_config():\n    return {'seed': 1}\n", ["dict.py did not return a ConfigDict"]),
        "alone.py": (
            "from altgrad_jax.config import load_sibling\n"
            "def get_config():\n    return load_sibling(__file__, 'base').get_config()\n",
            ["base.py is missing", "alone.py builds on it"],
        ),
    }
    for name, (text, _) in files.items():
        (tmp_path / name).write_text(text)
    cases = [[f"--config={tmp_path / name}"] for name in files]
    cases += [[f"--config={tmp_path}"], ["--workdir=x"], ["--config="]]
    says = [*(says for _, says in files.values()), ["no file"], ["--config is missing"], ["--config"]]
    for done, expected in zip(lab.run_forks(cases), says, strict=True):
        assert_one_line(done, 2, expected)
    for done, expected in zip(lab.run_forks([[*case, "--config.seed=1"] for case in cases]), says, strict=True):
        assert_one_line(done, 2, expected[:1])


def test_folders_that_cannot_be_used(lab, tmp_path):
    """Files stand where folders are needed: unlike permissions, that stops root as well."""
    base = {"train.batch_size": 6}
    (tmp_path / "file").write_text("mine")
    (tmp_path / "locked").mkdir()
    (tmp_path / "locked" / ".lock").mkdir()
    (tmp_path / "blocked").mkdir()
    (tmp_path / "blocked" / "checkpoints").write_text("mine")
    before = snapshot(tmp_path)
    data = {"data.data_dir": str(tmp_path / "file" / "data")}
    cases = [
        lab.arguments(tmp_path / "file", base),
        lab.arguments(tmp_path / "file" / "below", base),
        lab.arguments(tmp_path / "locked", base),
        lab.arguments(tmp_path / "blocked", base),
        lab.arguments(tmp_path / "run", base | data),
    ]
    says = [["--workdir=", "cannot be written", "choose another folder"]] * 3
    says += [["checkpoints cannot be written"], ["cannot write", "--config.data.data_dir=DIR"]]
    for done, expected in zip(lab.run_forks(cases), says, strict=True):
        assert_one_line(done, 1, expected)
    assert {k: v for k, v in snapshot(tmp_path).items() if not k.endswith("/.lock")} == before


def test_a_damaged_token_cache_is_told(lab, tmp_path):
    base = {"train.batch_size": 6, "data.data_dir": str(tmp_path / "data"), "train.steps": 1}
    [done] = lab.run_forks([lab.arguments(tmp_path / "run", base)])
    assert done.code == 0
    [cache] = [path for path in (tmp_path / "data" / "cache").iterdir() if path.is_dir()]
    tokens = bytearray((cache / "train.bin").read_bytes())
    tokens[len(tokens) // 2] ^= 1
    (cache / "train.bin").write_bytes(tokens)
    finished = snapshot(tmp_path / "run")
    for arguments in lab.arguments(tmp_path / "run", base), lab.arguments(tmp_path / "another", base):
        [done] = lab.run_forks([arguments])
        assert_one_line(done, 1, ["train.bin", "SHA-256", "delete that folder"])
    assert snapshot(tmp_path / "run") == finished


def test_a_vocabulary_larger_than_the_models_in_a_given_cache(lab, tmp_path):
    base = {"train.batch_size": 6, "train.steps": 1}
    lab.run_forks([lab.arguments(tmp_path / "warm", base)])
    [cache] = [path for path in (lab.folder / "data" / "cache").iterdir() if path.is_dir()]
    arguments = lab.arguments(tmp_path / "run", base | {"data.cache": str(cache), "model.vocab_size": 100})
    [done] = lab.run_forks([arguments])
    assert_one_line(done, 1, ["has 257 tokens", "config.model.vocab_size=100"])


def test_refused_starts_leave_an_earlier_run_as_it_was(lab, tmp_path):
    """Its manifest, config, metrics and checkpoints survive whatever the refused start asked for."""
    base = {"train.batch_size": 6, "train.steps": 6, "checkpoint.every": 3, "optimizer.decay_steps": 100}
    [done] = lab.run_forks([lab.arguments(tmp_path / "run", base)])
    assert done.code == 0, done
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")  # so that there is something left to do
    before = snapshot(tmp_path / "run")
    changes = [
        {"model.n_embd": 64, "model.bias": True},
        {"tracking.wandb": "online"},
        {"data.path": str(tmp_path / "nowhere.txt")},
        {"train.batch_size": 7},
    ]
    says = [
        ["belongs to a different run", "model.bias: False -> True", "model.n_embd: 32 -> 64"],
        ["no W&B login"],
        ["does not exist"],
        ["batch_size=7"],
    ]
    cases = [lab.arguments(tmp_path / "run", base | change) for change in changes]
    for done, code, expected in zip(lab.run_forks(cases), (1, 1, 1, 2), says, strict=True):
        assert_one_line(done, code, expected)
    assert snapshot(tmp_path / "run") == before


@pytest.mark.parametrize(("arguments", "code"), [(["--config=nowhere.py"], 2), (["--help"], 0)])
def test_the_command_itself(lab, tmp_path, arguments, code):
    """Through a real process, restart with the other allocator included."""
    process = lab.start(tmp_path / "run")
    process.kill()
    process.communicate()
    import subprocess
    import sys

    command = [sys.executable, "-m", "altgrad_jax.main", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == code, done
    assert "Traceback" not in done.stderr


def test_the_lines_are_about_what_was_typed():
    """No case of the table passes by an error of the table itself."""
    assert len({json.dumps(case) for case in MISTAKES.values()}) == len(MISTAKES)
