"""Optimizers that know the grid of the weights, beside AdamW, in any format.

    python -m altgrad_jax.main --config=configs/optimizer.py:relative,e3m4         # 2000 steps, 30 M parameters
    python -m altgrad_jax.main --config=configs/optimizer.py:grid,e5m2,quick       # 300 steps, minutes on 2 CPU cores

OPTIMIZER,RECIPE[,quick]. Optimizers: adamw; manifold_adamw with its stiffness before the moments (`before`), after them
(`relative`) or in ulps (`ulps`); `grid`; `madam`; `sr`, AdamW on weights stored in the format with moments in 8 bits.
Weights are scaled by powers of two in all of them, as `grid` and `sr` need it, so that conditions differ in the
optimizer alone. See docs/optimizers.md.

Expect: docs/results/optimizers.md has the losses measured. The learning rates are those found there with the quick
variant; for the full size AdamW's and the manifold's are scaled as the baseline's are, and none has been measured.
"""

from altgrad_jax.config import load_sibling
from altgrad_jax.precision.recipes import parse_recipe

# name -> (settings, learning rate of the quick variant, of the full one)
OPTIMIZERS = {
    "adamw": ({"name": "adamw"}, 3e-3, 6e-4),
    "before": ({"name": "manifold_adamw", "placement": "before"}, 3e-3, 6e-4),
    "relative": ({"name": "manifold_adamw", "placement": "after", "form": "relative"}, 3e-3, 6e-4),
    "ulps": ({"name": "manifold_adamw", "placement": "after", "form": "ulps"}, 0.3, 0.1),
    "grid": ({"name": "grid"}, 4.0, 4.0),
    "madam": ({"name": "madam"}, 0.1, 0.03),
    "sr": ({"name": "adamw_sr", "weights": "format", "moments": "8bit"}, 3e-3, 6e-4),
}
IN_RUNGS = ("ulps", "grid")  # their rates count rungs, and are given here for a format without mantissa bits
WITH_OTHERS = ("ulps", "grid", "madam")  # some parameters are AdamW's


def _mantissa_bits(text: str) -> int:
    recipe = parse_recipe(text)
    if recipe is None:
        raise ValueError(f"{text} quantises no weight; name a format or a recipe that does")
    return recipe.weight.fmt.mantissa_bits


def get_config(argument: str = ""):
    """The baseline with this optimizer and recipe."""
    name, _, rest = argument.partition(",")
    recipe, quick = rest.removesuffix(",quick"), rest.endswith(",quick")
    if name not in OPTIMIZERS or not recipe or recipe == "quick":
        raise ValueError(f"give OPTIMIZER,RECIPE after the colon, OPTIMIZER one of {', '.join(OPTIMIZERS)}")
    config = load_sibling(__file__, "base").get_config("quick" if quick else "")
    settings, small_rate, full_rate = OPTIMIZERS[name]
    if name in WITH_OTHERS:
        config.optimizer.other_learning_rate = config.optimizer.learning_rate
    config.optimizer.update(settings)
    config.optimizer.learning_rate = small_rate if quick else full_rate
    if name in IN_RUNGS:  # a rung of a format with fewer mantissa bits is longer
        config.optimizer.learning_rate *= 2.0 ** _mantissa_bits(recipe)
    config.precision.rules = ((r"blocks\..*|lm_head", f"{recipe} w.pow2=1"),)
    config.tracking.name = "-".join([name, recipe.replace(" ", "-"), *(["quick"] if quick else [])])
    config.tracking.tags = ("optimizer", name, recipe.split()[0])
    return config
