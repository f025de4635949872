"""Rounding to a format: bytes/s beside those of a copy of the same array.

    python benchmarks/rounding.py [--elements=16777216] [--rounds=15] [--out=docs/results/rounding.json]

Every round times everything once, one after the other, and a ratio is the median over rounds of two times of the same
round, so that a machine whose speed drifts drifts for both. Bytes are those of the array read and of the array written.

There are two copies to compare with. `copy` is `jnp.copy` under jit. `loop` is an elementwise operation compiled by XLA
that does next to nothing: an exclusive or with a zero that it does not know. Neither is a bound on the other, nor on
rounding. All is measured with large pages, as training runs, and with the default allocator, where every result is
written to fresh pages.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from common import in_subprocess, write_results

from altgrad_jax.allocator import TUNABLES

FORMATS = ("e5m2", "e3m4", "e4m3fn", "e0m7")
DTYPES = ("float32", "bfloat16")
REFERENCE_SHARE = 64  # the NumPy references get this part of the array


def main() -> None:
    """Runs each dtype and allocator in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=1 << 24)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--worker", choices=DTYPES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(measure(arguments.worker, arguments.elements, arguments.rounds)))
        return
    results: dict[str, Any] = {"elements": arguments.elements, "rounds": arguments.rounds}
    for allocator, tunables in (("large_pages", TUNABLES), ("default_allocator", "")):
        for dtype in DTYPES:
            options = [f"--worker={dtype}", f"--elements={arguments.elements}", f"--rounds={arguments.rounds}"]
            environment = {"GLIBC_TUNABLES": tunables}
            results[f"{dtype}_{allocator}"] = in_subprocess(__file__, options, environment)
    write_results(arguments.out, results)


def measure(dtype: str, elements: int, rounds: int) -> dict[str, Any]:
    """Bytes/s of everything on one array, and over those of both copies."""
    import jax
    import numpy as np

    array = jax.random.normal(jax.random.key(0), (elements,)).astype(dtype)
    runs = {name: (run, 1) for name, run in jitted(array).items()}
    for name, run in in_numpy(np.asarray(array[: elements // REFERENCE_SHARE])).items():
        runs[name] = (run, REFERENCE_SHARE)
    for run, _ in runs.values():  # compiles
        jax.block_until_ready(run())
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, (run, share) in runs.items():
            began = time.perf_counter()
            jax.block_until_ready(run())
            taken[name].append((time.perf_counter() - began) * share)
    result: dict[str, Any] = {}
    for name, seconds in taken.items():
        result[name] = {"GB_per_second": round(2 * array.nbytes / statistics.median(seconds) / 1e9, 3)}
        for other in ("copy", "loop"):
            ratio = statistics.median(a / b for a, b in zip(taken[other], seconds, strict=True))
            result[name][f"over_{other}"] = round(ratio, 4)
    return result


def jitted(array) -> dict[str, Callable[[], Any]]:
    """What XLA compiles: copies, and roundings with the format built in and traced."""
    import jax
    import jax.numpy as jnp

    from altgrad_jax.precision.formats import get_format
    from altgrad_jax.precision.grid import Grid
    from altgrad_jax.precision.rounding import has_native_cast, native_cast, round_to_format

    @jax.jit
    def loop(x, zero):
        return jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(x, zero.dtype) ^ zero, x.dtype)

    @partial(jax.jit, static_argnums=(1, 2))
    def rounded(x, fmt, rounding, key):
        return round_to_format(x, fmt, rounding, key=key)

    @partial(jax.jit, static_argnums=2)
    def traced(x, grid, rounding, key):
        return round_to_format(x, grid, rounding, key=key)

    @partial(jax.jit, static_argnums=1)
    def cast_and_back(x, fmt):
        return native_cast(x, fmt).astype(x.dtype)

    zero = jnp.zeros((), f"uint{8 * array.dtype.itemsize}")
    key = jax.random.key(1)
    grid = jax.tree.map(jnp.asarray, Grid.of("e3m4"))
    runs: dict[str, Callable[[], Any]] = {
        "copy": partial(jax.jit(jnp.copy), array),
        "loop": partial(loop, array, zero),
    }
    for rounding in ("nearest", "stochastic"):
        for name in FORMATS:
            runs[f"{name} {rounding}"] = partial(rounded, array, get_format(name), rounding, key)
        runs[f"traced {rounding}"] = partial(traced, array, grid, rounding, key)
    for name in FORMATS:
        if has_native_cast(name):
            runs[f"{name} native cast"] = partial(cast_and_back, array, get_format(name))
    runs["random bits of jax.random"] = partial(
        jax.jit(partial(jax.random.bits, shape=array.shape, dtype=jnp.uint32)), key
    )
    return runs


def in_numpy(array) -> dict[str, Callable[[], Any]]:
    """The same to nearest by ml_dtypes, which does not saturate, and by gfloat where it is installed."""
    import ml_dtypes
    import numpy as np

    def cast(dtype):
        return array.astype(dtype).astype(array.dtype)

    runs: dict[str, Callable[[], Any]] = {
        f"{name} ml_dtypes": partial(cast, getattr(ml_dtypes, f"float8_{name}")) for name in ("e5m2", "e3m4", "e4m3fn")
    }
    try:
        import gfloat
        from gfloat import formats
    except ImportError:
        return runs
    for name, info in (("e5m2", formats.format_info_ocp_e5m2), ("e4m3fn", formats.format_info_ocp_e4m3)):
        wide = array.astype(np.float32)
        runs[f"{name} gfloat"] = partial(gfloat.round_ndarray, info, wide, sat=True)
    return runs


if __name__ == "__main__":
    main()
