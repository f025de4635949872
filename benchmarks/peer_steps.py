"""The train steps that `peers.py` compares: one function a peer, which makes a step of the size asked for.

Each imports what it needs itself, so that what is not installed is missed by the one that needs it.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any


@dataclass(frozen=True)
class Step:
    """One more train step a call.

    Attributes:
      run: takes so many steps, and returns when they are done.
      facts: what is known of the program: how many products are in FP8, versions, what differs from the others.
      peak_bytes: the most memory used so far, where the library says.
    """

    run: Callable[[int], None]
    facts: dict[str, Any]
    peak_bytes: Callable[[], int | None]


def ours(recipe: str, rules: tuple[tuple[str, str], ...] | None = None) -> Callable[..., Step]:
    """altgrad_jax's step in a recipe of `gpt_sizes`; with other rules if given."""

    def make(size: str, batch: int, altgrad: str | None) -> Step:
        import jax
        from gpt_sizes import config_of

        from altgrad_jax.precision.audit import audit
        from altgrad_jax.program import build_program

        del altgrad
        config = config_of(size, recipe, batch)
        if rules is not None:
            config.precision.rules = rules
        program = build_program(config)
        found = audit(program.compile_train().as_text() or "", program.policy).summary()
        shape, held = program.abstract_batch(), [program.fresh_state()]
        tokens = jax.jit(
            lambda: jax.random.randint(jax.random.key(0), shape.shape, 0, program.model.vocab_size),
            out_shardings=shape.sharding,
        )()

        def run(steps: int) -> None:
            for _ in range(steps):
                held[0], metrics = program.run_train(held[0], tokens)
            jax.block_until_ready(metrics)

        return Step(run, {"engines": found["engines"], "fp8_share": found["fp8_share"]}, _jax_peak)

    return make


def linen(library: str) -> Callable[..., Step]:
    """`linen_gpt` as it is ("flax"), with flax's `fp8_ops`, or with a model that qwix has quantised."""

    def make(size: str, batch: int, altgrad: str | None) -> Step:
        import importlib.metadata

        import jax
        import jax.numpy as jnp
        from flax.linen.fp8_ops import Fp8DirectDotGeneralOp
        from gpt_sizes import config_of, model_of
        from linen_gpt import DENSE, GPT, train_step

        del altgrad
        config = config_of(size, "bf16", batch)
        model = GPT(model_of(config), Fp8DirectDotGeneralOp if library == "fp8_ops" else None)
        facts: dict[str, Any] = {"flax": importlib.metadata.version("flax"), "differs": "whole logits at once"}
        if library != "flax":
            facts["differs"] += "; output layer in bf16"
        if library == "qwix":
            import qwix

            e4m3, e5m2 = jnp.float8_e4m3fn, jnp.float8_e5m2
            quantised = {"weight_qtype": e4m3, "act_qtype": e4m3, "bwd_qtype": e5m2, "disable_channelwise_axes": True}
            rule = qwix.QtRule(module_path=rf".*({'|'.join(DENSE)})", **quantised)
            model = qwix.quantize_model(model, qwix.QtProvider([rule]))
            facts["qwix"] = qwix.__version__
        step, state, tokens = train_step(model, model_of(config), config.train.batch_size)
        compiled = step.lower(state, tokens).compile()
        held = [state]

        def run(steps: int) -> None:
            for _ in range(steps):
                held[0], loss = compiled(held[0], tokens)
            jax.block_until_ready(loss)

        return Step(run, facts | _engines(compiled.as_text() or ""), _jax_peak)

    return make


def _engines(text: str) -> dict[str, Any]:
    """What multiplies in a program that has no names of ours: counts by engine and types, and the share in FP8."""
    from altgrad_jax.precision.audit import Audit, find_gemms

    found = Audit((), tuple(find_gemms(text, {}))).summary()
    return {"engines": found["engines"], "fp8_share": found["fp8_share"]}


