"""What the compiled train step really multiplies, and in which types.

    python -m altgrad_jax.audit --config=configs/hybrid.py                 # as it would run on this machine
    python -m altgrad_jax.audit --config=configs/hybrid.py --gpu=h100      # compiled for a GPU that need not be here
    python -m altgrad_jax.audit --config=configs/hybrid.py --hlo=step.txt  # a program's text, from another machine

Lists every matrix product of the step: its layer and product (forward, dx, dw), the formats asked for, the types that
meet, the engine, padding, transposes and accumulation. Without a GPU nothing can be timed, so with --gpu the engine is
the one that --engine names; on a GPU XLA chooses by timing. Exit status: 0 what was asked for in FP8 is multiplied in
FP8, 1 some of it is not, 2 usage error, 3 that cannot be told: the step could not be compiled, or not be read.
"""

from altgrad_jax.interrupt import watch

if __name__ == "__main__":
    watch()  # before imports that take seconds

import json
from pathlib import Path

import jax
from absl import flags

from altgrad_jax import cli
from altgrad_jax.config import check_devices, validate
from altgrad_jax.errors import UsageError, UserError
from altgrad_jax.files import write_atomically
from altgrad_jax.machine import check_device, check_xla_flags
from altgrad_jax.precision.audit import Audit, audit
from altgrad_jax.precision.kernels.tiles_used import tiles_used
from altgrad_jax.precision.target import GPU_TARGETS, absent_gpu, why_no_fp8
from altgrad_jax.program import build_program, make_policy
from altgrad_jax.task import Task, task_of
from altgrad_jax.versions import check_versions, compiler

CONFIG = cli.define_config()
GPU = flags.DEFINE_enum("gpu", None, list(GPU_TARGETS), "Compile for this GPU, which need not be here.")
ENGINE = flags.DEFINE_enum("engine", "cublaslt", ["cublaslt", "triton"], "With --gpu: what multiplies matrices.")
HLO = flags.DEFINE_string("hlo", None, "Read this file of optimised HLO instead of compiling.")
OUT = flags.DEFINE_string("out", None, "Write the audit to this file, as JSON.")
SAVE_HLO = flags.DEFINE_string("save_hlo", None, "Write the compiled program's text to this file.")


class CannotTellError(UserError):
    """There is no answer, which is another exit status than a bad answer."""

    exit_code = 3


def main() -> int:
    """Compiles, reads, prints."""
    try:
        return _main()
    except UsageError:
        raise
    except UserError as e:
        raise CannotTellError(str(e)) from e


def _main() -> int:
    config = cli.read_config(CONFIG)
    validate(config)
    cli.quiet_libraries()
    check_versions()
    check_xla_flags()
    if GPU.value and HLO.value:
        raise UsageError("--gpu compiles a program and --hlo reads one: give one of them")
    for name, file in (("out", OUT.value), ("save_hlo", SAVE_HLO.value)):
        if file and not Path(file).absolute().parent.is_dir():
            raise UsageError(f"--{name}: there is no folder {Path(file).parent}")
    if GPU.value:
        text, found = compile_for(config, GPU.value, ENGINE.value)
    else:
        check_device()
        check_devices(config, jax.local_device_count(), jax.process_count())
        task = task_of(config)
        text = _read(HLO.value) if HLO.value else build_program(config, task=task).compile_train().as_text() or ""
        found = _audited(text, config, task)
    platform = "gpu" if GPU.value else jax.default_backend()
    for line in found.lines("" if GPU.value or HLO.value else why_no_fp8()):
        print(line)
    if not HLO.value:
        print(f"compiled by {compiler(platform)}")
    if tiles := tiles_used(found, make_policy(config).tiles).line():
        print(tiles)
    if SAVE_HLO.value:
        write_atomically(Path(SAVE_HLO.value), text)
    if OUT.value:
        content = found.as_json() if HLO.value else {"compiler": compiler(platform), **found.as_json()}
        write_atomically(Path(OUT.value), json.dumps(content, indent=1) + "\n")
    return 1 if found.fallbacks else 0


def compile_for(config, gpu: str, engine: str) -> tuple[str, Audit]:
    """The train step's text as compiled for a GPU that need not be here, and its audit.

    Raises:
      UserError: XLA's compiler for GPUs is not installed.
    """
    # Else JAX looks for a GPU and its driver first, and complains at length.
    jax.config.update("jax_platforms", "cpu")
    try:
        device = absent_gpu(gpu)
    except RuntimeError as e:
        raise UserError(str(e)) from e
    task = task_of(config)
    with jax.default_device(device):
        options = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": engine == "triton"}
        try:
            text = build_program(config, [device], task).compile_train(options).as_text() or ""
        except RuntimeError as e:
            if "cuDNN" not in str(e):
                raise UserError(f"the step cannot be compiled for {gpu}: {' '.join(str(e).split())[:300]}") from e
            raise UserError(
                f"cuDNN's attention cannot be compiled here ({str(e).splitlines()[0]}): pip install nvidia-cudnn-cu13,"
                " or compile XLA's own with --config.model.attention=xla"
            ) from e
        return text, _audited(text, config, task)


def _audited(text: str, config, task: Task) -> Audit:
    try:
        return audit(text, make_policy(config, task.labels), config.precision.compute, config.train.steps_per_dispatch)
    except ValueError as e:
        raise UserError(f"{HLO.value or 'the compiled step'}: {e}") from e


def _read(file: str) -> str:
    try:
        return Path(file).read_text()
    except FileNotFoundError as e:
        raise UsageError(f"--hlo: there is no file {file}") from e
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"--hlo: {file} cannot be read: {e}") from e


if __name__ == "__main__":
    cli.run(main)
