"""A user's mistakes: one clear line on stderr, the right exit status, nothing created, nothing lost."""

import os
import shutil
import subprocess
import sys

from tests.runs import ROOT, Ended, snapshot

# What is typed after a command line that would work, the exit status, and what the line must say.
MISTAKES: dict[str, tuple[list[str], int, list[str]]] = {
    "mistyped key": (["--config.train.step=7"], 2, ["config key config.train.step:", "mean config.train.steps?"]),
    "unknown section": (["--config.trian.steps=7"], 2, ["config key config.trian.steps:", "mean config.train.steps?"]),
    "key of nothing": (["--config.model.n_experts=7"], 2, ["unknown config key config.model.n_experts"]),
    "section": (["--config.train=7"], 2, ["unknown config key config.train:", "config.train.steps"]),
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
    "devices": (["--config.parallel.devices=3"], 2, ["batch_size=8", "3 devices", "--config.train.batch_size=9"]),
    "too many devices": (["--config.parallel.devices=9"], 2, ["parallel.devices=9", "has 8"]),
    "microbatches": (["--config.train.grad_accumulation=5"], 2, ["batch_size=8", "grad_accumulation=5"]),
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
    "missing text": (["--config.data.path=nowhere.txt"], 2, ["nowhere.txt does not exist"]),
    "missing source": (
        ["--config.data.name=eurlex", "--config.data.path="],
        2,
        ["data.name=eurlex", "not prepared", "altgrad_jax.data prepare --name=eurlex", "data.name=embedded"],
    ),
    "missing cache": (["--config.data.cache=nowhere"], 2, ["no token cache at nowhere"]),
    "no weights": (["--config.checkpoint.restore_from=nowhere"], 2, ["no checkpoint in", "nowhere"]),
    "a checkpoint's folder": (["--config.checkpoint.restore_from=a/checkpoints/6/"], 2, ["write a@6, the run and the"]),
    "a tag of no text": (["--config.tracking.tags=('a', 5)"], 2, ["config.tracking.tags: 5 is no text"]),
    "W&B without login": (["--config.tracking.wandb=online"], 1, ["no W&B login", "--config.tracking.wandb=offline"]),
}


def assert_one_line(done: Ended, code: int, says: list[str]) -> None:
    assert done.code == code, done
    assert done.err.startswith("error: ") and done.err.count("\n") == 1, done
    assert len(done.err) < 600, done
    missing = [text for text in says if text not in done.err]
    assert not missing, (missing, done.err)


def test_every_mistake_is_one_line_and_creates_nothing(lab, tmp_path):
    lab.prepare()
    cases = [[*lab.arguments(tmp_path / f"run {i}"), *more] for i, (more, _, _) in enumerate(MISTAKES.values())]
    for (name, (_, code, says)), done in zip(MISTAKES.items(), lab.run_forks(cases), strict=True):
        try:
            assert_one_line(done, code, says)
        except AssertionError as e:
            raise AssertionError(f"{name}: {e}") from None
        assert not done.out, (name, done)
    assert not [path for path in tmp_path.glob("run */**/*") if path.is_file() and path.name != ".lock"]
    # What flags and configuration tell is told before the work directory is made.
    later = ("model under tokenizer", "missing text", "missing cache", "no weights")
    for i, (name, (_, code, _)) in enumerate(MISTAKES.items()):
        assert code != 2 or not (tmp_path / f"run {i}").exists() or name in later, name


def test_config_files_that_are_none(lab, tmp_path):
    files = {
        "broken.py": ("def get_config(:\n", ["broken.py could not be loaded: SyntaxError"]),
        "raises.py": ("raise RuntimeError('no\\nluck')\n", ["raises.py could not be loaded: RuntimeError: no luck"]),
        "empty.py": ("", ["empty.py could not be loaded", "get_config"]),
        "dict.py": ("def get_config():\n    return {'seed': 1}\n", ["dict.py did not return a ConfigDict"]),
        "plain.py:x": ("def get_config():\n    pass\n", ["plain.py:x could not be loaded", "get_config()"]),
        "text.txt": ("seed = 1", ["text.txt is no Python file"]),
        "alone.py": (
            "from altgrad_jax.config import load_sibling\n"
            "def get_config():\n    return load_sibling(__file__, 'basis').get_config()\n",
            ["alone.py builds on basis.py, which is neither beside it nor a config of the package"],
        ),
    }
    for name, (text, _) in files.items():
        (tmp_path / name.partition(":")[0]).write_text(text)
    cases = [[f"--config={tmp_path / name}"] for name in files] + [[f"--config={tmp_path}"], ["--config="]]
    says = [*(says for _, says in files.values()), ["there is no file"], ["there is no file"]]
    cases += [[*case, "--config.seed=1"] for case in cases]
    for done, expected in zip(lab.run_forks(cases), says * 2, strict=True):
        assert_one_line(done, 2, expected)


