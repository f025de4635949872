"""What a matrix of experiments consists of: the product of its axes, less what it leaves out, as configurations.

A matrix is a config file (configs/matrix.py). A condition is one recipe, optimizer, choice of layers, factor on the
learning rate and seed; its configuration is `base` with those put in, and it has the command that would run it alone.
"""

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ml_collections import ConfigDict

from altgrad_jax.config import get, leaves, validate
from altgrad_jax.errors import UsageError
from altgrad_jax.precision.reals import seed_fault
from altgrad_jax.precision.recipes import PLAIN, parse_recipe

LARGEST_SEED = 2**31 - 1  # lanes carry their seeds as int32
AXES = ("recipe", "optimizer", "layers", "rate", "seed")
PLAIN_CONFIG = "bf16"  # what commands of single conditions start from


@dataclass(frozen=True)
class Condition:
    """One cell of the matrix.

    Attributes:
      name: of its folder.
      facts: recipe, optimizer, layers, rate (the factor), seed and learning_rate, as reports name them.
      config: what a run of its own would be given.
      command: which would run it alone, without its work directory.
    """

    name: str
    facts: dict[str, Any]
    config: ConfigDict
    command: tuple[str, ...]


def conditions(matrix: ConfigDict, plain: ConfigDict, factors: Mapping[str, float] | None = None) -> list[Condition]:
    """All conditions of a matrix, those of one seed together.

    Args:
      matrix: as configs/matrix.py has it.
      plain: the configuration of `PLAIN_CONFIG`.
      factors: optimizer -> what its learning rate is multiplied by, as a search has found it; 1 where it has not.

    Raises:
      UsageError: an axis is malformed, or a condition contradicts itself; every one is named.
    """
    recipes, layers = _pairs(matrix, "recipes"), _pairs(matrix, "layers")
    _check_elements(matrix)
    for axis in ("optimizers", "seeds", "rates"):
        if not matrix[axis] or len(set(matrix[axis])) < len(matrix[axis]):
            raise UsageError(f"config.{axis}={tuple(matrix[axis])} must name one or more, none of them twice")
    left_out, used = [_exclusion(text) for text in matrix.exclude], set()
    found, problems = [], []
    for seed, (recipe, text), (where, pattern), optimizer, rate in itertools.product(
        matrix.seeds, recipes.items(), layers.items(), matrix.optimizers, matrix.rates
    ):
        if text == PLAIN and where != next(iter(layers)):
            continue  # no layer is quantised, whichever are under test
        cell = {"recipe": recipe, "optimizer": optimizer, "layers": where, "rate": rate, "seed": seed}
        excluded = [i for i, parts in enumerate(left_out) if _matches(parts, cell)]
        used.update(excluded)
        if excluded:
            continue
        config = _configured(matrix, cell, text, pattern, (factors or {}).get(optimizer, 1.0))
        config.tracking.name = name = _name(matrix, cell, len(layers) > 1)
        try:
            validate(config)
        except UsageError as e:
            problems.append(f"{name}: {e}")
            continue
        facts = cell | {"learning_rate": config.optimizer.learning_rate}
        found.append(Condition(name, facts, config.lock(), command(config, plain)))
    if unused := [text for i, text in enumerate(matrix.exclude) if i not in used]:
        raise UsageError(f"config.exclude: {unused[0]!r} leaves out nothing; its parts are AXIS=PATTERN")
    if problems:
        more = f", and {len(problems) - 1} more like it" if len(problems) > 1 else ""
        raise UsageError(f"condition {problems[0]}{more}; leave out what cannot be with config.exclude")
    if not found:
        raise UsageError("config.exclude leaves out every condition")
    if len({c.name for c in found}) < len(found):
        raise UsageError("two conditions have one name: give recipes and layers names that differ in letters or digits")
    return found


