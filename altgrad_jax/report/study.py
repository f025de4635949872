"""Runs put in order for a comparison: who stands together, against what, and who stands apart and why.

A group is all seeds of one condition. Runs are compared if they agree in what `runs.MUST_AGREE` names and are as long;
one that diverged or failed is shorter, and that is its result. Of several experiments in one call the one with most
runs is compared, and the runs of the others are set apart, each with its reason. What is one experiment under two names
(`aliases`) is one group.
"""

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from altgrad_jax.errors import UsageError
from altgrad_jax.report.conditions import ADAMW, PLAIN, Matrix, condition_of, read_matrix
from altgrad_jax.report.groups import Apart, Entry, Group, grouped, merged, shortened
from altgrad_jax.report.runs import MUST_AGREE, Run, differences, read_run, visible
from altgrad_jax.report.statistics import MARGIN, NOTHING, Paired, Tested, decide, shared_differences

LOST = "lost"


@dataclass(frozen=True)
class Comparison:
    """One group against another, in nats per token of the last validation loss.

    Attributes:
      group: the one.
      against: the other.
      tested: loss of `group` less loss of `against`, paired over seeds, with its tests.
    """

    group: Group
    against: Group
    tested: Tested

    @property
    def difference(self) -> Paired:
        """The mean difference and its interval."""
        return self.tested.found

    @property
    def p_holm(self) -> float:
        """p of the difference, corrected for the family."""
        return self.tested.p

    @property
    def words(self) -> str:
        """What the tests say; a group that lost runs was not tested: those that are left are the lucky ones."""
        lost, n = self.group.lost, len(self.group.entries)
        return f"{lost} of {n} lost" if lost else self.tested.words

    @property
    def verdict(self) -> str:
        """The same as one word; LOST of a group that lost runs."""
        return LOST if self.group.lost else self.tested.verdict


@dataclass(frozen=True)
class Study:
    """What a report is about.

    Attributes:
      entries: every run given, in order.
      groups: those compared.
      baseline: what the others are compared with; None if there is no run to compare.
      apart: runs that cannot be compared, with the reasons.
      again: runs that could be, of a condition and seed that another run stands for, likewise.
      classified: runs of the classification task.
      matrices: sweeps that runs belong to.
      searches: runs of their searches for a learning rate.
      merged: sentences about conditions with several names, of which one is shown.
      margin: nats per token within which two conditions are as good as equal.
    """

    entries: tuple[Entry, ...]
    groups: tuple[Group, ...]
    baseline: Group | None
    apart: tuple[tuple[Entry, tuple[str, ...]], ...]
    again: tuple[tuple[Entry, tuple[str, ...]], ...]
    classified: tuple[Entry, ...]
    matrices: tuple[Matrix, ...]
    searches: tuple[Entry, ...]
    merged: tuple[str, ...] = ()
    margin: float = MARGIN

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
        """Every group but the baseline against it; those with one optimizer are a family of tests."""
        if self.baseline is None:
            return []
        families: dict[str, list[tuple[Group, Group]]] = {}
        for group in self.groups:
            if group is not self.baseline:
                families.setdefault(group.optimizer, []).append((group, self.baseline))
        found = {id(c.group): c for pairs in families.values() for c in compare(pairs, self.margin)}
        return [found[id(group)] for group in self.groups if id(group) in found]

    def gap(self, group: Group) -> Paired:
        """The difference of a group to the baseline; nothing of the baseline to itself."""
        found = self.comparison(group)
        return found.difference if found else NOTHING

    def comparison(self, group: Group) -> Comparison | None:
        """Of a group with the baseline; None of the baseline."""
        return next((c for c in self.gaps if c.group is group), None)

    @cached_property
    def gains(self) -> list[Comparison]:
        """Every group with another optimizer than AdamW against AdamW in the same curve; all are one family."""
        plain = {group.curve: group for group in self.groups if group.optimizer == ADAMW}
        pairs = [(g, plain[g.curve]) for g in self.groups if g.optimizer != ADAMW and g.curve in plain]
        return compare(pairs, self.margin)

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


def compare(pairs: Sequence[tuple[Group, Group]], margin: float = MARGIN) -> list[Comparison]:
    """The differences of groups' last losses, tested as one family."""
    tested = decide([shared_differences(one.final_losses, other.final_losses) for one, other in pairs], margin)
    return [Comparison(*pair, found) for pair, found in zip(pairs, tested, strict=True)]


def make_study(
    runs: Sequence[Run],
    folders: Sequence[Path],
    page: Path,
    baseline: str | None = None,
    margin: float = MARGIN,
    first: bool = False,
) -> Study:
    """Puts runs in order.

    Args:
      runs: what `read_runs` found.
      folders: where it looked: matrices and their searches are found there.
      page: the report's file, which run folders are named relative to.
      baseline: the name, curve or recipe of the group, or the name of a run in it, that others are compared with.
      margin: nats per token within which two conditions are as good as equal.
      first: the first run's group is what others are compared with, whatever the others are; of one task, any.

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
        Entry(number, run, condition_of(run), visible(os.path.relpath(run.path.resolve(), root)))
        for number, run in enumerate([*runs, *searched], 1)
    ]
    entries, searches = entries[: len(runs)], entries[len(runs) :]
    classified = () if first else tuple(entry for entry in entries if is_classification(entry.run))
    models = [entry for entry in entries if entry not in classified]
    together, apart = _set_apart(models, models[0] if first and models else None)
    groups, doubled, renamed = grouped(together)
    groups, twins, coincided = merged(groups)
    chosen = groups[0] if first and groups else _baseline(groups, baseline)
    groups.sort(key=lambda group: group is not chosen)  # the baseline first, the others as they come
    return Study(
        tuple(entries), tuple(groups), chosen, tuple(apart), tuple(doubled + twins), classified, matrices,
        tuple(searches), (*renamed, *coincided), margin,
    )  # fmt: skip


def is_classification(run: Run) -> bool:
    """Whether the run is one of the classification task."""
    config = run.manifest.get("config")
    return isinstance(config, dict) and config.get("task") == "classify"


def _set_apart(entries: Sequence[Entry], reference: Entry | None) -> tuple[list[Entry], Apart]:
    """(the runs that can be compared, the others with their reasons).

    Compared with `reference`; if None, with the longest of the experiment with most runs.
    """
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
    reference = reference or max(ended, key=lambda entry: entry.run.step)
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


def _baseline(groups: Sequence[Group], name: str | None) -> Group | None:
    if not groups:
        return None
    if name is None:
        plain = [group for group in groups if group.recipe == PLAIN]
        return next((group for group in plain if group.optimizer == ADAMW), (plain or list(groups))[0])
    by_group = [group for group in groups if name in (group.name, group.curve, group.recipe, *group.also)]
    by_run = [group for group in groups if any(name == entry.run.name for entry in group.entries)]
    found = [group for group in by_group if group.optimizer == ADAMW] or by_group or by_run
    if not found:
        raise UsageError(f"--baseline={name}: no group or run has this name; there are {_named(groups)}")
    return found[0]


def _named(groups: Sequence[Group]) -> str:
    return shortened([f'"{group.name}"' for group in groups], 12)
