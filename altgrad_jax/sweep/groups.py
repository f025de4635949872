"""Which conditions one compiled program can run: those that differ in nothing but values that may be traced."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import jax

from altgrad_jax import provenance
from altgrad_jax.precision.grid import Grid
from altgrad_jax.precision.policy import Policy
from altgrad_jax.precision.recipes import RoleRecipe
from altgrad_jax.precision.scaling import carrier
from altgrad_jax.program import make_policy
from altgrad_jax.sweep.lanes import TRACED_OPTIONS
from altgrad_jax.sweep.matrix import Condition

ALONE = "alone"


def program_keys(conditions: Sequence[Condition]) -> tuple[str, dict[str, str]]:
    """The kind of device there is, and every condition's `program_key` by its name; opens the device.

    Raises:
      UsageError: the rules of a condition are none of its model's.
    """
    return jax.default_backend(), {condition.name: program_key(condition) for condition in conditions}


def groups(conditions: Sequence[Condition], keys: Mapping[str, str], together: int) -> list[list[Condition]]:
    """Conditions that run together, at most `together` at once; in the order of the first of each.

    Those that cannot share a program come one by one. `keys` are their `program_keys`.
    """
    found: dict[str, list[Condition]] = {}
    for condition in conditions:
        key = keys[condition.name]
        found.setdefault(f"{ALONE} {condition.name}" if key == ALONE else key, []).append(condition)
    parts = []
    for members in found.values():
        count = -(-len(members) // together)  # parts of nearly one size: as few programs as can be
        size = -(-len(members) // count)
        parts += [members[i : i + size] for i in range(0, len(members), size)]
    return parts


def program_key(condition: Condition) -> str:
    """Equal for conditions that one program can run; `ALONE` for those that need a run of their own.

    That is: what is multiplied natively, whose formats XLA has to know; interventions on single runs; profiles; what
    starts from the weights of another run; and what learns labels.
    """
    config = condition.config
    if config.task != "lm":
        return ALONE
    policy = make_policy(config)
    stability = config.stability
    if any(plan.native for plan in policy.plans) or stability.fallback or stability.rewinds:
        return ALONE
    if config.profile or config.checkpoint.restore_from:
        return ALONE
    plain = provenance.config_dict(config)
    del plain["seed"], plain["tracking"], plain["checkpoint"]["max_to_keep"]
    del plain["precision"]["rules"]
    for key in TRACED_OPTIONS:
        del plain["optimizer"][key]
    # These build formats into their program, or store weights as a format's codes.
    by_name = config.optimizer.name == "adamw_sr" or config.optimizer.weights != "float32" or stability.relative_clip
    return json.dumps([plain, _structure(policy, by_name)], sort_keys=True)


def _structure(policy: Policy, by_name: bool) -> list[Any]:
    """What a program knows of its layers' recipes."""
    return [[plan.path, *(_role(plan.recipe.role(role), by_name) for role in plan.roles)] for plan in policy.plans]


def _role(role: RoleRecipe, by_name: bool) -> list[Any]:
    """An operand's recipe, its format as far as a program that leaves it open has to know it."""
    fmt, narrow = role.fmt, carrier(role.fmt)
    if by_name or (narrow == "bfloat16" and not Grid.of(fmt).addable):
        of_format: list[Any] = [fmt.name]
    else:
        of_format = [str(narrow), fmt.bits]
    return of_format + [getattr(role, f.name) for f in fields(role) if f.name != "fmt"]
