"""The benchmarks that are meant for a GPU, at their smallest on the CPU: that they run, and what their JSON holds."""

import importlib.util
import json
import math
import os
import stat
import subprocess
import sys
from argparse import Namespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from altgrad_jax.layers import layer_shapes
from altgrad_jax.model import GPTConfig
from altgrad_jax.precision.kernels.tiles import Product, Tiles, load_tiles
from altgrad_jax.precision.policy import resolve
from tests.forks import ROOT

BENCHMARKS = ROOT / "benchmarks"
QUICK_TO_COMPILE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
needs_gpu_compiler = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None, reason='needs pip install ".[gpu-compiler]"'
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs a benchmark on one CPU device and gives the file that it wrote."""
    compiled = tmp_path_factory.mktemp("compiled")

    def run(script: str, *arguments: str, code: int = 0) -> dict:
        out = tmp_path_factory.mktemp("results") / "out.json"
        environment = os.environ | {"XLA_FLAGS": QUICK_TO_COMPILE, "JAX_COMPILATION_CACHE_DIR": str(compiled)}
        environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        command = [sys.executable, str(BENCHMARKS / script), *arguments, f"--out={out}"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=out.parent, timeout=300)
        assert done.returncode == code, done.stderr
        assert [path.name for path in out.parent.iterdir()] == ["out.json"], "nothing else is left behind"
        report = json.loads(out.read_text())
        assert {"command", "date", "machine", "versions", "xla_flags", "environment", "git"} < report.keys()
        assert report["machine"]["accelerator"]["kind"] == "cpu" and report["xla_flags"] == QUICK_TO_COMPILE
        return report["results"]

    return run


@pytest.fixture
def module(monkeypatch):
    """Imports a benchmark's file as the benchmarks themselves do."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def assert_skipped(entry: dict, *words: str) -> None:
    assert list(entry) == ["skipped"] and all(word in entry["skipped"] for word in words)


@pytest.mark.slow
def test_gemm(run):
    results = run("gemm.py", "--tiny", "--rounds=1")
    assert results["ceiling"]["bf16_tflops"] > 0 and results["ceiling"]["fp8_tflops"] is None, "no FP8 units here"
    [(shape, found)] = results["shapes"].items()
    assert shape == "128x128x128"
    pairs = [f"{pair} -> {out}" for pair in ("e4m3 x e4m3", "e4m3 x e5m2", "e5m2 x e5m2") for out in ("f32", "bf16")]
    timed = {"products": ["bf16", *pairs], "layers": ["bf16", "hybrid", "e4m3", "e5m2"]}
    for group, names in timed.items():
        for name in names:
            entry = found[group][name]
            assert entry["milliseconds"] > 0 and entry["tflops"] > 0 and entry["speed_over_bf16"] > 0
            assert entry["share_of_ceiling"] > 0 and entry["runs_per_dispatch"] == 1
            assert not entry["in_fp8"] and len(entry["multiplied"]) == (1 if group == "products" else 3)
    assert found["products"]["bf16"]["share_of_ceiling"] == 1
    assert found["layers"]["hybrid"]["backend"] == "emulated (no FP8 matrix units on this machine)"
    for name in ("e5m2 x e5m2", "e4m3 x e4m3"):
        assert_skipped(found["products"][f"{name} -> f32, Pallas kernel"], "9.0", "cpu")
    assert_skipped(found["layers"]["e5m2, Pallas kernel"], "9.0", "cpu")