def _check_elements(matrix: ConfigDict) -> None:
    """Raises UsageError for an element of an axis that is none of its kind."""
    kinds: dict[str, tuple[Any, str]] = {
        "seeds": (int, "whole numbers"),
        "rates": ((int, float), "numbers"),
        "optimizers": (str, "names"),
    }
    kinds["exclude"] = (str, "texts")
    for axis, (kind, called) in kinds.items():
        if wrong := [x for x in matrix[axis] if not isinstance(x, kind) or isinstance(x, bool)]:
            raise UsageError(f"config.{axis}: {wrong[0]!r} is none of the {called} that it takes")
    for seed in matrix.seeds:
        if why := seed_fault(seed, LARGEST_SEED):
            raise UsageError(f"config.seeds: {seed} {why}")


def _pairs(matrix: ConfigDict, axis: str) -> dict[str, str]:
    """((name, text), ...) as a dict, in order."""
    pairs = matrix[axis]
    if not pairs or any(not (isinstance(p, (tuple, list)) and len(p) == 2) for p in pairs):
        raise UsageError(f"config.{axis}={pairs!r} must be ((name, text), ...), one or more")
    named = {str(name): str(text) for name, text in pairs}
    if len(named) < len(pairs):
        raise UsageError(f"config.{axis} names {list(named)} more than once")
    return named


def _exclusion(text: str) -> dict[str, re.Pattern]:
    parts = dict(part.partition("=")[::2] for part in text.split())
    if not parts or (wrong := [axis for axis in parts if axis not in AXES]):
        named = f"{wrong[0]!r} is no axis" if parts else "it is empty"
        raise UsageError(f"config.exclude: {text!r}: {named}; write AXIS=PATTERN, AXIS one of {', '.join(AXES)}")
    try:
        return {axis: re.compile(pattern) for axis, pattern in parts.items()}
    except re.error as e:
        raise UsageError(f"config.exclude: {text!r} has no regular expression: {e}") from e


def _matches(parts: Mapping[str, re.Pattern], cell: Mapping[str, Any]) -> bool:
    return all(pattern.fullmatch(str(cell[axis])) for axis, pattern in parts.items())


def _configured(matrix: ConfigDict, cell: Mapping[str, Any], recipe: str, pattern: str, factor: float) -> ConfigDict:
    """The base configuration with one cell's values."""
    config = ConfigDict(matrix.base.to_dict())
    settings = matrix.optimizer_settings
    if cell["optimizer"] not in settings:
        raise UsageError(
            f"config.optimizers: {cell['optimizer']!r} has no settings; config.optimizer_settings has"
            f" {', '.join(settings)}"
        )
    config.optimizer.update(settings[cell["optimizer"]].to_dict())
    config.optimizer.learning_rate *= factor * cell["rate"]
    if cell["optimizer"] in matrix.rates_in_rungs:
        # A rung of a format with fewer mantissa bits is longer; the setting is that of a format without any.
        try:
            parsed = parse_recipe(recipe)
        except ValueError as e:
            raise UsageError(f"config.recipes: {e}") from e
        if parsed is not None:
            config.optimizer.learning_rate *= 2.0**parsed.weight.fmt.mantissa_bits
    config.precision.rules = () if recipe == PLAIN else ((pattern, recipe),)
    config.seed = cell["seed"]
    return config


def _name(matrix: ConfigDict, cell: Mapping[str, Any], with_layers: bool) -> str:
    """The folder's name: what distinguishes the condition."""
    parts = [cell["recipe"], cell["optimizer"]]
    parts += [cell["layers"]] if with_layers else []
    parts += [f"rate{cell['rate']:g}"] if len(matrix.rates) > 1 else []
    text = "-".join([*map(str, parts), f"seed{cell['seed']}"])
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text)


def command(config: ConfigDict, plain: ConfigDict) -> tuple[str, ...]:
    """The main job's command for a configuration, as differences from `plain`."""

    def differing() -> Iterator[str]:
        for key in leaves(config):
            value = get(config, key)
            if value is not None and value != get(plain, key) and key != "runtime.compilation_cache":
                yield f"--config.{key}={value}"

    return ("python", "-m", "altgrad_jax.main", f"--config={PLAIN_CONFIG}", *differing())
