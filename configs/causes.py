"""Matrices that ask for causes: which layer, which operand, which scale a loss is due to.

    python -m altgrad_jax.sweep --config=configs/causes.py:output_layer,tiny --workdir=runs/output_layer
    python -m altgrad_jax.sweep --config=configs/causes.py:vocabulary,tiny --config.base.model.vocab_size=1024
    python -m altgrad_jax.sweep --config=configs/causes.py:mx --config.base.train.loss_scale=1.5
    python -m altgrad_jax.sweep --config=configs/causes.py:control,tiny

NAME[,tiny]: the size of configs/bf16.py:quick, or that of configs/matrix.py:formats8,quick. All on EUR-Lex.

    output_layer  few exponent bits in all dense layers, in the blocks, in the output layer; in x and w or g alone; g
                  with other scales and roundings
    vocabulary    formats in the output layer alone; repeat it with other vocabularies
    mx            MXFP8 by layers; repeat it with train.loss_scale=1.5, or with another batch size
    control       `relative` in 8-bit formats and in e8m7, which has BF16's values; seeds that no published table used

Expect: docs/results/formats8.md and docs/results/formats.md have what they gave.
"""

from ml_collections import ConfigDict

from altgrad_jax.config import load_sibling

LAYERS = (("all", r"blocks\..*|lm_head"), ("blocks", r"blocks\..*"), ("lm_head", "lm_head"))
FEW = ("e0m7", "e2m5")  # few exponent bits
NAMES = ("output_layer", "vocabulary", "mx", "control")


def get_config(argument: str) -> ConfigDict:
    """The matrix named."""
    name, _, size = argument.partition(",")
    if name not in NAMES or size not in ("", "tiny"):
        raise ValueError(f"{argument!r}: name one of {', '.join(NAMES)}, small with ',tiny' behind it")
    matrix = load_sibling(__file__, "matrix").get_config("formats8,quick")
    with matrix.unlocked():
        if not size:
            matrix.base = load_sibling(__file__, "base").get_config("quick")
        matrix.name = argument.replace(",", "-")
        matrix.optimizers, matrix.exclude = ("adamw",), ()
        matrix.search.factors = ()
        with matrix.base.unlocked():
            matrix.base.data.name = "eurlex"
            matrix.base.tracking.update(wandb="disabled", tags=("sweep",))
            matrix.base.checkpoint.every = matrix.base.train.steps
            matrix.base.diagnostics.update(quant_every=50, shadow_every=50, questions=())
        # What the search of docs/results/formats8 found for the tiny size; the baseline's own rate for the other.
        matrix.optimizer_settings.adamw.learning_rate = 1.5e-3 if size else matrix.base.optimizer.learning_rate
        {"output_layer": _output_layer, "vocabulary": _vocabulary, "mx": _mx, "control": _control}[name](matrix)
    return matrix.lock()


def _output_layer(matrix: ConfigDict) -> None:
    matrix.question = "Which layer and which operand do formats with few exponent bits fail in?"
    plain = "x=bfloat16 x.scaling=none w=bfloat16 w.scaling=none"
    ways = {
        "": "{}",
        "-xw": "{} g=bfloat16 g.scaling=none",
        "-g": f"{{}} {plain}",
        "-g-stochastic": f"{{}} {plain} g.rounding=stochastic",
        "-g-blocks": f"{{}} {plain} g.scaling=mx",
    }
    matrix.recipes = (("bf16", "bf16"), *((fmt + way, text.format(fmt)) for way, text in ways.items() for fmt in FEW))
    matrix.layers = LAYERS
    matrix.seeds = (42, 43, 44, 45)
    matrix.exclude = (r"recipe=.*-xw layers=blocks|lm_head", r"recipe=.*-g|.*-g-.* layers=all|blocks")


def _vocabulary(matrix: ConfigDict) -> None:
    matrix.question = "Does the output layer fail where 1/V falls below half the format's smallest step?"
    matrix.recipes = (("bf16", "bf16"), *((fmt, fmt) for fmt in ("e0m7", "e2m5", "e3m4")))
    matrix.layers = (("lm_head", "lm_head"),)
    matrix.seeds = (42, 43, 44, 45)


def _mx(matrix: ConfigDict) -> None:
    matrix.question = "Where does MXFP8's standard scale rule lose?"
    matrix.recipes = (("bf16", "bf16"), ("mxfp8", "mxfp8"))
    matrix.layers = LAYERS
    matrix.seeds = (42, 43, 44)


def _control(matrix: ConfigDict) -> None:
    matrix.question = "Does relative gain more in an 8-bit format than in BF16's own values?"
    formats = ("e8m7", "e3m4", "e4m3", "e5m2")
    texts = (("e8m7", "e8m7 pow2=1"), *((fmt, f"{fmt} w.pow2=1") for fmt in formats[1:]))
    matrix.recipes = (("bf16", "bf16"), *texts)
    matrix.optimizers = ("adamw", "relative")
    matrix.exclude = ("recipe=bf16 optimizer=relative",)
    matrix.seeds = tuple(range(100, 116))
