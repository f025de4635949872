"""The GPT's blocks one after the other in the program, as they are, against one block in a loop over stacked weights.

    python benchmarks/layer_scan.py [--layers 4 12 24] [--recipes bf16 e5m2] [--out=FILE.json]
    python benchmarks/layer_scan.py --gpu=h100 --attention=xla      # no GPU needed: compile time and memory
    python benchmarks/layer_scan.py --tiny                          # shows that it runs

Both forms train the same weights on the same tokens: loss, gradients, AdamW, scaling state. They differ in what XLA is
given: a program that grows with the layers, or `lax.scan` over parameters that have an axis of layers. Each is compiled
with activations kept and with blocks recomputed backward (`train.remat`). Given are the seconds to trace and to
compile, the compiler's account of temporary memory, the seconds of a step (median over rounds, the forms in turn),
ratios to the unrolled form, and how far the forms' losses lie apart: in float32 by rounding alone, and in fewer bits by
what XLA leaves unrounded within its fusions. On a GPU that is not here nothing is timed but compiling.

"e5m2" is emulated, as it is on a CPU; "hybrid" is native where a device multiplies FP8. One loop cannot run a recipe
for each layer: what a rule names, all blocks have.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import save_results
from flax import nnx
from jax import lax
from timing import in_turn

from altgrad_jax.layers import layer_shapes, layer_weights
from altgrad_jax.losses import token_cross_entropy
from altgrad_jax.model import GPTConfig
from altgrad_jax.precision.policy import Policy, resolve
from altgrad_jax.precision.scaling import next_state
from altgrad_jax.precision.target import GPU_TARGETS, absent_gpu, on_cpu, target_device
from altgrad_jax.state import init_params, model_structure
from altgrad_jax.step import window_loss

# name -> (recipe, backend)
RECIPES = {"bf16": ("bf16", "auto"), "e5m2": ("e5m2", "emulated"), "hybrid": ("hybrid", "auto")}
FORMS = ("unrolled", "scanned")
REMATS = ("none", "block")
OPTIMIZER = optax.adamw(1e-3)
COMPARED_STEPS = 3

State = dict[str, Any]
Step = Callable[[State, jax.Array], tuple[State, jax.Array]]


def main() -> None:
    """All depths, recipes and forms, in this process; the results are saved after each depth."""
    arguments = parse_arguments()
    device = None
    if arguments.gpu:
        # Else JAX looks for a GPU and its driver first, and complains at length.
        jax.config.update("jax_platforms", "cpu")
        device = absent_gpu(arguments.gpu)
    with jax.default_device(device):
        results: dict[str, Any] = {"device": target_device().device_kind, "shape": shape_of(arguments)}
        if not arguments.gpu:
            results["largest_relative_difference_in_float32"] = float32_difference(min(arguments.layers), arguments)
        for layers in arguments.layers:
            results[f"{layers} layers"] = {recipe: measure(layers, recipe, arguments) for recipe in arguments.recipes}
            print(f"{layers} layers done", file=sys.stderr, flush=True)
            save_results(arguments.out, results)
    print(json.dumps(results, indent=2))


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 12, 24])
    parser.add_argument("--recipes", nargs="+", default=["bf16", "e5m2"], choices=list(RECIPES))
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--window", type=int, default=128, help="tokens of a window")
    parser.add_argument("--vocabulary", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8, help="windows a step")
    parser.add_argument("--attention", default="auto", choices=["auto", "xla", "cudnn"])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--gpu", choices=list(GPU_TARGETS), help="compile for this GPU, which is not here; run nothing")
    parser.add_argument("--tiny", action="store_true", help="two layers 32 wide, one round")
    parser.add_argument("--out", help="JSON file to write")
    arguments = parser.parse_args()
    if arguments.tiny:
        arguments.layers, arguments.width, arguments.heads, arguments.window = [2], 32, 2, 16
        arguments.rounds, arguments.batch, arguments.vocabulary = 1, 2, 512
    return arguments


def shape_of(arguments: argparse.Namespace) -> dict[str, int]:
    """What all depths have in common."""
    return {name: getattr(arguments, name) for name in ("width", "heads", "window", "vocabulary", "batch")}


def config_of(layers: int, arguments: argparse.Namespace, compute: str = "bfloat16") -> GPTConfig:
    """The network."""
    return GPTConfig(
        compute_dtype=compute,
        n_layer=layers,
        n_head=arguments.heads,
        n_embd=arguments.width,
        block_size=arguments.window,
        vocab_size=arguments.vocabulary,
        attention=arguments.attention,
    )


def measure(layers: int, recipe: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Every form of one depth and recipe, and the scanned form's ratios to the unrolled one's."""
    config, tokens = config_of(layers, arguments), tokens_of(arguments)
    text, backend = RECIPES[recipe]
    policy = resolve([(r"blocks\..*|lm_head", text)], layer_shapes(config), backend=backend)
    entries: dict[str, dict[str, Any]] = {}
    runs: dict[str, Run] = {}
    for remat in REMATS:
        for form in FORMS:
            name = f"{form}, remat={remat}"
            step, initial = FORM[form](dataclasses.replace(config, remat=remat), policy)
            entries[name], compiled = compile_step(step, initial, tokens, bool(arguments.gpu))
            if not arguments.gpu:
                runs[name] = Run(compiled, jax.jit(initial)(), jnp.asarray(tokens))
    losses = {name: run.losses() for name, run in runs.items()}
    for name, taken in in_turn(runs, arguments.rounds if runs else 0).items():
        entries[name]["seconds_per_step"] = round(statistics.median(taken), 6)
    if losses:
        entries["losses"] = losses | {"largest_relative_difference": largest_difference(list(losses.values()))}
    for remat in REMATS:
        one, other = (entries[f"{form}, remat={remat}"] for form in ("scanned", "unrolled"))
        entries[f"scanned over unrolled, remat={remat}"] = {
            what: round(one[what] / other[what], 3) for what in other if isinstance(other[what], (int, float))
        }
    return entries


