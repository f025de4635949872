"""Any format or recipe in every dense layer, named after the colon.

    python -m altgrad_jax.main --config=configs/format.py:e3m4              # the full baseline in E3M4
    python -m altgrad_jax.main --config=configs/format.py:e3m4,quick        # the same, small
    python -m altgrad_jax.main --config="configs/format.py:e4m3fn g=e5m2 scaling=current,quick"

What stands before ",quick" is a recipe: a name (`hybrid`), or a format (`e0m7`, `binary8p4`, `e3m4:bias=1,inf=0,nan=0`)
with options; see docs/precision.md. `python -m altgrad_jax.formats NAME` shows a format.

Expect: docs/results/formats.md has the losses of the eight formats e0m7 to e7m0.
"""

from altgrad_jax.config import load_sibling


def get_config(recipe: str = ""):
    """The baseline with its dense layers in `recipe`, small if it ends in ",quick"."""
    name = recipe.removesuffix(",quick")
    if not name or name == "quick":
        raise ValueError("name a format or a recipe after the colon: --config=configs/format.py:e3m4")
    config = load_sibling(__file__, "base").get_config("quick" if name != recipe else "")
    config.precision.rules = ((r"blocks\..*|lm_head", name),)
    config.tracking.name = recipe.replace(" ", "-").replace(",quick", "-quick")
    config.tracking.tags = ("format", name.split()[0])
    return config
