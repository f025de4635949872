"""Recipes: in which format, at which scale and how rounded each operand of a dense layer is.

A recipe is written as one line of text: the name of a recipe or of a format, then options.

    e5m2                                      all operands E5M2, one delayed scale a tensor
    hybrid scaling=current                    E4M3 forward, E5M2 gradients, scaled by each tensor's own amax
    e4m3fn g=e5m2 g.rounding=stochastic       options of one operand: x. (activations), w. (weights), g. (gradients)

Options: `x=FORMAT w=FORMAT g=FORMAT`, and for all operands or, with a prefix, for one: `scaling`, `granularity`,
`scale`, `history`, `margin`, `pow2`, `rounding`, `overflow`.
"""

import difflib
from dataclasses import dataclass, fields, replace
from typing import Any

from altgrad_jax.precision.formats import FloatFormat, get_format
from altgrad_jax.precision.reals import float32_fault
from altgrad_jax.precision.rounding import OVERFLOWS, ROUNDINGS

ROLES = ("activation", "weight", "gradient")
SCALINGS = ("none", "static", "current", "delayed", "mx")
GRANULARITIES = ("tensor", "channel")
MAX_HISTORY = 1 << 16  # one number a step is kept for each operand
MX_BLOCK = 32  # OCP Microscaling Formats specification 1.0


@dataclass(frozen=True)
class RoleRecipe:
    """How one operand is quantised.

    Attributes:
      fmt: the format.
      scaling: "none" (s = 1), "static" (s = `scale`), "current" (s from the tensor's own amax), "delayed" (s from the
        largest amax of the last `history` steps; current as long as there is none), or "mx" (blocks of 32 along the
        contraction, each with a power-of-two scale; OCP MX 1.0).
      granularity: of "current": one scale a "tensor", or one for every vector along the contraction ("channel").
      scale: of "static".
      history: steps that "delayed" looks back.
      margin: "current", "delayed" and "mx" leave this many binades free above the amax.
      pow2: 1: scales of "current" and "delayed" are rounded down to powers of two, so that a value on the grid of one
        step is, but at the ends of the range, on that of the next; 0: they are not.
      rounding: "nearest", "toward_zero" or "stochastic".
      overflow: "saturate" or "special" (inf or NaN, as a bare cast does).
    """

    fmt: FloatFormat
    scaling: str = "delayed"
    granularity: str = "tensor"
    scale: float = 1.0
    history: int = 16
    margin: int = 0
    pow2: int = 0
    rounding: str = "nearest"
    overflow: str = "saturate"

    @property
    def per_tensor(self) -> bool:
        """Whether one scale serves the whole tensor, so that it is quantised once for both of its products."""
        return self.scaling != "mx" and self.granularity == "tensor"

    def describe(self) -> str:
        """For tables: "e5m2 delayed(16)"."""
        kind = {
            "delayed": f"delayed({self.history})",
            "static": f"static({self.scale:g})",
            "mx": f"mx({MX_BLOCK})",
        }.get(self.scaling, self.scaling)
        extras = [
            *([f"per {self.granularity}"] if self.granularity != "tensor" else []),
            *([f"margin {self.margin}"] if self.margin else []),
            *(["pow2"] if self.pow2 else []),
            *([self.rounding] if self.rounding != "nearest" else []),
            *(["overflows"] if self.overflow != "saturate" else []),
        ]
        return " ".join([self.fmt.name, kind, *extras])


@dataclass(frozen=True)
class Recipe:
    """How the three operands of a dense layer are quantised.

    Attributes:
      name: as written in the rule.
      activation: of x, in y = x w and dw = x^T g.
      weight: of w, in y = x w and dx = g w^T.
      gradient: of g, in dx and dw.
    """

    name: str
    activation: RoleRecipe
    weight: RoleRecipe
    gradient: RoleRecipe

    def role(self, role: str) -> RoleRecipe:
        """By the name in `ROLES`."""
        return getattr(self, role)


def _uniform(x: str, g: str | None = None, **options) -> tuple[RoleRecipe, RoleRecipe, RoleRecipe]:
    forward = RoleRecipe(get_format(x), **options)
    return forward, forward, RoleRecipe(get_format(g or x), **options)


# "bf16" is no recipe of this kind: it leaves a layer as it is.
PLAIN = "bf16"
RECIPES = {
    "e5m2": _uniform("e5m2"),
    "e4m3": _uniform("e4m3fn"),
    "hybrid": _uniform("e4m3fn", "e5m2"),
    "e5m2_cast": _uniform("e5m2", scaling="none", overflow="special"),
    "mxfp8": _uniform("e4m3fn", scaling="mx"),
    "mxfp8_e5m2": _uniform("e5m2", scaling="mx"),
    "mxfp6_e3m2": _uniform("e3m2fn", scaling="mx"),
    "mxfp6_e2m3": _uniform("e2m3fn", scaling="mx"),
    "mxfp4": _uniform("e2m1fn", scaling="mx"),
}
# Names of what is no recipe here -> why, or what is.
ELSEWHERE = {
    "nvfp4": "there are no blocks with E4M3 scales here; mxfp4 has these elements, and power-of-two scales",
    "mxfp8_e4m3": "it is called mxfp8",
    "mxfp6": "there are mxfp6_e3m2 and mxfp6_e2m3",
    "mxfp8blockscaling": "Transformer Engine's recipe of this name is mxfp8",
    "delayedscaling": "Transformer Engine's recipe of this name is 'hybrid scaling=delayed'",
    "float8currentscaling": "Transformer Engine's recipe of this name is 'hybrid scaling=current'",
}
_PREFIXES = {"x": "activation", "w": "weight", "g": "gradient"}
_NUMBERS = {"scale": float, "history": int, "margin": int, "pow2": int}
_CHOICES = {"scaling": SCALINGS, "granularity": GRANULARITIES, "rounding": ROUNDINGS, "overflow": OVERFLOWS}


