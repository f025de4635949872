"""What was run, on what and when; what the hardware did; and the list of runs that everything else points to."""

import math
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from altgrad_jax.report.cells import MISSING, Cell, Row, Table, number, size, text
from altgrad_jax.report.groups import Entry
from altgrad_jax.report.runs import is_number, speed
from altgrad_jax.report.study import Study


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def sessions(entry: Entry) -> list[dict[str, Any]]:
    """The starts of a run's command."""
    found = entry.run.manifest.get("sessions")
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []


def command(entry: Entry) -> str:
    """The command of a run's last start, as a shell reads it; "" if it is not known."""
    for words in (*(one.get("command") for one in reversed(sessions(entry))), entry.run.manifest.get("command")):
        if isinstance(words, list) and words:
            return shlex.join(map(str, words))
        if isinstance(words, str):
            return words
    return ""


def revision(entry: Entry) -> str:
    """The git revision of a run's last start, with "modified" if the tree differed from it."""
    git = _object(sessions(entry)[-1].get("git")) if sessions(entry) else {}
    commit = git.get("commit")
    if not isinstance(commit, str):
        return ""
    return f"{commit[:12]}, modified" if git.get("modified") else commit[:12]


def _started(entry: Entry) -> str:
    started = sessions(entry)[0].get("started") if sessions(entry) else None
    return started if isinstance(started, str) else ""


def _machine(entry: Entry) -> str:
    found = _object(sessions(entry)[-1].get("devices")) if sessions(entry) else {}
    if not found:
        return ""
    hosts = f" on {found['hosts']} hosts" if found.get("hosts", 1) != 1 else ""
    return (
        f"{found.get('global', '?')} x {found.get('kind', '?')}{hosts} ({found.get('machine', '?')},"
        f" {found.get('cores', '?')} cores)"
    )


def _versions(entry: Entry) -> str:
    found = _object(sessions(entry)[-1].get("versions")) if sessions(entry) else {}
    return ", ".join(
        f"{name} {found[name]}" for name in ("python", "altgrad_jax", "jax", "flax", "optax") if name in found
    )


def _each(values: Iterable[str]) -> str:
    """Every value with how many runs have it, the most frequent first; only the value if all have the same."""
    counts = Counter(value for value in values if value)
    if len(counts) == 1:
        return next(iter(counts))
    return "; ".join(f"{value} ({n} runs)" for value, n in counts.most_common(6)) or "not known"


def facts(study: Study) -> list[tuple[str, str]]:
    """What the header says of the runs that are compared (or of all, if none are)."""
    entries: Sequence[Entry] = study.compared or study.entries
    manifests = [entry.run.manifest for entry in entries]

    def model(m: dict[str, Any]) -> str:
        shape = _object(_object(m.get("config")).get("model"))
        total = _object(m.get("parameters")).get("total")
        known = all(key in shape for key in ("n_layer", "n_embd", "n_head", "block_size", "vocab_size"))
        if not known:
            return ""
        counted = f": {total:,} parameters" if isinstance(total, int) else ""
        return (
            f"{shape['n_layer']} layers x {shape['n_embd']}, {shape['n_head']} heads, block {shape['block_size']},"
            f" vocabulary {shape['vocab_size']}{counted}"
        )

    def data(m: dict[str, Any]) -> str:
        corpus = _object(m.get("corpus"))
        named = ": ".join(str(corpus[key]) for key in ("source", "description") if key in corpus)
        return f"{named} (tokens {str(corpus['sha256'])[:12]})" if named and "sha256" in corpus else named

    def schedule(entry: Entry) -> str:
        i = entry.run.identity
        steps, tokens = entry.run.step, entry.run.tokens
        if "train.batch_size" not in i or entry.ended_badly:
            return ""
        shown = f", {tokens:,} tokens" if tokens else ""
        return (
            f"{steps:,} steps of {i['train.batch_size']} windows{shown}, {i.get('optimizer.schedule', '?')} schedule,"
            f" {i.get('optimizer.warmup_steps', '?')} steps of warm-up"
        )

    seeds = sorted({e.condition.seed for e in entries if e.condition.seed is not None})
    times = sorted(filter(None, map(_started, entries)))
    when = f"{times[0]} to {times[-1]}" if len(set(times)) > 1 else "".join(times[:1]) or "not known"
    counted = f"{len(study.compared)} runs compared, in {len(study.groups)} conditions"
    others = [
        f"{len(found)} {what}"
        for found, what in (
            ((*study.apart, *study.again), "set apart"),
            (study.classified, "of the classification task"),
            (study.searches, "of a search for learning rates"),
        )
        if found
    ]
    found = [
        ("Runs", "; ".join([counted, *others])),
        ("Seeds", ", ".join(map(str, seeds)) or "not known"),
        ("Model", _each(map(model, manifests))),
        ("Data", _each(map(data, manifests))),
        ("Training", _each(map(schedule, entries))),
        ("Learning rates", _learning_rates(study)),
        ("Machine", _each(map(_machine, entries))),
        ("Versions", _each(map(_versions, entries))),
        ("When", when),
        ("Git revision", _each(map(revision, entries))),
    ]
    return found + [(f"Matrix {m.name}", m.command or "command not known") for m in study.matrices]


