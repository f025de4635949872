"""Which questions are asked of a run, and at which steps."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from altgrad_jax.errors import UsageError
from altgrad_jax.precision.recipes import ROLES

# Asked before a step, of its batch and the weights that it starts from; "weights" is asked of what the step did.
QUESTIONS = ("gradients", "weights", "spectra", "curvature", "sensitivity")
ANSWERS = ("quant", "grads", "weights", "spectra", "curvature", "sensitivity")  # first parts of metrics' names


def parse_questions(texts: Sequence[str]) -> dict[str, int]:
    """From `config.diagnostics.questions`, "name:steps between" each: name -> steps.

    Raises:
      UsageError: an unknown name (the nearest is named), no interval, one below 1, or a name given twice.
    """
    found: dict[str, int] = {}
    for text in texts:
        name, colon, every = str(text).partition(":")
        if name not in QUESTIONS:
            nearest = difflib.get_close_matches(name, QUESTIONS, 1, cutoff=0.0)[0]
            raise UsageError(f"config.diagnostics.questions: unknown question {name!r}: did you mean {nearest!r}?")
        if not colon or not every.isdecimal() or int(every) < 1:
            raise UsageError(
                f"config.diagnostics.questions: {text!r} is not name:steps with steps of 1 or more, such as"
                f" '{name}:100'; leave {name} out to ask it never"
            )
        if name in found:
            raise UsageError(f"config.diagnostics.questions: {name} is there twice")
        found[name] = int(every)
    return found


def is_answered(record: Mapping[str, Any]) -> bool:
    """Whether a step's record holds an answer to any question."""
    return any(key.partition("/")[0] in ANSWERS for key in record)


def is_of_one_layer(key: str) -> bool:
    """Whether a metric is that of a single layer: `grads/<layer>/cosine`, `quant/<layer>/<role>/underflow`."""
    first, *rest = key.split("/")
    if first == "quant":
        return rest[0] not in ROLES
    return first in ANSWERS and len(rest) == 2
