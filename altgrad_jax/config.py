"""Configuration: loading config files, and checking every value before any work is done.

Types are held by ml_collections (a locked `ConfigDict` takes no unknown key and no wrong type). What it cannot know,
the ranges, the names allowed and the rules across fields, is here, and every violation is reported at once.
"""

import difflib
import importlib.util
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
from ml_collections import ConfigDict

from altgrad_jax.config_keys import get, leaves
from altgrad_jax.diagnostics.questions import parse_questions
from altgrad_jax.errors import UsageError, UserError
from altgrad_jax.loss_scale import parse_loss_scale
from altgrad_jax.model import GELUS, REMATS
from altgrad_jax.optimizers.factory import OPTIONS
from altgrad_jax.optimizers.manifold import FORMS, PLACEMENTS
from altgrad_jax.optimizers.rules import optimizer_violations
from altgrad_jax.optimizers.schedule import schedule_violations
from altgrad_jax.optimizers.stored import MOMENTS
from altgrad_jax.precision.policy import BACKENDS, KERNELS, parse_rule
from altgrad_jax.precision.reals import float32_fault, seed_fault
from altgrad_jax.stability import stability_violations
from altgrad_jax.text_rules import text_violations
from altgrad_jax.weights import STORAGES

CHOICES = {
    "task": ("lm", "classify"),
    "classify.long_documents": ("cut", "split"),
    "model.attention": ("auto", "xla", "cudnn"),
    "model.gelu": GELUS,
    "data.name": ("auto", "eurlex", "eurlex-local", "eurlex57k", "lexglue", "embedded", "files"),
    "data.tokenizer": ("auto", "bpe", "bytes", "gpt2"),
    "optimizer.name": tuple(OPTIONS),
    "optimizer.placement": PLACEMENTS,
    "optimizer.form": FORMS,
    "optimizer.weights": STORAGES,
    "optimizer.moments": MOMENTS,
    "optimizer.schedule": ("cosine", "linear", "constant"),
    "precision.compute": ("bfloat16", "float32"),
    "precision.backend": BACKENDS,
    "precision.kernel": KERNELS,
    "train.remat": REMATS,
    "tracking.wandb": ("offline", "online", "disabled"),
}
AT_LEAST_ONE = (
    *("model.n_layer", "model.n_head", "model.n_embd", "model.block_size", "model.vocab_size"),
    *(
        "train.steps",
        "train.batch_size",
        "train.grad_accumulation",
        "train.steps_per_dispatch",
        "train.log_every",
        "train.eval_every",
    ),
    *("train.eval_batches", "checkpoint.every", "checkpoint.max_to_keep"),
    *("stability.nan_patience", "stability.fallback_patience", "parallel.hosts"),
    *("diagnostics.tokens", "diagnostics.lanczos_steps"),
)
NOT_NEGATIVE = (
    *(
        "data.vocab_size",
        "train.loss_chunk",
        "diagnostics.quant_every",
        "diagnostics.shadow_every",
        "diagnostics.windows",
        "optimizer.learning_rate",
        "optimizer.warmup_steps",
        "optimizer.decay_steps",
    ),
    *("optimizer.weight_decay", "optimizer.grad_clip", "parallel.devices", "parallel.host"),
    *("optimizer.max_stiffness", "optimizer.rung_clip", "optimizer.update_clip", "optimizer.max_scale"),
    *("classify.min_documents", "classify.max_windows", "classify.positive_weight"),
    *("optimizer.other_learning_rate", "stability.rewinds", "stability.fallback_stall", "runtime.peak_tflops"),
)
LARGEST_INT = 2**31 - 1
DIAGNOSTIC_INTERVALS = ("diagnostics.quant_every", "diagnostics.shadow_every")
FRACTIONS = ("model.dropout", "optimizer.min_lr_ratio", "optimizer.b1", "optimizer.b2", "optimizer.momentum")


SHIPPED = Path(__file__).with_name("configs")  # in a clone a link to the top-level folder, in an installation copies


def load_config(name_and_variant: str) -> ConfigDict:
    """The locked configuration of NAME[:VARIANT] or FILE[:VARIANT]; the variant is the argument of its `get_config`.

    A name is that of a config that comes with the package: "bf16" means the same in every folder.

    Raises:
      UsageError: there is no such config, or it cannot be run, or gives no ConfigDict.
    """
    name, colon, variant = name_and_variant.partition(":")
    file = SHIPPED / f"{name}.py" if name.isidentifier() else Path(name)
    if not file.is_file():
        raise UsageError(f"--config: {_not_there(name)}")
    try:
        config = _run_file(file).get_config(*([variant] if colon else []))
    except UserError:
        raise
    except Exception as e:  # whatever the user's file raises when it is run
        reason = " ".join(f"{type(e).__name__}: {e}".split())
        raise UsageError(f"--config: {name_and_variant} could not be loaded: {reason}") from e
    if not isinstance(config, ConfigDict):
        raise UsageError(f"--config: {name} did not return a ConfigDict")
    return config.lock()


