"""Names for one and the same arithmetic: recipes that are spelt differently, formats that differ where no value goes.

Under saturation a format is its finite values: which codes are infinities or NaN changes nothing. So
`e4m3:inf=0,nan=top` is `e4m3fn`. And e5m2 differs from `e5m2:inf=0,nan=0` in one binade, which under a free scale lies
below all values of most tensors: the two may be one experiment, and their losses, equal to the last digit, say whether
they were.
"""

from collections.abc import Hashable
from dataclasses import replace

from altgrad_jax.precision.formats import FloatFormat, get_format
from altgrad_jax.precision.recipes import ROLES, Recipe, RoleRecipe, parse_recipe

FIXED_SCALES = ("none", "static")
_ANY = get_format("float32")


def parsed(recipe: str) -> Recipe | None:
    """A recipe's text; None if nothing is rounded, or if it is no recipe."""
    try:
        return parse_recipe(recipe)
    except ValueError:
        return None


def formats_of(recipe: str) -> dict[str, FloatFormat]:
    """Role -> format of a recipe; empty if nothing is rounded, or if this is no recipe."""
    found = parsed(recipe)
    return {role: found.role(role).fmt for role in ROLES} if found else {}


def arithmetic(recipe: str) -> Hashable:
    """A value that is equal for two recipes if and only if they round alike; of what is no recipe, its text."""
    found = parsed(recipe)
    return tuple(_rounding(found.role(role)) for role in ROLES) if found else recipe


def _rounding(role: RoleRecipe) -> Hashable:
    fmt = role.fmt
    values: Hashable = (fmt.mantissa_bits, fmt.min_exponent, fmt.max_magnitude, fmt.signed, fmt.has_zero)
    if role.overflow != "saturate":
        values = (values, fmt.inf, fmt.nan)
    return values, replace(role, fmt=_ANY)


def may_coincide(one: str, other: str) -> bool:
    """Whether two recipes differ in nothing but where, under a free scale, their formats end."""
    a, b = parsed(one), parsed(other)
    return a is not None and b is not None and all(_nearly(a.role(role), b.role(role)) for role in ROLES)


def _nearly(one: RoleRecipe, other: RoleRecipe) -> bool:
    if _rounding(one) == _rounding(other):
        return True
    alike = replace(one, fmt=_ANY) == replace(other, fmt=_ANY)
    if not alike or one.scaling in FIXED_SCALES or one.overflow != "saturate":
        return False
    a, b = one.fmt, other.fmt
    if a.same_grid_factor(b) is not None:
        return True
    return (a.mantissa_bits, a.exponent_bits, a.signed, a.has_zero) == (
        b.mantissa_bits,
        b.exponent_bits,
        b.signed,
        b.has_zero,
    )
