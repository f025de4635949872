"""Generates text from a trained run.

    python -m altgrad_jax.sample --workdir=runs/quick --prompt="Article 1" [--temperature=0.8] [--top_k=50]

Temperature 0 takes the likeliest token every time. The prompt's last block_size - tokens tokens are kept: the positions
are learned, so prompt and text together cannot be longer than the block.
"""

from altgrad_jax.interrupt import watch

if __name__ == "__main__":
    watch()  # before imports that take seconds

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx

from altgrad_jax import checkpoint, cli
from altgrad_jax.data.cache import TokenCache, open_cache
from altgrad_jax.errors import UsageError, UserError
from altgrad_jax.files import read_json
from altgrad_jax.layers import layer_shapes, layer_weights
from altgrad_jax.machine import memory_errors
from altgrad_jax.model import UNQUANTISED, GPTConfig, KVCache, Quantised, gpt_config
from altgrad_jax.precision.policy import Policy, resolve
from altgrad_jax.state import init_params, model_structure
from altgrad_jax.weights import Weights, unpack

Array = jax.Array

_SIZES = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
MANIFEST = {  # what of it is read here
    "config": {
        "model": {**dict.fromkeys(_SIZES, int), "tie_embeddings": bool, "gelu?": str},
        "precision": {"compute": str, "rules?": [[str]]},
        "optimizer": {"weights?": str},
        "stability?": dict,
        "task?": str,
    },
    "corpus": {"cache": str},
}

WORKDIR = flags.DEFINE_string("workdir", None, "Work directory of the run.")
STEP = flags.DEFINE_integer("step", None, "Step of the checkpoint; default the newest.", lower_bound=0)
PROMPT = flags.DEFINE_string("prompt", "", "Text to continue; empty: the beginning of a document.")
MANY = 2**31 - 1  # what an index can be
TOKENS = flags.DEFINE_integer("tokens", 100, "Tokens to generate.", lower_bound=1, upper_bound=MANY)
SAMPLES = flags.DEFINE_integer("samples", 1, "Texts to generate.", lower_bound=1, upper_bound=MANY)
TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "Divides the logits; 0 takes the likeliest.", lower_bound=0.0)
TOP_K = flags.DEFINE_integer(
    "top_k", 50, "Draw from the k likeliest tokens; 0: from all.", lower_bound=0, upper_bound=MANY
)
SEED = flags.DEFINE_integer("seed", 0, "Of the draws.", lower_bound=0, upper_bound=2**32 - 1)


def draw(logits_BV: Array, key: Array, temperature: Array | float, top_k: int, vocab_size: int) -> Array:
    """One token for each row of logits, int32.

    Args:
      logits_BV: float32.
      key: PRNG key.
      temperature: divides the logits; 0 takes the largest.
      top_k: only the k largest logits can be drawn; 0 for no limit.
      vocab_size: ids from here on are not in the tokenizer and never drawn.
    """
    logits_BV = jnp.where(jnp.arange(logits_BV.shape[-1]) < vocab_size, logits_BV, -jnp.inf)
    if top_k:
        smallest_B1 = jax.lax.top_k(logits_BV, min(top_k, logits_BV.shape[-1]))[0][:, -1:]
        logits_BV = jnp.where(logits_BV < smallest_B1, -jnp.inf, logits_BV)
    drawn_B = jax.random.categorical(key, logits_BV / jnp.maximum(temperature, 1e-6))
    return jnp.where(temperature == 0, jnp.argmax(logits_BV, axis=-1), drawn_B).astype(jnp.int32)


@partial(jax.jit, static_argnames=("graphdef", "tokens", "top_k", "vocab_size"))
def generate(
    graphdef: Any,
    params: Any,
    prompt_BT: Array,
    key: Array,
    temperature: Array | float,
    *,
    tokens: int,
    top_k: int,
    vocab_size: int,
    quantised: Quantised = UNQUANTISED,
) -> Array:
    """Continues every prompt by `tokens` tokens, [B, tokens] int32, with a key-value cache.

    The prompt is read in one pass, then each step decodes one token. `prompt_BT.shape[1] + tokens` is at most
    block_size + 1: the last token drawn is not read. `quantised` as in `GPT.hidden`.
    """
    model = nnx.merge(graphdef, params, copy=True)

    def next_token(carry, key):
        logits_BV, cache = carry
        token_B = draw(logits_BV, key, temperature, top_k, vocab_size)
        return model.decode(token_B[:, None], cache, quantised), token_B

    start = model.decode(prompt_BT, KVCache.empty(model.config, prompt_BT.shape[0]), quantised)
    keys = jax.random.split(key, tokens)
    (logits_BV, _), drawn_TB = jax.lax.scan(next_token, start, keys[:-1])
    last_B = draw(logits_BV, keys[-1], temperature, top_k, vocab_size)
    return jnp.concatenate([drawn_TB, last_B[None]]).T


