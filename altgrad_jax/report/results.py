"""Tables of what came out: each format, each optimizer, each pair, and how fast each got there."""

import math
from collections.abc import Iterable, Sequence

from altgrad_jax.precision.formats import FloatFormat
from altgrad_jax.precision.recipes import ROLES
from altgrad_jax.report.aliases import FIXED_SCALES, formats_of, parsed
from altgrad_jax.report.cells import MISSING, Cell, Row, Table, difference, number, p_value, share, text
from altgrad_jax.report.curves import arrives_early, tokens_to_reach
from altgrad_jax.report.groups import Entry, Group
from altgrad_jax.report.statistics import LEVEL, ratio
from altgrad_jax.report.study import Comparison, Study

NATS = "nats per token of the last validation loss"


def numbers(entries: Iterable[Entry]) -> tuple[int, ...]:
    """The runs' numbers in the report."""
    return tuple(entry.number for entry in entries)


def same_grids(study: Study) -> list[str]:
    """Pairs of formats in the report that are one grid under a free scale, in words."""
    recipes = [recipe for group in study.groups if (recipe := parsed(group.text)) is not None]
    roles = [recipe.role(role) for recipe in recipes for role in ROLES]
    formats = {role.fmt.name: role.fmt for role in roles if role.scaling not in FIXED_SCALES}
    found = []
    for i, one in enumerate(formats.values()):
        for other in list(formats.values())[i + 1 :]:
            factor = one.same_grid_factor(other)
            if factor is not None:
                small, large, k = (other, one, factor) if factor >= 0 else (one, other, -factor)
                found.append(
                    f"{large.name} is {small.name} times {2**k}, value for value. With a scale for every tensor the two"
                    " are one experiment under two names (they differ only in which scale is taken), and a difference"
                    " between them is no effect of the format."
                )
    return found


def other_windows(study: Study) -> list[str]:
    """That diagnostics were asked of other parts of a batch, between runs or within one, in words."""
    asked: dict[str, list[int]] = {}
    marked = []
    for entry in study.compared:
        config = entry.run.manifest.get("config")
        diagnostics = config.get("diagnostics") if isinstance(config, dict) else None
        if isinstance(diagnostics, dict) and "windows" in diagnostics:
            asked.setdefault(str(diagnostics["windows"]), []).append(entry.number)
        marked += [entry.number for record in entry.run.records if record.get("event") == "measured"]
    found = []
    if len(asked) > 1:
        parts = [f"{windows} (runs {', '.join(map(str, of))})" for windows, of in asked.items()]
        found.append(
            f"diagnostics.windows differs: {'; '.join(parts)}. Rates and cosines are of other parts of a batch, and are"
            " not to be compared between them; losses are not touched."
        )
    if marked:
        runs = ", ".join(map(str, dict.fromkeys(marked)))
        found.append(f"Within runs {runs} diagnostics were asked of another part of the batch from a restart on.")
    return found


def results_table(study: Study) -> Table:
    """Every group: losses, gap, and what its format did, means over seeds."""
    rows = []
    for group in study.groups:
        losses = list(group.final_losses.values())
        mean = group.seed_mean(losses)
        spread = number(max(losses) - min(losses)) if len(losses) > 1 else Cell(MISSING)
        gap = study.comparison(group)
        cells = (
            text(group.status),
            number(float(len(group.entries)), ".0f"),
            number(float(group.lost), ".0f"),
            number(mean),
            spread,
            number(math.exp(mean) if mean < 700 else math.nan, ",.2f"),
            difference(gap.difference) if gap else Cell("baseline"),
            p_value(gap.tested.p if gap else math.nan),
            p_value(gap.tested.p_equivalent if gap else math.nan),
            text(gap.words if gap else ""),
        )
        rows.append(Row(group.name, cells, numbers(group.entries)))
    columns = (
        *("status", "seeds", "without a loss", "loss", "spread", "perplexity"),
        *("gap", "p (Holm)", "p (equivalence)", "verdict"),
    )
    note = (
        f"Loss: {NATS}, mean over seeds; spread: largest less smallest. Gap: loss less the baseline's, paired over"
        f" seeds, with the 95 % t interval. p: paired t test. p (equivalence): paired test (TOST) that the gap lies"
        f" within ±{study.margin:g} nats. {_families(study.gaps)} {_verdicts(study.margin)} Runs that diverged or"
        " failed have no loss: they are counted, not averaged."
    )
    return Table("results", "Every condition", "condition", columns, tuple(rows), note)


