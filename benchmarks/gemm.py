"""Matrix products in FP8 beside BF16: alone, and as the three products of a dense layer with all its quantisation.

    python benchmarks/gemm.py [--shapes 8192x3072x768 ...] [--minutes=10] [--out=docs/results/gpu/gemm.json]
    python benchmarks/gemm.py --gpu=h100      # compiled for a GPU that need not be here: engines, no times
    python benchmarks/gemm.py --tiny          # seconds on a CPU: shows that it runs; its figures say nothing

A shape is MxNxK, [M, K] by [K, N]. The first one is square and large: the best rate there, in BF16 and in FP8, is the
ceiling of which every other rate is given as a share. For each shape:

- products: BF16; FP8 operands, quantised before, by XLA with a float32 and with a BF16 result; by the Pallas kernel in
  every candidate for its tiles, of which the fastest takes part in the comparison (`tiles` has all of them).
- layers: forward, dx and dw of a dense layer with K inputs and N outputs on M tokens, weight and activations quantised
  and amaxes collected, in each recipe, beside the same in BF16. Rates count the products alone.

A time is the median over rounds of one dispatch, divided by the runs in it (`timing.py` says how one dispatch runs a
product many times on a GPU); a speed over BF16 is the median over rounds of the ratio to BF16 in the same round. What
multiplied, and in which types, is read from the compiled program. What cannot run is in the results with the reason.
"""

import argparse
import functools
import itertools
import re
import statistics
import time
from collections.abc import Iterator
from typing import Any

import jax
from common import failed, is_out_of_memory, save_results, skipped, write_results
from gemm_kinds import (
    LAYER,
    Kind,
    Shape,
    base_layer,
    base_product,
    fp8_products,
    kernel_obstacle,
    kernel_products,
    quantised_layer,
)
from jax.sharding import SingleDeviceSharding
from timing import executions, in_turn, input_sets, repeated, runs_per_dispatch, speed_over

from altgrad_jax.precision.audit import find_gemms
from altgrad_jax.precision.target import GPU_TARGETS, absent_gpu, target_device

TOKENS = 8192
CEILING = Shape(8192, 8192, 8192)
RECIPES = (("hybrid", "xla"), ("e4m3", "xla"), ("e5m2", "xla"), ("e5m2", "pallas"))
TUNING_ROUNDS = 3


def default_shapes() -> list[Shape]:
    """Dense layers on 8192 tokens, the large ones first; of the small model also a chunk of the output layer."""
    large = [Shape(TOKENS, 16384, 4096), Shape(TOKENS, 4096, 4096)]
    gpt2 = [
        Shape(TOKENS, outputs * width, inputs * width)
        for width in (2048, 1024, 768)  # 1.3B, 350M, 124M
        for outputs, inputs in ((3, 1), (1, 1), (4, 1), (1, 4))
    ]
    return [*large, *gpt2, Shape(4096, 50304, 768)]