def _not_there(name: str) -> str:
    """Why no file was found, and what to write instead."""
    shipped = [path.stem for path in shipped_configs()]
    if name.isidentifier():
        return f"there is no config {name!r}: give one of {', '.join(shipped)}, or a file, such as ./{name}.py"
    known = f"; {Path(name).stem!r} comes with the package: --config={Path(name).stem}"
    return f"there is no file {name or '(empty name)'}{known if Path(name).stem in shipped else ''}"


def shipped_configs() -> list[Path]:
    """The config files that come with the package, by name."""
    return sorted(path for path in SHIPPED.glob("*.py") if path.stem.isidentifier())


def load_sibling(file: str, name: str) -> ModuleType:
    """Runs `name`.py beside `file`, or, where there is none, the config of that name that comes with the package.

    So a file of ours that was copied elsewhere still runs, and so do all of ours that were copied and changed together.
    A file of one's own may as well write `from altgrad_jax.configs import base`.
    """
    path = next((p for p in (Path(file).with_name(f"{name}.py"), SHIPPED / f"{name}.py") if p.is_file()), None)
    if path is None:
        raise UsageError(f"{file} builds on {name}.py, which is neither beside it nor a config of the package")
    return _run_file(path)


def _run_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"altgrad_jax_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UsageError(f"--config: {path} is no Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_keys(config: ConfigDict, dotted: Iterable[str]) -> None:
    """Raises UsageError for the first dotted name that is no setting, with the nearest one that is."""
    known = leaves(config)
    for key in dotted:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, 1, cutoff=0.0)[0]
            raise UsageError(f"unknown config key config.{key}: did you mean config.{nearest}?")


def check_is_experiment(config: ConfigDict) -> None:
    """Raises UsageError unless a config has every setting of configs/base.py, each of its type."""
    if "base" in config and "recipes" in config:
        raise UsageError("--config names a matrix of experiments, which python -m altgrad_jax.sweep runs")
    base, found = load_config("base"), set(leaves(config))
    if missing := [key for key in leaves(base) if key not in found]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UsageError(f"--config: config.{missing[0]}{more} is missing; start from altgrad_jax.configs.base")
    for key in leaves(base):
        default, value = get(base, key), get(config, key)
        kind = str if default is None else (int, float) if isinstance(default, float) else type(default)
        if not (isinstance(value, kind) or (default is None and value is None)):
            raise UsageError(f"--config: config.{key}={value!r} is of another type than its default, {default!r}")


def check_is_matrix(config: ConfigDict) -> None:
    """Raises UsageError unless a config has every key of configs/matrix.py, and its `base` is an experiment."""
    if "train" in config:
        raise UsageError("--config names no matrix but one experiment, which python -m altgrad_jax.main runs")
    if missing := [key for key in load_config("matrix") if key not in config]:
        raise UsageError(
            f"--config names no matrix of experiments: config.{missing[0]} is missing; see configs/matrix.py"
        )
    check_is_experiment(config.base)


def validate(config: ConfigDict) -> None:
    """Checks everything that can be checked without data or devices.

    Raises:
      UsageError: naming every violation, each with the values and the way out.
    """
    problems = list(_violations(config))
    if problems:
        raise UsageError("; ".join(problems))


def _violations(config: ConfigDict) -> Iterator[str]:
    yield from _number_violations(config)
    for key, choices in CHOICES.items():
        value = get(config, key)
        if value not in choices:
            yield f"config.{key}={value!r} is not one of {', '.join(choices)}"
    for key in AT_LEAST_ONE:
        if get(config, key) < 1:
            yield f"config.{key}={get(config, key)} must be at least 1"
    for key in NOT_NEGATIVE:
        if get(config, key) < 0:
            yield f"config.{key}={get(config, key)} must be 0 or more"
    for key in FRACTIONS:
        value = get(config, key)
        with np.errstate(over="ignore"):
            rounded = np.float32(value)
        if value < 0 or rounded > 1 or (rounded == 1 and key != "optimizer.min_lr_ratio"):
            yield f"config.{key}={value} must lie between 0 and 1" + (", in float32 too" if 0 <= value < 1 else "")
    if config.optimizer.eps <= 0:
        yield f"config.optimizer.eps={config.optimizer.eps} must be above 0"
    yield from _precision_violations(config)
    yield from optimizer_violations(config)
    yield from schedule_violations(config.optimizer)
    yield from text_violations(config)
    yield from stability_violations(config)
    try:
        questions = parse_questions(config.diagnostics.questions)
    except UsageError as e:
        yield str(e)
    else:
        if config.task == "classify" and questions.get("sensitivity"):
            yield "the question 'sensitivity' is of next tokens, leave it out with config.task=classify"
    yield from _cross_field_violations(config)
    yield from _dispatch_violations(config)


