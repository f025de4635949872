"""A matrix as small as the tiny run: seconds a group."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from altgrad_jax.config import load_config
from tests.forks import ROOT
from tests.runs import Lab

PLAIN = load_config(str(ROOT / "configs" / "bf16.py"))
SMALL: dict[str, Any] = {
    "train.steps": 12,
    "train.eval_every": 6,
    "checkpoint.every": 2,
    "diagnostics.quant_every": 0,
    "optimizer.warmup_steps": 2,
}


def changes(lab: Lab, **more: Any) -> dict[str, Any]:
    """Of `base`; keys with "__" for dots."""
    own = lab.changes(SMALL | {key.replace("__", "."): value for key, value in more.items()})
    return {f"base.{key}": value for key, value in own.items()}


def tiny_matrix(lab: Lab, base: Mapping[str, Any] | None = None, **axes: Any) -> ConfigDict:
    """configs/matrix.py:quick with the lab's corpus and the tiny model; two seeds."""
    matrix = load_config(f"{ROOT / 'configs' / 'matrix.py'}:quick")
    matrix.update_from_flattened_dict(changes(lab, **(base or {})))
    matrix.update({"seeds": (0, 1), **axes})
    return matrix


def flags(lab: Lab, workdir: Path, base: Mapping[str, Any] | None = None, **axes: Any) -> list[str]:
    """The same as a command line."""
    given = changes(lab, **(base or {})) | {"seeds": (0, 1)} | axes
    options = [f"--config.{key}={value}" for key, value in given.items()]
    return ["--config=configs/matrix.py:quick", f"--workdir={workdir}", *options]
