"""Which experiment a run is: its format, its optimizer, its seed; and what a matrix of them was to hold.

A sweep writes a run's condition into its manifest. Of any other run it is read from the configuration.
"""

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from altgrad_jax import files
from altgrad_jax.errors import UserError
from altgrad_jax.report.aliases import arithmetic
from altgrad_jax.report.runs import Run, cleaned, is_number, visible

PLAIN = "bf16"  # the recipe of a run without rules
ADAMW = "adamw"
EVERY_LAYER = r"blocks\..*|lm_head"  # the pattern that configs/format.py writes
ALL = "all"


@dataclass(frozen=True)
class Condition:
    """What a run tries.

    Attributes:
      recipe: its name: that of the sweep, else the recipe itself; "bf16" or "float32" without rules.
      text: the recipe of the layers under test, as `parse_recipe` reads it.
      optimizer: its short name, as configs/optimizer.py has it.
      layers: "all", or the pattern or name of those under test.
      seed: of weights and data; None if it is not known.
      learning_rate: NaN if it is not known.
      factor: on the optimizer's usual rate, as a search tries them; NaN likewise.
      together: how many conditions ran in one program; of more than 1, tokens/s is not that of a run alone.
      stated: whether a sweep wrote it.
    """

    recipe: str
    text: str
    optimizer: str
    layers: str
    seed: int | None
    learning_rate: float
    factor: float
    together: int
    stated: bool

    @property
    def arithmetic(self) -> Hashable:
        """Equal for conditions that round alike, however their recipes are spelt or called."""
        return arithmetic(self.text)


def condition_of(run: Run) -> Condition:
    """The condition that the sweep wrote, completed by what the configuration says."""
    config = _object(run.manifest.get("config"))
    stated = _object(run.manifest.get("condition"))
    recipe, layers = _recipe(config) if config else (f"unknown ({run.name})", ALL)
    seed = stated.get("seed", config.get("seed", run.identity.get("seed")))
    rate = stated.get("learning_rate", _object(config.get("optimizer")).get("learning_rate"))
    together, factor = stated.get("together", 1), stated.get("rate")
    return Condition(
        recipe=_text(stated.get("recipe"), recipe),
        text=recipe if config else _text(stated.get("recipe"), recipe),
        optimizer=_text(stated.get("optimizer"), optimizer_name(_object(config.get("optimizer")))),
        layers=_text(stated.get("layers"), layers),
        seed=seed if type(seed) is int else None,
        learning_rate=float(rate) if is_number(rate) else math.nan,
        factor=float(factor) if is_number(factor) else math.nan,
        together=together if type(together) is int and together > 0 else 1,
        stated=bool(stated),
    )


def optimizer_name(settings: Mapping[str, Any]) -> str:
    """configs/optimizer.py's name of `config.optimizer`; "unknown" without one."""
    name = _text(settings.get("name"), "unknown")
    if name == "manifold_adamw":
        placement = _text(settings.get("placement"), "after")
        return _text(settings.get("form"), "relative") if placement == "after" else placement
    return "sr" if name == "adamw_sr" else name


def _recipe(config: Mapping[str, Any]) -> tuple[str, str]:
    """(recipe, layers) of `config.precision`."""
    precision = config.get("precision")
    if not isinstance(precision, dict):
        return "unknown", ALL
    rules = precision.get("rules") or []
    rules = rules if isinstance(rules, list) else []
    pairs = [(str(r[0]), str(r[1])) for r in rules if isinstance(r, list) and len(r) == 2]
    if all(recipe.lower() in (PLAIN, "bfloat16") for _, recipe in pairs):
        return (PLAIN if precision.get("compute", "bfloat16") == "bfloat16" else str(precision["compute"])), ALL
    if len(pairs) == 1:
        pattern, recipe = pairs[0]
        return recipe, ALL if pattern == EVERY_LAYER else pattern
    return " + ".join(dict.fromkeys(recipe for _, recipe in pairs)), "; ".join(f"{p}: {r}" for p, r in pairs)


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: Any, otherwise: str) -> str:
    return str(value) if isinstance(value, (str, int, float)) and str(value) else otherwise


@dataclass(frozen=True)
class Matrix:
    """What a sweep set out to do.

    Attributes:
      path: its folder.
      name: of the matrix.
      question: what it asks; "" if it does not say.
      command: that started it, "" likewise.
      expected: folder -> its condition in words, of every condition.
      notes: what the search for learning rates says of its choice.
      problems: what is wrong with matrix.json.
    """

    path: Path
    name: str
    question: str
    command: str
    expected: dict[str, str]
    notes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()


def read_matrix(path: Path) -> Matrix | None:
    """matrix.json of a folder; None if there is none."""
    file = path / "matrix.json"
    if not file.exists():
        return None
    found, problem = _read(file)
    if problem:
        return Matrix(path, visible(path.name), "", "", {}, problems=(problem,))
    notes = _read(path / "search" / "rates.json")[0].get("notes")
    conditions = found.get("conditions")
    expected = {
        str(c["name"]): ", ".join(f"{key} {c[key]}" for key in ("recipe", "optimizer", "layers", "seed") if key in c)
        for c in (conditions if isinstance(conditions, list) else [])
        if isinstance(c, dict) and "name" in c
    }
    command = found.get("command")
    text = " ".join(map(str, command)) if isinstance(command, list) else _text(command, "")
    name, question = _text(found.get("name"), visible(path.name)), _text(found.get("question"), "")
    said = tuple(map(str, notes)) if isinstance(notes, list) else ()
    return Matrix(path, name, question, text, expected, said)


def _read(file: Path) -> tuple[dict[str, Any], str]:
    """(the object in a JSON file, what is wrong with it)."""
    try:
        return cleaned(files.read_json(file, way_out="it is left out") or {}), ""
    except UserError as e:
        return {}, visible(str(e))
