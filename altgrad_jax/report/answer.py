"""The answer in three sentences, by rule from the numbers: the formats, the optimizers, what failed first.

No sentence says more than a test does. A difference is called one only if its Holm-corrected p is below 0.05; without
seeds to test it, it is what one run showed.
"""

import math
from collections import Counter
from collections.abc import Sequence

from altgrad_jax.report.cells import interval
from altgrad_jax.report.failures import run_failures
from altgrad_jax.report.results import within_rule
from altgrad_jax.report.statistics import Paired
from altgrad_jax.report.study import Comparison, Study

LEVEL = 0.05
WORDS = {
    "nan": "a NaN in the {role}",
    "overflow": "overflow of the {role}",
    "underflow": "underflow of the {role}",
    "gradient": "the direction of a layer's gradient",
    "stall": "updates that move no rounded weight",
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
    return f"95 % intervals, paired over {n} seeds, tests Holm-corrected"


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
        within = sum(within_rule(c.group, base) for c in same)
        parts.append(f"{within} of {len(same)} end within 10 % of it")
        tested = [c for c in measured if not math.isnan(c.p_holm)]
        worse = [c for c in tested if c.p_holm < LEVEL and c.difference.mean > 0]
        better = [c for c in tested if c.p_holm < LEVEL and c.difference.mean < 0]
        if tested and not worse and not better:
            alone = sum(c.difference.p < LEVEL for c in tested)
            but = f", {alone} would be without the correction" if alone else ""
            parts.append(f"no difference to it is significant ({len(tested)} tested{but})")
        elif tested:
            kinds = [f"{len(found)} {word}" for found, word in ((worse, "worse"), (better, "better")) if found]
            parts.append(f"of {len(tested)} tested against it {' and '.join(kinds)} beyond chance")
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
    d = best.difference
    gain = Paired(d.n, -d.mean, -d.high, -d.low, d.p)
    large = f"{best.group.optimizer} in {best.group.curve}, by {_shown(gain)} nats"
    tested = [c for c in gains if not math.isnan(c.p_holm)]
    if not tested:
        return _sentence(
            f"of {len(gains)} comparisons with AdamW in the same format the best for another optimizer is {large}",
            "which one seed cannot tell from chance",
        )
    better = [c for c in tested if c.p_holm < LEVEL and c.difference.mean < 0]
    worse = [c for c in tested if c.p_holm < LEVEL and c.difference.mean > 0]
    n = len(tested)
    if not better and not worse:
        return _sentence(
            f"none of the n = {n} comparisons of another optimizer with AdamW in the same format shows an effect after"
            f" Holm's correction; the largest gain is {large}"
        )
    return _sentence(
        f"of n = {n} comparisons of another optimizer with AdamW in the same format gains in {len(better)} and"
        f" losses in {len(worse)} stand after Holm's correction; the largest gain is {large}"
    )


def _failures(study: Study) -> str:
    firsts = [(e, found[0]) for e in study.compared if (found := [f for f in run_failures(e.run) if f.kind != "rank"])]
    ended = [entry for entry in study.compared if entry.ended_badly]
    runs = len(study.compared)
    stopped = f"{len(ended)} of {runs} runs diverged or failed" if ended else f"no run of {runs} diverged or failed"
    if not firsts:
        return _sentence(stopped, "no diagnostic that was logged crossed its threshold, but for the rank of weights")
    (kind, role), n = Counter((f.kind, f.role) for _, f in firsts).most_common(1)[0]
    first = min((f for _, f in firsts if (f.kind, f.role) == (kind, role)), key=lambda f: f.step)
    where = f" in {first.layer}" if first.layer else ""
    named = WORDS.get(kind, kind).format(role=role)
    return _sentence(
        f"what fails first is most often {named} ({n} of {len(firsts)} runs in which something crossed a threshold,"
        f" earliest at step {first.step}{where})",
        stopped,
    )


def _list(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _has(comparisons: Sequence[Comparison]) -> str:
    return "has" if len(comparisons) == 1 else "have"


def _sentence(*parts: str) -> str:
    text = "; ".join(parts)
    return text[0].upper() + text[1:] + "."
