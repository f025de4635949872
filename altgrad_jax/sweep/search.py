"""The learning rate of each optimizer, by a small declared search, so that none is judged at another's.

For every optimizer of the matrix, `config.search` names factors on its learning rate, recipes and seeds to try them
with. The factor with the lowest mean validation loss is taken, for all formats alike; one that diverged, or failed,
anywhere is out. Where the best is the first or the last factor tried, the range was too narrow, and that is said.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from altgrad_jax.errors import UsageError, UserError
from altgrad_jax.sweep.matrix import Condition, conditions
from altgrad_jax.sweep.requests import read_summary


def search_conditions(matrix: ConfigDict, plain: ConfigDict) -> list[Condition]:
    """The conditions of the search; none where no factors are given.

    Raises:
      UsageError: a factor, recipe or seed of the search cannot be used.
    """
    search = matrix.search
    if not search.factors:
        return []
    if any(not isinstance(factor, (int, float)) or not factor > 0 for factor in search.factors):
        raise UsageError(f"config.search.factors={tuple(search.factors)} must be numbers above 0")
    if both := sorted(set(search.seeds) & set(matrix.seeds)):
        raise UsageError(
            f"config.search.seeds: {both[0]} is also among config.seeds; a rate must not be chosen on the data that it"
            " is judged by"
        )
    recipes = [pair for pair in matrix.recipes if pair[0] in search.recipes]
    if missing := sorted(set(search.recipes) - {pair[0] for pair in matrix.recipes}):
        raise UsageError(f"config.search.recipes: {missing[0]!r} is none of config.recipes")
    if not recipes or not search.seeds:
        raise UsageError("config.search has factors, and needs recipes and seeds to try them with")
    trial = ConfigDict(matrix.to_dict())
    trial.update(recipes=tuple(recipes), seeds=search.seeds, rates=search.factors, layers=matrix.layers[:1])
    trial.exclude = tuple(text for text in matrix.exclude if _concerns(text, trial))
    return conditions(trial, plain)


def _concerns(text: str, trial: ConfigDict) -> bool:
    """Whether an exclusion is one of the search's: rates and seeds are its own, and what matches none is refused."""
    if any(part.startswith(("rate=", "seed=")) for part in text.split()):
        return False
    try:
        conditions(ConfigDict(trial.to_dict() | {"exclude": (text,)}), ConfigDict(trial.base.to_dict()))
    except UsageError as e:
        return "leaves out nothing" not in str(e)
    return True


def choose(tried: Sequence[Condition], folder: Path, optimizers: Sequence[str] = ()) -> dict[str, Any]:
    """What the search found: rates.json's content. Of `optimizers` it says which it has not tried.

    Returns:
      `factors` (optimizer -> the factor chosen), `tried` (optimizer -> factor -> mean validation loss, null for one
      that did not finish everywhere), `notes` (for people).

    Raises:
      UserError: an optimizer finished with no factor.
    """
    losses: dict[str, dict[float, list[float]]] = {}
    for condition in tried:
        summary = read_summary(folder / condition.name) or {}
        loss = summary.get("final", {}).get("val/loss")
        usable = summary.get("status") == "finished" and isinstance(loss, float)
        of_optimizer = losses.setdefault(condition.facts["optimizer"], {})
        of_optimizer.setdefault(condition.facts["rate"], []).append(loss if usable else math.inf)
    factors: dict[str, float] = {}
    notes = [f"{name} was not tried: its learning rate is the one given" for name in optimizers if name not in losses]
    table = {}
    for optimizer, of_factors in losses.items():
        means = {factor: sum(values) / len(values) for factor, values in sorted(of_factors.items())}
        best = min(means, key=lambda factor: means[factor])
        if not math.isfinite(means[best]):
            raise UserError(
                f"the search in {folder}: {optimizer} finished with no learning rate; see the logs in"
                f" {folder / 'groups'}, and choose others in config.search.factors"
            )
        factors[optimizer] = best
        table[optimizer] = {f"{factor:g}": loss if math.isfinite(loss) else None for factor, loss in means.items()}
        if len(means) > 2 and best in (min(means), max(means)):
            notes.append(f"{optimizer}: the best factor, {best:g}, is at the end of those tried")
    return {"factors": factors, "tried": table, "notes": notes}