def parse_recipe(text: str) -> Recipe | None:
    """The recipe of a line of text; None for "bf16", which leaves a layer unquantised.

    Raises:
      ValueError: an unknown recipe, format or option (the nearest is named), or options that do not go together.
    """
    base, *options = text.split() or [""]
    if base.lower() in (PLAIN, "bfloat16"):
        if options:
            raise ValueError(f"recipe {text!r}: {PLAIN} leaves a layer as it is and takes no options")
        return None
    name = base.lower().removeprefix("format.")  # Transformer Engine has Format.E4M3 and Format.HYBRID
    if name in RECIPES:
        roles = dict(zip(ROLES, RECIPES[name], strict=True))
    else:
        roles = dict(zip(ROLES, _uniform(_format_or_nearest(base)), strict=True))
    for option in options:
        key, equals, value = option.partition("=")
        if not equals or not value:
            raise ValueError(f"recipe {text!r}: {option!r} is not of the form option=value")
        _apply(roles, key, value, text)
    for role, recipe in roles.items():
        _check(role, recipe, text)
    return Recipe(text, **roles)


def _format_or_nearest(base: str) -> str:
    """The name itself if it is a format's; otherwise an error that knows recipes too."""
    try:
        get_format(base)
    except ValueError as e:
        if (why := ELSEWHERE.get(base.lower())) is not None:
            raise ValueError(f"unknown recipe or format {base!r}: {why}") from None
        nearest = difflib.get_close_matches(base.lower(), RECIPES, 1, cutoff=0.6)
        if nearest and "unknown format" in str(e):
            raise ValueError(f"unknown recipe or format {base!r}: did you mean {nearest[0]!r}?") from None
        raise ValueError(str(e).replace("unknown format", "unknown recipe or format")) from None
    return base


def _apply(roles: dict[str, RoleRecipe], key: str, value: str, text: str) -> None:
    """Sets one option in all roles, or in the one that its prefix names."""
    prefix, _, name = key.rpartition(".")
    if key in _PREFIXES:
        prefix, name = key, "fmt"
    if prefix and prefix not in _PREFIXES:
        raise ValueError(f"recipe {text!r}: {prefix!r} is not one of the operands x, w, g")
    known = [field.name for field in fields(RoleRecipe)]
    if name not in known or key == "fmt":
        nearest = difflib.get_close_matches(name, [*_NUMBERS, *_CHOICES], 1, cutoff=0.0)[0]
        raise ValueError(f"recipe {text!r}: unknown option {name!r}; did you mean {nearest!r}?")
    setting: Any = value
    if name == "fmt":
        setting = get_format(value)
    elif name in _CHOICES and value not in _CHOICES[name]:
        raise ValueError(f"recipe {text!r}: {name}={value!r} is not one of {', '.join(_CHOICES[name])}")
    elif name in _NUMBERS:
        try:
            setting = _NUMBERS[name](value)
        except ValueError:
            raise ValueError(f"recipe {text!r}: {name}={value!r} is no {_NUMBERS[name].__name__}") from None
    for role in [_PREFIXES[prefix]] if prefix else ROLES:
        roles[role] = replace(roles[role], **{name: setting})


def _check(role: str, recipe: RoleRecipe, text: str) -> None:
    if not (recipe.fmt.signed and recipe.fmt.has_zero):
        raise ValueError(f"recipe {text!r}: {recipe.fmt.name} holds only powers of two, it cannot be a layer's format")
    if not 1 <= recipe.history <= MAX_HISTORY:
        raise ValueError(f"recipe {text!r}: history={recipe.history} must lie between 1 and {MAX_HISTORY} steps")
    if not recipe.scale > 0:
        raise ValueError(f"recipe {text!r}: scale={recipe.scale} must be above 0")
    if why := float32_fault(recipe.scale, inverse=True):
        raise ValueError(f"recipe {text!r}: scale={recipe.scale} must {why}")
    if not 0 <= recipe.margin <= 32:
        raise ValueError(f"recipe {text!r}: margin={recipe.margin} must lie between 0 and 32 binades")
    if recipe.pow2 not in (0, 1):
        raise ValueError(f"recipe {text!r}: pow2={recipe.pow2} must be 0 or 1")
    for option, unset, scalings in (
        ("scale", 1.0, ("static",)),
        ("history", 16, ("delayed",)),
        ("margin", 0, ("current", "delayed", "mx")),
        ("pow2", 0, ("current", "delayed")),
    ):
        if getattr(recipe, option) != unset and recipe.scaling not in scalings:
            raise ValueError(
                f"recipe {text!r}: {option}={getattr(recipe, option)} of the {role} goes with"
                f" scaling={' or '.join(scalings)}, not {recipe.scaling}"
            )
    if recipe.granularity == "channel" and recipe.scaling != "current":
        raise ValueError(
            f"recipe {text!r}: granularity=channel of the {role} goes with scaling=current, not {recipe.scaling}"
        )
