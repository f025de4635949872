"""The config files and commands of an installation: from any folder, and as a beginning of a user's own."""

import os
import subprocess
import sys
import tomllib
import zipfile

import pytest

from altgrad_jax.config import load_config
from altgrad_jax.errors import UsageError
from tests.forks import ROOT

OWN = "from altgrad_jax.configs import {module}\n\ndef get_config():\n    return {module}.get_config({argument!r})\n"


def test_a_config_of_the_package_goes_by_its_name_in_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config("hybrid:quick").to_dict() == load_config(f"{ROOT}/configs/hybrid.py:quick").to_dict()
    assert load_config("mxfp8").tracking.name == "mxfp8"
    with pytest.raises(
        UsageError, match=r"no config 'hybird': give one of base, bf16, .* or a file, such as ./hybird.py"
    ):
        load_config("hybird")
    with pytest.raises(UsageError, match="no file configs/mixed.py; 'mixed' comes with the package: --config=mixed"):
        load_config("configs/mixed.py")


def test_a_users_own_file_starts_from_ours(tmp_path):
    for module, argument in (("e5m2", "quick"), ("optimizer", "sr,e4m3,quick"), ("matrix", "layers,quick")):
        (tmp_path / "mine.py").write_text(OWN.format(module=module, argument=argument))
        assert load_config(f"{tmp_path}/mine.py").to_dict() == load_config(f"{module}:{argument}").to_dict()


def test_a_file_of_ours_runs_where_it_was_copied_and_keeps_its_neighbours(tmp_path):
    copied = tmp_path / "mine.py"
    copied.write_text((ROOT / "configs" / "hybrid.py").read_text())
    assert load_config(f"{copied}:quick").to_dict() == load_config("hybrid:quick").to_dict()
    base = (ROOT / "configs" / "base.py").read_text()
    (tmp_path / "base.py").write_text(base.replace("config.seed = 42", "config.seed = 43"))
    assert load_config(f"{copied}:quick").seed == 43


def test_there_is_one_copy_of_each_config():
    assert (ROOT / "altgrad_jax" / "configs").samefile(ROOT / "configs")


@pytest.mark.slow
def test_the_wheel_has_the_configs_and_the_commands(tmp_path):
    options = {"check": True, "capture_output": True, "text": True}
    source = tmp_path / "source"  # a copy, for builds leave folders behind
    source.mkdir()
    parts = [str(ROOT / name) for name in ("altgrad_jax", "configs", "pyproject.toml", "README.md", "LICENSE")]
    subprocess.run(["cp", "-rP", *parts, str(source)], **options)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(source)], **options
    )
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        wheel.extractall(tmp_path / "installed")
        names = wheel.namelist()
    assert {f"altgrad_jax/configs/{path.name}" for path in (ROOT / "configs").glob("*.py")} <= set(names)
    assert not [name for name in names if name.startswith(("configs/", "tests/"))]
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "installed")}
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    entries = next(name for name in names if name.endswith("entry_points.txt"))
    assert all(name in (tmp_path / "installed" / entries).read_text() for name in scripts)
    program = "import sys; sys.argv[0] = 'altgrad-audit'; from altgrad_jax.scripts import audit; audit()"
    small = [f"--config.model.{key}=8" for key in ("n_embd", "n_head", "block_size", "vocab_size")]
    more = ["--config.train.batch_size=8", "--config.model.n_layer=1"]
    command = [sys.executable, "-c", program, "--config=bf16:quick", *small, *more]
    done = subprocess.run(command, cwd=tmp_path, env=environment, **options)
    assert "FP8 products: none asked for" in done.stdout
    found = subprocess.run(
        [sys.executable, "-c", "import altgrad_jax.configs.base as m; print(m.__file__)"],
        cwd=tmp_path,
        env=environment,
        **options,
    )
    assert found.stdout.startswith(str(tmp_path / "installed"))
