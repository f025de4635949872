"""What a run was: everything needed to repeat it, and nothing that must stay secret.

`manifest.json` names the code, the versions, the machine, the flags, the configuration and the data. Of the process
environment it takes only the variables listed here, which tune JAX and XLA and hold no credentials.
"""

import dataclasses
import hashlib
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from altgrad_jax import __version__
from altgrad_jax.data.cache import TokenCache
from altgrad_jax.data.overlap import open_overlap
from altgrad_jax.optimizers.factory import OPTIONS, OWN_OPTIONS
from altgrad_jax.versions import installed

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "ml_dtypes", "numpy", "ml-collections")
# Variables that change what JAX, XLA and NCCL do, by name; those of JAX's own settings are found in `jax.config`. A
# prefix would let through what is secret, for anybody may call a variable JAX_SOMETHING.
ENVIRONMENT = (
    *("XLA_FLAGS", "XLA_CLIENT_MEM_FRACTION", "GLIBC_TUNABLES", "LIBTPU_INIT_ARGS", "TF_CPP_VMODULE"),
    *("XLA_PYTHON_CLIENT_ALLOCATOR", "XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_PREALLOCATE"),
    *("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_MAX_CONNECTIONS", "CUDA_LAUNCH_BLOCKING", "CUDA_MODULE_LOADING"),
    *("NVIDIA_TF32_OVERRIDE", "TF_GPU_ALLOCATOR", "JAX_PLATFORM_NAME", "JAX_COORDINATOR_ADDRESS"),
    *("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"),
    *("NCCL_ALGO", "NCCL_BUFFSIZE", "NCCL_COLLNET_ENABLE", "NCCL_CROSS_NIC", "NCCL_CUMEM_ENABLE", "NCCL_DEBUG"),
    *("NCCL_DEBUG_SUBSYS", "NCCL_IB_DISABLE", "NCCL_IB_GID_INDEX", "NCCL_IB_HCA", "NCCL_IB_QPS_PER_CONNECTION"),
    *("NCCL_IB_TC", "NCCL_IB_TIMEOUT", "NCCL_LAUNCH_MODE", "NCCL_MAX_CTAS", "NCCL_MAX_NCHANNELS", "NCCL_MIN_CTAS"),
    *("NCCL_MIN_NCHANNELS", "NCCL_NET", "NCCL_NET_GDR_LEVEL", "NCCL_NET_PLUGIN", "NCCL_NTHREADS", "NCCL_NVLS_ENABLE"),
    *("NCCL_P2P_DISABLE", "NCCL_P2P_LEVEL", "NCCL_PROTO", "NCCL_SHM_DISABLE", "NCCL_SOCKET_FAMILY"),
    *("NCCL_SOCKET_IFNAME", "NCCL_SOCKET_NTHREADS", "NCCL_TOPO_FILE", "NCCL_TUNER_PLUGIN"),
)