def tokens_of(arguments: argparse.Namespace) -> np.ndarray:
    """Windows to train on, [B, T + 1]."""
    shape = (arguments.batch, arguments.window + 1)
    return np.random.default_rng(0).integers(0, arguments.vocabulary, shape).astype(np.int32)


def largest_difference(losses: list[list[float]]) -> float:
    """Of the runs' losses from the first run's, relative, over all steps."""
    return max(abs(a / b - 1) for run in losses[1:] for a, b in zip(run, losses[0], strict=True))


def float32_difference(layers: int, arguments: argparse.Namespace) -> float:
    """How far the two forms lie apart in float32: about 1e-7, for they are the same mathematics."""
    config, tokens = config_of(layers, arguments, "float32"), jnp.asarray(tokens_of(arguments))
    losses = []
    for form in FORM.values():
        step, initial = form(config, Policy())
        losses.append(Run(jax.jit(step), jax.jit(initial)(), tokens).losses())
    return largest_difference(losses)


def compile_step(step: Step, initial: Callable[[], State], tokens: np.ndarray, absent: bool) -> tuple[dict, Any]:
    """Compiled with its state donated: seconds and memory, and the program."""
    state = jax.eval_shape(initial)
    began = time.perf_counter()
    lowered = jax.jit(step, donate_argnums=0).lower(state, jax.ShapeDtypeStruct(tokens.shape, tokens.dtype))
    traced = time.perf_counter()
    options: Any = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False} if absent else None
    compiled = lowered.compile(options)
    done = time.perf_counter()
    entry: dict[str, Any] = {
        "trace_seconds": round(traced - began, 3),
        "compile_seconds": round(done - traced, 3),
        "instructions": sum(" = " in line for line in (compiled.as_text() or "").splitlines()),
    }
    if memory := compiled.memory_analysis():
        entry["temp_bytes"] = int(memory.temp_size_in_bytes)
    return entry, compiled


class Run:
    """A form in training: a call is a step, and gives its loss."""

    def __init__(self, compiled: Any, state: State, tokens: jax.Array):
        self._compiled, self._state, self._tokens = compiled, state, tokens

    def __call__(self) -> jax.Array:
        """Trains a step."""
        self._state, loss = self._compiled(self._state, self._tokens)
        return loss

    def losses(self) -> list[float]:
        """Of the first steps."""
        return [float(self()) for _ in range(COMPARED_STEPS)]


def chunk_of() -> int:
    """Tokens whose logits exist at once: the main job's default."""
    return 256 if on_cpu() else 4096


def updated(state: State, params: Any, grads: Any, quant: Any) -> State:
    """The state after a step."""
    updates, moments = OPTIMIZER.update(grads, state["moments"], params)
    return {"params": optax.apply_updates(params, updates), "moments": moments, "quant": quant}


