"""The training step on this machine: speed beside PyTorch, memory, and everything that is not the step.

    python benchmarks/train_step.py [--torch] [--rounds=3] [--out=docs/results/train_step.json]

Everything is a ratio of two things measured in the same run, in turn, so that a machine whose speed drifts drifts for
both. Each line is the median over rounds of the median over steps; memory is the peak of a process of its own.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import in_subprocess, write_results

from altgrad_jax.allocator import TUNABLES

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "bf16.py"
# name -> (config.model, batch size, steps timed)
SIZES = {
    "baseline_30M": ({"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "vocab_size": 50257}, 12, 4),
    "quick_1M": ({"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 128, "vocab_size": 1024}, 16, 40),
    "tiny": ({"n_layer": 2, "n_head": 4, "n_embd": 128, "block_size": 64, "vocab_size": 512}, 8, 200),
}
FIXED = {"dropout": 0.0, "bias": False, "tie_embeddings": True, "attention": "auto"}


def main() -> None:
    """Runs all sections, each worker in its own process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", action="store_true", help="also the same model in PyTorch, float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", nargs="*", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        kind, size = arguments.worker.split(":")
        print(json.dumps(WORKERS[kind](size)))
        return
    results = {size: measure_step(size, arguments.rounds, arguments.torch) for size in arguments.sizes}
    results["around_the_step"] = {size: worker("loop", size) for size in arguments.sizes if size != "baseline_30M"}
    results["loss_memory"] = {form: worker(form, "baseline_30M") for form in ("chunked_loss", "plain_loss")}
    results["startup"] = measure_startup()
    write_results(arguments.out, results)


def worker(kind: str, size: str, large_pages: bool = True) -> dict:
    """One measurement in a process of its own."""
    # An empty value leaves glibc's defaults.
    return in_subprocess(__file__, [f"--worker={kind}:{size}"], {"GLIBC_TUNABLES": TUNABLES if large_pages else ""})