def _learning_rates(study: Study) -> str:
    """The rates of each optimizer."""
    rates: dict[str, set[float]] = {}
    for group in study.groups:
        found = (entry.condition.learning_rate for entry in group.entries)
        rates.setdefault(group.optimizer, set()).update(rate for rate in found if math.isfinite(rate))
    said = [f"{name} {' or '.join(f'{rate:.3g}' for rate in sorted(of))}" for name, of in rates.items() if of]
    return ", ".join(said) or "not known"


def hardware_table(study: Study) -> Table:
    """What each run really multiplied, how fast, and in how much memory."""
    rows = []
    for entry in (*study.compared, *(e for e, _ in (*study.apart, *study.again)), *study.classified):
        audit, memory = _object(entry.run.manifest.get("audit")), _object(entry.run.summary.get("peak_memory_bytes"))
        engines = "; ".join(f"{k}: {v}" for k, v in _object(audit.get("engines")).items())
        together = entry.condition.together
        cells = (
            _count(audit.get("fp8_asked")),
            _count(audit.get("fp8_got")),
            number(_float(audit.get("fp8_share")), ".3f"),
            text(audit.get("problem") or engines),
            number(speed(entry.run), ",.0f"),
            number(float(together), ".0f"),
            size(_float(memory.get("device"))),
            size(_float(memory.get("host"))),
            number(entry.run.last("train/mfu"), ".3f"),
            number(_float(entry.run.summary.get("compile_seconds")), ".1f"),
            number(_float(entry.run.summary.get("seconds")), ",.1f"),
        )
        rows.append(Row(f"run {entry.number}: {entry.where}", cells, (entry.number,)))
    columns = (
        *("FP8 products asked", "got", "share of multiply-adds in FP8", "products by engine and type"),
        *("tokens/s", "together", "device memory", "host memory", "MFU", "compiling, s", "in all, s"),
    )
    shared = any(entry.condition.together > 1 for entry in study.entries)
    note = (
        "The audit reads the compiled step: how many products were asked for in FP8 and how many came out so; the rest"
        " is emulated: operands rounded to the format, multiplied in a wider type. Tokens/s: median of those logged;"
        " memory: peak; MFU: logged only where the device's peak is known."
    )
    if shared:
        note += (
            " Together: conditions that ran in one program. Their tokens/s, memory and time are those of the program as"
            " a whole or a share of it, and cannot be compared with a run alone."
        )
    return Table("hardware", "What the hardware did", "run", columns, tuple(rows), note, folded=len(rows) > 12)


def _count(value: Any) -> Cell:
    return number(float(value), ".0f") if is_number(value) else Cell(MISSING)


def _first(*values: float) -> float:
    """The first that is a number."""
    return next((value for value in values if not math.isnan(value)), math.nan)


def _float(value: Any) -> float:
    return float(value) if is_number(value) else math.nan