@pytest.mark.slow
def test_gpu_step(run):
    results = run("gpu_step.py", "--tiny", "--rounds=2", "--recipes", "bf16", "hybrid", "e5m2, Pallas kernel")
    size = results["sizes"]["tiny"]
    assert size["tokens_per_step"] == 128 and size["parameters"]["total"] > 0 and "problem" not in size
    for recipe in ("bf16", "hybrid"):
        entry = size["recipes"][recipe]
        assert entry["seconds_per_step"] > 0 and entry["tokens_per_second"] > 0 and len(entry["rounds"]) == 2
        assert entry["speed_over_bf16"] > 0 and entry["model_tflops"] > 0 and entry["mfu"] is None
        assert entry["memory"]["temp_size_in_bytes"] > 0 and entry["peak_bytes_in_use"] is None
        assert entry["audit"]["fp8_asked"] == (0 if recipe == "bf16" else 15) and entry["audit"]["fp8_got"] == 0
        assert math.isfinite(entry["loss"]) and ("not_in_fp8" in entry) == (recipe == "hybrid")
    assert_skipped(size["recipes"]["e5m2, Pallas kernel"], "9.0")


@pytest.mark.slow
def test_peers(run):
    ours, flax = "altgrad_jax, bf16", "flax.linen, fp8_ops"
    results = run(
        *("peers.py", "--tiny", "--batch=4", "--rounds=2", "--peers", ours, flax, "torch.compile, bf16"),
        *("AltGrad, bf16", "flax.linen, qwix fp8"),
    )
    for name in (ours, flax):
        entry = results["peers"][name]
        assert entry["tokens_per_second"] > 0 and entry["speed_over_ours"] > 0 and len(entry["all_rounds"]) == 2
        assert "bfloat16" in str(entry["engines"])
    assert results["peers"][ours]["speed_over_ours"] == 1
    assert "output layer in bf16" in results["peers"][flax]["differs"]
    assert_skipped(results["peers"]["AltGrad, bf16"], "--altgrad=DIR")
    for name, package in (("torch.compile, bf16", "torch"), ("flax.linen, qwix fp8", "qwix")):
        if importlib.util.find_spec(package) is None:
            assert_skipped(results["peers"][name], "not installed", package)


@pytest.mark.slow
def test_layer_scan_of_quantised_layers(module):
    """One block in a loop over stacked parameters and scaling states: the same losses as the network's."""
    scan = module("layer_scan")
    arguments = Namespace(heads=2, width=16, window=8, vocabulary=32, batch=2, attention="auto")
    config = scan.config_of(2, arguments, "float32")
    policy = resolve([(r"blocks\..*|lm_head", "e4m3 x=float32 w=float32")], layer_shapes(config))
    losses = []
    for form in scan.FORM.values():
        step, initial = form(config, policy)
        losses.append(scan.Run(jax.jit(step), initial(), jnp.asarray(scan.tokens_of(arguments))).losses())
    assert scan.largest_difference(losses) < 1e-6 and losses[0][0] > losses[0][-1]


@pytest.mark.slow
def test_layer_scan(run):
    results = run("layer_scan.py", "--tiny", "--recipes", "bf16")
    assert results["largest_relative_difference_in_float32"] < 1e-6
    entries = results["2 layers"]["bf16"]
    for remat in ("none", "block"):
        for form in ("unrolled", "scanned"):
            entry = entries[f"{form}, remat={remat}"]
            assert all(entry[what] > 0 for what in ("compile_seconds", "instructions", "temp_bytes"))
            assert entry["seconds_per_step"] > 0
        ratio = entries[f"scanned over unrolled, remat={remat}"]["temp_bytes"]
        scanned, unrolled = (entries[f"{form}, remat={remat}"]["temp_bytes"] for form in ("scanned", "unrolled"))
        assert ratio == round(scanned / unrolled, 3)


@pytest.mark.slow
def test_gpu_check(run):
    results = run("gpu_check.py", "--tiny")
    assert results["passed"] and results["fp8_hardware"] is None
    assert all(entry["different"] == 0 for entry in results["operands"]["recipes"].values())
    for check in ("products", "kernel"):
        for entry in results[check]["cases"].values():
            assert 0 <= entry["largest_error_over_bound"] <= 1
    assert results["kernel"]["interpreted"]
    losses = results["losses"]
    assert len(losses["native"]) == 2 and losses["spread_over_seeds"] > 0
    assert losses["native"] == losses["emulated"], "on a CPU the sums are the same too"


