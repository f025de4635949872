"""What is done about what goes wrong: stopping, leaving out steps, other formats, going back.

    skip       a step whose loss or gradient is not finite changes nothing (in the step itself, on the device)
    fallback   a layer that has failed goes on in a format with more mantissa bits; formats are traced values then, so
               nothing is compiled again
    rewind     a run that would end as diverged goes back to its last checkpoint and on with later batches
    diverged   `nan_patience` steps in a row without a finite loss, or left out, end the run; so does a gradient that is
               too large at the smallest dynamic loss scale, and an end that is not finite or reached without a step

Decisions are made on the host from a step's record and the state after it, and nothing else, so a run that is stopped
and resumed decides as one that never was. Every one of them is an event: a record with the key `event`.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import jax
from ml_collections import ConfigDict

from altgrad_jax.loss_scale import SMALLEST
from altgrad_jax.precision.formats import get_format
from altgrad_jax.precision.policy import Policy, parse_rule
from altgrad_jax.precision.recipes import ROLES
from altgrad_jax.precision.scaling import carrier, traced_grid

Record = dict[str, Any]


@dataclass
class DivergenceWatch:
    """Decides when a run has diverged, and says why.

    The counts of consecutive steps without a finite loss, and of those left out, are kept in the TrainState, on the
    device, so they survive a restart and do not depend on how often metrics are logged or which trackers are on.

    Attributes:
      patience: consecutive such steps after which the run stops.
    """

    patience: int

    def diverged(self, record: Record) -> str:
        """Why this step's metrics end the run; "" if they do not."""
        nonfinite, skipped = int(record["train/nonfinite_steps"]), int(record.get("train/skipped_in_a_row", 0))
        if record.get("train/skipped") and record.get("train/loss_scale") == SMALLEST:
            return f"gradients are not finite, or saturate, at the smallest loss scale, {SMALLEST:g}"
        if skipped >= self.patience:
            scale = record.get("train/loss_scale")
            return f"{skipped} steps in a row were left out" + (f", down to a loss scale of {scale:g}" if scale else "")
        return f"{nonfinite} steps in a row had no finite loss" if nonfinite >= self.patience else ""


def unhealthy(record: Record, finite_weights: bool) -> str:
    """Why a state with these metrics is not worth a checkpoint; "" if it is.

    Args:
      record: of the step that led to the state. A step that was left out says nothing of it.
      finite_weights: whether all its weights are finite.
    """
    spoilt = [] if finite_weights else ["the weights"]
    names = {"train/loss": "the loss", "train/grad_norm": "the gradient"} if not record.get("train/skipped") else {}
    names |= {"val/loss": "the validation loss", "test/loss": "the test loss"}
    spoilt += [name for key, name in names.items() if not math.isfinite(record.get(key, 0.0))]
    return f"not finite at step {record['step']}: {', '.join(spoilt)}" if spoilt else ""


def no_step(record: Record) -> str:
    """Says that a run with this record has taken no step so far, all having been left out; "" if it has."""
    taken = record["step"] > record.get("train/skipped_steps", 0)
    return "" if taken else f"no step was taken: all {record['step']} were left out"


@dataclass(frozen=True)
class Fallback:
    """When and to what a layer's format gives way.

    Attributes:
      formats: names, from least to most mantissa bits.
      patience: consecutive steps left out before the layers with NaN or overflow, all if none shows any, fall back;
        0: never, as under a dynamic loss scale, which leaves steps out while it looks for its size.
      stall: share of a layer's updates lost in rounding above which it falls back; 0: never.
    """

    formats: tuple[str, ...]
    patience: int
    stall: float

    def due_by_skips(self, record: Record) -> bool:
        """Whether so many steps in a row were left out that something has to change."""
        skipped = int(record.get("train/skipped_in_a_row", 0))
        return self.patience > 0 and skipped > 0 and skipped % self.patience == 0

    def stalled(self, record: Record, policy: Policy) -> dict[str, str]:
        """Layers whose weights stand still, each with the reason."""
        if not self.stall:
            return {}
        found = {}
        for plan in policy.plans:
            value = record.get(f"weights/{plan.path}/stall")
            if isinstance(value, float) and value > self.stall:
                found[plan.path] = f"stall ratio {value:.4f} above {self.stall:g}"
        return found

    def spoilt(self, answers: Mapping[str, Any], policy: Policy) -> dict[str, str]:
        """Layers to blame for steps left out: those that make NaN, else those that overflow, else all; each with why.

        An operand into which an infinity or NaN came is not to blame for what it became.
        """
        for what, text in (("nan", "NaN"), ("overflow", "overflow")):
            found = {}
            for plan in policy.plans:
                seen = {role: f"quant/{plan.path}/{role}/" for role in plan.roles}
                bad = [r for r, of in seen.items() if answers.get(of + what) and not answers.get(of + "nonfinite")]
                if bad:
                    found[plan.path] = f"{text} in {' and '.join(bad)} during steps left out"
            # One NaN makes everything behind it NaN: the layers where all are tell nothing of the cause.
            if found and len(found) < len(policy.plans):
                return found
        return {plan.path: "steps left out without a layer to blame" for plan in policy.plans}

    def apply(self, quant: Any, policy: Policy, blamed: Mapping[str, str], step: int) -> tuple[Any, list[Record]]:
        """Scaling state with other formats in the layers blamed, and the events; a layer at the list's end stays."""
        quant, events = dict(quant), []
        for layer, reason in blamed.items():
            roles, moves = dict(quant[layer]), []
            for role in filter(roles.__contains__, ROLES):
                state = roles[role]
                bits = int(jax.device_get(state.grid.mantissa_bits))
                target = next((name for name in self.formats if get_format(name).mantissa_bits > bits), None)
                if target is not None:
                    sharding = state.mean.sharding
                    grid = jax.tree.map(lambda x, s=sharding: jax.device_put(x, s), traced_grid(get_format(target)))
                    roles[role] = replace(state, grid=grid)
                    moves.append(f"{role} to {target}")
            if moves:
                quant[layer] = roles
                events.append(event(step, "fallback", reason, layer=layer, change=", ".join(moves)))
        return quant, events


