"""Matrices of experiments: what `python -m altgrad_jax.sweep` runs.

    python -m altgrad_jax.sweep --config=configs/matrix.py:quick           # 3 recipes x 2 optimizers, minutes on a CPU
    python -m altgrad_jax.sweep --config=configs/matrix.py:formats8        # e0m7 ... e7m0 and bf16 x 4 optimizers
    python -m altgrad_jax.sweep --config=configs/matrix.py:formats8,quick  # the same, small
    python -m altgrad_jax.sweep --config=configs/matrix.py:formats16       # e0m15 ... e15m0
    python -m altgrad_jax.sweep --config=configs/matrix.py:layers          # one kind of layer in 8 bits at a time
    python -m altgrad_jax.sweep --config=configs/matrix.py:scaling         # how operands are brought into range

NAME[,quick]. Every condition starts from `base`; `--config.base.train.steps=500` changes it for all. Axes can be
narrowed: `--config.seeds="(0, 1)"`. All weights are scaled by powers of two, as `grid` needs it, so that conditions
differ in their optimizer alone. Learning rates are those of configs/optimizer.py times what the search finds.

Expect: docs/results/formats8.md has what `formats8,quick` gave.
"""

from ml_collections import ConfigDict

from altgrad_jax.config import load_sibling

DENSE = r"blocks\..*|lm_head"
FORMATS8 = tuple(f"e{e}m{7 - e}" for e in range(8))
FORMATS16 = tuple(f"e{e}m{15 - e}" for e in range(16))
OPTIMIZERS = ("adamw", "relative", "grid", "madam")
KINDS = ("attn.qkv", "attn.proj", "mlp.up", "mlp.down")
BF16 = ("bf16", "bf16")
NO_GRID = "recipe=bf16 optimizer=relative|grid"  # they work on a format's grid
MATRICES = ("quick", "formats8", "formats16", "layers", "scaling")


def get_config(argument: str = "quick") -> ConfigDict:
    """The matrix named."""
    name, _, size = argument.partition(",")
    if name not in MATRICES or size not in ("", "quick"):
        raise ValueError(f"{argument!r}: name one of {', '.join(MATRICES)}, small with ',quick' behind it")
    small = size == "quick" or name == "quick"
    matrix = _matrix(small)
    matrix.name = f"{name}-quick" if small and name != "quick" else name
    {"quick": _quick, "formats8": _formats8, "formats16": _formats16, "layers": _layers, "scaling": _scaling}[name](
        matrix
    )
    return matrix.lock()


def _matrix(small: bool) -> ConfigDict:
    """What all matrices share."""
    matrix = ConfigDict()
    matrix.name = ""
    matrix.question = ""
    matrix.base = load_sibling(__file__, "base").get_config("quick" if small else "")
    with matrix.base.unlocked():
        matrix.base.tracking.wandb = "disabled"
        matrix.base.tracking.tags = ("sweep",)
        if small:
            matrix.base.model.update(n_layer=2, n_head=2, n_embd=64, block_size=64, vocab_size=512)
            matrix.base.train.update(steps=200, batch_size=8, eval_every=50, eval_batches=16)
            matrix.base.diagnostics.update(quant_every=50, shadow_every=50, questions=("weights:50", "spectra:199"))
            matrix.base.optimizer.warmup_steps = 20
    matrix.recipes = (BF16,)  # (name, recipe), ...
    matrix.optimizers = ("adamw",)  # names in optimizer_settings
    matrix.layers = (("all", DENSE),)  # (name, pattern of layer paths), ...: which layers a recipe is for
    matrix.rates = (1.0,)  # factors on every learning rate, as an axis of its own
    matrix.seeds = (0, 1, 2)
    matrix.exclude = ()  # "AXIS=PATTERN AXIS=PATTERN", ...: conditions to leave out
    matrix.together = 0  # most conditions in one program; 0: as many as memory allows (on a CPU at most 8)
    optimizer = load_sibling(__file__, "optimizer")
    matrix.optimizer_settings = ConfigDict()
    for name, (settings, small_rate, full_rate) in optimizer.OPTIMIZERS.items():
        own = ConfigDict(settings | {"learning_rate": small_rate if small else full_rate})
        if name in optimizer.WITH_OTHERS:
            own.other_learning_rate = matrix.base.optimizer.learning_rate
        matrix.optimizer_settings[name] = own
    matrix.rates_in_rungs = optimizer.IN_RUNGS
    matrix.search = ConfigDict()
    matrix.search.factors = ()  # tried on each optimizer's learning rate; none: no search
    matrix.search.recipes = ()  # names in recipes
    matrix.search.seeds = (41,)
    return matrix


def _on_grid(*formats: str) -> tuple[tuple[str, str], ...]:
    return tuple((name, f"{name} w.pow2=1") for name in formats)


def _quick(matrix: ConfigDict) -> None:
    matrix.question = "Do E5M2 and E4M3 train as BF16 does, and do geometry-aware updates help them?"
    matrix.recipes = (BF16, *_on_grid("e5m2", "e4m3"))
    matrix.optimizers = ("adamw", "relative")
    matrix.exclude = (NO_GRID,)
    matrix.base.train.steps = 100
    matrix.base.diagnostics.questions = ("weights:50", "spectra:99")


def _formats8(matrix: ConfigDict) -> None:
    matrix.question = "Which 8-bit format gains most from geometry-aware updates, and where does each format fail?"
    matrix.recipes = (BF16, *_on_grid(*FORMATS8))
    matrix.optimizers = OPTIMIZERS
    matrix.exclude = (NO_GRID,)
    matrix.search.update(factors=(0.125, 0.25, 0.5, 1.0, 2.0, 4.0), recipes=("e4m3", "e5m2"))
    matrix.search.seeds = (41, 42)


def _formats16(matrix: ConfigDict) -> None:
    matrix.question = "How should sixteen bits be split between exponent and mantissa?"
    matrix.recipes = (BF16, *_on_grid(*FORMATS16))


def _layers(matrix: ConfigDict) -> None:
    matrix.question = "Which layers lose the most in 8 bits?"
    kinds = tuple((kind, rf"blocks\.\d+\.{kind.replace('.', chr(92) + '.')}") for kind in KINDS)
    matrix.layers = (("all", DENSE), *kinds, ("lm_head", "lm_head"))
    matrix.recipes = (BF16, *_on_grid("e5m2", "e4m3", "e2m5"))


def _scaling(matrix: ConfigDict) -> None:
    matrix.question = "How much of a format's loss is its scaling?"
    ways = {
        "none": "scaling=none",
        "current": "scaling=current",
        "delayed": "scaling=delayed",
        "pow2": "scaling=delayed pow2=1",
        "channel": "scaling=current granularity=channel",
        "mx": "scaling=mx",
    }
    matrix.recipes = (
        BF16,
        *((f"{fmt}-{way}", f"{fmt} {options}") for fmt in ("e5m2", "e4m3") for way, options in ways.items()),
    )
