"""Runs put in order for a comparison: who stands together, against what, and who stands apart and why.

A group is all seeds of one condition. Runs are compared if they agree in what `runs.MUST_AGREE` names and are as long;
one that diverged or failed is shorter, and that is its result. Of several experiments in one call the one with most
runs is compared, and the runs of the others are set apart, each with its reason.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from altgrad_jax.errors import UsageError
from altgrad_jax.report.conditions import ADAMW, ALL, PLAIN, Condition, Matrix, condition_of, printable, read_matrix
from altgrad_jax.report.runs import MUST_AGREE, Run, differences, read_run
from altgrad_jax.report.statistics import NOTHING, Paired, holm, paired

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
    """

    recipe: str
    optimizer: str
    layers: str
    variant: str
    entries: tuple[Entry, ...]

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


@dataclass(frozen=True)
class Comparison:
    """One group against another, in nats per token of the last validation loss.

    Attributes:
      group: the one.
      against: the other.
      difference: loss of `group` less loss of `against`, paired over seeds.
      p_holm: p, corrected for all comparisons of the same family.
    """

    group: Group
    against: Group
    difference: Paired
    p_holm: float = math.nan


@dataclass(frozen=True)
class Study:
    """What a report is about.

    Attributes:
      entries: every run given, in order.
      groups: those compared.
      baseline: what the others are compared with; None if there is no run to compare.
      apart: runs that are not compared, with the reasons.
      classified: runs of the classification task.
      matrices: sweeps that runs belong to.
      searches: runs of their searches for a learning rate.
    """

    entries: tuple[Entry, ...]
    groups: tuple[Group, ...]
    baseline: Group | None
    apart: tuple[tuple[Entry, tuple[str, ...]], ...]
    classified: tuple[Entry, ...]
    matrices: tuple[Matrix, ...]
    searches: tuple[Entry, ...]

    @property
    def compared(self) -> list[Entry]:
        """The runs in groups."""
        return [entry for group in self.groups for entry in group.entries]

    @property
    def seeds(self) -> int:
        """The most runs that a group has."""
        return max((len(group.entries) for group in self.groups), default=0)

    @cached_property
    def gaps(self) -> list[Comparison]:
        """Every group but the baseline against it."""
        others = [group for group in self.groups if group is not self.baseline]
        return _corrected([compare(group, self.baseline) for group in others]) if self.baseline else []

    def gap(self, group: Group) -> Paired:
        """The difference of a group to the baseline; nothing of the baseline to itself."""
        return next((c.difference for c in self.gaps if c.group is group), NOTHING)

    @cached_property
    def gains(self) -> list[Comparison]:
        """Every group with another optimizer than AdamW against AdamW with the same recipe, layers and variant."""
        plain = {group.curve: group for group in self.groups if group.optimizer == ADAMW}
        pairs = [(g, plain[g.curve]) for g in self.groups if g.optimizer != ADAMW and g.curve in plain]
        return _corrected([compare(group, adamw) for group, adamw in pairs])

    @cached_property
    def missing(self) -> list[str]:
        """Conditions that a matrix names and no run is there for."""
        there = {entry.run.path.resolve() for entry in self.entries}
        return [
            f"{name} ({what})" if what else name
            for matrix in self.matrices
            for name, what in matrix.expected.items()
            if (matrix.path / name).resolve() not in there
        ]


def shortened(names: Sequence[str], most: int = 20) -> str:
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return "; ".join(names[:most]) + more


def compare(group: Group, against: Group) -> Comparison:
    """The difference of two groups' last losses."""
    return Comparison(group, against, paired(group.final_losses, against.final_losses))


def _corrected(comparisons: Sequence[Comparison]) -> list[Comparison]:
    adjusted = holm([c.difference.p for c in comparisons])
    return [replace(c, p_holm=p) for c, p in zip(comparisons, adjusted, strict=True)]