def _number_violations(config: ConfigDict) -> Iterator[str]:
    """Numbers that are others in the arithmetic of a run: float32, int32, and uint32 for the seed."""
    if why := seed_fault(config.seed):
        yield f"config.seed={config.seed} {why}"
    for key in leaves(config):
        value = get(config, key)
        if isinstance(value, float) and (why := float32_fault(value)):
            yield f"config.{key}={value} must {why}"
        elif type(value) is int and key != "seed" and value > LARGEST_INT:
            yield f"config.{key}={value} must be at most {LARGEST_INT} (2^31 - 1)"


def _precision_violations(config: ConfigDict) -> Iterator[str]:
    try:
        parse_loss_scale(config.train.loss_scale)
    except UsageError as e:
        yield str(e)
    for rule in config.precision.rules:
        try:
            parse_rule(rule)
        except ValueError as e:
            yield f"config.precision.rules: {e}"
    if config.precision.kernel_tiles and config.precision.kernel != "pallas":
        yield (
            "config.precision.kernel_tiles is read only with config.precision.kernel=pallas,"
            f" not {config.precision.kernel!r}"
        )


def _cross_field_violations(config: ConfigDict) -> Iterator[str]:
    model, train, data = config.model, config.train, config.data
    if model.n_head >= 1 and model.n_embd % model.n_head:
        nearest = max(1, round(model.n_embd / model.n_head)) * model.n_head
        yield (
            f"config.model.n_embd={model.n_embd} is not divisible by config.model.n_head={model.n_head};"
            f" n_embd={nearest} would be"
        )
    if train.grad_accumulation >= 1 and train.batch_size % train.grad_accumulation:
        yield (
            f"config.train.batch_size={train.batch_size} is not divisible by"
            f" config.train.grad_accumulation={train.grad_accumulation}"
        )
    if data.vocab_size > model.vocab_size:
        yield (
            f"config.data.vocab_size={data.vocab_size} is larger than config.model.vocab_size={model.vocab_size};"
            " raise the model's or lower the tokenizer's"
        )
    if config.parallel.host >= config.parallel.hosts:
        yield f"config.parallel.host={config.parallel.host} must be below config.parallel.hosts={config.parallel.hosts}"
    if not (math.isfinite(config.parallel.timeout) and config.parallel.timeout >= 1):
        yield f"config.parallel.timeout={config.parallel.timeout} must be 1 (second) or more"
    if config.parallel.hosts > 1 and not config.parallel.coordinator:
        yield f"config.parallel.hosts={config.parallel.hosts} needs config.parallel.coordinator, host:port of process 0"
    coordinator = config.parallel.coordinator
    if coordinator is not None and not coordinator.rpartition(":")[2].isdecimal():
        yield f"config.parallel.coordinator={coordinator!r} is not host:port"
    if data.name == "files" and not data.path and not data.cache:
        yield "config.data.name=files needs config.data.path, a text file or a folder of them"
    if data.path and data.name != "files":
        yield f"config.data.path is read only with config.data.name=files, not {data.name!r}"


def _dispatch_violations(config: ConfigDict) -> Iterator[str]:
    """What several steps in one program leave no room for: anything that happens between two of them."""
    count = config.train.steps_per_dispatch
    if count <= 1:
        return
    at_steps = {
        f"config.{key}": get(config, key)
        for key in ("train.steps", "train.eval_every", "checkpoint.every", *DIAGNOSTIC_INTERVALS)
    }
    try:
        questions = parse_questions(config.diagnostics.questions)
    except UsageError:
        return  # reported on its own
    at_steps |= {f"config.diagnostics.questions, {name},": every for name, every in questions.items()}
    for name, steps in at_steps.items():
        if steps % count:
            yield f"{name}={steps} is no multiple of config.train.steps_per_dispatch={count}"
    if "weights" in questions:
        yield "the question 'weights' looks at single steps: leave it out, or config.train.steps_per_dispatch=1"
    if config.stability.fallback:
        yield "config.stability.fallback looks at single steps: it needs config.train.steps_per_dispatch=1"


def check_devices(config: ConfigDict, local_devices: int, hosts: int) -> None:
    """Checks that a step's batch divides over microbatches and devices.

    Raises:
      UsageError: naming the numbers and a batch size that fits.
    """
    if config.parallel.devices > local_devices:
        raise UsageError(f"config.parallel.devices={config.parallel.devices}, but this host has {local_devices}")
    devices = (config.parallel.devices or local_devices) * hosts
    parts = devices * config.train.grad_accumulation
    batch = config.train.batch_size
    if batch % parts:
        fitting = math.ceil(batch / parts) * parts
        raise UsageError(
            f"config.train.batch_size={batch} is not divisible by {devices} devices x grad_accumulation="
            f"{config.train.grad_accumulation}; use --config.train.batch_size={fitting} or fewer devices"
            " (--config.parallel.devices)"
        )
