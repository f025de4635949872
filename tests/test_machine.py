"""What can be wrong with the machine, in one line each; the peak of devices; the trace of a few steps."""

import gzip
import json
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from altgrad_jax import machine, profiling
from altgrad_jax.errors import UserError
from altgrad_jax.flops import model_flops_per_token, peak_flops, peak_of
from altgrad_jax.model import GPTConfig
from altgrad_jax.tracking import read_metrics
from tests.runs import ended
from tests.test_cli_errors import assert_one_line

GOOD = "--xla_gpu_autotune_level=4"


@pytest.mark.parametrize(
    ("environment", "code", "says"),
    [
        ({"XLA_FLAGS": GOOD + " --xla_gpu_foo=1"}, 2, [": XLA of jaxlib", "does not take --xla_gpu_foo=1; correct"]),
        ({"XLA_FLAGS": GOOD + " --xla_gpu_autotune_level=x"}, 2, ["does not take --xla_gpu_autotune_level=x;"]),
        ({"JAX_PLATFORMS": "cuda"}, 1, ["JAX cannot start on JAX_PLATFORMS=cuda", 'pip install ".[cuda13]"']),
    ],
)
def test_one_line(lab, tmp_path, environment, code, says):
    done = ended(lab.start(tmp_path / "run", {}, environment))
    assert_one_line(done, code, says)
    assert not (tmp_path / "run").exists()


def test_a_gpu_that_is_not_used(monkeypatch, caplog):
    jax.local_devices()  # looks for files too
    monkeypatch.setattr(machine.Path, "exists", lambda self: str(self) == "/dev/nvidia0")
    monkeypatch.delenv("JAX_PLATFORMS")
    machine.check_device()
    assert "JAX runs on the cpu; a GPU that is here and not used needs pip install" in caplog.text


# As XLA words it, on a GPU and on a CPU.
OUT_OF_MEMORY = {
    "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 18253611008 bytes.": "18253611008 bytes",
    "RESOURCE_EXHAUSTED: Out of memory allocating 4398046511104 bytes.": "4398046511104 bytes",
    "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1.50GiB: more": "1.50GiB",
    "RESOURCE_EXHAUSTED: the module needs too much": "",
}


@pytest.mark.parametrize(("text", "size"), OUT_OF_MEMORY.items())
def test_out_of_memory(text, size):
    with pytest.raises(UserError) as caught, machine.memory_errors("lower this"):
        raise jax.errors.JaxRuntimeError(text)
    asked = f" for {size}" if size else ""
    assert str(caught.value) == f"out of memory{asked} on cpu; lower this"


def test_other_errors_stay_what_they_are():
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), machine.memory_errors(""):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")


def test_a_run_that_asks_for_too_much(lab, tmp_path):
    """A state that no machine holds is refused before XLA compiles a step for it, of which it may die by a signal."""
    done = ended(lab.start(tmp_path / "run", {"train.batch_size": 8, "model.n_embd": 2**21, "model.n_head": 2**15}))
    says = [
        "out of memory before the first step: parameters 2.11e+05 GB",
        "optimizer 4.22e+05 GB",
        "config.model.n_embd",
    ]
    assert_one_line(done, 1, says)
    assert not done.out and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("gpu", "size", "devices", "refused"),
    [(None, 30, 1, False), (None, 30, 4, True), (None, 101, 1, True), (40, 39, 8, False), (40, 41, 1, True)],
)
def test_a_state_that_does_not_fit(monkeypatch, gpu, size, devices, refused):
    """Devices of a CPU share its memory, 100 GB here; a GPU has its own."""
    memory = {"bytes_limit": gpu * 10**9} if gpu else None
    device = SimpleNamespace(device_kind="it", platform="gpu" if gpu else "cpu", memory_stats=lambda: memory)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    monkeypatch.setattr(machine, "host_memory", lambda: 100 * 10**9)
    state = {"parameters": size * 10**9, "scaling": 0}
    if not refused:
        return machine.check_memory(state, devices)
    with pytest.raises(
        machine.OutOfMemoryError, match=f"parameters {size * (1 if gpu else devices)} GB of state, and it"
    ):
        machine.check_memory(state, devices)