def main() -> None:
    """Times, or compiles, shape after shape; the results are saved after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", type=read_shape, help="MxNxK; GPT-2's layers if not given")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--minutes", type=float, default=0, help="start no shape after so many; 0: no limit")
    parser.add_argument("--gpu", choices=list(GPU_TARGETS), help="compile for this GPU, and time nothing")
    parser.add_argument("--tiny", action="store_true", help="one small shape and no other, for a CPU")
    parser.add_argument("--out", help="JSON file to write")
    arguments = parser.parse_args()
    square = Shape(128, 128, 128) if arguments.tiny else CEILING
    shapes = [] if arguments.gpu else [square]  # where nothing is timed, there is no ceiling to find
    shapes += [] if arguments.tiny else arguments.shapes or default_shapes()
    results: dict[str, Any] = {"rounds": 0 if arguments.gpu else arguments.rounds, "compiled_for": arguments.gpu}
    results["shapes"] = {}
    began = time.monotonic()
    device = None
    if arguments.gpu:
        jax.config.update("jax_platforms", "cpu")
        device = absent_gpu(arguments.gpu)
    with jax.default_device(device):
        for shape in shapes:
            spent = (time.monotonic() - began) / 60
            if arguments.minutes and spent > arguments.minutes:
                results["shapes"][str(shape)] = skipped(f"not begun within --minutes={arguments.minutes:g}")
                continue
            results["shapes"][str(shape)] = {
                "products": measure(*products(shape), arguments.rounds, device),
                "layers": measure(*layers(shape), arguments.rounds, device),
            }
            if not arguments.gpu and "ceiling" not in results:
                results["ceiling"] = ceiling(shape, results["shapes"][str(shape)]["products"])
            if "ceiling" in results:
                add_shares(results["shapes"][str(shape)], results["ceiling"])
            with jax.default_device(None):
                save_results(arguments.out, results)
    write_results(arguments.out, results)


def read_shape(text: str) -> Shape:
    """ "8192x3072x768" as a shape."""
    found = re.fullmatch(r"(\d+)x(\d+)x(\d+)", text)
    if found is None or "0" in found.groups():
        raise argparse.ArgumentTypeError(f"{text!r} is no MxNxK")
    return Shape(*map(int, found.groups()))


def products(shape: Shape) -> tuple[Shape, list[Kind | list[Kind]], dict[str, Any]]:
    """What to time of the single product, the base first, tuned kernels as lists; and entries of what cannot run."""
    kinds: list[Kind | list[Kind]] = [base_product(shape), *fp8_products(shape)]
    without: dict[str, Any] = {}
    for candidates in kernel_products(shape):
        if reason := kernel_obstacle(shape):
            without[candidates[0].name] = skipped(reason)
        else:
            kinds.append(candidates)
    return shape, kinds, without


def layers(shape: Shape) -> tuple[Shape, list[Kind | list[Kind]], dict[str, Any]]:
    """The same of the layer."""
    kinds: list[Kind | list[Kind]] = [base_layer(shape)]
    without: dict[str, Any] = {}
    for recipe, kernel in RECIPES:
        kind = quantised_layer(shape, recipe, kernel)
        if isinstance(kind, str):
            without[f"{recipe}, Pallas kernel"] = skipped(kind)
        else:
            kinds.append(kind)
    return shape, kinds, without


def measure(
    shape: Shape, kinds: list[Kind | list[Kind]], without: dict[str, Any], rounds: int, device: jax.Device | None
) -> dict[str, Any]:
    """An entry for every kind: compiled, and timed unless for a `device` that is not here."""
    entries: dict[str, Any] = {}
    ready: dict[str, Timed] = {}
    for kind in kinds:
        name = kind.name if isinstance(kind, Kind) else kind[0].name
        try:
            if isinstance(kind, Kind):
                timed = Timed(kind, shape, device)
                entries[name] = timed.described()
            else:
                timed, entries[name] = tuned(kind, shape, device)
            ready[name] = timed
        except Exception as e:  # a compiler's or a kernel's failure is a result; what else there is goes on
            entries[name] = failed(e) | ({"out_of_memory": True} if is_out_of_memory(e) else {})
    if device is None and ready:
        seconds = in_turn({name: timed.dispatch for name, timed in ready.items()}, rounds)
        per_run = {name: [s / ready[name].runs for s in taken] for name, taken in seconds.items()}
        for name, taken in per_run.items():
            timed = ready[name]
            median = statistics.median(taken)
            rate = timed.kind.products * shape.flops / median / 1e12
            entries[name] |= {"milliseconds": round(1e3 * median, 6), "tflops": round(rate, 4)}
            if "bf16" in per_run:
                entries[name]["speed_over_bf16"] = round(speed_over(per_run["bf16"], taken), 4)
    return entries | without


class Timed:
    """A kind, compiled: `runs` of it in a dispatch, and what its program multiplies."""

    def __init__(self, kind: Kind, shape: Shape, device: jax.Device | None):
        self.kind = kind
        self.runs = runs_per_dispatch(kind.products * shape.flops, target_device().platform)
        program, seeds = jax.jit(repeated(kind.run, self.runs)), range(input_sets(self.runs))
        if device is not None:
            sharding = SingleDeviceSharding(device)
            like = functools.partial(jax.tree.map, lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding))
            # Without a GPU there is nothing to tune on; cuBLASLt where it can, and what that refuses by Triton's flags.
            options: dict[str, Any] = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}
            shapes = [like(jax.eval_shape(kind.inputs, seed)) for seed in seeds]
            self._compiled = program.lower(*shapes).compile(compiler_options=options)
        else:
            self._inputs = [jax.block_until_ready(jax.jit(kind.inputs)(seed)) for seed in seeds]
            self._compiled = program.lower(*self._inputs).compile()
        self.gemms = find_gemms(self._compiled.as_text() or "", {})
        found, asked = executions(self.gemms, LAYER), self.runs * kind.products
        if found != asked:
            raise RuntimeError(f"the compiled program has {found} products where {asked} were asked for")
        if device is None:
            jax.block_until_ready(self.dispatch())

    def dispatch(self) -> Any:
        """All runs, once."""
        return self._compiled(*self._inputs)

    def described(self) -> dict[str, Any]:
        """What multiplies, in which types, and how often in one dispatch."""
        named = [gemm for gemm in self.gemms if gemm.product]
        found = {f"{gemm.product}: {' x '.join(gemm.met)} by {gemm.engine}": gemm for gemm in named}
        entry: dict[str, Any] = {
            "multiplied": sorted(found),
            "in_fp8": all(gemm.is_fp8 for gemm in found.values()),
            "fp8_transposes": sum(gemm.transposes for gemm in found.values()),
            "runs_per_dispatch": self.runs,
        }
        return entry | ({"backend": self.kind.note} if self.kind.note else {})


def tuned(candidates: list[Kind], shape: Shape, device: jax.Device | None) -> tuple[Timed, dict[str, Any]]:
    """The fastest of a kernel's candidates, and its entry with the times of all of them."""
    times: dict[str, Any] = {}
    best: Timed | None = None
    least = float("inf")
    for kind in candidates:
        assert kind.tiles is not None
        label = kind.tiles.label()
        if reason := kernel_obstacle(shape, kind.tiles):
            times[label] = skipped(reason)
            continue
        try:
            timed = Timed(kind, shape, device)
        except Exception as e:
            times[label] = failed(e)
            continue
        if device is not None:
            times[label], best = "compiled", best or timed
            continue
        taken = statistics.median(in_turn({label: timed.dispatch}, TUNING_ROUNDS)[label]) / timed.runs
        times[label] = {"milliseconds": round(1e3 * taken, 6)}
        if taken < least:
            best, least, chosen = timed, taken, label
    if best is None:
        raise RuntimeError(f"no candidate of {candidates[0].name} runs: {times}")
    return best, best.described() | {"tiles": times} | ({} if device else {"best_tiles": chosen})


def ceiling(shape: Shape, entries: dict[str, Any]) -> dict[str, Any]:
    """The best rate in BF16, and the best in FP8, if one is really in FP8."""
    rates = {name: entry["tflops"] for name, entry in entries.items() if entry.get("in_fp8")}
    fp8 = max(rates, key=lambda name: rates[name], default=None)
    return {
        "shape": str(shape),
        "bf16_tflops": entries["bf16"].get("tflops"),
        "fp8_tflops": rates[fp8] if fp8 else None,
        "fp8_by": fp8,
    }


def timed_entries(of_shape: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """All entries with a rate."""
    for entry in itertools.chain(of_shape["products"].values(), of_shape["layers"].values()):
        if "tflops" in entry:
            yield entry


def add_shares(of_shape: dict[str, Any], best: dict[str, Any]) -> None:
    """Gives every rate as a share of the ceiling of the types that it is multiplied in."""
    for entry in timed_entries(of_shape):
        if top := best["fp8_tflops"] if entry["in_fp8"] else best["bf16_tflops"]:
            entry["share_of_ceiling"] = round(entry["tflops"] / top, 4)


if __name__ == "__main__":
    main()
