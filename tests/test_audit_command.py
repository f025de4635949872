"""The audit as a command and as part of a run: for this machine, for an H100 that is not here, from a file."""

import gzip
import importlib.util
import json

import jax
import pytest

from altgrad_jax import experiment
from altgrad_jax.data.corpus import open_corpus
from altgrad_jax.errors import UserError
from altgrad_jax.precision.target import GPU_TARGETS, absent_gpu, fp8_hardware, on_cpu, target_device
from altgrad_jax.program import compile_audited
from tests.forks import run_module
from tests.precision.test_audit import RECORDED
from tests.runs import Lab
from tests.test_cli_errors import assert_one_line

HAS_GPU_COMPILER = importlib.util.find_spec("jax_cuda13_plugin") is not None
needs_gpu_compiler = pytest.mark.skipif(not HAS_GPU_COMPILER, reason='needs pip install ".[gpu-compiler]"')
SMALL = ["--config.model.n_layer=1", "--config.model.n_embd=64", "--config.model.n_head=2"]
SMALL += ["--config.model.vocab_size=250", "--config.model.block_size=32", "--config.train.batch_size=4"]
SMALL += ["--config.train.loss_chunk=64", "--config.model.attention=xla", "--config.parallel.devices=1"]


def run_audit(tmp_path, *cases):
    return run_module("altgrad_jax.audit", cases, tmp_path / "forks", ["altgrad_jax.program"])


def experiment_with(lab: Lab, **changes) -> experiment.Experiment:
    config = lab.config(**changes)
    return experiment.build(config, open_corpus(config, progress=False))


def test_the_audited_program_is_the_one_that_runs(lab):
    """Compiling it first costs nothing: the first step finds it compiled."""
    exp = experiment_with(lab, precision__rules=((".*", "hybrid"),))
    state, batch = exp.fresh_state(), exp.shard(next(exp.batches.from_step(0)))
    compiled = []
    listen = lambda name, seconds, **_: compiled.append(name) if "backend_compile" in name else None  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        compile_audited(exp, state)
        assert len(compiled) == 1
        exp.run_train(state, batch)
        assert len(compiled) == 1
    finally:
        jax.monitoring.clear_event_listeners()


def test_it_is_in_the_manifest(lab, finished, tmp_path, capsys):
    manifest = json.loads((finished / "manifest.json").read_text())
    assert "kernel_tiles" not in manifest
    plain = manifest["audit"]
    assert (plain["fp8_asked"], plain["fp8_got"], plain["not_found"]) == (0, 0, [])
    assert any(line.startswith("blocks.*.mlp.down dw: asked bfloat16 x bfloat16") for line in plain["products"])
    tiles = tmp_path / "tiles.json"
    tiles.write_text('{"results": {"gpu": "NVIDIA H100", "products": []}}')
    changes = {"precision__kernel": "pallas", "precision__kernel_tiles": str(tiles)}
    assert lab.train(tmp_path / "run", train__steps=1, precision__rules=(("blocks.*", "hybrid"),), **changes) == 0
    assert f"kernel tiles: {tiles} is not used" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    table = {"file": str(tiles), "gpu": "NVIDIA H100"}
    assert manifest["kernel_tiles"] == {"table": table, "measured": {}, "by_size": {}}
    hybrid = manifest["audit"]
    assert (hybrid["fp8_asked"], hybrid["fp8_got"], hybrid["fp8_share"]) == (12, 0, 0.0)
    assert hybrid["multiply_adds"] == plain["multiply_adds"]


def test_strict_stops_a_run_whose_audit_falls_short(lab):
    """What the rules alone cannot know: here that XLA converts FP8 operands before it multiplies them."""
    exp = experiment_with(lab, precision__rules=(("lm_head", "e5m2"),), precision__backend="native")
    assert compile_audited(exp, exp.fresh_state())[0].summary()["fp8_got"] == 0
    exp.config.precision.strict = True
    with pytest.raises(UserError, match=r"precision.strict: 3 of 3 products asked for in FP8 are not.*strict=False"):
        compile_audited(exp, exp.fresh_state())


def test_a_program_that_cannot_be_read_stops_only_strict_runs(lab, tmp_path, monkeypatch):
    """Another version of XLA must not end training; that the audit failed is said and kept."""

    def unreadable(*_):
        raise ValueError("KeyError 'x'")

    told = "what the compiled step multiplies cannot be told: KeyError 'x'"
    monkeypatch.setattr("altgrad_jax.program.audit", unreadable)
    assert lab.train(tmp_path / "run", train__steps=1) == 0
    kept = json.loads((tmp_path / "run" / "manifest.json").read_text())["audit"]
    assert kept == {"problem": told}
    exp = experiment_with(lab)
    exp.config.precision.strict = True
    with pytest.raises(UserError, match=f"precision.strict: {told}"):
        compile_audited(exp, exp.fresh_state())


