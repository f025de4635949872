"""The formats that have names, and how a name is read.

Names: ml_dtypes' (`e5m2`, `e4m3fn`, `e8m0fnu`, ...) mean its types. Any other `e{E}m{M}` is the format with those
widths in which every code is finite, as is `e{E}m{M}:inf=0,nan=0` where ml_dtypes has taken the plain name.
`binary8p1` to `binary8p7` are IEEE P3109's. Anything else: `get_format("e3m4:bias=1,inf=0,nan=0")`.
"""

import difflib
import re
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from altgrad_jax.precision.float_format import MAX_BITS, FloatFormat
from altgrad_jax.precision.spellings import ALIASES, AMBIGUOUS, ELSEWHERE, own_spelling, p3109, plain_spelling

FormatLike: TypeAlias = FloatFormat | str | npt.DTypeLike  # what `get_format` takes


def default_bias(exponent_bits: int) -> int:
    """2^(E-1) - 1, and 0 for E <= 1."""
    return max(0, (1 << exponent_bits >> 1) - 1)


def _ml_dtypes() -> list[FloatFormat]:
    """The small floats that ml_dtypes defines, as described in its README and in the OCP FP8 and MX specifications."""

    def named(name: str, e: int, m: int, bias: int, *, inf: bool = False, nan: str, number_line: bool = True):
        dtype = f"float8_{name}"
        return FloatFormat(name, e, m, bias, inf, nan, signed=number_line, has_zero=number_line, dtype_name=dtype)

    return [
        named("e5m2", 5, 2, 15, inf=True, nan="ieee"),
        named("e4m3", 4, 3, 7, inf=True, nan="ieee"),
        named("e3m4", 3, 4, 3, inf=True, nan="ieee"),
        named("e4m3fn", 4, 3, 7, nan="top"),
        named("e5m2fnuz", 5, 2, 16, nan="zero"),
        named("e4m3fnuz", 4, 3, 8, nan="zero"),
        named("e4m3b11fnuz", 4, 3, 11, nan="zero"),
        named("e8m0fnu", 8, 0, 127, nan="top", number_line=False),
        # XLA has no arrays of these on every backend; they are rounded to by the general path.
        FloatFormat("e3m2fn", 3, 2, 3),
        FloatFormat("e2m3fn", 2, 3, 1),
        FloatFormat("e2m1fn", 2, 1, 1),
    ]


def _p3109() -> list[FloatFormat]:
    """IEEE P3109 binary8 with precision 1 to 7: one NaN in place of -0, infinities, bias 2^(7 - p)."""
    return [FloatFormat(f"binary8p{p}", 8 - p, p - 1, 1 << (7 - p), inf=True, nan="zero") for p in range(1, 8)]


def all_finite(exponent_bits: int, mantissa_bits: int) -> FloatFormat:
    """The sign-magnitude format with these widths in which every code is finite."""
    plain = f"e{exponent_bits}m{mantissa_bits}"
    taken = any(fmt.name == plain for fmt in _ml_dtypes())
    name = f"{plain}:inf=0,nan=0" if taken else plain
    return FloatFormat(name, exponent_bits, mantissa_bits, default_bias(exponent_bits))


def family(bits: int) -> tuple[FloatFormat, ...]:
    """All formats of `bits` magnitude bits in which every code is finite: family(7) is e0m7, e1m6, ... e7m0."""
    if not 1 <= bits < MAX_BITS:
        raise ValueError(f"family({bits}): formats have 1 to {MAX_BITS - 1} bits beside the sign")
    return tuple(all_finite(e, bits - e) for e in range(bits + 1))


@cache
def registry() -> dict[str, FloatFormat]:
    """Every named format, by name."""
    formats = [
        *_ml_dtypes(),
        *_p3109(),
        FloatFormat("float16", 5, 10, 15, inf=True, nan="ieee", dtype_name="float16"),
        FloatFormat("bfloat16", 8, 7, 127, inf=True, nan="ieee", dtype_name="bfloat16"),
        FloatFormat("float32", 8, 23, 127, inf=True, nan="ieee", dtype_name="float32"),
        *family(7),
        *family(15),
    ]
    return {fmt.name: fmt for fmt in formats}


def get_format(name: FormatLike) -> FloatFormat:
    """The format of a name or dtype; a FloatFormat is returned as it is.

    Args:
      name: a name of `registry()`; another library's spelling of one, in upper or lower case (`bf16`, `F8E4M3FN`,
        `torch.float8_e5m2`, `fp8e4nv`, `binary8p4se`); widths with options,
        "e{E}m{M}[:bias=INT][,inf=0|1][,nan=0|1|ieee|top|zero]", where with inf=1, nan=1 means "ieee", without "top"; or
        a dtype of NumPy, ml_dtypes, JAX or torch.

    Raises:
      TypeError: it is nothing of that kind.
      ValueError: no format has this name; or several have, all of which are named; or the widths and options contradict
        each other.
    """
    if isinstance(name, FloatFormat):
        if registry().get(name.name, name) != name:
            raise ValueError(f"{name.name!r} is the name of another format: {registry()[name.name]}, not {name}")
        return name
    text = name.strip() if isinstance(name, str) else _name_of_dtype(name)
    if own_spelling(text) in registry():
        return registry()[own_spelling(text)]
    plain = plain_spelling(text)
    if plain in AMBIGUOUS and text not in AMBIGUOUS[plain]:
        raise ValueError(f"format {text!r} can mean {_listed(map(get_format, AMBIGUOUS[plain]), ' or ')}: name one")
    if plain in registry():
        return registry()[plain]
    if described := p3109(plain):
        return _p3109_format(*described)
    widths, _, options = plain.partition(":")
    match = re.fullmatch(r"e(\d{1,3})m(\d{1,3})", widths, re.ASCII)
    if match is None:
        raise ValueError(_unknown(text, plain))
    return _user_format(int(match[1]), int(match[2]), options)