def unrolled(config: GPTConfig, policy: Policy) -> tuple[Step, Callable[[], State]]:
    """The network as it is: the step, and its state before the first."""
    graphdef = model_structure(config)

    def initial() -> State:
        params = init_params(config, 0)
        return {"params": params, "moments": OPTIMIZER.init(params), "quant": policy.init()}

    def step(state: State, tokens_BT1: jax.Array) -> tuple[State, jax.Array]:
        params = state["params"]
        prepared, seen_of_weights = policy.prepare(layer_weights(params), state["quant"])

        def loss_of(params: Any, probes: Any) -> jax.Array:
            quantised = {path: (layer, probes.get(path)) for path, layer in prepared.items()}
            return window_loss(graphdef, params, tokens_BT1, chunk_of(), None, quantised)

        loss, (grads, probes) = jax.value_and_grad(loss_of, (0, 1))(params, policy.probes(prepared))
        return updated(state, params, grads, next_quant(state["quant"], seen_of_weights, probes)), loss

    return step, initial


def next_quant(quant: Any, of_weights: Any, probes: Any) -> Any:
    """Scaling states of layers after a step, from what was seen of their three operands."""
    after = {}
    for path, roles in quant.items():
        amaxes = {"weight": of_weights[path].amax}
        amaxes |= {"activation": probes[path].activation.amax, "gradient": probes[path].gradient.amax}
        after[path] = {role: next_state(state, amaxes[role]) for role, state in roles.items()}
    return after


def scanned(config: GPTConfig, policy: Policy) -> tuple[Step, Callable[[], State]]:
    """One block in a loop. Its parameters, scaling states and probes have an axis of layers, [L, ...]."""
    one_layer = model_structure(dataclasses.replace(config, n_layer=1))
    in_block = dataclasses.replace(policy, plans=tuple(p for p in policy.plans if p.path.startswith("blocks.0.")))
    outside = dataclasses.replace(policy, plans=tuple(p for p in policy.plans if not p.path.startswith("blocks.")))
    over_layers = partial(jax.vmap, axis_size=config.n_layer)

    def of_block(block: Any) -> dict[str, jax.Array]:
        parts = {"attn": ("qkv", "proj"), "mlp": ("up", "down")}
        return {f"blocks.0.{part}.{n}": block[part][n]["kernel"] for part, names in parts.items() for n in names}

    def initial() -> State:
        params = init_params(config, 0)
        blocks = [params["blocks"][i] for i in range(config.n_layer)]
        params = params | {"blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)}
        repeat = lambda leaf: jnp.broadcast_to(leaf, (config.n_layer, *leaf.shape))  # noqa: E731
        quant = {"blocks": jax.tree.map(repeat, in_block.init()), "outside": outside.init()}
        return {"params": params, "moments": OPTIMIZER.init(params), "quant": quant}

    def step(state: State, tokens_BT1: jax.Array) -> tuple[State, jax.Array]:
        params, quant = state["params"], state["quant"]
        prepared_L, of_weights_L = over_layers(in_block.prepare)(of_block(params["blocks"]), quant["blocks"])
        head = {"lm_head": params["wte"].T}
        prepared, of_weights = outside.prepare(head, quant["outside"])
        probes = {"blocks": over_layers(in_block.probes)(prepared_L), "outside": outside.probes(prepared)}

        def loss_of(params: Any, probes: Any) -> jax.Array:
            def block(x_BTC: jax.Array, of_layer: Any) -> tuple[jax.Array, None]:
                own, layers, own_probes = of_layer
                model = nnx.merge(one_layer, params | {"blocks": {0: own}}, copy=True)
                return model.blocks[0](x_BTC, None, {p: (layer, own_probes[p]) for p, layer in layers.items()}), None

            model = nnx.merge(one_layer, params | {"blocks": {0: params["blocks"]}}, copy=True)
            x_BTC = model._embed(tokens_BT1[:, :-1], 0, {})
            body = jax.checkpoint(block, prevent_cse=False) if config.remat == "block" else block
            x_BTC, _ = lax.scan(body, x_BTC, (params["blocks"], prepared_L, probes["blocks"]))
            hidden_NC = model.norm_f(x_BTC).astype(config.dtype).reshape(-1, config.n_embd)
            targets_N = tokens_BT1[:, 1:].reshape(-1)
            quantised = {path: (layer, probes["outside"][path]) for path, layer in prepared.items()}
            return token_cross_entropy(
                hidden_NC, model.head_weight_CV(), targets_N, config.dtype, chunk_of(), quantised.get("lm_head")
            )

        loss, (grads, seen) = jax.value_and_grad(loss_of, (0, 1))(params, probes)
        after = {
            "blocks": over_layers(next_quant)(quant["blocks"], of_weights_L, seen["blocks"]),
            "outside": next_quant(quant["outside"], of_weights, seen["outside"]),
        }
        return updated(state, params, grads, after), loss

    return step, initial


FORM = {"unrolled": unrolled, "scanned": scanned}

if __name__ == "__main__":
    main()
