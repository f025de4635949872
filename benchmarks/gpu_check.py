"""Whether a GPU computes what the formats and the emulation say: operands, products, the kernel, and a run's losses.

    python benchmarks/gpu_check.py [--steps=200] [--seeds 0 1 2] [--out=FILE.json]
    python benchmarks/gpu_check.py --tiny          # shows that it runs; on a CPU too

- operands: what natively and what by emulation is quantised, from random and special values, equal to the bit; and,
  where the scale is a power of two, equal to NumPy's cast (ml_dtypes) on the host.
- products: native products against NumPy's in float64, each result within its bound (`bound`). Operands are exact, so
  all there is to bound are the sums.
- kernel: the Pallas kernel in every candidate for its tiles against its `reference`; on a CPU by Pallas's interpreter.
- losses: the quick variant of configs/hybrid.py trained with native and with emulated operands from the same weights
  on the same batches of the embedded corpus. The operands' formats are equal and the sums are not, so that the losses
  part by and by: their difference is given beside the spread of the emulated runs' losses over seeds.

Exit status: 0, or 1 if operands differ, a product is out of bounds, or the losses lie further apart than seeds do.
"""

import argparse
import statistics
import sys
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import failed, skipped, write_results
from jax import lax
from train_step import CONFIG

from altgrad_jax import experiment
from altgrad_jax.config import load_sibling, validate
from altgrad_jax.data.corpus import open_corpus
from altgrad_jax.precision.audit import find_gemms
from altgrad_jax.precision.kernels.fp8_matmul import fp8_matmul, reference
from altgrad_jax.precision.kernels.tiles import CANDIDATES, MULTIPLE, Tiles
from altgrad_jax.precision.reals import seed_fault
from altgrad_jax.precision.recipes import parse_recipe
from altgrad_jax.precision.scaling import initial_state, next_state, quantise
from altgrad_jax.precision.target import fp8_hardware, has_wgmma, on_cpu
from altgrad_jax.state import init_params

# Recipes of one operand: the formats that GPUs have in each way of scaling, rounding and overflowing.
WAYS = ("", "scaling=current", "scaling=current granularity=channel", "scaling=none overflow=special", "pow2=1")
OPERANDS = [f"{fmt} {way}".strip() for fmt in ("e4m3fn", "e5m2") for way in WAYS]
OPERANDS += ["e4m3fn scaling=static scale=0.5", "e4m3fn rounding=toward_zero", "e5m2 rounding=stochastic"]
PAIRS = (("e4m3fn", "e4m3fn"), ("e4m3fn", "e5m2"), ("e5m2", "e4m3fn"), ("e5m2", "e5m2"))
SHAPES = ((256, 512, 1024), (1024, 1024, 4096), (130, 72, 200))  # M, N, K
# Hopper's FP8 matrix units keep about 14 bits of a sum (deepseek-ai/DeepGEMM, issue 50): what an addition may lose of
# the largest number in it.
SHORT_SUM = 2.0**-13
WGMMA_K = 32  # products of FP8 operands that one instruction sums