def _families(comparisons: Sequence[Comparison]) -> str:
    """How many comparisons each correction is for."""
    sizes = {c.group.optimizer: c.tested.family for c in comparisons if c.tested.family}
    if not sizes:
        return "No pair of seeds, so nothing is tested."
    listed = ", ".join(f"{size} with {optimizer}" for optimizer, size in sizes.items())
    return f"Holm's correction is for the gaps of one optimizer, equal ones counted once: {listed}."


def _verdicts(margin: float) -> str:
    return (
        f"Verdict: worse or better where p is below {LEVEL:g}; equivalent within {margin:g} where p (equivalence) is;"
        " not decided where neither: then nothing is known, not even that there is no difference."
    )


def format_table(study: Study) -> Table:
    """Every format, under the first optimizer it was tried with: AdamW where there is AdamW."""
    curves: dict[str, Group] = {}
    for group in study.groups:
        if group.curve not in curves or (group.optimizer == "adamw" and curves[group.curve].optimizer != "adamw"):
            curves[group.curve] = group
    rows = []
    for curve, group in curves.items():
        formats = list(dict.fromkeys(formats_of(group.text).values()))
        cells = (
            text(group.optimizer),
            *_grid_cells(formats),
            Cell("baseline") if group is study.baseline else difference(study.gap(group)),
            number(mean_last(group, "grads/cosine")),
            share(mean_highest(group, "quant", "underflow")),
            share(mean_highest(group, "quant", "overflow")),
            number(mean_last(group, "weights/stall"), ".3f"),
            number(group.seed_mean(rank_change(entry) for entry in group.entries), "+.3f"),
            text(group.status),
        )
        rows.append(Row(curve, cells, numbers(group.entries)))
    columns = (
        *("optimizer", "bits", "largest", "smallest", "binades", "mantissa bits"),
        *("gap", "cosine", "underflow", "overflow", "stall", "rank change", "status"),
    )
    note = (
        "Largest and smallest: positive values of the format, before scaling; binades: log2 of their ratio; of a recipe"
        " with several formats, each. Means over seeds of the last record: cosine of the gradient to the float32 one;"
        " underflow and overflow of the worst role, over all layers; stall: updates that moved no rounded weight; rank"
        " change: of the effective rank of the weights, last against first record. A dash: not measured."
    )
    return Table("formats", "Every format", "format", columns, tuple(rows), note)


def _grid_cells(formats: list[FloatFormat]) -> tuple[Cell, ...]:
    if not formats:
        return (Cell(MISSING),) * 5
    if len(formats) == 1:
        fmt = formats[0]
        # Exponents, which always exist: the values of a wide format may lie beyond float64.
        low, high = fmt.parts(fmt.min_magnitude), fmt.parts(fmt.max_magnitude)
        binades = math.log2(high[0]) + high[1] - math.log2(low[0]) - low[1]
        return (
            number(float(fmt.bits), ".0f"),
            number(fmt.max, ".4g") if math.isfinite(fmt.max) else Cell(f"2^{fmt.max_exponent}"),
            number(fmt.min_positive, ".3g") if fmt.min_positive else Cell(f"2^{fmt.step_exponent}"),
            number(binades, ".1f"),
            number(float(fmt.mantissa_bits), ".0f"),
        )
    cells = zip(*(_grid_cells([fmt]) for fmt in formats), strict=True)
    return tuple(Cell(" / ".join(dict.fromkeys(cell.text for cell in column))) for column in cells)


def mean_last(group: Group, name: str) -> float:
    """Mean over seeds of the last value of a metric."""
    return group.seed_mean(entry.run.last(name) for entry in group.entries)


def mean_highest(group: Group, prefix: str, suffix: str) -> float:
    """Mean over seeds of the largest last value of prefix/<role>/suffix."""
    return group.seed_mean(entry.run.highest(prefix, suffix) for entry in group.entries)


def rank_change(entry: Entry) -> float:
    """Share by which the effective rank over all matrices changed from the first record to the last."""
    ranks = [r["spectra/effective_rank"] for r in entry.run.records if "spectra/effective_rank" in r]
    good = [rank for rank in ranks if isinstance(rank, (int, float)) and math.isfinite(rank)]
    return good[-1] / good[0] - 1 if len(good) > 1 and good[0] > 0 else math.nan


