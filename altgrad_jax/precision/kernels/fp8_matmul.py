"""A matrix product of FP8 operands on Hopper's tensor cores, E5M2 by E5M2 among them, written in Pallas (Mosaic GPU).

cuBLASLt refuses E5M2 by E5M2, and whether XLA's Triton engine takes it is up to its autotuner and flags. This kernel
does not depend on either: it issues `wgmma` instructions (PTX ISA 8.0, section 9.7.15) on the FP8 operands, summed in
float32.

A block of threads computes a tile of the result. Its memory warpgroup copies slices of both operands into shared
memory, several ahead, by the tensor memory accelerator; two compute warpgroups multiply them, each for half the rows.
Shape letters: M, N rows of the operands, K the contraction, which is the last axis of both, as FP8 `wgmma` needs it.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from altgrad_jax.precision.kernels.tiles import COMPUTE_WARPGROUPS, MULTIPLE, Product, Tiles, choose_tiles

Array = jax.Array
DTYPES = (jnp.float8_e5m2, jnp.float8_e4m3fn)
SWIZZLE = 128  # bytes: the widest pattern in which wgmma reads shared memory without bank conflicts


def padded(x_RK: Array) -> Array:
    """With zeros up to a multiple of `MULTIPLE` along both axes."""
    return lax.pad(x_RK, np.zeros((), x_RK.dtype), [(0, -size % MULTIPLE, 0) for size in x_RK.shape])


def product_of(a_MK: Array, b_NK: Array) -> Product:
    """The product as a table of tiles names it: the operands' type, and their sizes once they are padded."""
    whole = (size + -size % MULTIPLE for size in (a_MK.shape[0], b_NK.shape[0], a_MK.shape[1]))
    return Product(a_MK.dtype.name.removeprefix("float8_"), *whole)


def reference(a_MK: Array, b_NK: Array) -> Array:
    """What the kernel computes, [M, N] float32: a b^T."""
    return lax.dot_general(
        a_MK.astype(jnp.float32), b_NK.astype(jnp.float32), (((1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST
    )


def fp8_matmul(a_MK: Array, b_NK: Array, tiles: Tiles | None = None, interpret: Any = None) -> Array:
    """a b^T of two matrices of one FP8 type, [M, N] float32, of any size.

    Args:
      a_MK: float8_e5m2 or float8_e4m3fn.
      b_NK: the same type.
      tiles: how to cut the padded product; by its size if not given.
      interpret: parameters of Pallas's GPU interpreter, to run on a CPU.

    Raises:
      ValueError: the types differ or are none of the two, or the tiles do not divide the padded product.
    """
    if a_MK.dtype != b_NK.dtype or a_MK.dtype not in DTYPES:
        raise ValueError(f"the kernel multiplies float8_e5m2 or float8_e4m3fn, not {a_MK.dtype} by {b_NK.dtype}")
    rows, columns = a_MK.shape[0], b_NK.shape[0]
    a_MK, b_NK = padded(a_MK), padded(b_NK)
    (m, k), n = a_MK.shape, b_NK.shape[0]
    tiles = tiles or choose_tiles(m, n, k)
    if not tiles.divide(m, n, k):
        raise ValueError(f"{tiles} do not divide a product of {m} x {n} x {k}")
    # The interpreter knows no transposed views of shared memory, so there the second operand comes transposed.
    b, b_transposed = (b_NK, True) if interpret is None else (b_NK.T, False)
    run = plgpu.kernel(
        functools.partial(_tile, tiles=tiles, slices=k // tiles.k, b_transposed=b_transposed),
        out_type=jax.ShapeDtypeStruct((m, n), jnp.float32),
        scratch_types=[plgpu.SMEM((COMPUTE_WARPGROUPS, tiles.m, tiles.n), jnp.float32, transforms=_layout(4))],
        grid=(m // (COMPUTE_WARPGROUPS * tiles.m), n // tiles.n),
        grid_names=("m", "n"),
        num_threads=COMPUTE_WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        **({} if interpret is None else {"interpret": interpret}),
    )
    return run(a_MK, b)[:rows, :columns]


def _layout(itemsize: int) -> tuple[Any, Any]:
    """How a tile lies in shared memory: in blocks of 8 rows, swizzled, as wgmma and the memory accelerator read it."""
    return plgpu.TilingTransform((8, SWIZZLE // itemsize)), plgpu.SwizzleTransform(SWIZZLE)


def _tile(a_gmem, b_gmem, out_gmem, out_smem, *, tiles: Tiles, slices: int, b_transposed: bool) -> None:
    """One block's tile: the pipeline over slices of the contraction, then the result's way out."""
    warpgroup = lax.axis_index("warpgroup")
    block_rows = COMPUTE_WARPGROUPS * tiles.m
    first_row, first_column = lax.axis_index("m") * block_rows, lax.axis_index("n") * tiles.n
    columns = pl.ds(first_column, tiles.n)
    own = pl.ds(warpgroup * tiles.m, tiles.m)  # this warpgroup's rows of the tile

    def multiply(_, a_smem, b_smem, sum_mn):
        b_kn = plgpu.transpose_ref(b_smem, (1, 0)) if b_transposed else b_smem
        plgpu.wgmma(sum_mn, a_smem.at[own], b_kn)
        plgpu.wgmma_wait(0)
        return sum_mn

    def compute(over_slices):
        @functools.partial(pl.run_scoped, sum_mn=plgpu.ACC((tiles.m, tiles.n), jnp.float32))
        def _(sum_mn):
            over_slices(sum_mn)
            out_smem[warpgroup] = sum_mn[...]
            plgpu.commit_smem()
            rows = pl.ds(first_row + warpgroup * tiles.m, tiles.m)
            plgpu.copy_smem_to_gmem(out_smem.at[warpgroup], out_gmem.at[rows, columns])
            plgpu.wait_smem_to_gmem(0)

    a_spec = plgpu.BlockSpec((block_rows, tiles.k), lambda k: (0, k), transforms=_layout(1))
    if b_transposed:
        b_spec = plgpu.BlockSpec((tiles.n, tiles.k), lambda k: (0, k), transforms=_layout(1))
        b = b_gmem.at[columns, :]
    else:
        b_spec, b = plgpu.BlockSpec((tiles.k, tiles.n), lambda k: (k, 0)), b_gmem.at[:, columns]
    plgpu.emit_pipeline_warp_specialized(
        multiply,
        grid=(slices,),
        in_specs=[a_spec, b_spec],
        max_concurrent_steps=tiles.stages,
        num_compute_wgs=COMPUTE_WARPGROUPS,
        memory_registers=40,
        wg_axis="warpgroup",
        compute_context=compute,
    )(a_gmem.at[pl.ds(first_row, block_rows), :], b)
