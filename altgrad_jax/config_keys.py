"""A configuration's settings by their dotted names."""

from typing import Any

from ml_collections import ConfigDict


def leaves(config: ConfigDict, prefix: str = "") -> list[str]:
    """Dotted names of all settings."""
    names = []
    for key in config:
        inner = config[key]
        names += leaves(inner, f"{prefix}{key}.") if isinstance(inner, ConfigDict) else [f"{prefix}{key}"]
    return names


def get(config: ConfigDict, dotted: str) -> Any:
    """The value at a dotted key such as "train.steps"."""
    for key in dotted.split("."):
        config = config[key]
    return config