@dataclass(frozen=True)
class LoadedRun:
    """A trained model.

    Attributes:
      model: its shape.
      params: its parameters.
      quantised: its quantised layers, as evaluation during training has them.
      cache: the token cache it was trained on.
      step: of the checkpoint.
    """

    model: GPTConfig
    params: Any
    quantised: Quantised
    cache: TokenCache
    step: int


def load_run(workdir: str, step: int | None) -> LoadedRun:
    """Reads a run's newest checkpoint, or that of a step.

    Raises:
      UserError: the folder holds no run, or its checkpoint or cache is missing or damaged.
    """
    manifest = read_json(Path(workdir).expanduser() / "manifest.json", MANIFEST)
    if manifest is None:
        raise UsageError(f"--workdir={workdir} holds no manifest.json; give a run's work directory")
    config = manifest["config"]
    if config.get("task", "lm") != "lm":
        raise UserError(f"{workdir} is a run of config.task={config['task']}: it has no next token to draw")
    precision = config["precision"]
    model = gpt_config(config["model"], precision["compute"])
    rules = [tuple(rule) for rule in precision.get("rules", ())]
    traced = config.get("stability", {}).get("fallback", False)
    backend = precision.get("backend", "auto")
    policy = resolve(rules, layer_shapes(model), backend=backend, traced=traced) if rules else Policy()
    storage = config["optimizer"].get("weights", "float32")
    weights = Weights(policy, config["model"]["tie_embeddings"], storage)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        jax.eval_shape(lambda: {"params": weights.stored(init_params(model, 0)), "quant": policy.init()}),
    )
    parts, found, _ = checkpoint.read_parts(workdir if step is None else f"{workdir}@{step}", like)
    params = unpack(parts["params"])
    prepared, _ = policy.prepare(layer_weights(params), parts.get("quant", {}))
    probes = policy.probes(prepared)
    quantised = {path: (layer, probes.get(path)) for path, layer in prepared.items()}
    return LoadedRun(model, params, quantised, open_cache(manifest["corpus"]["cache"]), found)


def main() -> int:
    """Prints the texts."""
    cli.quiet_libraries()
    if WORKDIR.value is None:
        raise UsageError("--workdir is missing: the work directory of a run")
    if not TEMPERATURE.value <= float(np.finfo(np.float32).max):
        raise UsageError(f"--temperature={TEMPERATURE.value} is not finite in float32; 0 takes the likeliest token")
    run = load_run(WORKDIR.value, STEP.value)
    tokenizer = run.cache.tokenizer()
    room = run.model.block_size - TOKENS.value + 1
    if room < 1:
        raise UsageError(f"--tokens={TOKENS.value} is more than the model's block of {run.model.block_size} can hold")
    # An empty prompt begins where documents begin: after the end of another.
    prompt = list(tokenizer.encode(PROMPT.value)) if PROMPT.value else [tokenizer.end_of_text]
    with memory_errors(f"lower --samples={SAMPLES.value}"):
        prompt_BT = jnp.asarray(np.tile(np.array(prompt[-room:], np.int32), (SAMPLES.value, 1)))
        drawn = generate(
            model_structure(run.model),
            run.params,
            prompt_BT,
            jax.random.key(SEED.value),
            TEMPERATURE.value,
            tokens=TOKENS.value,
            top_k=TOP_K.value,
            vocab_size=run.cache.vocab_size,
            quantised=run.quantised,
        )
        drawn = np.asarray(drawn)
    print(f"step {run.step}, temperature {TEMPERATURE.value}, top_k {TOP_K.value}, seed {SEED.value}")
    for row in drawn:
        end = np.flatnonzero(row == tokenizer.end_of_text)
        print("---")
        print(PROMPT.value + tokenizer.decode(row[: end[0]] if end.size else row))
    return 0


if __name__ == "__main__":
    cli.run(main)