def make_study(runs: Sequence[Run], folders: Sequence[Path], page: Path, baseline: str | None = None) -> Study:
    """Puts runs in order.

    Args:
      runs: what `read_runs` found.
      folders: where it looked: matrices and their searches are found there.
      page: the report's file, which run folders are named relative to.
      baseline: the name, curve or recipe of the group, or the name of a run in it, that others are compared with.

    Raises:
      UsageError: no group or run is called `baseline`.
    """
    root = page.resolve().parent
    matrices = tuple(m for folder in dict.fromkeys(folders) if (m := read_matrix(folder)) is not None)
    searched = [
        read_run(path)
        for matrix in matrices
        for path in sorted(p for p in (matrix.path / "search").glob("*") if (p / "manifest.json").exists())
    ]
    entries = [
        Entry(number, run, condition_of(run), os.path.relpath(run.path.resolve(), root))
        for number, run in enumerate([*runs, *searched], 1)
    ]
    entries, searches = entries[: len(runs)], entries[len(runs) :]
    classified = tuple(entry for entry in entries if is_classification(entry.run))
    models = [entry for entry in entries if entry not in classified]
    together, apart = _set_apart(models)
    groups, doubled = _grouped(together)
    chosen = _baseline(groups, baseline)
    groups.sort(key=lambda group: group is not chosen)  # the baseline first, the others as they come
    return Study(tuple(entries), tuple(groups), chosen, tuple(apart + doubled), classified, matrices, tuple(searches))


def is_classification(run: Run) -> bool:
    """Whether the run is one of the classification task."""
    config = run.manifest.get("config")
    return isinstance(config, dict) and config.get("task") == "classify"


def _set_apart(entries: Sequence[Entry]) -> tuple[list[Entry], list[tuple[Entry, tuple[str, ...]]]]:
    """(the runs that can be compared, the others with their reasons)."""
    if not entries:
        return [], []

    def experiment(entry: Entry) -> str:
        return json.dumps([entry.run.identity.get(key) for key in MUST_AGREE], sort_keys=True, default=str)

    known = [entry for entry in entries if entry.run.identity and entry.run.records] or list(entries)
    counts = Counter(map(experiment, known))
    largest = max(counts.values())
    alike = [entry for entry in known if counts[experiment(entry)] == largest]
    alike = [entry for entry in alike if experiment(entry) == experiment(alike[0])]
    ended = [entry for entry in alike if not entry.ended_badly] or alike
    reference = max(ended, key=lambda entry: entry.run.step)
    together, apart = [], []
    for entry in entries:
        reasons = [] if entry is reference else _reasons(entry, reference)
        if reasons:
            apart.append((entry, tuple(reasons)))
        else:
            together.append(entry)
    return together, apart


def _reasons(entry: Entry, reference: Entry) -> list[str]:
    if entry.ended_badly and entry.condition.stated and not entry.run.identity:
        return []  # a sweep's condition that failed before it began
    found = differences(entry.run, reference.run)
    if not entry.run.records:
        found = ["no step was logged", *found] if not entry.ended_badly else found
    return [text for text in found if not (entry.ended_badly and text.startswith("steps:"))]


def _grouped(entries: Sequence[Entry]) -> tuple[list[Group], list[tuple[Entry, tuple[str, ...]]]]:
    """Groups in the order of their first runs; a second run of the same condition and seed is set apart."""
    buckets: dict[tuple[str, str, str], list[Entry]] = {}
    for entry in entries:
        c = entry.condition
        buckets.setdefault((c.recipe, c.optimizer, c.layers), []).append(entry)
    groups: list[Group] = []
    doubled: list[tuple[Entry, tuple[str, ...]]] = []
    for (recipe, optimizer, layers), found in buckets.items():
        for variant, alike in _variants(found).items():
            first: dict[int, Entry] = {}
            for entry in alike:
                if (same := first.setdefault(entry.seed, entry)) is not entry:
                    doubled.append((entry, (f"the condition and seed of run {same.number}, which is used",)))
            groups.append(Group(recipe, optimizer, layers, variant, tuple(first[seed] for seed in sorted(first))))
    return groups, doubled


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
        found.setdefault(printable(", ".join(shown)), []).append(entry)
    return found


def _baseline(groups: Sequence[Group], name: str | None) -> Group | None:
    if not groups:
        return None
    if name is None:
        plain = [group for group in groups if group.recipe == PLAIN]
        return next((group for group in plain if group.optimizer == ADAMW), (plain or list(groups))[0])
    by_group = [group for group in groups if name in (group.name, group.curve, group.recipe)]
    by_run = [group for group in groups if any(name == entry.run.name for entry in group.entries)]
    found = [group for group in by_group if group.optimizer == ADAMW] or by_group or by_run
    if not found:
        raise UsageError(f"--baseline={name}: no group or run has this name; there are {_named(groups)}")
    return found[0]


def _named(groups: Sequence[Group]) -> str:
    return shortened([f'"{group.name}"' for group in groups], 12)