def _name_of_dtype(dtype: Any) -> str:
    """The name of a dtype, of NumPy and its like or of torch. Raises TypeError if it is none."""
    if type(dtype).__module__ == "torch":
        return str(dtype)
    try:
        if not isinstance(dtype, np.dtype | type):
            raise TypeError
        return np.dtype(dtype).name
    except TypeError:
        raise TypeError(
            f"a format is a FloatFormat, a name such as 'e4m3fn', or a dtype; {type(dtype).__name__} is none of these"
        ) from None


def _listed(formats: Iterable[FloatFormat], between: str = ", ") -> str:
    """ "e4m3fn (largest 448) or e4m3 (largest 240)"."""
    return between.join(f"{fmt.name} (largest {fmt.max:g})" for fmt in formats)


def _unknown(text: str, plain: str) -> str:
    """What is said of a name that no format has."""
    from altgrad_jax.precision.recipes import RECIPES  # which are made of formats

    if plain in RECIPES:
        made_of = " and ".join(dict.fromkeys(role.fmt.name for role in RECIPES[plain]))
        return (
            f"{text!r} is a recipe, of {made_of}, and no format: it says how layers are quantised, and goes into"
            " config.precision.rules"
        )
    if plain in ELSEWHERE:
        return f"unknown format {text!r}: {ELSEWHERE[plain]}"
    widths = re.search(r"e\d+m\d+", plain)
    alike = [fmt for name, fmt in registry().items() if widths and re.fullmatch(rf"{widths[0]}(\D.*)?", name)]
    if alike:
        return f"unknown format {text!r}: with these widths there are {_listed(alike)}"
    nearest = difflib.get_close_matches(plain, [*registry(), *ALIASES], 1, cutoff=0.5)
    hint = f"did you mean {nearest[0]!r}?" if nearest else "python -m altgrad_jax.formats lists them"
    return f"unknown format {text!r}: {hint}"


def _p3109_format(bits: int, precision: int, signed: bool, extended: bool) -> FloatFormat:
    """IEEE P3109's binary{K}p{P}{s,u}{e,f}: K bits, P of precision, one NaN, infinities if extended.

    With a sign NaN takes the place of -0, without one it is the last code; the bias is 2^(K - P - 1) or 2^(K - P).
    """
    name = f"binary{bits}p{precision}{'su'[not signed]}{'ef'[not extended]}"
    if not 1 <= precision <= bits - signed:
        raise ValueError(f"format {name}: P3109 has precisions of 1 to {bits - signed} in {bits} bits")
    e_bits, m_bits = bits - precision + (not signed), precision - 1
    if not signed:
        return FloatFormat(name, e_bits, m_bits, 1 << (bits - precision), extended, "top", signed=False)
    return _one_spelling(e_bits, m_bits, 1 << (bits - precision - 1), extended, "zero")


def _user_format(exponent_bits: int, mantissa_bits: int, options: str) -> FloatFormat:
    """A format by its widths and "bias=1,inf=0,nan=0"."""
    plain = f"e{exponent_bits}m{mantissa_bits}"
    given = dict(option.partition("=")[::2] for option in options.split(",") if option)
    if len(given) < options.count(",") + bool(options):
        raise ValueError(f"format {plain}:{options}: an option is empty or given twice")
    if unknown := sorted(given.keys() - {"bias", "inf", "nan"}):
        raise ValueError(f"format {plain}:{options}: unknown option {unknown[0]!r}; there are bias, inf and nan")
    inf, nan = given.get("inf", "0"), given.get("nan", "0")
    if inf not in ("0", "1") or nan not in ("0", "1", "ieee", "top", "zero"):
        raise ValueError(f"format {plain}:{options}: inf is 0 or 1, nan is 0, 1, ieee, top or zero")
    kind = {"0": "none", "1": "ieee" if inf == "1" else "top"}.get(nan, nan)
    # Of widths beyond MAX_BITS the bias does not matter: they are refused.
    bias_text = given.get("bias", str(default_bias(min(exponent_bits, MAX_BITS))))
    if not re.fullmatch(r"-?\d{1,9}", bias_text):
        raise ValueError(f"format {plain}:{options}: bias={bias_text!r} is no integer of up to 9 digits")
    return _one_spelling(exponent_bits, mantissa_bits, int(bias_text), inf == "1", kind)


def _one_spelling(exponent_bits: int, mantissa_bits: int, bias: int, inf: bool, nan: str) -> FloatFormat:
    """The signed format with these fields, by its one name, so that equal formats have equal names."""
    name = f"e{exponent_bits}m{mantissa_bits}:bias={bias},inf={inf:d},nan={'0' if nan == 'none' else nan}"
    fmt = FloatFormat(name, exponent_bits, mantissa_bits, bias, inf, nan)
    for known in registry().values():
        if replace(known, name=name, dtype_name="") == fmt:
            return known
    return fmt