@pytest.mark.exhaustive
def test_sweep(run):
    results = run("sweep.py", "--tiny")
    assert set(results["seconds"]) == {"together", "in_turn", "main"} and set(results["together_over"]) == {
        "in_turn",
        "main",
    }
    assert results["conditions_per_hour"]["together"] == pytest.approx(3600 * 2 / results["seconds"]["together"][0])
    assert results["largest_relative_loss_difference"]["together"] == 0
    assert results["largest_relative_loss_difference"]["main"] < 1e-3


def test_operands_that_differ_are_found(module, monkeypatch):
    check = module("gpu_check")

    def broken(x, role, state, axis, *, native, key):
        operand, stats = quantise(x, role, state, axis, native=native, key=key)
        values = jnp.where(operand.values == 1, 2, operand.values) if native else operand.values
        return type(operand)(values.astype(operand.values.dtype), operand.inverse_scale), stats

    quantise = check.quantise
    x = np.linspace(0, 1, 256, dtype=np.float32).reshape(-1, 128)
    assert check.compare_operands("e5m2 scaling=none", x)["different"] == 0
    monkeypatch.setattr(check, "quantise", broken)
    found = check.compare_operands("e5m2 scaling=none", x)
    assert found["different"] > found["different_on_host"] > 0 and found["first"][1:] == [2.0, 1.0]
    a, b = check.random_operands(8, 8, 32, "e5m2", "e5m2")
    exact = np.asarray(a, np.float64) @ np.asarray(b, np.float64).T
    assert check.against_float64(exact, a, b, None)["passed"]
    assert not check.against_float64(exact * 1.01, a, b, None)["passed"]
    assert not check.against_float64(exact * np.nan, a, b, None)["passed"]


COUNT = """
import sys
import jax
jax.config.update("jax_platforms", "cpu")
from altgrad_jax.precision import hlo
from altgrad_jax.precision.target import absent_gpu
sys.path.insert(0, "benchmarks")
import gemm
from gemm_kinds import Shape, base_product, quantised_layer

def kernels(timed):
    module = hlo.parse(timed._compiled.as_text())
    counts = module.executions()
    opcodes = [(i.opcode, counts[name]) for name, c in module.computations.items() for i in c.instructions.values()]
    return sum(count for opcode, count in opcodes if opcode in ("fusion", "custom-call"))

shape, device = Shape(1024, 512, 256), absent_gpu("h100")
with jax.default_device(device):
    for kind in (base_product(shape), quantised_layer(shape, "hybrid", "xla")):
        many = gemm.Timed(kind, shape, device)
        gemm.runs_per_dispatch, before = (lambda *_: 1), gemm.runs_per_dispatch
        one = gemm.Timed(kind, shape, device)
        gemm.runs_per_dispatch = before
        assert many.runs > 100 and one.runs == 1
        assert kernels(many) >= many.runs * kernels(one), (many.runs, kernels(many), kernels(one))
        print(many.described()["multiplied"])
"""


