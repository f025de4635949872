"""The whole train step in every recipe beside BF16, for models from 30 M parameters to layers 4096 wide.

    python benchmarks/gpu_step.py [--sizes gpt2_124M ...] [--recipes bf16 hybrid ...] [--out=FILE.json]
    python benchmarks/gpu_step.py --compile-only --gpu=h100 --sizes baseline_30M    # no GPU needed: audit and memory
    python benchmarks/gpu_step.py --tiny                                            # shows that it runs; on a CPU too

The step is the main job's (`build_program` of a file in configs/, state donated, all that a run counts), on random
tokens made on the device, on one device. Each size has a process of its own, in which all recipes share one set of
parameters and moments: each in turn trains them a few steps, `rounds` times over, its own scaling state kept for it
between turns. A time is the median over rounds of a turn divided by its steps; a speed over BF16 is the median over
rounds of the ratio to BF16's turn of the same round.

MFU counts model FLOPs against the device's 16-bit peak in every recipe (`altgrad_jax.flops`). `memory` is what the
compiler says of the recipe's program; `peak_bytes_in_use` is the allocator's, of the size's process so far, so it is a
recipe's own only for the first. `audit` says what the compiled step multiplies. A recipe that has too little memory, or
cannot run here, is in the results with the reason; so is a size whose process was ended.
"""

import argparse
import json
import statistics
import time
from dataclasses import replace
from typing import Any

import jax
from common import failed, heard, is_out_of_memory, machine_of_workers, save_results, say, skipped
from gpt_sizes import RECIPES, SIZES, config_of, model_of, throughput
from ml_collections import ConfigDict
from timing import seconds_of, speed_over

from altgrad_jax.layers import parameter_counts
from altgrad_jax.precision.audit import audit
from altgrad_jax.precision.target import GPU_TARGETS, absent_gpu, has_wgmma, target_device
from altgrad_jax.program import Program, build_program
from altgrad_jax.state import TrainState

TURN_SECONDS, MOST_STEPS = 0.5, 20  # of a recipe's turn
MEMORY = ("argument_size_in_bytes", "output_size_in_bytes", "alias_size_in_bytes", "temp_size_in_bytes")


def main() -> None:
    """Runs one process a size; the results are saved after each."""
    arguments = parse_arguments()
    if arguments.worker:
        with jax.default_device(worker_device(arguments)):
            for result in work(arguments.worker, arguments):
                say(result)
        return
    sizes = ["tiny"] if arguments.tiny else arguments.sizes
    of = machine_of_workers()
    results: dict[str, Any] = {"compiled_for": arguments.gpu, "engine": arguments.engine, "sizes": {}}
    began = time.monotonic()
    for size in sizes:
        left = arguments.minutes * 60 - (time.monotonic() - began) if arguments.minutes else None
        if left is not None and left <= 0:
            results["sizes"][size] = skipped(f"not begun within --minutes={arguments.minutes:g}")
            continue
        results["sizes"][size] = of_size(size, arguments, left)
        save_results(arguments.out, results, of)
    save_results(arguments.out, results, of)
    print(json.dumps(results, indent=2))


def parse_arguments() -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    full = [size for size in SIZES if size != "tiny"]
    parser.add_argument("--sizes", nargs="+", default=full, choices=list(SIZES))
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--batch", type=int, default=0, help="windows a step, for every size; 0: each size's own")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=0, help="end after so many; 0: no limit")
    parser.add_argument("--compile-only", action="store_true", help="compile and audit, run nothing")
    parser.add_argument("--gpu", choices=list(GPU_TARGETS), help="with --compile-only: for this GPU, which is not here")
    parser.add_argument("--engine", default="cublaslt", choices=["cublaslt", "triton"], help="with --gpu")
    parser.add_argument("--tiny", action="store_true", help="a model of a few thousand parameters, for tests")
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.gpu and not arguments.compile_only:
        parser.error("--gpu compiles for a GPU that is not here: it goes with --compile-only")
    if arguments.batch < 0 or arguments.rounds < 1:
        parser.error("--batch cannot be negative, and --rounds must be at least 1")
    return arguments


def of_size(size: str, arguments: argparse.Namespace, seconds_left: float | None) -> dict[str, Any]:
    """All that the size's process says, recipe by recipe, whether it lives to the end or not."""
    own = [f"--worker={size}", f"--batch={arguments.batch}", f"--rounds={arguments.rounds}"]
    own += ["--recipes", *arguments.recipes]
    if arguments.compile_only:
        own += ["--compile-only", f"--engine={arguments.engine}"]
    if arguments.gpu:
        own += [f"--gpu={arguments.gpu}"]
    said, problem = heard(__file__, own, seconds_left)
    found: dict[str, Any] = {"recipes": {recipe: {} for recipe in arguments.recipes}}
    for result in said:
        found["recipes"].get(result.pop("recipe", None), found).update(result)
    if problem:
        found["problem"] = problem
        wanted = "audit" if arguments.compile_only else "seconds_per_step"
        for entry in found["recipes"].values():
            if not {"skipped", "failed", wanted} & entry.keys():
                entry.update(failed(problem))
    return found


def worker_device(arguments: argparse.Namespace) -> jax.Device | None:
    """The device to compile for, if it is not here."""
    if not arguments.gpu:
        return None
    # Else JAX looks for a GPU and its driver first, and complains at length.
    jax.config.update("jax_platforms", "cpu")
    return absent_gpu(arguments.gpu)