def test_a_file_of_hlo(tmp_path):
    text = tmp_path / "step.txt"
    text.write_bytes(gzip.decompress((RECORDED / "h100_e5m2_triton.txt.gz").read_bytes()))
    config = ["--config=configs/e5m2.py:quick", *SMALL]
    good, fallen, broken, missing, both, nowhere = run_audit(
        tmp_path,
        [*config, f"--hlo={text}", f"--out={tmp_path / 'audit.json'}"],
        ["--config=configs/hybrid.py:quick", *SMALL],
        [*config, f"--hlo={tmp_path / 'audit.json'}"],
        [*config, f"--hlo={tmp_path / 'nothing'}"],
        [*config, f"--hlo={text}", "--gpu=h100"],
        [*config, f"--hlo={text}", f"--out={tmp_path / 'none' / 'audit.json'}"],
    )
    assert good.code == 0 and "FP8 products: 15 asked for, 15 got" in good.out
    found = json.loads((tmp_path / "audit.json").read_text())
    assert found["summary"]["fp8_got"] == 15 and len(found["products"]) == 15
    assert (
        fallen.code == 1
        and "FP8 products: 15 asked for, all emulated (no FP8 matrix units" in fallen.out
        and not fallen.err
    )
    assert_one_line(broken, 3, ["audit.json: this is no HLO text"])
    assert_one_line(missing, 2, ["--hlo: there is no file"])
    assert_one_line(nowhere, 2, ["--out: there is no folder"])
    assert_one_line(both, 2, ["--gpu compiles a program and --hlo reads one"])


def test_unknown_gpus(tmp_path):
    [unknown] = run_audit(tmp_path, ["--config=configs/e5m2.py:quick", "--gpu=h1000"])
    assert unknown.code == 2 and "h100" in unknown.err
    with pytest.raises(LookupError, match="unknown GPU 'h1000': give one of a100, h100, h200"):
        absent_gpu("h1000")


@pytest.mark.skipif(HAS_GPU_COMPILER, reason="it is here")
def test_without_the_compiler(tmp_path):
    [absent] = run_audit(tmp_path, ["--config=configs/e5m2.py:quick", "--gpu=h100", *SMALL])
    assert_one_line(absent, 3, ["cannot compile for h100", 'pip install -e ".[gpu-compiler]"'])


@needs_gpu_compiler
@pytest.mark.parametrize("name", list(GPU_TARGETS))
def test_a_gpu_that_is_not_here(name):
    device = absent_gpu(name)
    assert on_cpu() and fp8_hardware() == ""
    with jax.default_device(device):
        assert target_device() == device and not on_cpu()
        assert fp8_hardware() == ("" if name == "a100" else GPU_TARGETS[name].kind)
    assert on_cpu()


ON_AN_H100 = {
    ("hybrid.py:quick", "cublaslt"): (15, "cuBLASLt FP8"),
    ("e5m2.py:quick", "triton"): (15, "Triton"),
    ("e5m2.py:quick", "cublaslt"): (0, "cuBLASLt"),
    ("hybrid.py:quick", "triton"): (15, "Triton"),
    ("e5m2_cast.py:quick", "triton"): (15, "Triton"),
    ("format.py:e4m3,quick", "cublaslt"): (15, "cuBLASLt FP8"),
    ("bf16.py:quick", "cublaslt"): (0, "cuBLASLt"),
}


def check_on_an_h100(tmp_path, config, engine):
    """Compiles the whole train step with XLA's compiler for GPUs."""
    got, by = ON_AN_H100[config, engine]
    out = tmp_path / "audit.json"
    command = [f"--config=configs/{config}", *SMALL, "--gpu=h100", f"--engine={engine}", f"--out={out}"]
    [ended] = run_audit(tmp_path, command)
    asked = 0 if config.startswith("bf16") else 15
    assert ended.code == (0 if got == asked else 1), ended.err
    found = json.loads(out.read_text())
    assert (found["summary"]["fp8_asked"], found["summary"]["fp8_got"]) == (asked, got)
    assert {gemm["engine"] for product in found["products"] for gemm in product["gemms"]} == {by}
    assert found["summary"]["not_found"] == []


@needs_gpu_compiler
@pytest.mark.slow
@pytest.mark.parametrize(("config", "engine"), list(ON_AN_H100)[:2])
def test_what_an_h100_would_multiply(tmp_path, config, engine):
    check_on_an_h100(tmp_path, config, engine)


@needs_gpu_compiler
@pytest.mark.exhaustive
@pytest.mark.parametrize(("config", "engine"), list(ON_AN_H100)[2:])
def test_what_an_h100_would_multiply_in_other_recipes(tmp_path, config, engine):
    check_on_an_h100(tmp_path, config, engine)


@needs_gpu_compiler
@pytest.mark.slow
def test_float32_is_not_tf32_on_a_gpu(tmp_path):
    """Tensor cores cut float32 operands to 10 mantissa bits unless a product says not to; here every one does."""
    out = tmp_path / "audit.json"
    exact = "--config.precision.compute=float32"
    command = ["--config=configs/bf16.py:quick", *SMALL, "--gpu=h100", f"--out={out}", exact]
    [ended] = run_audit(tmp_path, command)
    assert ended.code == 0, ended.err
    found = json.loads(out.read_text())
    gemms = [gemm for product in found["products"] for gemm in product["gemms"]] + found["others"]
    assert {tuple(gemm["met"]) for gemm in gemms} == {("float32", "float32")}


@pytest.mark.parametrize(("raised", "says"), [(AssertionError(), "AssertionError"), (RuntimeError("a\nb"), "a")])
def test_without_the_compiler_for_gpus(monkeypatch, raised, says):
    """However JAX puts it that the plugin is missing; its assertions may say nothing."""

    def missing(*_, **__):
        raise raised

    monkeypatch.setattr("altgrad_jax.precision.target.topologies.get_topology_desc", missing)
    with pytest.raises(RuntimeError, match=rf"not here \({says}\); pip install"):
        absent_gpu("h100")
