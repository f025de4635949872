"""--help, options in files, options that are settings, configurations of another kind, readers that end early."""

import os
import subprocess
import sys

import pytest

from tests.forks import ROOT, run_module
from tests.test_cli_errors import assert_one_line

COMMANDS = ("main", "audit", "sweep", "data", "sample", "report", "formats")


def run(tmp_path, module, *cases):
    """`python -m altgrad_jax.MODULE` with each list of arguments."""
    environment = os.environ | {"GLIBC_TUNABLES": ""}
    return run_module(f"altgrad_jax.{module}", cases, tmp_path / f"forks-{module}", ["altgrad_jax.config"], environment)


FILES = {  # of options, and what is said of them
    "--config=bf16:quick\n--config.checkpoint.evry=3\n": "did you mean config.checkpoint.every?",
    "--config=bf16:quick\n--config.train.log_every=0\n": "config.train.log_every=0 must be at least 1",
    "--config=nosuch\n": "there is no config 'nosuch'",
    "# a comment\n--wrokdir=x\n": "Unknown command line flag 'wrokdir'",
}
PART = "from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({'train': {'steps': 3}})\n"
TYPE = (
    "from ml_collections import ConfigDict\nfrom altgrad_jax.configs import base\n"
    "def get_config():\n    return ConfigDict(base.get_config().to_dict() | {'seed': '7'})\n"
)


def mistakes(tmp_path) -> dict[str, dict[str, str]]:
    """Command -> option -> what is said of it."""
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    (tmp_path / "part.py").write_text(PART)
    (tmp_path / "type.py").write_text(TYPE)
    for i, text in enumerate(FILES):
        (tmp_path / f"file{i}").write_text(text)
    part, kind = f"--config={tmp_path}/part.py", f"--config={tmp_path}/type.py"
    return {
        "main": {
            **{f"--flagfile={tmp_path}/file{i}": says for i, says in enumerate(FILES.values())},
            **{f"--flagfile={tmp_path}/{name}": "--flagfile: " for name in ("nowhere", "binary", "")},
            "--optimizer.weight_decay=0": "settings begin with config: --config.optimizer.weight_decay (see",
            "--vocab_size=9": "--config.data.vocab_size or --config.model.vocab_size",
            "--optimiser.eps=1": "--config.optimizer.eps",
            "--config=matrix:layers": "altgrad_jax.sweep runs",
            part: "config.checkpoint.every and",
            kind: "config.seed='7' is of another type",
        },
        "audit": {"--config=matrix:scaling": "altgrad_jax.sweep runs", part: "config.checkpoint.every and"},
        "sweep": {"--config=e5m2:quick": "altgrad_jax.main runs", part: "altgrad_jax.main runs"},
        "data": {f"--flagfile={tmp_path}/nowhere": "--flagfile: "},
        "formats": {f"--flagfile={tmp_path}/nowhere": "--flagfile: "},
    }


@pytest.mark.parametrize("module", COMMANDS)
def test_every_command_has_help_and_tells_mistakes_in_a_line(tmp_path, module):
    """Options in files, settings given as options, and configurations of another kind among them."""
    said = mistakes(tmp_path).get(module, {})
    text, short, full, *wrong = run(tmp_path, module, ["--help"], ["-h"], ["--helpfull"], *([o] for o in said))
    assert (text.code, text.err, short) == (0, "", text)
    assert "Options:\n" in text.out and "--flagfile=FILE" in text.out
    assert max(map(len, text.out.splitlines())) <= 120
    takes_a_config = module in ("main", "audit", "sweep", "data")
    for part in ("  --config=", "--config.SECTION.NAME=VALUE", "\n  e5m2_cast ", "NAME[:VARIANT]"):
        assert (part in text.out) == takes_a_config, part
    assert ("\n  --config.optimizer.grad_clip=1.0\n" in full.out) == takes_a_config
    for done, says in zip(wrong, said.values(), strict=True):
        assert_one_line(done, 2, [says])


@pytest.mark.parametrize("command", ["altgrad_jax.main --helpfull", "altgrad_jax.formats e5m2 --values"])
def test_a_reader_that_ends_early_is_no_traceback(command):
    """As `| head` does: the other end of the pipe is closed before anything is written."""
    read, write = os.pipe()
    os.close(read)
    environment = os.environ | {"GLIBC_TUNABLES": ""}
    words = [sys.executable, "-m", *command.split()]
    done = subprocess.run(words, cwd=ROOT, env=environment, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.returncode in (1, 141) and not done.stderr
