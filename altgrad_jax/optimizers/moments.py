"""Adam with its moments stored in 8 bits: m in E4M3, v in E5M2, each block of 256 under a scale of its own.

Compare "FP8-LM" (Peng et al. 2023, arXiv 2310.18313) and Fishman et al. 2024, arXiv 2409.12517, who store both moments
in FP8: m, of either sign, wants precision, v, a square, wants range. Both are rounded stochastically. A moving average
whose increment is (1 - b) of itself moves by less than half an ulp of such formats, and to nearest would stand still.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from altgrad_jax.optimizers.draws import update_key
from altgrad_jax.optimizers.grids import parameter_name
from altgrad_jax.precision.formats import get_format
from altgrad_jax.precision.largest import amax
from altgrad_jax.precision.rounding import round_to_format
from altgrad_jax.precision.scaling import scale_from_amax

Array = jax.Array
BLOCK = 256
FIRST, SECOND = "e4m3fn", "e5m2"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Packed:
    """An array in 8 bits.

    Attributes:
      values_nB: blocks of 256 elements in row-major order, in the format's own dtype; the last padded with zeros.
      scale_n1: what each block was multiplied by, float32.
      shape: of the array; static.
    """

    values_nB: Array
    scale_n1: Array
    shape: tuple[int, ...] = field(metadata={"static": True})

    def unpack(self) -> Array:
        """The array, float32."""
        flat = (self.values_nB.astype(jnp.float32) / self.scale_n1).reshape(-1)
        return flat[: _size(self.shape)].reshape(self.shape)


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


def pack(x: Array, fmt: str, key: Array, keep_positive: bool = False) -> Packed:
    """x in a float8 format, rounded stochastically; `keep_positive`: what is above 0 does not become 0."""
    form = get_format(fmt)
    flat = jnp.pad(x.reshape(-1), (0, -x.size % BLOCK)).reshape(-1, BLOCK)
    scale = scale_from_amax(amax(flat, 1), form.max)
    values = round_to_format(flat * scale, form, "stochastic", key=key)
    if keep_positive:
        values = jnp.where(flat > 0, jnp.maximum(values, form.min_positive), values)
    return Packed(values.astype(form.dtype), scale, x.shape)


@dataclass(frozen=True)
class Moved:
    """The update and both moments of one parameter; to JAX a leaf."""

    parts: tuple[Array, Packed, Packed]


def _is_moved(x: Any) -> bool:
    return isinstance(x, Moved)


class Adam8State(NamedTuple):
    """What `scale_by_adam_8bit` carries: updates done, int32, and both moments as trees of `Packed`."""

    steps: Array
    mu: Any
    nu: Any


def scale_by_adam_8bit(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, seed: int | Array = 0
) -> optax.GradientTransformation:
    """`optax.scale_by_adam` with the moments rounded when they are stored; an update uses them unrounded."""

    def init(params):
        def zeros(fmt):
            return jax.tree.map(lambda p: pack(jnp.zeros(p.shape, jnp.float32), fmt, jax.random.key(0)), params)

        return Adam8State(jnp.zeros((), jnp.int32), zeros(FIRST), zeros(SECOND))

    def update(updates, state, params=None):
        del params
        count = state.steps + 1

        def one(path, g, mu, nu):
            name = parameter_name(path)
            m = b1 * mu.unpack() + (1 - b1) * g
            v = b2 * nu.unpack() + (1 - b2) * jnp.square(g)
            u = (m / (1 - jnp.float32(b1) ** count)) / (jnp.sqrt(v / (1 - jnp.float32(b2) ** count)) + eps)
            keys = (update_key(seed, count, f"{name}.{moment}") for moment in ("mu", "nu"))
            return u, pack(m, FIRST, next(keys)), pack(v, SECOND, next(keys), keep_positive=True)

        found = jax.tree_util.tree_map_with_path(lambda *leaves: Moved(one(*leaves)), updates, state.mu, state.nu)
        u, mu, nu = (jax.tree.map(lambda moved, i=i: moved.parts[i], found, is_leaf=_is_moved) for i in range(3))
        return u, Adam8State(count, mu, nu)

    return optax.GradientTransformation(init, update)