def gap_matrix(study: Study) -> Table:
    """Format x optimizer: the gap of each pair to the baseline."""
    curves = list(dict.fromkeys(group.curve for group in study.groups))
    optimizers = list(dict.fromkeys(group.optimizer for group in study.groups))
    found = {(group.curve, group.optimizer): group for group in study.groups}

    def cell(curve: str, optimizer: str) -> Cell:
        group = found.get((curve, optimizer))
        if group is None:
            return Cell(MISSING)
        if group is study.baseline:
            return Cell("baseline", runs=numbers(group.entries))
        shown = difference(study.gap(group))
        lost = f" ({group.lost} of {len(group.entries)} lost)" if group.lost else ""
        said = group.status if group.lost == len(group.entries) else f"{shown.text}{lost}"
        return Cell(said, shown.value, shown.low, shown.high, numbers(group.entries))

    rows = tuple(
        Row(
            curve,
            tuple(cell(curve, optimizer) for optimizer in optimizers),
            tuple(n for o in optimizers if (curve, o) in found for n in numbers(found[curve, o].entries)),
        )
        for curve in curves
    )
    note = f"Gap to the baseline in {NATS}, with the 95 % t interval, paired over seeds. A dash: not run."
    return Table("matrix", "Formats and optimizers: the gap to the baseline", "format", tuple(optimizers), rows, note)


def gains_table(study: Study) -> Table:
    """What each optimizer gains over AdamW in the same format."""
    rows = []
    for c in study.gains:
        gain = c.difference.reversed  # a gain is a lower loss
        cells = (
            text(c.group.curve),
            text(c.group.optimizer),
            number(float(gain.n), ".0f"),
            difference(gain),
            p_value(gain.p),
            p_value(c.tested.p),
            p_value(c.tested.p_equivalent),
            text(c.words),
        )
        rows.append(Row(c.group.name, cells, numbers((*c.against.entries, *c.group.entries))))
    size = max((c.tested.family for c in study.gains), default=0)
    note = (
        f"Gain: AdamW's loss less this optimizer's in the same format, {NATS}, paired over seeds, with the 95 % t"
        f" interval; above zero the optimizer is better. p of the paired t test; Holm-corrected for the {size}"
        " comparisons of this table that could be tested, equal ones counted once, as is p (equivalence), of the test"
        f" that the difference lies within ±{study.margin:g} nats. {_verdicts(study.margin)}"
    )
    columns = ("format", "optimizer", "pairs", "gain over AdamW", "p", "p (Holm)", "p (equivalence)", "verdict")
    return Table("gains", "What other optimizers gain over AdamW", "condition", columns, tuple(rows), note)


def equal_loss_table(study: Study) -> tuple[Table, float]:
    """(how many tokens each group needs to a common loss; that loss: the highest with which a whole group's run ends).

    So every run of those groups gets there.
    """
    whole = [g for g in study.groups if not g.lost and all(entry.run.status == "finished" for entry in g.entries)]
    target = max((loss for g in whole for loss in g.final_losses.values()), default=math.nan)
    reached = {id(g): {e.seed: tokens_to_reach(e.run, target) for e in g.entries} for g in study.groups}
    base = reached[id(study.baseline)] if study.baseline else {}
    rows = []
    for group in study.groups:
        tokens = reached[id(group)]
        arrived = [t for t in tokens.values() if math.isfinite(t)]
        early = sum(arrives_early(e.run, target) for e in group.entries)
        speed = ratio(base, tokens)  # how many times fewer tokens than the baseline
        before = f", {early} before the first evaluation" if early else ""
        cells = (
            number(group.seed_mean(arrived), ",.0f"),
            Cell(f"{len(arrived) + early} of {len(tokens)}{before}"),
            Cell("baseline") if group is study.baseline else difference(speed, ".3f"),
        )
        rows.append(Row(group.name, cells, numbers(group.entries)))
    shown = "unknown" if math.isnan(target) else f"{target:.4f} nats"
    note = (
        f"Tokens until the validation loss, joined by straight lines between evaluations, is {shown} or lower for good:"
        " the highest final loss of a run among the conditions that finished with all their seeds. Of a run that gets"
        " there before its first evaluation after step 0 the tokens are not known, and are left out. Speed: the"
        " baseline's tokens over this condition's, geometric mean over the seeds in which both arrive, with the 95 % t"
        " interval of its logarithm; above 1 it needs fewer."
    )
    columns = ("tokens", "seeds that arrive", "speed to that loss")
    return Table("speed", "Equal-loss speed", "condition", columns, tuple(rows), note), target
