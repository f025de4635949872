"""The answer in three sentences, by rule from the numbers: the formats, the optimizers, what failed first.

No sentence says more than a test does. A difference is called one only if its Holm-corrected p is below 0.05, two
conditions are called equivalent only if the test of that says so, and the rest is not decided. Without seeds to test,
it is what one run showed.
"""

import math
from collections import Counter
from collections.abc import Sequence

from altgrad_jax.report.cells import interval
from altgrad_jax.report.failures import run_failures
from altgrad_jax.report.statistics import BETTER, EQUIVALENT, UNDECIDED, WORSE, Paired
from altgrad_jax.report.study import LOST, Comparison, Study

WORDS = {
    "spoilt": "an infinity or NaN that comes into the {role}",
    "nan": "a NaN in the {role}",
    "overflow": "overflow of the {role}",
    "underflow": "underflow of the {role} (by what it loses)",
    "gradient": "the direction of a layer's gradient",
    "stall": "updates that move no rounded weight",
    "rank": "the collapse of a matrix into few directions",
    "blow-up": "an update as long as a third of its weights",
    "loss": "a loss that is not finite",
}
QUESTION = "What do these runs' number formats and optimizers do to the loss, and where does each format fail first?"


def question(study: Study) -> str:
    """The matrices' questions; a general one without."""
    asked = list(dict.fromkeys(m.question for m in study.matrices if m.question))
    return " ".join(asked) or QUESTION


def answer(study: Study) -> list[str]:
    """Three sentences."""
    if study.baseline is None:
        return [
            "There is no run whose loss can be compared.",
            "So nothing can be said about optimizers either.",
            "What is missing is listed below.",
        ]
    return [_formats(study), _optimizers(study), _failures(study)]


def seeds_clause(study: Study) -> str:
    """What the number of seeds allows."""
    if study.seeds <= 1:
        return "with one seed a condition, no difference can be told from chance"
    counts = sorted({c.difference.n for c in study.gaps if c.difference.n > 1})
    if not counts:
        return "no two seeds are shared with the baseline, so no difference can be told from chance"
    n = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"95 % intervals, paired over {n} seeds"


def _shown(found: Paired) -> str:
    mean = format(found.mean, "+.4f").replace("-", "−")
    return f"{mean} {interval(found)}" if found.has_interval else mean


def _formats(study: Study) -> str:
    assert study.baseline is not None
    base, optimizer = study.baseline, study.baseline.optimizer
    same = [c for c in study.gaps if c.group.optimizer == optimizer] or study.gaps
    if not same:
        return f"Only one condition was run ({base.name}), so there is nothing to compare it with."
    scope = f"with {optimizer}" if all(c.group.optimizer == optimizer for c in same) else "over all optimizers"
    lost = [c for c in same if math.isnan(c.difference.mean)]
    measured = sorted((c for c in same if not math.isnan(c.difference.mean)), key=lambda c: c.difference.mean)
    parts = []
    if measured:
        near, far = measured[0], measured[-1]
        label = near.group.curve if same is not study.gaps else near.group.name
        lead = f"the lowest last loss is that of {label}, {_shown(near.difference)} nats per token from {base.name}"
        if far is not near:
            label = far.group.curve if same is not study.gaps else far.group.name
            lead += f", the highest that of {label}, {_shown(far.difference)}"
        parts.append(lead)
        parts += _decided(same, study.margin, by_curve=same is not study.gaps)
    if lost:
        parts.append(f"no final loss to compare {_has(lost)} {_list([c.group.name for c in lost])}")
    parts.append(seeds_clause(study))
    return _sentence(f"{scope}, {parts[0]}", *parts[1:])


def _optimizers(study: Study) -> str:
    if not study.gains:
        return "No optimizer can be set against AdamW in the same format: the runs have one optimizer, or no AdamW."
    gains = [c for c in study.gains if not math.isnan(c.difference.mean)]
    if not gains:
        return "No optimizer can be set against AdamW in the same format: no pair has losses to compare."
    best = min(gains, key=lambda c: c.difference.mean)
    large = f"{best.group.optimizer} in {best.group.curve}, by {_shown(best.difference.reversed)} nats"
    tested = _decided(study.gains, study.margin)
    if not tested:
        return _sentence(
            f"of {len(gains)} comparisons with AdamW in the same format the best for another optimizer is {large}",
            "which one seed cannot tell from chance",
        )
    return _sentence("of other optimizers against AdamW in the same format", *tested, f"the largest gain is {large}")


def _decided(comparisons: Sequence[Comparison], margin: float, by_curve: bool = False) -> list[str]:
    """What the tests say of each: ["worse: a, b", ..., "7 comparisons, Holm-corrected"]; nothing if none was tested."""
    tested = [c for c in comparisons if c.tested.family and not math.isnan(c.tested.p)]
    if not tested:
        return []
    words = {
        WORSE: "worse", BETTER: "better", EQUIVALENT: f"equivalent within {margin:g} nats", UNDECIDED: "not decided",
        LOST: "with lost runs, so not judged",
    }  # fmt: skip
    parts = []
    for verdict, word in words.items():
        named = [c.group.curve if by_curve else c.group.name for c in tested if c.verdict == verdict]
        if named:
            parts.append(f"{word} ({len(named)}): {_list(named, 8)}")
    sizes = sorted({c.tested.family for c in tested})
    of = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    return [*parts, f"Holm-corrected for {of} different comparisons"]


def _failures(study: Study) -> str:
    firsts = [(entry, found[0]) for entry in study.compared if (found := run_failures(entry.run))]
    ended = [entry for entry in study.compared if entry.ended_badly]
    runs = len(study.compared)
    stopped = f"{len(ended)} of {runs} runs diverged or failed" if ended else f"no run of {runs} diverged or failed"
    if not firsts:
        return _sentence(stopped, "no diagnostic that was logged crossed its threshold")
    (kind, role), n = Counter((f.kind, f.role) for _, f in firsts).most_common(1)[0]
    first = min((f for _, f in firsts if (f.kind, f.role) == (kind, role)), key=lambda f: f.step)
    where = f" in {first.layer}" if first.layer else ""
    named = WORDS.get(kind, kind).format(role=role)
    return _sentence(
        f"what fails first is most often {named}: in {n} of the {len(firsts)} runs of {runs} in which a threshold was"
        f" crossed, earliest at step {first.step}{where}",
        stopped,
    )


def _list(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _has(comparisons: Sequence[Comparison]) -> str:
    return "has" if len(comparisons) == 1 else "have"


def _sentence(*parts: str) -> str:
    text = "; ".join(parts)
    return text[0].upper() + text[1:] + "."