def main() -> int:
    """Runs all checks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--checks", nargs="+", default=list(CHECKS), choices=list(CHECKS))
    parser.add_argument("--tiny", action="store_true", help="few values, small products, a few steps")
    parser.add_argument("--out", help="JSON file to write")
    arguments = parser.parse_args()
    for seed in arguments.seeds:
        if why := seed_fault(seed):
            parser.error(f"--seeds: {seed} {why}")
    if arguments.tiny:
        arguments.steps, arguments.seeds = 3, [0, 1]
    results: dict[str, Any] = {"fp8_hardware": fp8_hardware() or None}
    for name in arguments.checks:
        try:
            results[name] = CHECKS[name](arguments)
        except Exception as e:  # one check that cannot run is its result; the others go on
            results[name] = failed(e) | {"passed": False}
        print(f"{name}: {'passed' if results[name]['passed'] else 'FAILED'}", file=sys.stderr, flush=True)
    results["passed"] = all(results[name]["passed"] for name in arguments.checks)
    write_results(arguments.out, results)
    return 0 if results["passed"] else 1


def probe_values(count: int) -> np.ndarray:
    """All bfloat16 values, infinities and NaN among them, and random float32 of all sizes: [R, 128], float32.

    The former hold every value of the 8-bit formats, the middle between any two, and float32's smallest numbers, which
    a GPU may flush; the latter what lies next to them.
    """
    every = (np.arange(2**16, dtype=np.uint32) << 16).view(np.float32)
    draw = np.random.default_rng(0)
    sizes = draw.normal(size=count).astype(np.float32) * np.exp2(draw.integers(-30, 20, count)).astype(np.float32)
    with np.errstate(invalid="ignore"):
        near = np.nextafter(every[:count], np.float32(0))
    values = np.concatenate([every, sizes, near])
    return values[: len(values) // 128 * 128].reshape(-1, 128)


def check_operands(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every recipe on all values, and on the finite ones alone, whose amax is one."""
    values = probe_values(2**10 if arguments.tiny else 2**16)
    # One infinity is every scale's end; without it, and in a range that 8 bits can hold, scales are ordinary numbers.
    ordinary = values[np.isfinite(values) & (np.abs(values) < 2**20)]
    sets = {"all": values, "ordinary": ordinary[: len(ordinary) // 128 * 128].reshape(-1, 128)}
    entries: dict[str, Any] = {}
    for text in OPERANDS[1:4] if arguments.tiny else OPERANDS:
        for name, x_RC in sets.items():
            entries[f"{text}, {name} values"] = compare_operands(text, x_RC)
    return {"passed": all(entry["different"] == 0 for entry in entries.values()), "recipes": entries}


def compare_operands(text: str, x_RC: np.ndarray) -> dict[str, Any]:
    """How many elements, or scales, differ in any bit between the native and the emulated operand."""
    recipe = parse_recipe(text)
    assert recipe is not None
    role = recipe.activation
    key = jax.random.key(1) if role.rounding == "stochastic" else None
    state = next_state(initial_state(role), jnp.float32(1000.0))  # for delayed scaling: some elements saturate

    def operand(native: bool) -> tuple[np.ndarray, np.ndarray]:
        made = jax.jit(lambda x: quantise(x, role, state, 1, native=native, key=key)[0])(x_RC)
        return np.asarray(made.values.astype(jnp.float32)), np.asarray(made.inverse_scale)

    (native, native_scale), (emulated, emulated_scale) = operand(True), operand(False)
    differ = (native.view(np.uint32) != emulated.view(np.uint32)) & ~(np.isnan(native) & np.isnan(emulated))
    entry: dict[str, Any] = {"values": int(x_RC.size), "different": int(differ.sum())}
    entry["different"] += int((native_scale.view(np.uint32) != emulated_scale.view(np.uint32)).sum())
    if differ.any():
        entry["first"] = [float(v[differ][0]) for v in (x_RC, native, emulated)]
    fixed = {"none": 1.0, "static": role.scale}.get(role.scaling)
    # A spoilt tensor is multiplied back by NaN, which tells nothing of a scale that the recipe does not fix.
    known = fixed is not None or (role.pow2 and np.isfinite(emulated_scale).all())  # and its inverse is exact
    if role.rounding == "nearest" and known:
        largest = np.float32(role.fmt.max)
        with np.errstate(over="ignore", invalid="ignore"):
            scaled = x_RC / emulated_scale if fixed is None else x_RC * np.float32(fixed)
            bounded = np.clip(scaled, -largest, largest) if role.overflow == "saturate" else scaled
            cast = bounded.astype(role.fmt.dtype).astype(np.float32)
        entry["different_on_host"] = int(((native != cast) & ~(np.isnan(native) & np.isnan(cast))).sum())
        entry["different"] += entry["different_on_host"]
    return entry


def bound(products: np.ndarray, k: int, chunk: int | None) -> np.ndarray:
    """Most that a product of FP8 operands may be off, given the sums of its products' magnitudes.

    An addition may lose `SHORT_SUM` of the largest number in it, which is no larger than that sum. In a tensor core's
    accumulator there is one addition for every 32 products along the contraction; where `chunk` products are summed
    there and the rest in float32, as for gradients, only those of a chunk count, and the others lose 2^-24 each.
    """
    if on_cpu():
        return 2.0**-23 * k * products  # float32 throughout
    if chunk is None:
        return SHORT_SUM * (k / WGMMA_K + 1) * products
    return (SHORT_SUM * (chunk / WGMMA_K + 1) + 2.0**-24 * (k / chunk + 1)) * products


def random_operands(m: int, n: int, k: int, a: str, b: str) -> tuple[jax.Array, jax.Array]:
    """Normal numbers in two formats, [M, K] and [N, K]."""
    draw = np.random.default_rng(2)
    first, second = (draw.normal(size=(rows, k)).astype(np.float32) for rows in (m, n))
    return jnp.asarray(first, f"float8_{a}"), jnp.asarray(second, f"float8_{b}")


def against_float64(found: jax.Array, a: jax.Array, b: jax.Array, chunk: int | None) -> dict[str, Any]:
    """Largest error, as a share of the bound and of the sum of the products' magnitudes; and the mean relative one."""
    a64, b64 = np.asarray(a, np.float64), np.asarray(b, np.float64)
    exact, magnitudes = a64 @ b64.T, np.abs(a64) @ np.abs(b64).T
    error = np.abs(np.asarray(found, np.float64) - exact)
    share = float((error / bound(magnitudes, a.shape[1], chunk)).max())
    return {
        "largest_error_over_bound": share,
        "largest_error_over_magnitudes": float((error / magnitudes).max()),
        "relative_error": float(np.linalg.norm(error) / np.linalg.norm(exact)),
        "passed": share <= 1.0,  # not so if it is NaN
    }


def check_products(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every pair of types at every shape, summed as forward products are and as gradients' are."""
    entries: dict[str, Any] = {}
    for a_name, b_name in PAIRS:
        for shape in SHAPES[2:] if arguments.tiny else SHAPES:
            a, b = random_operands(*shape, a_name, b_name)
            for sums, precision, chunk in (("forward", None, None), ("gradients", lax.Precision.HIGHEST, 128)):

                def multiply(a: jax.Array, b: jax.Array, precision: Any = precision) -> jax.Array:
                    dims = (((1,), (1,)), ((), ()))
                    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)

                compiled = jax.jit(multiply).lower(a, b).compile()
                entry = against_float64(compiled(a, b), a, b, chunk)
                gemms = find_gemms(compiled.as_text() or "", {})
                entry["multiplied"] = [f"{' x '.join(gemm.met)} by {gemm.engine}" for gemm in gemms]
                entries[f"{a_name} x {b_name}, {'x'.join(map(str, shape))}, {sums}"] = entry
    return {"passed": all(entry["passed"] for entry in entries.values()), "cases": entries}


def check_kernel(arguments: argparse.Namespace) -> dict[str, Any]:
    """Both types, all tiles; whole numbers of few bits exactly, others within the bound and beside `reference`."""
    if not has_wgmma() and not on_cpu():
        return skipped("the kernel's wgmma instructions exist on compute capability 9.0 alone") | {"passed": True}
    interpret, candidates = None, CANDIDATES
    shape = (4 * MULTIPLE, 4 * MULTIPLE, 8 * MULTIPLE)
    if on_cpu():
        from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams  # exported nowhere as of jax 0.10

        interpret, candidates, shape = InterpretGPUParams(), (Tiles(64, 64, 128, 2),), (70, 40, 100)
    entries: dict[str, Any] = {}
    for name in ("e5m2",) if arguments.tiny else ("e5m2", "e4m3fn"):
        whole = np.random.default_rng(3).integers(-3, 4, (shape[0], shape[2])).astype(np.float32)
        integers = jnp.asarray(whole, f"float8_{name}")
        a, b = random_operands(*shape, name, name)
        for tiles in candidates:
            found = fp8_matmul(a, b, tiles, interpret)
            entry = against_float64(found, a, b, None)
            entry["largest_difference_to_reference"] = float(jnp.max(jnp.abs(found - reference(a, b))))
            entry["integers_exact"] = bool(
                np.array_equal(fp8_matmul(integers, integers, tiles, interpret), whole @ whole.T)
            )
            entry["passed"] &= entry["integers_exact"]
            entries[f"{name}, tiles {tiles.m}x{tiles.n}x{tiles.k}, {tiles.stages} stages"] = entry
    passed = all(entry["passed"] for entry in entries.values())
    return {"passed": passed, "interpreted": interpret is not None, "cases": entries}


def check_losses(arguments: argparse.Namespace) -> dict[str, Any]:
    """Native and emulated runs, a pair a seed: the difference of their last losses beside the spread over seeds."""
    steps, last = arguments.steps, max(1, arguments.steps // 10)
    losses: dict[str, list[list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for backend in ("emulated", "native"):
            config = load_sibling(str(CONFIG), "hybrid").get_config("quick")
            with config.unlocked():
                config.data.update(name="embedded", tokenizer="bytes" if arguments.tiny else "bpe", data_dir=folder)
                config.train.steps = steps
                config.precision.backend, config.parallel.devices = backend, 1
                if arguments.tiny:
                    config.model.update(n_layer=1, n_embd=64, n_head=2, block_size=32, vocab_size=512)
            validate(config)
            exp = experiment.build(config, open_corpus(config, progress=False))
            losses[backend] = [train(exp, seed, steps) for seed in arguments.seeds]
    native, emulated = ([statistics.mean(run[-last:]) for run in losses[kind]] for kind in ("native", "emulated"))
    differences = [a - b for a, b in zip(native, emulated, strict=True)]
    spread = statistics.stdev(emulated) if len(emulated) > 1 else None
    largest = max(abs(d) for d in differences)
    return {
        # With 3 seeds the standard deviation is itself uncertain by half; twice it is no further than seeds lie apart.
        "passed": spread is not None and largest <= 2 * spread,
        "steps": steps,
        "last": last,
        "native": native,
        "emulated": emulated,
        "differences": differences,
        "spread_over_seeds": spread,
        "first_losses_equal": all(a[0] == b[0] for a, b in zip(losses["native"], losses["emulated"], strict=True)),
        "curves": losses,
    }


def train(exp: experiment.Experiment, seed: int, steps: int) -> list[float]:
    """The losses of a run from weights drawn with the seed, on batches of its own."""
    state = exp.fresh_state(init_params(exp.model, seed))
    batches, losses = exp.batches.from_step(seed * steps), []
    for _ in range(steps):
        state, metrics = exp.run_train(state, exp.shard(next(batches)))
        losses.append(metrics["train/loss"])
    return [float(loss) for loss in jax.device_get(losses)]


CHECKS = {"operands": check_operands, "products": check_products, "kernel": check_kernel, "losses": check_losses}

if __name__ == "__main__":
    sys.exit(main())
