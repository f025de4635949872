"""What `gemm.py` times: single products of operands in one type or another, and the three products of a dense layer.

A product is C = A B, [M, K] by [K, N], of operands that are already in their types. B is stored as [N, K], so that both
have the contraction last: the only form in which FP8 matrix units take them, so no transposition is in the time. A
layer has M tokens, K inputs and N outputs; its products are those of a training step, forward, dx and dw, from bfloat16
activations and gradients and a float32 weight, with everything that turns these into operands.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from altgrad_jax.precision.dot import gemm_scope, matmul, quantised_matmul
from altgrad_jax.precision.kernels.fp8_matmul import fp8_matmul, padded
from altgrad_jax.precision.kernels.tiles import CANDIDATES, Tiles
from altgrad_jax.precision.policy import Policy, resolve
from altgrad_jax.precision.statistics import RoleStats
from altgrad_jax.precision.target import has_wgmma, target_device

Array = jax.Array
LAYER = "layer"  # the name under which the products are traced
BF16, F32 = jnp.dtype("bfloat16"), jnp.dtype("float32")
E4M3, E5M2 = jnp.dtype("float8_e4m3fn"), jnp.dtype("float8_e5m2")
SHORT = {E4M3: "e4m3", E5M2: "e5m2", BF16: "bf16", F32: "f32"}
# Size of what a layer is given: activations after a LayerNorm, initial weights, gradients of a mean over a batch.
SIZES = {"activation": 1.0, "weight": 0.02, "gradient": 1e-4}


class Shape(NamedTuple):
    """Of a product: [m, k] by [k, n]."""

    m: int
    n: int
    k: int

    def __str__(self) -> str:
        return f"{self.m}x{self.n}x{self.k}"

    @property
    def flops(self) -> float:
        """Multiplications and additions."""
        return 2.0 * self.m * self.n * self.k


@dataclass(frozen=True)
class Kind:
    """One thing to be timed, at one shape.

    Attributes:
      name: in the results.
      run: the function, of arrays.
      inputs: makes its arguments, on the device, from a seed.
      products: matrix products that it runs.
      fp8: whether it is asked for in FP8.
      tiles: of a kernel that is tuned.
      note: how it runs here, where that is not what its name says.
    """

    name: str
    run: Callable[..., Any]
    inputs: Callable[[int | Array], tuple[Any, ...]]
    products: int
    fp8: bool
    tiles: Tiles | None = None
    note: str = ""


def base_product(shape: Shape) -> Kind:
    """BF16 operands, BF16 result: what others are compared with."""
    return _by_xla(shape, BF16, BF16, BF16)


def fp8_products(shape: Shape) -> list[Kind]:
    """FP8 operands multiplied by XLA; with a float32 result, as `precision.dot` asks for it, and with a BF16 one."""
    pairs = ((E4M3, E4M3), (E4M3, E5M2), (E5M2, E5M2))
    return [_by_xla(shape, a, b, out) for a, b in pairs for out in (F32, BF16)]


def _by_xla(shape: Shape, a: jnp.dtype, b: jnp.dtype, out: jnp.dtype) -> Kind:
    def run(a_MK: Array, b_NK: Array) -> Array:
        with gemm_scope(LAYER, "forward"):
            return lax.dot_general(a_MK, b_NK, (((1,), (1,)), ((), ())), preferred_element_type=out)

    fp8 = a.itemsize == 1
    name = f"{SHORT[a]} x {SHORT[b]} -> {SHORT[out]}" if fp8 else "bf16"
    return Kind(name, run, lambda seed: _operands(seed, shape, a, b), 1, fp8)


def _operands(seed: int | Array, shape: Shape, a: jnp.dtype, b: jnp.dtype) -> tuple[Array, Array]:
    keys = jax.random.split(jax.random.key(seed))
    return _normal(keys[0], (shape.m, shape.k)).astype(a), _normal(keys[1], (shape.n, shape.k)).astype(b)


def _normal(key: Array, shape: tuple[int, int], size: float = 1.0) -> Array:
    # Drawn in 16 bits: the largest weights here would take gigabytes in 32.
    return size * jax.random.normal(key, shape, BF16)


def kernel_products(shape: Shape) -> list[list[Kind]]:
    """`kernels.fp8_matmul` for either type, in all its candidates for tiles."""
    return [[_by_kernel(shape, dtype, tiles) for tiles in CANDIDATES] for dtype in (E5M2, E4M3)]


def kernel_name(dtype: jnp.dtype) -> str:
    """Of the kernel's entry, with whatever tiles."""
    return f"{SHORT[dtype]} x {SHORT[dtype]} -> f32, Pallas kernel"


