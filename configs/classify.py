"""EuroVoc concepts of European legislation: the GPT as a multi-label classifier of documents.

    python -m altgrad_jax.main --config=configs/classify.py              # the full baseline in BF16; a GPU job
    python -m altgrad_jax.main --config=configs/classify.py:quick        # the same, small: minutes on 2 CPU cores
    python -m altgrad_jax.main --config=configs/classify.py:e5m2,quick   # trunk and classifier in a format or recipe

Prepare the corpus first: `python -m altgrad_jax.data prepare --config=configs/classify.py [--source=DIR]`. Without it
the small variant classifies the acts of the embedded corpus by the concepts that they print on their last line; cut to
a block, these must be told from the beginning. LexGLUE's 100 labels:
`--config.data.name=lexglue --config.classify.min_documents=0`.

Labels, policies for long documents and the measures: docs/classify.md. Expect: docs/results/classify.md.
"""

from altgrad_jax.config import load_sibling


def get_config(recipe: str = ""):
    """The baseline as a classifier, its dense layers in `recipe` if one is named, small if it ends in "quick"."""
    name = recipe.removesuffix("quick").removesuffix(",")
    config = load_sibling(__file__, "base").get_config("quick" if recipe.endswith("quick") else "")
    config.task = "classify"
    if recipe.endswith("quick"):
        config.train.update(steps=600, eval_every=100)
    if name:
        config.precision.rules = ((r"blocks\..*|classifier", name),)
    plain = recipe.replace(" ", "-").replace(",", "-")
    config.tracking.name = "-".join(part for part in ("classify", plain) if part)
    config.tracking.tags = ("classify", name.split()[0] if name else "bf16")
    return config
