"""Quantisation and a dense layer's three products in NumPy, from their definitions; nothing shared with altgrad_jax.

A tensor is rounded with the format's table of magnitudes: those of ml_dtypes where it has the type, else computed code
by code from widths and bias. Scales are float32, as defined, and so is x s; everything after that is float64, in
which neither a value q / s nor a product of two is rounded by more than 1e-16.

Sources: OCP Microscaling Formats 1.0 (section 6.3, block scales), Micikevicius et al. 2022 (FP8, arXiv 2209.05433).
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import ml_dtypes
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
LARGEST_TARGET = 2.0**50
MX_BLOCK = 32
# Our names of the types that ml_dtypes has.
NATIVE = ("e5m2", "e4m3", "e3m4", "e4m3fn", "e5m2fnuz", "e4m3fnuz", "e4m3b11fnuz")
ML_DTYPES = {name: f"float8_{name}" for name in NATIVE}
ML_DTYPES |= {"e3m2fn": "float6_e3m2fn", "e2m3fn": "float6_e2m3fn", "e2m1fn": "float4_e2m1fn", "bfloat16": "bfloat16"}


def ml_dtype(name: str) -> np.dtype:
    """The type of a native format."""
    return np.dtype(getattr(ml_dtypes, ML_DTYPES[name]))


@cache
def magnitudes(name: str) -> Floats:
    """All finite values from 0 up, in code order: the index is the magnitude's code."""
    if name in ML_DTYPES:
        dtype = ml_dtype(name)
        bits = {"float4": 4, "float6": 6, "float8": 8, "bfloat": 16}[re.match(r"[a-z]+(4|6|8)?", dtype.name)[0]]
        codes = np.arange(1 << (bits - 1)).astype(np.uint16 if bits == 16 else np.uint8)
        values = codes.view(dtype).astype(np.float64)
        return values[np.isfinite(values)]
    widths = re.fullmatch(r"e(\d+)m(\d+)(:inf=0,nan=0)?", name)
    exponent_bits, mantissa_bits = int(widths[1]), int(widths[2])
    bias = 2 ** (exponent_bits - 1) - 1 if exponent_bits > 1 else 0
    values = []
    for field in range(2**exponent_bits):
        for mantissa in range(2**mantissa_bits):
            if exponent_bits == 0:
                values.append(mantissa / 2**mantissa_bits)
            elif field == 0:
                values.append(mantissa / 2**mantissa_bits * 2.0 ** (1 - bias))
            else:
                values.append((1 + mantissa / 2**mantissa_bits) * 2.0 ** (field - bias))
    return np.array(values)


def to_nearest(x: npt.ArrayLike, name: str) -> Floats:
    """x rounded to the format: the nearest value, of two equally near ones that with the even code; saturating."""
    x = np.asarray(x, np.float64)
    if name == "float32":
        return x.astype(np.float32).astype(np.float64)
    table = magnitudes(name)
    size = np.minimum(np.abs(x), table[-1])
    above = np.clip(np.searchsorted(table, size), 1, table.size - 1)
    below = above - 1
    middle = (table[below] + table[above]) / 2
    code = np.where((size > middle) | ((size == middle) & (above % 2 == 0)), above, below)
    return np.where(np.isnan(x), x, np.copysign(table[code], x))


@dataclass(frozen=True)
class Role:
    """How one operand is quantised; the fields mean what they mean in a recipe."""

    fmt: str
    scaling: str = "delayed"
    granularity: str = "tensor"
    scale: float = 1.0
    margin: int = 0
    history: tuple[float, ...] = ()


@dataclass(frozen=True)
class Quantised:
    """q = round(x s) and s, of an operand whose value is q / s; NaN where one that shares its scale is not finite."""

    q: Floats
    s: npt.NDArray[np.floating]
    spoilt: npt.NDArray[np.bool_]

    @property
    def value(self) -> Floats:
        """q / s, the inverse scale being float32 as well, but for blocks', which are powers of two."""
        return np.where(self.spoilt, np.nan, self.q * (self.s.dtype.type(1) / self.s).astype(np.float64))