def runs_table(study: Study) -> Table:
    """Every run: where it is, what started it, how it ended."""
    groups = {entry.number: group.name for group in study.groups for entry in group.entries}
    apart = {entry.number for entry, _ in (*study.apart, *study.again)}
    searched = {entry.number for entry in study.searches}
    rows = []
    for entry in (*study.entries, *study.searches):
        role = groups.get(entry.number, "")
        role = role or ("set apart" if entry.number in apart else "search" if entry.number in searched else "classify")
        c, run = entry.condition, entry.run
        reason = run.summary.get("reason")
        cells = (
            text(role),
            text("" if c.seed is None else c.seed),
            number(c.learning_rate, ".3g"),
            text(f"{run.status}: {reason}" if reason else run.status),
            number(float(run.step), ",.0f"),
            number(run.last("val/loss")),
            text(_started(entry)),
            text(revision(entry)),
            text("; ".join(run.problems)),
            text(command(entry)),
        )
        rows.append(Row(f"{entry.number}: {entry.where}", cells, (entry.number,)))
    columns = (
        *("condition", "seed", "learning rate", "status", "steps", "last loss"),
        *("started", "git", "missing or broken", "command"),
    )
    note = "Folders are relative to this page. A run's number is what the other tables link to."
    return Table("runs", "Runs", "run", columns, tuple(rows), note)


def apart_table(study: Study) -> Table:
    """Runs that are not compared, and why."""
    rows = [
        Row(f"{entry.number}: {entry.where}", (text("; ".join(reasons)),), (entry.number,))
        for entry, reasons in (*study.apart, *study.again)
    ]
    note = (
        "Their losses say nothing about the others' (other data, another model or schedule, another length), or stand"
        " in the comparison already."
    )
    return Table("apart", "Set apart", "run", ("why",), tuple(rows), note)


def search_table(study: Study) -> Table:
    """The learning rates tried for each optimizer, and which the comparison used."""
    used = {(g.optimizer, g.recipe, e.condition.learning_rate) for g in study.groups for e in g.entries}
    tried: dict[tuple[str, str, float], list[Entry]] = {}
    for entry in study.searches:
        c = entry.condition
        tried.setdefault((c.optimizer, c.recipe, c.learning_rate), []).append(entry)
    rows = []
    for (optimizer, recipe, rate), entries in sorted(tried.items(), key=lambda item: item[0]):
        losses = [e.final_loss for e in entries if math.isfinite(e.final_loss)]
        cells = (
            text(optimizer),
            text(recipe),
            number(entries[0].condition.factor, ".3g"),
            number(rate, ".3g"),
            number(sum(losses) / len(losses) if losses else math.nan),
            text(", ".join(sorted({e.run.status for e in entries}))),
            text("used" if (optimizer, recipe, rate) in used else ""),
        )
        rows.append(Row(f"{optimizer}, {recipe}, {rate:.6g}", cells, tuple(e.number for e in entries)))
    columns = ("optimizer", "recipe", "factor", "learning rate", "loss", "status", "in the comparison")
    said = " ".join(f"{note}." for matrix in study.matrices for note in matrix.notes)
    note = (
        "Runs of the search are no part of the comparison. Factor: on the optimizer's usual rate. Loss: last validation"
        f" loss, mean over the search's seeds. {said}"
    )
    return Table("search", "Search for the learning rate", "tried", columns, tuple(rows), note)


SCORES = ("micro_f1", "macro_f1", "micro_pr_auc", "subset_accuracy", "hamming_loss")


def classification_table(study: Study) -> Table:
    """The classification task: the last scores on the validation split, and those on the test split."""
    rows = []
    for entry in study.classified:
        final = _object(entry.run.summary.get("final"))
        cells = [text(entry.condition.recipe), text(entry.condition.optimizer), text(entry.run.status)]
        cells.append(number(entry.run.last("val/loss")))
        cells += [number(entry.run.last(f"val/{score}")) for score in SCORES]
        cells += [number(_first(entry.run.last(f"test/{s}"), _float(final.get(f"test/{s}")))) for s in SCORES]
        rows.append(Row(f"{entry.number}: {entry.where}", tuple(cells), (entry.number,)))
    columns = (
        "recipe",
        "optimizer",
        "status",
        "val loss",
        *(f"val {s}" for s in SCORES),
        *(f"test {s}" for s in SCORES),
    )
    return Table("classification", "Classification", "run", columns, tuple(rows))
