"""How much memory a compiled program needs, and how much there is."""

from pathlib import Path

import jax

# Of what is free: for what is not in the program's own account (validation batches, diagnostics, the host's arrays).
SHARE = 0.8


def needed_bytes(compiled: jax.stages.Compiled) -> int:
    """What the program takes on each device while it runs, beside its arguments, which lie there already."""
    found = compiled.memory_analysis()
    if found is None:
        return 0
    return found.output_size_in_bytes - found.alias_size_in_bytes + found.temp_size_in_bytes


def free_bytes(device: jax.Device) -> int | None:
    """What a program may take on a device; None where that is not known."""
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return int(SHARE * (stats["bytes_limit"] - stats.get("bytes_in_use", 0)))
    return _host_bytes(Path("/proc/meminfo")) if device.platform == "cpu" else None


def _host_bytes(meminfo: Path) -> int | None:
    """What Linux says is available."""
    try:
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        return int(SHARE * 1024 * int(lines["MemAvailable"].split()[0]))
    except (OSError, KeyError, ValueError):
        return None