def make_fallback(stability: ConfigDict) -> Fallback | None:
    """From `config.stability`; None where it is off."""
    if not stability.fallback:
        return None
    patience = stability.fallback_patience if stability.skip_nonfinite else 0
    return Fallback(tuple(stability.fallback_formats), patience, stability.fallback_stall)


def event(step: int, kind: str, reason: str, **more: Any) -> Record:
    """A record of an intervention after a step, for metrics.jsonl."""
    return {"step": step, "event": kind, "event/reason": reason} | {f"event/{k}": v for k, v in more.items()}


def rewinds(records: Sequence[Record], step: int) -> list[Record]:
    """The rewinds that a run had behind it when its checkpoint of `step` was made: those to an earlier step."""
    return [r for r in records if r.get("event") == "rewind" and r["step"] < step]


def batch_of(records: Sequence[Record], step: int) -> int:
    """Which batch, counted from 0, a step, counted from 1, was taken on: rewinds pass over batches."""
    passed_over = [r["event/skipped_batches"] for r in rewinds(records, step)]
    return step - 1 + (passed_over[-1] if passed_over else 0)


def stability_violations(config: ConfigDict) -> Iterator[str]:
    """Every contradiction of `config.stability` with itself and the rest, each in one sentence with the way out."""
    s = config.stability
    if s.skip_nonfinite and config.train.loss_scale == "dynamic":
        yield (
            "config.stability.skip_nonfinite=True with config.train.loss_scale=dynamic, which leaves such steps out"
            " by itself; use one of the two"
        )
    if s.relative_clip and config.optimizer.grad_clip == 0:
        yield "config.stability.relative_clip=True needs a threshold, config.optimizer.grad_clip above 0"
    if s.relative_clip and not config.precision.rules:
        yield "config.stability.relative_clip=True, but config.precision.rules gives no layer a format"
    if s.fallback:
        yield from _fallback_violations(config)
    elif s.fallback_stall:
        yield "config.stability.fallback_stall does nothing with config.stability.fallback=False"


def _fallback_violations(config: ConfigDict) -> Iterator[str]:
    s = config.stability
    asks = [str(text).partition(":")[0] for text in config.diagnostics.questions]
    if not (s.skip_nonfinite or s.fallback_stall):
        yield (
            "config.stability.fallback=True has nothing to act on: set config.stability.skip_nonfinite=True (steps left"
            " out) or config.stability.fallback_stall (a limit of the stall ratio)"
        )
    if s.fallback_stall and "weights" not in asks:
        yield "config.stability.fallback_stall needs the question 'weights:N' in config.diagnostics.questions"
    if s.skip_nonfinite and s.fallback_patience >= s.nan_patience:
        yield (
            f"config.stability.fallback_patience={s.fallback_patience} is not below config.stability.nan_patience="
            f"{s.nan_patience}: the run would end before any format gave way"
        )
    if not config.precision.rules:
        yield "config.stability.fallback=True, but config.precision.rules gives no layer a format"
    if config.precision.backend == "native":
        yield (
            "config.stability.fallback=True makes formats traced values, which config.precision.backend=native cannot"
            " run; use auto or emulated"
        )
    if config.optimizer.weights == "format":
        yield "config.stability.fallback=True changes formats, which config.optimizer.weights=format stores weights in"
    yield from _format_violations(config)


def _format_violations(config: ConfigDict) -> Iterator[str]:
    names = config.stability.fallback_formats
    try:
        formats = [get_format(name) for name in names]
        recipes = [parse_rule(rule)[1] for rule in config.precision.rules]
    except ValueError as e:
        yield f"config.stability.fallback_formats: {e}"
        return
    bits = [fmt.mantissa_bits for fmt in formats]
    if not bits or any(a >= b for a, b in pairwise(bits)):
        yield f"config.stability.fallback_formats={tuple(names)} must gain mantissa bits from each to the next"
    for recipe in filter(None, recipes):
        for role in ROLES:
            own = recipe.role(role).fmt
            for fmt in formats:
                if carrier(fmt) != carrier(own):
                    yield (
                        f"config.stability.fallback_formats: {fmt.name} needs {carrier(fmt)} operands, and"
                        f" {recipe.name!r} has {carrier(own)} ones"
                    )
                    return