def test_the_memory_of_this_machine_is_known():
    assert 2**28 < machine.host_memory() < 2**50


def test_device_memory_where_it_is_known(monkeypatch):
    device = SimpleNamespace(device_kind="NVIDIA H100", memory_stats=lambda: {"bytes_limit": 3 * 2**34})
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    with pytest.raises(UserError, match=r"on NVIDIA H100 \(48.0 GiB\)"), machine.memory_errors(""):
        raise MemoryError


def test_flops_of_gpt2_by_hand():
    """124 M: 85 M weights in the blocks and 38.6 M in the output layer multiply a token."""
    gpt2 = GPTConfig(n_layer=12, n_head=12, n_embd=768, block_size=1024, vocab_size=50257)
    assert model_flops_per_token(gpt2) == 6 * (84_934_656 + 38_597_376) + 12 * 12 * 768 * 1024


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("TPU v5 lite", 197e12),
        ("cpu", None),
    ],
)
def test_peaks(kind, peak):
    assert peak_flops(kind) == peak_of(kind, 0.0) == peak
    assert peak_of(kind, 2.5) == 2.5e12


def test_utilisation_is_logged_where_the_peak_is_known(lab, finished, tmp_path):
    assert "train/mfu" not in read_metrics(finished / "metrics.jsonl")[-1]
    assert lab.train(tmp_path / "run", train__steps=2, runtime__peak_tflops=1e-3) == 0
    record = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
    model = GPTConfig(n_layer=1, n_head=2, n_embd=32, block_size=32, vocab_size=257)
    assert record["train/mfu"] == record["train/tokens_per_second"] * model_flops_per_token(model) / 1e9


def test_a_session_too_short_to_be_traced_says_so(lab, tmp_path, caplog):
    assert lab.train(tmp_path / "run", profile=True, train__steps=5) == 0
    assert "config.profile: nothing was traced, for the session ended before its step 6" in caplog.text
    assert not (tmp_path / "run" / "profile").exists()


def test_the_trace_is_of_steps_6_to_10(monkeypatch, tmp_path):
    trace, step, events = profiling.StepTrace(tmp_path), 0, []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder, **options: events.append(("start", step, folder)))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: events.append(("stop", step)))
    written = []
    for step in range(1, 13):
        trace.before()
        if trace.after(jnp.zeros(())):
            written.append(step)
    assert events == [("start", 6, str(tmp_path)), ("stop", 10)] and written == [10]


def test_a_trace_that_the_session_s_end_cuts_short_is_written(monkeypatch, tmp_path):
    events = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder, **options: events.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: events.append("stop"))
    trace = profiling.StepTrace(tmp_path)
    for _ in range(7):
        trace.before()
        assert not trace.after(None)
    trace.close()
    trace.close()
    assert events == ["start", "stop"]


def test_a_plugin_that_does_not_start_is_said_in_a_line(monkeypatch, caplog):
    """JAX logs a page of traceback and goes on with another device."""

    def start():
        try:
            raise RuntimeError("Unable to load\ncuFFT")
        except RuntimeError:
            machine.logging.getLogger("jax._src.xla_bridge").exception("plugin configuration error")
        return [SimpleNamespace(platform="gpu", device_kind="NVIDIA H100")]

    monkeypatch.setattr(jax, "local_devices", start)
    machine.check_device()
    assert [r.getMessage().partition(";")[0] for r in caplog.records] == [
        "JAX runs on the NVIDIA H100 (Unable to load cuFFT)"
    ]


@pytest.mark.slow
def test_a_trace_of_some_steps(lab, finished, tmp_path):
    """It holds steps 6 to 10 of the session, opens in Perfetto, and changes no bit."""
    run = tmp_path / "run"
    assert lab.train(run, profile=True) == 0
    [trace] = run.glob("profile/**/perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    names = [event.get("name", "") for event in events]
    assert any(re.search(r"dot|fusion", name) for name in names)
    assert list(run.glob("profile/**/*.xplane.pb"))
    losses = [[r.get("train/loss") for r in read_metrics(folder / "metrics.jsonl")] for folder in (run, finished)]
    assert losses[0] == losses[1]
    assert not (finished / "profile").exists()
