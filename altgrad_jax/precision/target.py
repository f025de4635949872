"""The device that programs are compiled for: JAX's default one, which may be a GPU that this machine does not have.

XLA's compiler for NVIDIA GPUs ships in the wheels `jax-cuda13-pjrt` and `jax-cuda13-plugin` and needs no GPU: told what
the GPU is like, it compiles for it on any Linux machine. What it cannot do without one is to time kernels, so between
engines (cuBLASLt, Triton) it decides by its flags alone.
"""

import re
from dataclasses import dataclass

import jax
from jax.experimental import topologies


@dataclass(frozen=True)
class GpuTarget:
    """A GPU to compile for. Figures of the SXM boards, from NVIDIA's data sheets and CUDA's device properties.

    Attributes:
      kind: name of the device, as its driver gives it.
      capability: compute capability, (major, minor).
      cores: streaming multiprocessors.
      memory_bytes: of the device.
      bandwidth: bytes per second of it.
      l2_bytes: second-level cache.
      clock_ghz: of the multiprocessors, boosted.
    """

    kind: str
    capability: tuple[int, int]
    cores: int
    memory_bytes: int
    bandwidth: int
    l2_bytes: int
    clock_ghz: float

    def describe(self) -> str:
        """XLA's GpuTargetConfigProto as text."""
        major, minor = self.capability
        # What a block may use is the same on compute capabilities 8.0 and 9.0 but for shared memory (CUDA programming
        # guide, table of technical specifications).
        shared = 233472 if major >= 9 else 167936 if minor == 0 else 102400
        return f"""
            gpu_device_info {{
              threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
              shared_memory_per_block: 49152 shared_memory_per_core: {shared}
              shared_memory_per_block_optin: {shared - 1024}
              core_count: {self.cores} fpus_per_core: 128
              block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
              memory_bandwidth: {self.bandwidth} l2_cache_size: {self.l2_bytes} clock_rate_ghz: {self.clock_ghz}
              device_memory_size: {self.memory_bytes}
              cuda_compute_capability {{ major: {major} minor: {minor} }}
              registers_per_core_limit: 65536 registers_per_block_limit: 65536
            }}
            platform_name: "CUDA"
            dnn_version_info {{ major: 9 minor: 10 }}
            runtime_version {{ major: 13 minor: 0 }}
            device_description_str: "{self.kind}"
        """


GPU_TARGETS = {
    "a100": GpuTarget("NVIDIA A100-SXM4-80GB", (8, 0), 108, 85_000_000_000, 2_039_000_000_000, 41_943_040, 1.41),
    "h100": GpuTarget("NVIDIA H100 80GB HBM3", (9, 0), 132, 84_929_347_584, 3_352_320_000_000, 52_428_800, 1.98),
    "h200": GpuTarget("NVIDIA H200", (9, 0), 132, 150_754_820_096, 4_800_000_000_000, 52_428_800, 1.98),
}


def absent_gpu(name: str) -> jax.Device:
    """A device of `GPU_TARGETS` to compile for, as `jax.default_device` takes it; it cannot run anything.

    Raises:
      LookupError: no such target.
      RuntimeError: XLA's compiler for GPUs is not installed.
    """
    if name not in GPU_TARGETS:
        raise LookupError(f"unknown GPU {name!r}: give one of {', '.join(GPU_TARGETS)}")
    jax.local_devices()  # registers the plugins that are installed
    try:
        found = topologies.get_topology_desc("", "cuda", target_config=GPU_TARGETS[name].describe(), topology="1x1x1")
    except (RuntimeError, ValueError, NotImplementedError, AssertionError) as e:
        reason = (str(e).splitlines() or [type(e).__name__])[0]  # JAX's assertions may say nothing
        raise RuntimeError(
            f"cannot compile for {name}: XLA's compiler for GPUs is not here ({reason});"
            ' pip install -e ".[gpu-compiler]" -c constraints.txt (Linux)'
        ) from e
    return found.devices[0]


def target_device() -> jax.Device:
    """The device that programs traced here will be compiled for."""
    chosen = jax.config.jax_default_device  # type: ignore[attr-defined]  # every option is one, made at run time
    if chosen is None:
        return jax.local_devices()[0]
    return jax.local_devices(backend=chosen)[0] if isinstance(chosen, str) else chosen


def on_cpu() -> bool:
    """Whether that is a CPU."""
    return target_device().platform == "cpu"


def _capability() -> float:
    """Compute capability of the target, an NVIDIA GPU; 0 if it is none."""
    device = target_device()
    text = str(getattr(device, "compute_capability", ""))
    # AMD's GPUs have names there instead of numbers.
    return float(text) if device.platform == "gpu" and re.fullmatch(r"\d+\.\d+", text) else 0.0


def fp8_hardware() -> str:
    """What there multiplies FP8: the name of the GPU; "" if nothing does.

    FP8 matrix units came with NVIDIA's compute capability 8.9; AMD's have other formats.
    """
    return target_device().device_kind if _capability() >= 8.9 else ""


def why_no_fp8() -> str:
    """Why it multiplies none, for people; "" where it does."""
    if fp8_hardware():
        return ""
    capability = _capability()
    if not capability:
        return "no FP8 matrix units on this machine"
    return f"{target_device().device_kind} has compute capability {capability}, FP8 matrix units begin with 8.9"


def has_wgmma() -> bool:
    """Whether it has Hopper's warpgroup matrix instructions, which later architectures dropped."""
    return _capability() == 9.0