def measure_step(size: str, rounds: int, torch: bool) -> dict:
    """Seconds and peak memory of the step in its variants, taken in turn `rounds` times."""
    variants = {
        "bfloat16": lambda: worker("bfloat16", size),
        "float32": lambda: worker("float32", size),
        "bfloat16_default_allocator": lambda: worker("bfloat16", size, large_pages=False),
    }
    if torch:
        variants["torch_float32"] = lambda: worker("torch", size, large_pages=False)
        variants["torch_float32_large_pages"] = lambda: worker("torch", size)
    taken: dict[str, list[dict]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, measure in variants.items():
            taken[name].append(measure())
    model, batch, _ = SIZES[size]
    result: dict = {}
    for name, rows in taken.items():
        seconds = statistics.median(row["seconds"] for row in rows)
        result[name] = {
            "seconds_per_step": round(seconds, 5),
            "all_rounds": [round(row["seconds"], 5) for row in rows],
            "tokens_per_second": round(batch * model["block_size"] / seconds),
            "peak_memory_MB": round(statistics.median(row["peak_bytes"] for row in rows) / 1e6),
        }
    for name in result:
        if name != "bfloat16":
            pairs = zip(taken[name], taken["bfloat16"], strict=True)
            result[name]["seconds_over_bfloat16"] = round(
                statistics.median(a["seconds"] / b["seconds"] for a, b in pairs), 2
            )
    return result


def experiment_of(
    size: str, compute: str, folder: str, rules: tuple = (), windows: int = 0, questions: tuple | None = None
):
    """The size as an Experiment on the embedded corpus, `windows` of a batch diagnosed; other questions if given."""
    import altgrad_jax.config
    from altgrad_jax import experiment
    from altgrad_jax.data.corpus import open_corpus

    config = altgrad_jax.config.load_sibling(str(CONFIG), "bf16").get_config()
    model, batch, steps = SIZES[size]
    with config.unlocked():
        config.model.update(model)
        config.train.update(batch_size=batch, steps=steps, eval_batches=1, eval_every=10**6)
        config.checkpoint.every = 10**6
        config.data.update(name="embedded", tokenizer="bpe", vocab_size=512, data_dir=folder)
        config.precision.update(compute=compute, rules=rules)
        config.diagnostics.windows = windows
        if questions is not None:
            config.diagnostics.questions = questions
    altgrad_jax.config.validate(config)
    return experiment.build(config, open_corpus(config, progress=False))


def time_steps(size: str, compute: str) -> dict:
    """Median seconds of the compiled step alone, after two that are not counted."""
    import jax

    with tempfile.TemporaryDirectory() as folder:
        exp = experiment_of(size, compute, folder)
        batch = exp.shard(next(exp.batches.from_step(0)))
        state, times = exp.fresh_state(), []
        for _ in range(SIZES[size][2] + 2):
            began = time.perf_counter()
            state, metrics = exp.run_train(state, batch)
            jax.block_until_ready(metrics)
            times.append(time.perf_counter() - began)
    return {"seconds": statistics.median(times[2:]), "peak_bytes": _peak_bytes()}


def time_torch(size: str) -> dict:
    """Median seconds of the PyTorch step."""
    from torch_gpt import seconds_per_step

    from altgrad_jax.model import gpt_config

    model, batch, steps = SIZES[size]
    times = seconds_per_step(gpt_config(model | FIXED, "float32"), batch, steps + 1)
    return {"seconds": statistics.median(times[1:]), "peak_bytes": _peak_bytes()}


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def time_loop(size: str) -> dict:
    """The real loop against the bare step, the loader against training, and how long a save blocks."""
    import jax

    from altgrad_jax.checkpoint import Checkpoints
    from altgrad_jax.interrupt import GracefulStop
    from altgrad_jax.loop import Loop
    from altgrad_jax.start import Start
    from altgrad_jax.tracking import MetricsFile, read_metrics

    with tempfile.TemporaryDirectory() as folder:
        exp = experiment_of(size, "bfloat16", folder)
        tokens_per_step = exp.config.train.batch_size * exp.model.block_size
        batches, steps = exp.batches.from_step(0), exp.config.train.steps
        state, _ = exp.run_train(exp.fresh_state(), exp.shard(next(batches)))
        bare, loop, saves = [], [], []
        for turn in range(5):
            batch = exp.shard(next(batches))
            jax.block_until_ready(state)
            began = time.perf_counter()
            for _ in range(steps):
                state, metrics = exp.run_train(state, batch)
            jax.block_until_ready(metrics)
            bare.append((time.perf_counter() - began) / steps)

            checkpoints = Checkpoints(Path(folder) / f"checkpoints{turn}", max_to_keep=3)
            metrics_file = MetricsFile(Path(folder) / f"{turn}.jsonl", 0)
            session = Loop(exp, checkpoints, [metrics_file], Start(state, 0, 0.0, ""), {})
            with GracefulStop() as stop:
                session.run(stop)
            state = session.state
            # The loop's own clock runs from fetch to fetch and stops for evaluation and saving. The first step fills
            # the pipeline, the last drains it.
            rates = [r["train/tokens_per_second"] for r in read_metrics(Path(folder) / f"{turn}.jsonl")[2:-1]]
            loop.append(statistics.mean(tokens_per_step / rate for rate in rates))
            checkpoints.wait()
            began = time.perf_counter()
            checkpoints.save(steps + 1, state, {}, {})
            saves.append(time.perf_counter() - began)
            checkpoints.close()
        began, count = time.perf_counter(), 0
        for _ in range(2000):
            count += next(batches)[:, 1:].size
        loader = count / (time.perf_counter() - began)
    return {
        "bare_step_seconds": round(statistics.median(bare), 6),
        "loop_step_seconds": round(statistics.median(loop), 6),
        "share_outside_the_step": round(statistics.median(1 - b / a for a, b in zip(loop, bare, strict=True)), 4),
        "loader_tokens_per_second": round(loader),
        "loader_over_training": round(loader / (tokens_per_step / statistics.median(loop)), 1),
        "checkpoint_save_blocks_seconds": round(statistics.median(saves), 4),
    }


def time_loss(chunk: int) -> dict:
    """Time and memory of the loss and its gradients alone; `chunk` 0 is the plain form, all logits at once."""
    import jax
    import jax.numpy as jnp

    from altgrad_jax.losses import token_cross_entropy
    from altgrad_jax.precision.dot import matmul

    model, batch, _ = SIZES["baseline_30M"]
    tokens, width, vocab = batch * model["block_size"], model["n_embd"], model["vocab_size"]

    def plain(hidden_NC, w_CV, targets_N):
        logits_NV = matmul(hidden_NC, w_CV, jnp.bfloat16, jnp.float32)
        picked_N1 = jnp.take_along_axis(jax.nn.log_softmax(logits_NV), targets_N[:, None], axis=-1)
        return -jnp.mean(picked_N1)

    def chunked(hidden_NC, w_CV, targets_N):
        return token_cross_entropy(hidden_NC, w_CV, targets_N, jnp.bfloat16, chunk)

    keys = jax.random.split(jax.random.key(0), 3)
    hidden_NC = jax.random.normal(keys[0], (tokens, width), jnp.bfloat16)
    w_CV = 0.02 * jax.random.normal(keys[1], (width, vocab))
    targets_N = jax.random.randint(keys[2], (tokens,), 0, vocab)
    run = jax.jit(jax.value_and_grad(chunked if chunk else plain, argnums=(0, 1)))
    compiled = run.lower(hidden_NC, w_CV, targets_N).compile()
    memory = compiled.memory_analysis()
    times = []
    for _ in range(5):
        began = time.perf_counter()
        jax.block_until_ready(compiled(hidden_NC, w_CV, targets_N))
        times.append(time.perf_counter() - began)
    return {
        "seconds": round(statistics.median(times), 3),
        "temporary_MB": round(memory.temp_size_in_bytes / 1e6) if memory else None,
        "process_peak_MB": round(_peak_bytes() / 1e6),
    }


def measure_startup() -> dict:
    """Wall time of whole one-step runs of the quick variant, and their first step, with the compilation cache."""
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("without_cache", "cache_being_filled", "cache_full"):
            command = [
                sys.executable,
                "-m",
                "altgrad_jax.main",
                f"--config={CONFIG}:quick",
                f"--workdir={folder}/{name}",
            ]
            command += [f"--config.data.data_dir={folder}/data", "--config.data.name=embedded"]
            command += ["--config.tracking.wandb=disabled", "--config.train.steps=1", "--config.train.eval_batches=1"]
            if name != "without_cache":
                command.append(f"--config.runtime.compilation_cache={folder}/xla")
            else:  # a first run builds the token cache, which is not what is timed
                subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
                command[4] += "_again"
            began = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
            wall = time.perf_counter() - began
            summary = json.loads((Path(command[4].partition("=")[2]) / "summary.json").read_text())
            result[name] = {"process_seconds": round(wall, 2), "first_step_seconds": summary["compile_seconds"]}
    return result


WORKERS = {
    "bfloat16": lambda size: time_steps(size, "bfloat16"),
    "float32": lambda size: time_steps(size, "float32"),
    "torch": time_torch,
    "loop": time_loop,
    "chunked_loss": lambda size: time_loss(256),
    "plain_loss": lambda size: time_loss(0),
}

if __name__ == "__main__":
    main()