def quantise(x: npt.ArrayLike, role: Role, axis: int) -> Quantised:
    """A matrix that is contracted over `axis`."""
    x = np.asarray(x, np.float32)
    bad = ~np.isfinite(x)
    kind = "mx" if role.scaling == "mx" else role.granularity
    with np.errstate(invalid="ignore", over="ignore"):
        known = np.where(bad, np.float32(0), x)  # whatever becomes of what shares a scale with the others
        if role.scaling == "mx":
            s = block_scales(known, role.fmt, axis)
            scaled = known.astype(np.float64) * s
        else:
            s = np.asarray(_scale(known, role, axis), np.float32)
            scaled = known * s
        return Quantised(to_nearest(scaled, role.fmt), s, shares_a_scale(bad, kind, axis))


def shares_a_scale(marked: npt.NDArray[np.bool_], kind: str, axis: int) -> npt.NDArray[np.bool_]:
    """Which elements have a scale in common with one that is marked: of a "tensor", "channel" or block ("mx")."""
    if kind == "tensor":
        return np.full(marked.shape, marked.any())
    if kind == "channel":
        return np.broadcast_to(marked.any(axis=axis, keepdims=True), marked.shape)
    rows = np.moveaxis(marked, axis, 1)
    starts = np.arange(0, rows.shape[1], MX_BLOCK)
    blocks = np.logical_or.reduceat(rows, starts, axis=1)
    return np.moveaxis(np.repeat(blocks, MX_BLOCK, axis=1)[:, : rows.shape[1]], 1, axis)


def _scale(x: npt.NDArray[np.float32], role: Role, axis: int) -> npt.ArrayLike:
    if role.scaling == "none":
        return 1.0
    if role.scaling == "static":
        return role.scale
    amax = np.abs(x).max(axis=axis, keepdims=True) if role.granularity == "channel" else np.abs(x).max()
    if role.scaling == "delayed" and any(role.history):
        amax = np.float32(max(role.history))
    return scale_of(amax, role.fmt, role.margin)


def scale_of(amax: npt.ArrayLike, name: str, margin: int = 0) -> npt.NDArray[np.float32]:
    """The float32 that brings amax to the format's largest value, or `margin` binades below; 1 for amax 0."""
    target = np.float32(min(magnitudes(name)[-1], LARGEST_TARGET) / 2**margin)
    amax = np.asarray(amax, np.float32)
    return np.where(amax > 0, target / np.where(amax > 0, amax, np.float32(1)), np.float32(1))


def block_scales(x: npt.NDArray[np.float32], name: str, axis: int) -> Floats:
    """s = 2^-k of every element, k that of its block of 32: floor(log2 amax) less the largest value's exponent."""
    largest_exponent = math.frexp(magnitudes(name)[-1])[1] - 1
    rows = np.moveaxis(x, axis, 1)
    scales = np.ones(rows.shape)
    for i, row in enumerate(rows):
        for start in range(0, row.size, MX_BLOCK):
            amax = float(np.abs(row[start : start + MX_BLOCK]).max())
            if amax > 0:
                k = math.frexp(amax)[1] - 1 - largest_exponent
                scales[i, start : start + MX_BLOCK] = 2.0 ** -min(max(k, -127), 127)
    return np.moveaxis(scales, 1, axis)


@dataclass(frozen=True)
class Products:
    """What one dense layer computes, float64, and a bound on what float32 accumulation may do to each."""

    y: Floats
    dx: Floats
    dw: Floats
    dbias: Floats
    bounds: tuple[Floats, Floats, Floats]


def products(x, w, bias, g, roles: Sequence[Role]) -> Products:
    """y = x w + b, dx = g w^T and dw = x^T g of operands each rounded for its product; db is the sum of g itself.

    Args:
      x: [N, I].
      w: [I, O].
      bias: [O].
      g: [N, O], the gradient of y.
      roles: of x, w and g.
    """
    role_x, role_w, role_g = roles
    bias, g64 = np.asarray(bias, np.float64), np.asarray(g, np.float64)
    pairs = (
        (quantise(x, role_x, 1).value, quantise(w, role_w, 0).value),
        (quantise(g, role_g, 1).value, quantise(w, role_w, 1).value.T),
        (quantise(x, role_x, 0).value.T, quantise(g, role_g, 0).value),
    )
    y, dx, dw = (left @ right for left, right in pairs)
    # n products and sums, two multiplications by scales and a bias: each off by 2^-24 of what it adds up at most.
    bounds = [(left.shape[1] + 4) * 2.0**-24 * (np.abs(left) @ np.abs(right)) for left, right in pairs]
    bounds[0] = bounds[0] + 2.0**-23 * np.abs(bias)
    return Products(y + bias, dx, dw, g64.sum(axis=0), tuple(bounds))