@needs_gpu_compiler
@pytest.mark.slow
def test_no_run_is_compiled_away():
    """The loops of one dispatch, as a GPU would run them, have all kernels of all runs, and not only the products."""
    done = subprocess.run([sys.executable, "-c", COUNT], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    product, layer = done.stdout.splitlines()
    assert product == "['forward: bfloat16 x bfloat16 by cuBLASLt']"
    assert layer.count("by cuBLASLt FP8") == 3


def test_repeated_runs_give_the_same(module):
    timing = module("timing")
    a = jnp.arange(6.0).reshape(2, 3)

    def product(a):
        return {"sum": a @ a.T, "twice": 2 * a}

    np.testing.assert_array_equal(timing.repeated(product, 1)((a,))["twice"], 2 * a)
    times = 2 * timing.UNROLL
    sets = [(i * a,) for i in range(timing.input_sets(times))]
    found = timing.repeated(product, times)(*sets)
    for result, (own,) in zip(found, sets, strict=True):
        np.testing.assert_array_equal(result["sum"], own @ own.T)
        np.testing.assert_array_equal(result["twice"], 2 * own)
    assert timing.runs_per_dispatch(1e9, "cpu") == 1
    assert timing.runs_per_dispatch(1e9, "gpu") == 20000 and timing.runs_per_dispatch(1e15, "gpu") == timing.UNROLL
    assert timing.speed_over([2.0, 4.0, 9.0], [1.0, 1.0, 3.0]) == 3.0


def test_shapes(module):
    gemm = module("gemm")
    assert gemm.read_shape("8192x3072x768") == gemm.Shape(8192, 3072, 768)
    for wrong in ("8192x3072", "0x1x1", "axbxc", "1x2x3x4"):
        with pytest.raises(gemm.argparse.ArgumentTypeError, match="is no MxNxK"):
            gemm.read_shape(wrong)
    assert len(set(gemm.default_shapes())) == len(gemm.default_shapes()) == 15
    assert gemm.Shape(2, 3, 4).flops == 48


def test_shares_of_the_ceiling(module):
    gemm = module("gemm")
    products = {"bf16": {"tflops": 600.0, "in_fp8": False}, "a": {"tflops": 900.0, "in_fp8": True}}
    products |= {"b": {"tflops": 1200.0, "in_fp8": True}, "c": {"skipped": "why"}}
    best = gemm.ceiling(gemm.Shape(8, 8, 8), products)
    assert best == {"shape": "8x8x8", "bf16_tflops": 600.0, "fp8_tflops": 1200.0, "fp8_by": "b"}
    gemm.add_shares({"products": products, "layers": {}}, best)
    assert [products[name].get("share_of_ceiling") for name in "abc"] == [0.75, 1.0, None]
    assert gemm.ceiling(gemm.Shape(8, 8, 8), {"bf16": {"failed": "why"}})["bf16_tflops"] is None


def test_throughput(module):
    sizes = module("gpt_sizes")
    config = sizes.config_of("gpt2_124M", "e5m2, Pallas kernel", 8)
    assert (config.precision.kernel, config.train.batch_size, config.parallel.devices) == ("pallas", 8, 1)
    assert isinstance(sizes.model_of(config), GPTConfig)
    found = sizes.throughput(config, 0.1, "NVIDIA H100 80GB HBM3")
    assert found["tokens_per_second"] == 81920
    assert found["mfu"] == pytest.approx(found["model_tflops"] / 989.4, abs=1e-4)
    assert sizes.throughput(config, 0.1, "cpu")["mfu"] is None
    for recipe in sizes.RECIPES:
        rules = sizes.config_of("tiny", recipe).precision.rules
        assert bool(rules) == (recipe != "bf16")


def test_a_table_of_tiles(module, tmp_path):
    """What tuning found is a row that training reads; the rule's tiles, 64x64x128x4, took twice as long."""
    tune, product = module("tune_kernel"), Product("e5m2", 128, 256, 128)
    times = {
        "64x64x128x4": {"milliseconds": 0.5},
        "64x64x128x6": {"milliseconds": 0.25},
        "64x256x128x2": {"failed": "x"},
    }
    row = tune.row_of(product, {"tiles": times, "best_tiles": "64x64x128x6"})
    assert (row["milliseconds"], row["speed_over_rule"]) == (0.25, 2.0)
    file = tmp_path / "tiles.json"
    file.write_text(json.dumps({"results": {"gpu": "NVIDIA H100", "products": [row]}}))
    assert load_tiles(str(file)).find(product) == Tiles(64, 64, 128, 6)
    without_rule = {name: times[name] for name in ("64x64x128x6", "64x256x128x2")}
    assert tune.row_of(product, {"tiles": without_rule, "best_tiles": "64x64x128x6"})["speed_over_rule"] is None


@pytest.mark.slow
def test_no_tiles_without_the_kernel_s_instructions(run, tmp_path):
    results = run("tune_kernel.py", f"--config={ROOT / 'configs' / 'e5m2.py'}")
    assert results["gpu"] == "cpu" and results["products"] == [] and "compute capability 9.0" in results["skipped"]


def test_workers_that_die(module, tmp_path):
    """What they said before is kept, and the reason is given."""
    common = module("common")
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import sys, time\nfrom pathlib import Path\n"
        f"sys.path.insert(0, {str(BENCHMARKS)!r})\n"
        "print('RESULT {\"first\": 1}', flush=True)\nprint('noise')\n"
        "time.sleep(60) if sys.argv[1:] else sys.exit('too large')\n"
    )
    assert common.heard(str(worker), [], None) == ([{"first": 1}], "the process ended with status 1: too large")
    assert common.heard(str(worker), ["stay"], 2.0) == ([{"first": 1}], "ended after 2 s")


