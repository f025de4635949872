"""Timing on a device: many runs in one dispatch, and several programs in turn.

A large GPU multiplies the matrices of a small layer in less time than the host needs to ask for it. So there one
dispatch runs a product many times, in a loop that XLA compiles. Each turn of the loop has `UNROLL` runs, each on inputs
of its own, so that none is another's common subexpression; every result is part of what the loop carries, so that none
is dropped; and each run's inputs pass an optimization barrier with the result of the turn before, so that nothing is
moved out of the loop. What the loop itself costs, one small kernel a turn that counts and one filling of the results
with zeros a dispatch, is spread over those runs. `executions` counts the products in the compiled program, to see that
all are there. On a CPU a dispatch is nothing beside a product, and one dispatch is one run.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from altgrad_jax.precision.audit import Gemm

UNROLL = 4
DISPATCH_SECONDS = 0.05  # about what one dispatch should take on a GPU
ASSUMED_FLOPS = 4e14  # a second, of a large GPU, to guess how many runs that is


def runs_per_dispatch(flops: float, platform: str) -> int:
    """How often a dispatch runs something of so many operations."""
    if platform == "cpu":
        return 1
    return max(1, math.ceil(DISPATCH_SECONDS * ASSUMED_FLOPS / flops / UNROLL)) * UNROLL


def input_sets(times: int) -> int:
    """How many sets of inputs `repeated` takes."""
    return 1 if times == 1 else UNROLL


def repeated(run: Callable[..., Any], times: int) -> Callable[..., Any]:
    """A function of `input_sets` tuples, `run`'s arguments, that runs it so often: once, or a multiple of `UNROLL`."""
    if times == 1:
        return lambda args: run(*args)

    def loop(*sets: tuple[Any, ...]) -> Any:
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(run, *sets[0]))

        def turn(_: Any, before: list[Any]) -> list[Any]:
            results: list[Any] = []
            for args, last in zip(sets, before, strict=True):
                held, _ = lax.optimization_barrier((args, last))
                results.append(run(*held))
            return results

        return lax.fori_loop(0, times // UNROLL, turn, [zeros] * UNROLL)

    return loop


def executions(gemms: list[Gemm], layer: str) -> int:
    """How many products of the layer a program runs."""
    return sum(gemm.times for gemm in gemms if gemm.layer == layer)


def seconds_of(run: Callable[[], Any]) -> float:
    """Wall time until its result is there."""
    began = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - began


def in_turn(runs: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every run, one a round, all in turn within a round: a machine that drifts drifts for all."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            taken[name].append(seconds_of(run))
    return taken


def speed_over(base: list[float], taken: list[float]) -> float:
    """How many times as fast as the base: median over rounds of the ratio of two times of one round."""
    return statistics.median(a / b for a, b in zip(base, taken, strict=True))