def test_flags_in_no_order(lab):
    cases = [["--workdir=x"], ["--config.seed=1", "--config=configs/bf16.py"], ["--config.seed=1"]]
    says = ["--config is missing", "before a value for --config", "Unknown command line flag 'config.seed'"]
    for done, expected in zip(lab.run_forks(cases), says, strict=True):
        assert_one_line(done, 2, [expected])


def test_folders_that_cannot_be_used(lab, tmp_path):
    """Files stand where folders are needed: unlike permissions, that stops root as well."""
    lab.prepare()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "locked").mkdir()
    (tmp_path / "locked" / ".lock").mkdir()
    (tmp_path / "blocked").mkdir()
    (tmp_path / "blocked" / "checkpoints").write_text("mine")
    before = snapshot(tmp_path)
    cases = [
        lab.arguments(tmp_path / "file"),
        lab.arguments(tmp_path / "file" / "below"),
        lab.arguments(tmp_path / "locked"),
        lab.arguments(tmp_path / "blocked"),
        lab.arguments(tmp_path / "run", {"data.data_dir": str(tmp_path / "file" / "data")}),
    ]
    says = [["--workdir=", "cannot be written", "choose another folder"]] * 3
    says += [["checkpoints cannot be written"], ["cannot be written", "--config.data.data_dir=DIR"]]
    for done, expected in zip(lab.run_forks(cases), says, strict=True):
        assert_one_line(done, 1, expected)
    assert {k: v for k, v in snapshot(tmp_path).items() if not k.endswith("/.lock")} == before


def test_a_damaged_token_cache_is_told(lab, tmp_path):
    cache = tmp_path / "cache"
    shutil.copytree(lab.prepare(), cache)
    tokens = bytearray((cache / "train.bin").read_bytes())
    tokens[len(tokens) // 2] ^= 1
    (cache / "train.bin").write_bytes(tokens)
    [done] = lab.run_forks([lab.arguments(tmp_path / "run", {"data.cache": str(cache)})])
    assert_one_line(done, 1, ["train.bin", "SHA-256", "delete that folder"])


def test_a_vocabulary_larger_than_the_models_in_a_given_cache(lab, tmp_path):
    changes = {"data.cache": str(lab.prepare()), "model.vocab_size": 100}
    [done] = lab.run_forks([lab.arguments(tmp_path / "run", changes)])
    assert_one_line(done, 1, ["has 257 tokens", "config.model.vocab_size=100"])


def test_refused_starts_leave_an_earlier_run_as_it_was(lab, tmp_path):
    """Its manifest, config, metrics and checkpoints survive whatever the refused start asked for."""
    run = tmp_path / "run"
    assert lab.train(run) == 0
    shutil.rmtree(run / "checkpoints" / "20")  # so that there is something left to do
    before = snapshot(run)
    refused = [
        ({"model.n_embd": 64, "model.bias": True}, 1, ["model.bias: False -> True", "model.n_embd: 32 -> 64"]),
        ({"tracking.wandb": "online"}, 1, ["no W&B login"]),
        ({"data.path": str(tmp_path / "nowhere.txt")}, 2, ["does not exist"]),
        ({"parallel.devices": 3}, 2, ["batch_size=8"]),
    ]
    cases = [lab.arguments(run, changes) for changes, _, _ in refused]
    for done, (_, code, says) in zip(lab.run_forks(cases), refused, strict=True):
        assert_one_line(done, code, says)
    assert snapshot(run) == before


def test_the_command_itself(tmp_path):
    """In a process of its own, its restart with another allocator included."""
    command = [sys.executable, "-m", "altgrad_jax.main"]
    environment = {key: value for key, value in os.environ.items() if key != "GLIBC_TUNABLES"}
    options = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True}
    done = subprocess.run([*command, f"--workdir={tmp_path / 'run'}", "--config=nowhere.py"], **options)
    assert_one_line(Ended(done.returncode, done.stdout, done.stderr), 2, ["no file nowhere.py"])
    assert not (tmp_path / "run").exists()
    done = subprocess.run([*command, "--help"], **options)
    assert done.returncode == 0 and "--workdir" in done.stdout and not done.stderr


def test_ctrl_c_while_nothing_is_being_trained():
    program = "from altgrad_jax import cli\ndef main():\n    raise KeyboardInterrupt\ncli.run(main)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")
