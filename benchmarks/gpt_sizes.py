"""Sizes of GPTs and recipes to train them in, and the configuration of each: what whole-step benchmarks run."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from altgrad_jax.config import load_sibling, validate
from altgrad_jax.flops import model_flops_per_token, peak_flops
from altgrad_jax.model import GPTConfig, gpt_config

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


@dataclass(frozen=True)
class Size:
    """A model's shape and how many windows a step trains on.

    Attributes:
      model: changes to `config.model` of the baseline.
      batch: windows a step, chosen to leave room in 80 GB in every recipe.
    """

    model: dict[str, int] = field(default_factory=dict)
    batch: int = 12


def _gpt(n_layer: int, n_embd: int, n_head: int, block_size: int = 1024) -> dict[str, int]:
    return {"n_layer": n_layer, "n_embd": n_embd, "n_head": n_head, "block_size": block_size}


SIZES = {
    "baseline_30M": Size(),  # configs/bf16.py as it is
    "gpt2_124M": Size(_gpt(12, 768, 12), 32),
    "gpt2_350M": Size(_gpt(24, 1024, 16), 16),
    "gpt_1.3B": Size(_gpt(24, 2048, 16), 8),
    "wide_4096": Size(_gpt(4, 4096, 32, 2048), 4),  # four layers of a model of billions, its MLPs 16384 wide
    "tiny": Size(_gpt(1, 64, 2, 32) | {"vocab_size": 256}, 4),  # for tests
}
# name -> (config file, its variant, changes to config.precision)
RECIPES: dict[str, tuple[str, str, dict[str, str]]] = {
    "bf16": ("bf16", "", {}),
    "hybrid": ("hybrid", "", {}),
    "e5m2": ("e5m2", "", {}),
    "e5m2, Pallas kernel": ("e5m2", "", {"kernel": "pallas"}),
    "e5m2_cast": ("e5m2_cast", "", {}),
    "e4m3": ("format", "e4m3", {}),
    "mxfp8": ("mxfp8", "", {}),
    "e3m4": ("format", "e3m4", {}),
}


def config_of(size: str, recipe: str, batch: int = 0) -> ConfigDict:
    """The configuration of a recipe's file with the model of a size, on one device; `batch` windows if given."""
    name, variant, precision = RECIPES[recipe]
    config = load_sibling(str(CONFIGS / "bf16.py"), name).get_config(variant)
    with config.unlocked():
        config.model.update(SIZES[size].model)
        config.train.batch_size = batch or SIZES[size].batch
        config.precision.update(precision)
        config.parallel.devices = 1
    validate(config)
    return config


def model_of(config: ConfigDict) -> GPTConfig:
    """The network's shape."""
    return gpt_config(config.model, config.precision.compute)


def throughput(config: ConfigDict, seconds: float, device_kind: str) -> dict[str, Any]:
    """Of a step that takes so long: tokens and model FLOPs a second, and their share of the device's 16-bit peak."""
    tokens = config.train.batch_size * config.model.block_size
    flops = model_flops_per_token(model_of(config)) * tokens / seconds
    peak = peak_flops(device_kind)
    return {
        "tokens_per_second": round(tokens / seconds),
        "model_tflops": round(flops / 1e12, 4),
        "mfu": round(flops / peak, 4) if peak else None,  # None: the device's peak is not known
    }
