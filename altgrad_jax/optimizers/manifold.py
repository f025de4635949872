"""Adam with steps measured on the weights' grid: the gradient, or the update, times the stiffness S(w).

S(w) = 2^(max(floor(log2|w|), e_min) - M) is the distance between neighbours of the grid at w (`WeightGrid.ulp`, which
counts the weight's scale in). Where it enters decides what it does:

    before    g <- g min(S, max_stiffness), then Adam. Adam divides by the gradient's own root mean square, so a factor
              that changes slowly cancels: m and sqrt(v) carry the same S. What is left is the ratio of S now to S in
              the moments' past, and eps, which S g meets sooner where S is small. This is AltGrad's rule.
    after     Adam first, u = m / (sqrt(v) + eps), then
                relative   u S / mean(S) over the layer: Adam's step for the layer, larger for its larger weights
                ulps       u S, with the learning rate counted in ulps: every weight moves about `learning_rate` ulps

Steps in proportion to S are, away from zero, steps in proportion to |w|: multiplicative updates, as in Madam (Bernstein
et al. 2020, arXiv 2006.14560), with a floor at the smallest spacing, so that weights can pass through zero.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from altgrad_jax.optimizers.grids import Formats, Grids, labels, map_with_grids, resolve_grids

Array = jax.Array
PLACEMENTS = ("off", "before", "after")
FORMS = ("relative", "ulps")


def scale_by_stiffness(
    formats: Formats, form: str = "relative", max_stiffness: float = 1e6
) -> optax.GradientTransformationExtraArgs:
    """Multiplies every update by a function of S(w); leaves parameters without a format alone.

    Args:
      formats: of the parameters.
      form: "clipped" (min(S, max_stiffness), and 1 for weights that are 0, as AltGrad has it), "relative" (S over its
        mean in the parameter) or "ulps" (S).
      max_stiffness: of "clipped".
    """

    def factor(grid, w: Array) -> Array:
        ulp = grid.ulp(w)
        if form == "clipped":
            return jnp.where(w == 0, 1.0, jnp.minimum(ulp, max_stiffness))
        return ulp / jnp.mean(ulp) if form == "relative" else ulp

    def update(updates, state, params=None, *, grids: Grids | None = None, **extra: Any):
        del extra
        found = resolve_grids(formats, params, grids)
        scaled = map_with_grids(
            lambda _, grid, g, w: g if grid is None else (g * factor(grid, w)).astype(g.dtype), found, updates, params
        )
        return scaled, state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


def add_sign_decay(rate: float) -> optax.GradientTransformation:
    """Adds rate sign(w): behind it, `scale_by_stiffness(form="ulps")` makes it a pull to zero of so many ulps."""

    def update(updates, state, params=None):
        return jax.tree.map(lambda u, w: u + rate * jnp.sign(w), updates, params), state

    return optax.GradientTransformation(lambda _: optax.EmptyState(), update)


def manifold_adamw(
    learning_rate: optax.ScalarOrSchedule,
    formats: Formats,
    *,
    placement: str = "after",
    form: str = "relative",
    max_stiffness: float = 1e6,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    mask: Any = None,
    other_learning_rate: optax.ScalarOrSchedule | None = None,
) -> optax.GradientTransformationExtraArgs:
    """AdamW whose steps know the grid; with `placement="off"` it is `optax.adamw`, to the bit.

    Args:
      learning_rate: as AdamW's; with form "ulps" in ulps of each weight a step.
      formats: of the parameters.
      placement: "off", "before" or "after", see the module's text.
      form: of "after", "relative" or "ulps".
      max_stiffness: of "before".
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second.
      weight_decay: decoupled. With "before" and "relative" AdamW's own: learning_rate weight_decay w. With "ulps"
        learning_rate weight_decay ulps towards zero.
      mask: of the parameters that decay, as `optax.adamw` takes it.
      other_learning_rate: with "ulps", of the AdamW that parameters without a format get; `learning_rate` if None.

    Raises:
      ValueError: unknown placement or form.
    """
    if placement not in PLACEMENTS or form not in FORMS:
        raise ValueError(f"placement={placement!r}, form={form!r}: there are {PLACEMENTS} and {FORMS}")
    adam = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)
    decay = optax.add_decayed_weights(weight_decay, mask)
    rate = optax.scale_by_learning_rate(learning_rate)
    if placement == "off":
        return optax.with_extra_args_support(optax.chain(adam, decay, rate))
    if placement == "before":
        return optax.chain(scale_by_stiffness(formats, "clipped", max_stiffness), adam, decay, rate)
    if form == "relative":
        return optax.chain(adam, scale_by_stiffness(formats, "relative"), decay, rate)
    in_ulps = optax.chain(adam, add_sign_decay(weight_decay), scale_by_stiffness(formats, "ulps"), rate)
    other = optax.scale_by_learning_rate(learning_rate if other_learning_rate is None else other_learning_rate)
    return optax.partition({"grid": in_ulps, "rest": optax.chain(adam, decay, other)}, lambda t: labels(formats, t))