def work(size: str, arguments: argparse.Namespace) -> Any:
    """Results of one size, as they come: of the size, of each recipe's program, of each recipe's time."""
    config = config_of(size, "bf16", arguments.batch)
    yield {
        "parameters": parameter_counts(model_of(config)),
        "tokens_per_step": config.train.batch_size * config.model.block_size,
        "device": target_device().device_kind,
    }
    turns: dict[str, Turns] = {}
    shared = Shared()
    for recipe in arguments.recipes:
        if recipe.endswith("Pallas kernel") and not has_wgmma():
            yield {"recipe": recipe} | skipped("the kernel's wgmma instructions exist on compute capability 9.0 alone")
            continue
        try:
            config = config_of(size, recipe, arguments.batch)
            program, described = compiled(config, arguments)
            yield {"recipe": recipe} | described
            if not arguments.compile_only:
                turns[recipe] = Turns(program, shared)
                turns[recipe].warm_up()
                yield {"recipe": recipe, "peak_bytes_in_use": peak_bytes()}
        except Exception as e:  # whatever the compiler or the device refuses is the result; the others go on
            turns.pop(recipe, None)
            yield {"recipe": recipe} | refused(e)
    seconds: dict[str, list[float]] = {recipe: [] for recipe in turns}
    for _ in range(arguments.rounds):
        for recipe in list(turns):
            try:
                seconds[recipe].append(turns[recipe].take())
            except Exception as e:
                del turns[recipe], seconds[recipe]
                yield {"recipe": recipe} | refused(e)
    for recipe, taken in seconds.items():
        median, kind = statistics.median(taken), target_device().device_kind
        timed = {"seconds_per_step": round(median, 6), "rounds": [round(s, 6) for s in taken]}
        timed |= throughput(turns[recipe].program.config, median, kind) | {"loss": turns[recipe].loss}
        if "bf16" in seconds:
            timed["speed_over_bf16"] = round(speed_over(seconds["bf16"], taken), 4)
        yield {"recipe": recipe} | timed


def refused(error: Exception) -> dict[str, Any]:
    """The entry of a recipe that does not run."""
    return failed(error) | ({"out_of_memory": True} if is_out_of_memory(error) else {})


def compiled(config: ConfigDict, arguments: argparse.Namespace) -> tuple[Program, dict[str, Any]]:
    """The program, and what its compiled step multiplies and needs."""
    began = time.perf_counter()
    program, options = build_program(config, [target_device()] if arguments.gpu else None), None
    if arguments.gpu:
        options = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": arguments.engine == "triton"}
    step = program.compile_train(options)
    seconds = time.perf_counter() - began
    found = audit(step.as_text() or "", program.policy, config.precision.compute)
    described: dict[str, Any] = {"compile_seconds": round(seconds, 1), "audit": found.summary()}
    if problem := found.shortfall():
        described["not_in_fp8"] = problem
    if memory := step.memory_analysis():
        sizes = {name: int(getattr(memory, name)) for name in MEMORY}
        arrays = sizes[MEMORY[0]] + sizes[MEMORY[1]] - sizes[MEMORY[2]]  # what is donated is counted once
        described["memory"] = sizes | {"total_in_bytes": arrays + sizes[MEMORY[3]]}
    described["layers"] = sorted({row["backend"] for row in program.policy.table()})
    return program, described


def peak_bytes() -> int | None:
    """The most memory that this process's arrays and programs had at a time; None where the device does not say."""
    stats = jax.local_devices()[0].memory_stats()
    return stats.get("peak_bytes_in_use") if stats else None


class Shared:
    """Parameters, moments and counters that all recipes train in turn; None where there are none yet."""

    state: TrainState | None = None


class Turns:
    """A recipe's program, its batch, and the scaling state that is its own."""

    def __init__(self, program: Program, shared: Shared):
        self.program, self.loss, self._shared = program, float("nan"), shared
        replicated, shape = program.parallel.replicated, program.abstract_batch()
        self._own = jax.jit(lambda: (program.policy.init(), program.loss_scale.init()), out_shardings=replicated)()
        draw = lambda: jax.random.randint(jax.random.key(0), shape.shape, 0, program.model.vocab_size)  # noqa: E731
        self._batch = jax.jit(draw, out_shardings=shape.sharding)()
        self._steps = 1

    def warm_up(self) -> None:
        """Runs it twice, and settles how many steps a turn has."""
        self.take()
        self._steps = max(1, min(MOST_STEPS, round(TURN_SECONDS / self.take())))

    def take(self) -> float:
        """Seconds a step, of one turn."""
        quant, loss_scale = self._own
        held = [replace(self._shared.state or self.program.fresh_state(), quant=quant, loss_scale=loss_scale)]
        self._shared.state = None  # the step consumes it; were it to fail, nothing would be left of it

        def steps() -> dict[str, jax.Array]:
            for _ in range(self._steps):
                held[0], metrics = self.program.run_train(held[0], self._batch)
            self.loss = metrics["train/loss"]
            return metrics

        taken = seconds_of(steps) / self._steps
        self.loss = float(self.loss)
        self._shared.state, self._own = held[0], (held[0].quant, held[0].loss_scale)
        return taken


if __name__ == "__main__":
    main()