def _jax_peak() -> int | None:
    import jax

    stats = jax.local_devices()[0].memory_stats()
    return stats.get("peak_bytes_in_use") if stats else None


def pytorch(compiled: bool, float8: bool = False) -> Callable[..., Step]:
    """`torch_gpt` in bfloat16 autocast; through torch.compile, its linear layers converted by torchao if asked for."""

    def make(size: str, batch: int, altgrad: str | None) -> Step:
        import torch
        from gpt_sizes import config_of, model_of
        from torch_gpt import make_step

        del altgrad
        facts = {"torch": torch.__version__, "differs": "whole logits at once"}
        convert: Callable = lambda model: model  # noqa: E731
        if float8:
            import torchao
            from torchao.float8 import convert_to_float8_training

            convert = convert_to_float8_training
            facts |= {"torchao": torchao.__version__, "differs": "whole logits at once; output layer in bf16"}
        config = config_of(size, "bf16", batch)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        options: dict[str, Any] = {"device": device, "autocast": True, "compiled": compiled, "convert": convert}
        step = make_step(model_of(config), config.train.batch_size, **options)
        return Step(_until_done(step), facts | {"device": device}, _torch_peak)

    return make


def _until_done(step: Callable[[], Any]) -> Callable[[int], None]:
    """Takes steps of PyTorch's and waits for the device."""
    import torch

    def run(steps: int) -> None:
        for _ in range(steps):
            step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return run


def _torch_peak() -> int | None:
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


def original(fp8: bool) -> Callable[..., Step]:
    """The original AltGrad trainer's train step, from a checkout, on random tokens: its E5M2, or its BF16 baseline."""

    def make(size: str, batch: int, altgrad: str | None) -> Step:
        if altgrad is None:
            raise ModuleNotFoundError("no checkout of AltGrad given: --altgrad=DIR")
        if not (Path(altgrad) / "altgrad" / "training" / "trainer.py").is_file():
            raise FileNotFoundError(
                f"--altgrad={altgrad} is no checkout of AltGrad: no altgrad/training/trainer.py in it"
            )
        import torch
        from gpt_sizes import config_of

        sys.path.insert(0, altgrad)
        from altgrad.training import GPT, GPTConfig, TrainConfig, Trainer

        device = "cuda" if torch.cuda.is_available() else "cpu"
        config = config_of(size, "bf16", batch)
        shape = {k: config.model[k] for k in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "dropout")}
        # Without a project it has no tracker. Only its step is run, so nothing is saved, but it makes the folder.
        own = {"batch_size": config.train.batch_size, "use_fp8": fp8, "project": "", "checkpoint_dir": mkdtemp()}
        settings = TrainConfig(**shape, **own)
        torch.manual_seed(0)
        trainer = Trainer(settings, GPT(GPTConfig(**shape)).to(device), "", device)
        windows = (config.train.batch_size, config.model.block_size + 1)
        tokens = torch.randint(0, config.model.vocab_size, windows, device=device)
        x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        facts = {
            "torch": torch.__version__,
            "device": device,
            "differs": "its own model, with biases and exact GELU; gradient statistics",
        }
        return Step(_until_done(lambda: trainer.train_step(x, y)), facts, _torch_peak)

    return make


# The first is what others are compared with.
PEERS: dict[str, Callable[..., Step]] = {
    "altgrad_jax, bf16": ours("bf16"),
    "altgrad_jax, hybrid": ours("hybrid"),
    "altgrad_jax, hybrid, output layer in bf16": ours("hybrid", ((r"blocks\..*", "hybrid"),)),
    "torch.compile, bf16": pytorch(compiled=True),
    "torch.compile, torchao float8": pytorch(compiled=True, float8=True),
    "flax.linen, bf16": linen("flax"),
    "flax.linen, fp8_ops": linen("fp8_ops"),
    "flax.linen, qwix fp8": linen("qwix"),
    "torch, bf16": pytorch(compiled=False),
    "AltGrad, bf16": original(fp8=False),
    "AltGrad, e5m2": original(fp8=True),
}
