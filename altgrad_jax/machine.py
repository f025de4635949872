"""What can be wrong with the machine, said in one line: XLA's flags, the device, its memory."""

import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import jax

from altgrad_jax.errors import UsageError, UserError

log = logging.getLogger(__name__)
# XLA names the size by digits ("Out of memory allocating 123 bytes") or by units ("trying to allocate 1.50GiB").
_SIZE = re.compile(r"allocat\w* (?:request for )?([\d.,]+ ?(?:[KMGT]i?)?B(?:ytes)?\b|\d+ bytes)", re.IGNORECASE)


def check_xla_flags() -> None:
    """Refuses flags that this version of XLA does not know; call before JAX touches a device.

    XLA ends the process at the first of them, with a core dump for a message; so another process tries them.

    Raises:
      UsageError: naming the flag.
    """
    given = os.environ.get("XLA_FLAGS", "")
    if not given or _accepted(given):
        return
    refused = [flag for flag in given.split() if not _accepted(flag)]
    raise UsageError(
        f"XLA_FLAGS: XLA of jaxlib {jax.lib.__version__} does not take {' '.join(refused) or given}; correct it"
    )


def _accepted(flags: str) -> bool:
    program = "from jaxlib import xla_client; xla_client.CompileOptions()"
    environment = os.environ | {"XLA_FLAGS": flags}
    return subprocess.run([sys.executable, "-c", program], capture_output=True, env=environment).returncode == 0


def check_device() -> None:
    """Sees whether JAX can use the device it was told to, and says if there is a GPU that it does not use.

    Raises:
      UserError: it cannot.
    """
    # What JAX says when a plugin for a device does not start is a page of traceback; its last line is said below.
    troubles = _Troubles()
    jax_log = logging.getLogger("jax._src.xla_bridge")
    jax_log.addFilter(troubles.keep)
    try:
        device = jax.local_devices()[0]
    except (RuntimeError, AssertionError) as e:  # the latter where a platform that is asked for is not installed
        reason = troubles.found or " ".join(str(e).split())[:300] or "nothing of that kind is installed"
        raise UserError(
            f"JAX cannot start on JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '(not set)')}: {reason}; for an NVIDIA"
            ' GPU pip install ".[cuda13]" or ".[cuda12]"; JAX_PLATFORMS=cpu does without'
        ) from e
    finally:
        jax_log.removeFilter(troubles.keep)
    unused = device.platform == "cpu" and not os.environ.get("JAX_PLATFORMS") and Path("/dev/nvidia0").exists()
    if troubles.found or unused:
        reason = f" ({troubles.found})" if troubles.found else ""
        advice = 'a GPU that is here and not used needs pip install ".[cuda13]" or ".[cuda12]"'
        log.warning("JAX runs on the %s%s; %s", device.device_kind, reason, advice)


class _Troubles:
    """Takes errors with tracebacks out of a log, and keeps the last one's reason."""

    found = ""

    def keep(self, record: logging.LogRecord) -> bool:
        """A filter: whether the record is to be shown."""
        if record.levelno < logging.ERROR or not record.exc_info:
            return True
        self.found = " ".join(str(record.exc_info[1]).split())[:200]
        return False


class OutOfMemoryError(UserError):
    """What was to be run does not fit."""


@contextmanager
def memory_errors(settings: str) -> Iterator[None]:
    """Turns XLA's "out of memory" into one line.

    Args:
      settings: what the user can change, for people.

    Raises:
      OutOfMemoryError: naming the size that was asked for, the device and its memory, and the settings.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as e:
        if not is_out_of_memory(e):
            raise
        found = _SIZE.search(str(e))
        asked = f" for {found[1]}" if found else ""
        raise OutOfMemoryError(f"out of memory{asked} on {_device_memory()}; {settings}") from e


def check_memory(state: Mapping[str, int], devices: int) -> None:
    """Refuses a run whose state alone is more than there is; XLA may die of sizes like that while it compiles.

    Args:
      state: bytes of it on each device, by what they are for.
      devices: local devices it is kept on; of a CPU they share one memory.

    Raises:
      OutOfMemoryError: naming the sizes and the settings.
    """
    device = jax.local_devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    copies = 1 if limit else devices
    limit = limit or (host_memory() if device.platform == "cpu" else None)
    needed = copies * sum(state.values())
    if limit is None or needed <= limit:
        return
    parts = ", ".join(f"{name} {copies * size / 1e9:.3g} GB" for name, size in state.items() if size)
    raise OutOfMemoryError(
        f"out of memory before the first step: {parts} of state, and {device.device_kind} has {limit / 1e9:.3g} GB;"
        " lower config.model.n_embd, n_layer or vocab_size, or config.parallel.devices on a CPU"
    )


def host_memory() -> int | None:
    """Bytes that this process may use: the machine's with its swap space, or what its container is given."""
    try:
        sizes = dict(re.findall(r"(\w+): +(\d+) kB", Path("/proc/meminfo").read_text()))
    except OSError:
        return None  # no Linux
    limits = [1024 * (int(sizes["MemTotal"]) + int(sizes["SwapTotal"]))]
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = Path(file).read_text().strip() if Path(file).is_file() else ""
        limits += [int(text)] if text.isdecimal() else []
    return min(limits)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether that is what an exception of XLA's, or Python's, says."""
    if isinstance(error, jax.errors.JaxRuntimeError):
        return re.search("RESOURCE_EXHAUSTED|out of memory", str(error), re.IGNORECASE) is not None
    return isinstance(error, MemoryError)


def _device_memory() -> str:
    """The first device and how much memory it lets programs have, where it says."""
    device = jax.local_devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return f"{device.device_kind} ({limit / 2**30:.1f} GiB)" if limit else device.device_kind
