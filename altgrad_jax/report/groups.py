"""Runs that belong together: all seeds of one condition, under one name where it has several."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from altgrad_jax.report.aliases import may_coincide
from altgrad_jax.report.conditions import ALL, Condition
from altgrad_jax.report.runs import MUST_AGREE, Run, is_number

ENDED_BADLY = ("diverged", "failed")
# Of the identity, what makes no condition of its own: the seed, what must agree, where and how the step is computed.
NO_CONDITION = (
    *MUST_AGREE,
    "seed",
    "diagnostics.questions",
    "train.loss_chunk",
    "train.remat",
    "train.steps_per_dispatch",
    "model.attention",
)


@dataclass(frozen=True)
class Entry:
    """A run with its number in the report and its condition.

    Attributes:
      number: from 1, in the list of runs.
      run: its records.
      condition: what it tries.
      where: its folder, relative to the report.
    """

    number: int
    run: Run
    condition: Condition
    where: str

    @property
    def seed(self) -> int:
        """Its seed; of an unknown one a number of its own below zero, which no other run shares."""
        return self.condition.seed if self.condition.seed is not None else -self.number

    @property
    def ended_badly(self) -> bool:
        """Whether it diverged or failed."""
        return self.run.status in ENDED_BADLY

    @property
    def final_loss(self) -> float:
        """Its last validation loss; NaN if it diverged or failed, whatever it was before."""
        return math.nan if self.ended_badly else self.run.last("val/loss")


@dataclass(frozen=True)
class Group:
    """All seeds of one condition.

    Attributes:
      recipe, optimizer, layers: of the condition.
      variant: what else sets it off from a group with the same three; "" if nothing.
      entries: a run a seed.
      also: other names of the recipe.
    """

    recipe: str
    optimizer: str
    layers: str
    variant: str
    entries: tuple[Entry, ...]
    also: tuple[str, ...] = ()

    @property
    def curve(self) -> str:
        """The condition without its optimizer."""
        parts = (self.recipe, "" if self.layers == ALL else f"in {self.layers}", self.variant)
        return ", ".join(part for part in parts if part)

    @property
    def name(self) -> str:
        """The condition in words."""
        return f"{self.curve}, {self.optimizer}"

    @property
    def text(self) -> str:
        """The recipe behind the name."""
        return self.entries[0].condition.text

    @cached_property
    def final_losses(self) -> dict[int, float]:
        """Seed -> last validation loss, of the runs that have one."""
        found = {entry.seed: entry.final_loss for entry in self.entries}
        return {seed: loss for seed, loss in found.items() if math.isfinite(loss)}

    @property
    def lost(self) -> int:
        """How many of its runs have no finite last loss."""
        return len(self.entries) - len(self.final_losses)

    @property
    def status(self) -> str:
        """ "finished" if all did, else how many ended how."""
        counts = Counter(entry.run.status for entry in self.entries)
        return next(iter(counts)) if len(counts) == 1 else ", ".join(f"{n} {s}" for s, n in sorted(counts.items()))

    def seed_mean(self, values: Iterable[float]) -> float:
        """Mean of the values that are numbers; NaN without one."""
        good = [value for value in values if math.isfinite(value)]
        return sum(good) / len(good) if good else math.nan


Apart = list[tuple[Entry, tuple[str, ...]]]


def shortened(names: Sequence[str], most: int = 20) -> str:
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return "; ".join(names[:most]) + more


def grouped(entries: Sequence[Entry]) -> tuple[list[Group], Apart, list[str]]:
    """(groups in the order of their first runs, second runs of a condition and seed, what has several names)."""
    buckets: dict[tuple, list[Entry]] = {}
    for entry in entries:
        c = entry.condition
        buckets.setdefault((c.arithmetic, c.optimizer, c.layers), []).append(entry)
    groups: list[Group] = []
    doubled: Apart = []
    renamed: list[str] = []
    for (_, optimizer, layers), found in buckets.items():
        names = list(dict.fromkeys(entry.condition.recipe for entry in found))
        recipe = min(names, key=len)
        others = [name for name in names if name != recipe]
        if others:
            renamed.append(f"{shortened(others)}: the same arithmetic as {recipe}, and shown as that.")
        for variant, alike in _variants(found).items():
            first: dict[int, Entry] = {}
            for entry in alike:
                if (same := first.setdefault(entry.seed, entry)) is not entry:
                    doubled.append((entry, (f"the condition and seed of run {same.number}, which is used",)))
            runs = tuple(first[seed] for seed in sorted(first))
            groups.append(Group(recipe, optimizer, layers, variant, runs, tuple(others)))
    return groups, doubled, list(dict.fromkeys(renamed))


def merged(groups: Sequence[Group]) -> tuple[list[Group], Apart, list[str]]:
    """(groups without those that were another experiment again, their runs, what has several names).

    That is so where two formats may coincide and all losses of all optimizers and seeds do, to the last digit.
    """
    curves: dict[str, dict[str, Group]] = {}
    for group in groups:
        curves.setdefault(group.curve, {})[group.optimizer] = group
    kept: list[dict[str, Group]] = []
    apart: Apart = []
    notes: list[str] = []
    for of_curve in curves.values():
        twin = next((known for known in kept if _coincide(known, of_curve)), None)
        if twin is None:
            kept.append(of_curve)
            continue
        for optimizer, group in of_curve.items():
            used = twin[optimizer]
            twin[optimizer] = replace(used, also=(*used.also, group.recipe, *group.also))
            same = {entry.seed: entry.number for entry in used.entries}
            apart += [
                (e, (f"the losses of run {same[e.seed]}, which is used, to the last digit",)) for e in group.entries
            ]
        one, other = next(iter(twin.values())), next(iter(of_curve.values()))
        notes.append(
            f"{other.curve} is {one.curve} here: all losses of all seeds are equal to the last digit. It is one"
            f" experiment under two names, shown as {one.curve}."
        )
    order = {(of.curve, of.optimizer): place for place, of in enumerate(groups)}
    found = [group for of_curve in kept for group in of_curve.values()]
    return sorted(found, key=lambda group: order[group.curve, group.optimizer]), apart, notes


def _coincide(one: dict[str, Group], other: dict[str, Group]) -> bool:
    if one.keys() != other.keys() or not all(may_coincide(one[o].text, other[o].text) for o in one):
        return False
    return all(_losses(one[o]) == _losses(other[o]) != {} for o in one)


def _losses(group: Group) -> dict[int, list[tuple[int, float]]]:
    """Seed -> (step, validation loss) of every evaluation after step 0, finite ones."""
    found = {
        entry.seed: [
            (r["step"], r["val/loss"]) for r in entry.run.records if r["step"] and is_number(r.get("val/loss"))
        ]
        for entry in group.entries
    }
    return {seed: losses for seed, losses in found.items() if losses and math.isfinite(losses[-1][1])}


def _variants(entries: Sequence[Entry]) -> dict[str, list[Entry]]:
    """The runs of a condition by what else differs between them: "learning_rate 0.003"."""

    def value(entry: Entry, key: str) -> str:
        return json.dumps(entry.run.identity.get(key), default=str)

    keys = sorted({key for entry in entries for key in entry.run.identity})
    keys = [key for key in keys if key not in NO_CONDITION and not key.startswith("precision.layers.")]
    differing = [key for key in keys if len({value(entry, key) for entry in entries if entry.run.identity}) > 1]
    found: dict[str, list[Entry]] = {}
    for entry in entries:
        shown = [f"{key.rpartition('.')[2]} {entry.run.identity.get(key, 'unknown')}" for key in differing]
        found.setdefault(", ".join(shown), []).append(entry)
    return found