def test_failures_as_entries(module):
    common = module("common")
    assert common.failed(ValueError("first\nsecond")) == {"failed": "ValueError: first"}
    assert common.failed(ValueError()) == {"failed": "ValueError: "}
    assert common.is_out_of_memory(RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes"))
    assert common.is_out_of_memory(MemoryError()) and not common.is_out_of_memory(ValueError("shape"))


def test_everything_in_one_command(tmp_path):
    """With an interpreter that only notes what it is to run, and fails in one benchmark and three audits."""
    python, out = tmp_path / "python", tmp_path / "results"
    python.write_text(
        "#!/usr/bin/env bash\n"
        f'printf "%s|" "$@" >> {tmp_path}/calls; echo "${{XLA_FLAGS:-}}" >> {tmp_path}/calls\n'
        '[[ "$*" == *gemm_large* ]] && exit 7\n'
        'for a; do [[ $a == --out=* ]] && [[ $a != *audit_bf16* ]] && echo "{}" > "${a#--out=}"; done\n'
        '[[ "$*" == *audit_e5m2* || "$*" == *audit_bf16* ]] && exit 1\nexit 0\n'
    )
    smi = tmp_path / "nvidia-smi"
    smi.write_text('#!/usr/bin/env bash\necho "NVIDIA H100 80GB HBM3"\n')
    for file in (python, smi):
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
    command = [str(BENCHMARKS / "gpu.sh"), str(out)]
    environment = os.environ | {"PYTHON": str(python), "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    environment.pop("XLA_FLAGS", None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    steps = {step["step"]: step for step in json.loads((out / "steps.json").read_text())}
    assert done.returncode == 1
    assert steps["gemm_large"]["status"] == 7 and steps["check"]["status"] == 0 and steps["audit_e5m2"]["status"] == 1
    assert f"gemm_large: exit status 7, see {out}/logs/gemm_large.log" in done.stderr
    assert "audit_e5m2:" not in done.stderr, "it wrote what it found"
    assert "audit_bf16: exit status 1" in done.stderr, "it wrote nothing"
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == len(steps) == 21
    assert any("benchmarks/gpu_step.py|" in call and "|e5m2, Pallas kernel|" in call for call in calls)
    # The two that are to be deterministic have the flags, if there is a GPU, and no other has.
    flagged = [call for call in calls if call.endswith("--xla_gpu_deterministic_ops=true")]
    assert [("resume.py" in call, "gpu_step.py" in call) for call in flagged] == [(True, False), (False, True)]
    late = subprocess.run(command, env=environment | {"MINUTES": "0"}, capture_output=True)
    assert late.returncode == 1
    assert {step["status"] for step in json.loads((out / "steps.json").read_text())} == {124}
