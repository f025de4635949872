"""Which settings of an optimizer go together, and with which precision rules."""

from collections.abc import Iterator

from ml_collections import ConfigDict

from altgrad_jax.optimizers.factory import KEEP_TO_GRIDS, OPTIONS, OWN_OPTIONS, needs_formats
from altgrad_jax.precision.policy import parse_rule
from altgrad_jax.precision.recipes import Recipe

DEFAULTS = {
    "placement": "after",
    "form": "relative",
    "max_stiffness": 1e6,
    "momentum": 0.9,
    "rung_clip": 10.0,
    "update_clip": 10.0,
    "max_scale": 3.0,
    "other_learning_rate": 6e-4,
    "weights": "float32",
    "moments": "float32",
}


def optimizer_violations(config: ConfigDict) -> Iterator[str]:
    """Every contradiction, each in one sentence with the way out."""
    optimizer = config.optimizer
    if optimizer.name not in OPTIONS:
        return  # reported as an unknown name
    for key in OWN_OPTIONS:
        if optimizer[key] != DEFAULTS[key] and key not in OPTIONS[optimizer.name]:
            owners = ", ".join(name for name, keys in OPTIONS.items() if key in keys)
            yield (
                f"config.optimizer.{key}={optimizer[key]!r} does nothing with config.optimizer.name={optimizer.name};"
                f" it is an option of {owners}"
            )
    recipes = _recipes(config)
    if needs_formats(optimizer) and recipes is not None and not recipes:
        yield (
            f"config.optimizer.name={optimizer.name} works on the grids of quantised weights, and"
            " config.precision.rules quantises none; choose a format, such as --config=configs/format.py:e3m4, or"
            " another optimizer"
        )
    yield from _storage_violations(optimizer, recipes or [])


def _storage_violations(optimizer: ConfigDict, recipes: list[Recipe]) -> Iterator[str]:
    if optimizer.name == "adamw_sr" and optimizer.weights == "float32":
        yield (
            "config.optimizer.name=adamw_sr keeps no float32 weights:"
            " set config.optimizer.weights to bfloat16 or format"
        )
    if optimizer.name == "grid" and optimizer.weights == "bfloat16":
        yield "config.optimizer.name=grid keeps weights in their formats: config.optimizer.weights=float32 or format"
    if optimizer.name not in KEEP_TO_GRIDS or optimizer.weights == "bfloat16":
        return
    for recipe in recipes:
        role = recipe.weight
        if not role.per_tensor:
            yield (
                f"config.optimizer.name={optimizer.name} needs one scale for each weight; the weights of recipe"
                f" {recipe.name!r} have several"
            )
        elif role.scaling in ("current", "delayed") and not role.pow2:
            yield (
                f"config.optimizer.name={optimizer.name} keeps weights on a grid, which scales that are no powers of"
                f" two would leave in every step: write the recipe as '{recipe.name} w.pow2=1'"
            )
        if optimizer.weights == "format" and role.fmt.bits > 16:
            yield f"config.optimizer.weights=format stores formats of up to 16 bits, not {role.fmt.name}"


def _recipes(config: ConfigDict) -> list[Recipe] | None:
    """The recipes that quantise something; None where the rules are malformed, which is reported elsewhere."""
    try:
        found = [parse_rule(rule)[1] for rule in config.precision.rules]
    except ValueError:
        return None
    return [recipe for recipe in found if recipe is not None]