def config_dict(config: ConfigDict) -> dict[str, Any]:
    """The configuration as JSON: tuples become lists, unset placeholders null."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(v) for key, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, (tuple, list)) else value

    return plain(config.to_dict())


def identity(config: ConfigDict, cache: TokenCache) -> dict[str, Any]:
    """What must not change when a run resumes, as flat dotted names.

    Model, precision, optimizer, data and batch decide every bit of a trajectory. `Policy.identity` adds the quantised
    layers. The windows that a language model is judged on decide what `val/loss` means, and so which is the best: they
    must not change either. What is absent here may change: devices, native or emulated operands (which are equal to the
    bit), tracking, how often to log, evaluate and save, and `train.steps` where the schedule does not depend on it.
    """
    full = config_dict(config)
    facts: dict[str, Any] = {"seed": full["seed"], "data.sha256": cache.sha256}
    for section in ("model", "precision", "optimizer"):
        facts.update({f"{section}.{key}": value for key, value in full[section].items()})
    for option in set(OWN_OPTIONS) - set(OPTIONS[config.optimizer.name]):
        del facts[f"optimizer.{option}"]  # another optimizer's
    if facts["model.gelu"] == "tanh":
        del facts["model.gelu"]  # as in runs from before there was a choice
    interventions = {key: full["stability"][key] for key in ("skip_nonfinite", "relative_clip", "rewinds")}
    if config.stability.fallback:
        interventions |= {key: value for key, value in full["stability"].items() if key.startswith("fallback")}
        facts["diagnostics.windows"] = full["diagnostics"]["windows"]  # where it looks for what to blame
    facts |= {f"stability.{key}": value for key, value in interventions.items() if value}
    if any(text.startswith("gradients:") for text in full["diagnostics"]["questions"]):
        facts["diagnostics.questions"] = "gradients"  # whose counters are part of the state
    for key in ("strict", "rules", "backend", "kernel", "kernel_tiles"):
        del facts[f"precision.{key}"]  # `Policy.identity` says what became of them
    for key in ("batch_size", "grad_accumulation", "steps_per_dispatch", "remat", "loss_chunk", "loss_scale"):
        facts[f"train.{key}"] = full["train"][key]
    if full["task"] == "lm":  # a classifier is judged on all documents
        facts["train.eval_batches"] = full["train"]["eval_batches"]
    if config.optimizer.schedule != "constant":
        facts["optimizer.decay_steps"] = config.optimizer.decay_steps or config.train.steps
    return facts


def measured_on(config: ConfigDict) -> dict[str, Any]:
    """What decides which part of a batch diagnostics are asked of; a run may change it, and then says so."""
    return {f"diagnostics.{key}": config.diagnostics[key] for key in ("windows", "tokens", "lanczos_steps")}


def environment() -> dict[str, str]:
    """The environment variables that change what JAX and XLA do."""
    return {k: v for k, v in sorted(os.environ.items()) if k in ENVIRONMENT or _is_setting_of_jax(k)}


def _is_setting_of_jax(name: str) -> bool:
    return name.startswith("JAX_") and name.isupper() and hasattr(jax.config, name.lower())


def code_sha256() -> str:
    """Hash of this package's source files, their names included."""
    folder, digest = Path(__file__).resolve().parent, hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        digest.update(f"{file.relative_to(folder)}\0".encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Installed versions of the packages a result depends on."""
    found = {"python": platform.python_version(), "altgrad_jax": __version__}
    for name in PACKAGES:
        found[name] = importlib.metadata.version(name)
    return found | installed()


def git_revision() -> dict[str, Any] | None:
    """Commit and whether the tree differs from it; None outside a checkout or without git."""
    folder = Path(__file__).resolve().parents[1]
    if not (folder / ".git").exists():
        return None

    def git(*args: str) -> str:
        command = ["git", "-C", str(folder), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "modified": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None


def devices() -> dict[str, Any]:
    """The accelerator or CPU that JAX sees."""
    first = jax.devices()[0]
    return {
        "backend": jax.default_backend(),
        "kind": first.device_kind,
        "local": jax.local_device_count(),
        "global": jax.device_count(),
        "hosts": jax.process_count(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
    }


def corpus(cache: TokenCache, eval_split: str) -> dict[str, Any]:
    """The data and the tokenizer, by name, size and hash; entropies, in nats per token, of the split evaluated on.

    `shared_documents` is what its splits share; None if the cache was built before that was counted.
    """
    header, overlap = cache.header, open_overlap(cache)
    return {
        "sha256": cache.sha256,
        "source": header.source.name,
        "description": header.source.description,
        "fingerprint": header.source.fingerprint,
        "cache": _from_home(cache.path),
        "tokenizer": {
            "kind": header.tokenizer.kind,
            "vocab_size": header.tokenizer.vocab_size,
            "fingerprint": header.tokenizer.fingerprint,
        },
        "eval_split": eval_split,
        "split_sha256": {split.name: split.tokens_sha256 for split in header.splits},
        "unigram_nats": cache.split_header(eval_split).unigram_nats,
        "entropy_floor": cache.entropy_floor(eval_split),
        "tokens": {split.name: split.tokens for split in header.splits},
        "shared_documents": None if overlap is None else [dataclasses.asdict(pair) for pair in overlap.pairs],
    }


def _from_home(path: Path) -> str:
    """A path as people write it, without the name of whoever's home it is in."""
    return f"~/{path.relative_to(Path.home())}" if path.is_relative_to(Path.home()) else str(path)


def command_line(command: Sequence[str] | None = None) -> list[str]:
    """The command of a run, by default this process's own."""
    return list(command or ["python", "-m", "altgrad_jax.main", *sys.argv[1:]])


def to_go_on(command: Sequence[str]) -> str:
    """A command as one line for a shell, to be given again: without --restart, which would begin anew."""
    return shlex.join(word for word in command if not word.lstrip("-").startswith("restart"))


def session(step: int, command: Sequence[str] | None = None) -> dict[str, Any]:
    """One start of the run's command (None: of this process): when, from which step, on what, with which code."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "from_step": step,
        "command": command_line(command),
        "versions": versions(),
        "devices": devices(),
        "environment": environment(),
        "git": git_revision(),
    }