def _by_kernel(shape: Shape, dtype: jnp.dtype, tiles: Tiles) -> Kind:
    def run(a_MK: Array, b_NK: Array) -> Array:
        with gemm_scope(LAYER, "forward"):
            return fp8_matmul(a_MK, b_NK, tiles)

    return Kind(kernel_name(dtype), run, lambda seed: _operands(seed, shape, dtype, dtype), 1, True, tiles)


def kernel_obstacle(shape: Shape, tiles: Tiles | None = None) -> str:
    """Why the kernel cannot run here, or these tiles not at this shape; "" if they can."""
    if not has_wgmma():
        return (
            "the kernel's wgmma instructions exist on compute capability 9.0 (H100, H200) alone; this is"
            f" {target_device().device_kind}"
        )
    a, b = (jax.eval_shape(padded, jax.ShapeDtypeStruct((rows, shape.k), E5M2)) for rows in (shape.m, shape.n))
    whole = Shape(a.shape[0], b.shape[0], a.shape[1])
    return "" if tiles is None or tiles.divide(*whole) else f"the tiles do not divide {whole}"


def base_layer(shape: Shape) -> Kind:
    """The layer in BF16."""

    def run(x_MK: Array, w_KN: Array, g_MN: Array) -> Any:
        y_MN, backward = jax.vjp(lambda x, w: matmul(x, w, BF16, BF16, LAYER), x_MK, w_KN)
        return y_MN, *backward(g_MN)

    return Kind("bf16", run, lambda seed: _layer_inputs(seed, shape), 3, False)


def quantised_layer(shape: Shape, recipe: str, kernel: str) -> Kind | str:
    """The layer in a recipe, its products by "xla" or "pallas"; or why it cannot run here."""
    name = recipe if kernel == "xla" else f"{recipe}, Pallas kernel"
    if kernel == "pallas" and (obstacle := kernel_obstacle(shape)):
        return obstacle
    policy = resolve([(LAYER, recipe)], {LAYER: (shape.k, shape.n)}, kernel=kernel)

    def run(x_MK: Array, w_KN: Array, g_MN: Array, state: Any) -> Any:
        prepared, weight_stats = policy.prepare({LAYER: w_KN}, state)
        layer = prepared[LAYER]
        y_MN, backward = jax.vjp(
            lambda x, w, probe: quantised_matmul(x, w, None, layer, probe, BF16), x_MK, w_KN, layer.probe()
        )
        dx_MK, dw_KN, seen = backward(g_MN)
        stats = {"weight": weight_stats[LAYER], "activation": seen.activation, "gradient": seen.gradient}
        return y_MN, dx_MK, dw_KN, policy.update(state, {LAYER: stats})

    [plan] = policy.plans
    backend = "native" if plan.native else "emulated"
    note = f"{backend} ({plan.why})" if plan.why else backend
    return Kind(name, run, lambda seed: (*_layer_inputs(seed, shape), _second_step(policy)), 3, True, note=note)


def _layer_inputs(seed: int | Array, shape: Shape) -> tuple[Array, Array, Array]:
    keys = jax.random.split(jax.random.key(seed), 3)
    x_MK = _normal(keys[0], (shape.m, shape.k), SIZES["activation"])
    w_KN = _normal(keys[1], (shape.k, shape.n), SIZES["weight"]).astype(F32)
    return x_MK, w_KN, _normal(keys[2], (shape.m, shape.n), SIZES["gradient"])


def _second_step(policy: Policy) -> Any:
    """The state after one step, so that delayed scales come from the history: 5 standard deviations are the amax."""
    stats = {LAYER: {role: RoleStats(jnp.float32(5 * size)) for role, size in SIZES.items()}}
    return policy.update(policy.init(), stats)
