"""What can be said of every file of launch/ without running it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from altgrad_jax.config import check_keys, load_config
from tests.forks import ROOT

LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
FILES = sorted(path for path in LAUNCH.iterdir() if path.is_file())
SOURCED = {"common.sh", "xla_flags.sh"}


def shellcheck(*arguments: str, **options) -> subprocess.CompletedProcess:
    command = [str(Path(sys.executable).with_name("shellcheck")), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **options)


def test_shellcheck_has_nothing_to_say():
    others = [ROOT / "benchmarks" / "gpu.sh", ROOT / ".ci" / "run"]
    done = shellcheck(*(str(path.relative_to(ROOT)) for path in [*SCRIPTS, *others]))
    assert (done.returncode, done.stdout) == (0, "")
    assert shellcheck("-", input="#!/bin/bash\nrm $1/*\n").returncode == 1, "it would speak up"


@pytest.mark.parametrize("path", [*SCRIPTS, ROOT / "benchmarks" / "gpu.sh"], ids=lambda path: path.name)
def test_every_script_has_help(path, tmp_path):
    """From any folder, and nothing else is done."""
    command = ["bash", str(path), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"})
    assert (done.returncode, done.stderr, list(tmp_path.iterdir())) == (0, "", [])
    assert path.name in done.stdout and "#SBATCH" not in done.stdout and not done.stdout.startswith("#")
    assert done.stdout.count("\n") > 2 or path.name == "common.sh"


def test_every_benchmark_reads_its_arguments():
    """So that each has --help."""
    for path in (ROOT / "benchmarks").glob("*.py"):
        text = path.read_text()
        reads = any(way in text for way in ("ArgumentParser(", "parse_arguments(", "cli.run(main)", "make_parser("))
        assert reads or path.name == "common.py" or '\nif __name__ == "__main__"' not in text, path


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_stop_at_the_first_error_and_can_be_run(path):
    text = path.read_text()
    if path.name in SOURCED:
        assert text.startswith("# shellcheck shell=bash\n") and "\nset -" not in text, "it is its user's shell"
    else:
        assert text.startswith("#!/usr/bin/env bash\n") and "\nset -euo pipefail\n" in text
        assert path.stat().st_mode & 0o111


def test_the_readme_names_every_file():
    table = set(re.findall(r"^\| `(\w+\.\w+)`", (LAUNCH / "README.md").read_text(), re.MULTILINE))
    assert table == {path.name for path in FILES} - {"README.md"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_command_lines_are_the_programs(path):
    text = path.read_text()
    keys = {key.removeprefix("base.") for key in re.findall(r"--config\.([a-z0-9_.]+)=", text)} - {"key"}
    files = set(re.findall(r"\bconfigs/[\w.]+\.py(?::[\w,]+)?", text))
    check_keys(load_config(str(ROOT / "configs" / "base.py")), keys)
    for file in files:
        load_config(str(ROOT / file))


def test_a_wrong_key_would_be_found():
    with pytest.raises(Exception, match=r"unknown config key config\.parallel\.hots"):
        check_keys(load_config(str(ROOT / "configs" / "base.py")), {"parallel.hots"})
