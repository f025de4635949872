"""The main job, small enough for tests: a corpus of 150 kB, a model of 21 thousand parameters, half a second of steps.

A `Lab` runs it in this process, in a process of its own, or many times over in forks of one process that has already
imported it. Every lab has its own corpus, token cache and folder of compiled programs.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict

from altgrad_jax.config import load_config, validate
from altgrad_jax.data.corpus import open_corpus
from altgrad_jax.tracking import read_metrics
from altgrad_jax.train import train
from tests.forks import ROOT, Ended, run_module

TINY: dict[str, Any] = {
    "diagnostics.shadow_every": 0,
    "diagnostics.questions": (),
    "model.n_layer": 1,
    "model.n_embd": 32,
    "model.n_head": 2,
    "model.block_size": 32,
    "model.vocab_size": 257,
    "data.name": "files",
    "data.tokenizer": "bytes",
    "train.batch_size": 8,
    "train.steps": 20,
    "train.eval_every": 10,
    "train.eval_batches": 2,
    "optimizer.learning_rate": 3e-3,
    "optimizer.warmup_steps": 5,
    "checkpoint.every": 5,
    "tracking.wandb": "disabled",
    "parallel.devices": 1,
}
SECRET = "hunter2-5f0c1e"
SECRETS = {"AWS_SECRET_ACCESS_KEY": SECRET, "WANDB_API_KEY": SECRET * 3, "HF_TOKEN": SECRET, "MY_JAX_TOKEN": SECRET}
# Called like what tunes JAX, XLA and NCCL.
SECRETS |= {f"{prefix}_PASSWORD": SECRET for prefix in ("JAX", "JAX_CONFIG", "NCCL", "XLA_PYTHON_CLIENT")}
BITS = ("step", "train/loss", "train/grad_norm", "train/learning_rate", "val/loss")


class Lab:
    """A corpus and what is built from it once."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.corpus = folder / "corpus.txt"
        if not self.corpus.exists():
            folder.mkdir(parents=True, exist_ok=True)
            draw = random.Random(0)
            words = [
                "the",
                "member",
                "states",
                "shall",
                "ensure",
                "that",
                "each",
                "operator",
                "of",
                "goods",
                "keeps",
                "records",
                "and",
                "reports",
            ]
            paragraphs = (" ".join(draw.choices(words, k=120)) for _ in range(200))
            self.corpus.write_text("\n\n".join(paragraphs))

    def prepare(self) -> Path:
        """The token cache; built by the first call."""
        return open_corpus(self.config(), progress=False).path

    def changes(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        """The tiny configuration as changes to configs/bf16.py; `changes` go on top."""
        own = {
            "data.path": str(self.corpus),
            "data.data_dir": str(self.folder / "data"),
            "runtime.compilation_cache": str(self.folder / "compiled"),
        }
        return TINY | own | dict(changes)

    def arguments(self, workdir: Path, changes: Mapping[str, Any] = {}) -> list[str]:
        """The main job's command line, after its name."""
        flags = [f"--config.{k}={v}" for k, v in self.changes(changes).items()]
        return ["--config=configs/bf16.py", f"--workdir={workdir}", *flags]

    def config(self, **changes: Any) -> ConfigDict:
        """The same as a ConfigDict; keys with "__" for dots."""
        config = load_config(str(ROOT / "configs" / "bf16.py"))
        dotted = {key.replace("__", "."): value for key, value in changes.items()}
        config.update_from_flattened_dict(self.changes(dotted))
        validate(config)
        return config

    def train(self, workdir: Path, **changes: Any) -> int:
        """Runs in this process; returns the exit status."""
        with self.compiled_programs():
            return train(self.config(**changes), str(workdir))

    @contextmanager
    def compiled_programs(self) -> Iterator[None]:
        """Keeps what this process compiles, as the main job does with config.runtime.compilation_cache."""
        values = {
            "jax_compilation_cache_dir": str(self.folder / "compiled"),
            "jax_persistent_cache_min_compile_time_secs": 0.0,
        }
        before = {name: getattr(jax.config, name) for name in values}
        try:
            for name, value in values.items():
                jax.config.update(name, value)
            compilation_cache.reset_cache()
            yield
        finally:
            for name, value in before.items():
                jax.config.update(name, value)
            compilation_cache.reset_cache()

    def start(
        self,
        workdir: Path,
        changes: Mapping[str, Any] = {},
        environment: Mapping[str, str] = {},
    ) -> subprocess.Popen:
        """Starts a process of its own, in its own process group, with as many virtual devices as this one."""
        self.prepare()
        command = [sys.executable, "-m", "altgrad_jax.main", *self.arguments(workdir, changes)]
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run_forks(self, cases: Sequence[Sequence[str]]) -> list[Ended]:
        """Runs the main job once for each list of arguments, with as many virtual devices as this process."""
        folder = self.folder / "forks"
        shutil.rmtree(folder, ignore_errors=True)
        environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
        # Without a login, and with the allocator as it is: a restart would leave the fork.
        environment |= {"HOME": str(folder), "GLIBC_TUNABLES": ""}
        return run_module("altgrad_jax.main", cases, folder, ["altgrad_jax.train"], environment)


class Replaced:
    """A step that does something beside: called as `call`, compiled as `step`."""

    def __init__(self, step: Any, call: Any):
        self.compile, self._call = step.compile, call

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)


def ended(process: subprocess.Popen, timeout: float = 120.0) -> Ended:
    """Waits for the end."""
    out, err = process.communicate(timeout=timeout)
    return Ended(process.returncode, out, err)


def wait_for_step(process: subprocess.Popen, workdir: Path, step: int, timeout: float = 120.0) -> None:
    """Returns when the run has logged a step."""
    deadline = time.monotonic() + timeout
    while process.poll() is None and time.monotonic() < deadline:
        path = workdir / "metrics.jsonl"
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        if lines and json.loads(lines[-1])["step"] >= step:
            return
        time.sleep(0.002)
    raise AssertionError(f"the run did not get to step {step}: {ended(process)}")


def kill(process: subprocess.Popen) -> None:
    """SIGKILL to it and its children, and waits."""
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def bits(workdir: Path) -> list[tuple]:
    """What must be equal to the bit between two runs that did the same: each logged step's values."""
    return [tuple(record.get(name) for name in BITS) for record in read_metrics(workdir / "metrics.jsonl")]


def train_losses(workdir: Path) -> list[tuple[int, float]]:
    """(step, train/loss) of every step logged."""
    records = read_metrics(workdir / "metrics.jsonl")
    return [(r["step"], r["train/loss"]) for r in records if "train/loss" in r]


def summary(workdir: Path) -> dict[str, Any]:
    """summary.json."""
    return json.loads((workdir / "summary.json").read_text())


def checkpoint_steps(workdir: Path) -> list[int]:
    """Steps whose checkpoint is in the folder, by name."""
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdecimal())


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, to see that nothing was changed."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
