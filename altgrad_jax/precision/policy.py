r"""Which layer runs in which recipe: ordered rules on layer paths, resolved once, and what they need in each step.

    rules = ((r"lm_head|wte", "bf16"), (r"blocks\.\d+\.attn\..*", "e5m2"), (r".*", "hybrid"))

The first rule whose pattern matches a layer's whole path decides; a layer that none matches stays in 16 bits. The
layers are the dense ones and the tables `wte` and `wpe`, whose rows are rounded, as weights, when they are looked up.
"""

import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax import lax

from altgrad_jax.precision.dot import Prepared, Probe, operand_pair
from altgrad_jax.precision.formats import FloatFormat, get_format
from altgrad_jax.precision.kernels.tiles import BY_SIZE, TileTable
from altgrad_jax.precision.recipes import PLAIN, ROLES, Recipe, RoleRecipe, parse_recipe
from altgrad_jax.precision.scaling import RoleState, carrier, initial_state, next_state, runs_natively, traced_grid
from altgrad_jax.precision.statistics import RoleStats, over_devices, saturates_above
from altgrad_jax.precision.target import fp8_hardware, has_wgmma, why_no_fp8
from altgrad_jax.precision.weight_grid import WeightGrid, policy_grid

Array = jax.Array
BACKENDS = ("auto", "native", "emulated")
KERNELS = ("xla", "pallas")
TABLES = ("wte", "wpe")
UNIT_FORMATS = ("e4m3fn", "e5m2")  # operands of NVIDIA's FP8 matrix units (PTX ISA, mma and wgmma)
MAY_CONVERT = "cuBLASLt multiplies no E5M2 by E5M2, XLA may convert to 16 bits"
LayerState = dict[str, RoleState]


@dataclass(frozen=True)
class LayerPlan:
    """What one quantised layer does.

    Attributes:
      path: the layer's name, such as "blocks.3.attn.qkv".
      shape: of its weight, (inputs, outputs), or (rows, width) of a table.
      recipe: how its operands are quantised.
      native: whether they are multiplied in the formats' own dtypes.
      kernel: whether products of two operands of one type are left to `kernels.fp8_matmul`.
      why: why not, or what stands in the way of running in 8 bits; "" if nothing does.
    """

    path: str
    shape: tuple[int, int]
    recipe: Recipe
    native: bool
    kernel: bool
    why: str

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles it has: a table is only a weight."""
        return ("weight",) if self.path in TABLES else ROLES


@dataclass(frozen=True)
class Policy:
    """All layers' plans. Pure: what changes from step to step is in the state that `init` begins.

    Attributes:
      plans: of the quantised layers, in the model's order.
      shapes: of every layer, quantised or not.
      traced: whether formats are carried in the state, so that one compiled program serves all.
      tiles: how `kernels.fp8_matmul` cuts the products that are left to it.
    """

    plans: tuple[LayerPlan, ...] = ()
    shapes: tuple[tuple[str, tuple[int, int]], ...] = ()
    traced: bool = False
    tiles: TileTable = BY_SIZE

    def init(self) -> dict[str, LayerState]:
        """The state before the first step: layer -> role -> RoleState; empty without quantised layers."""
        return {
            plan.path: {role: initial_state(plan.recipe.role(role), self.traced) for role in plan.roles}
            for plan in self.plans
        }

    def with_format(self, state: Mapping[str, LayerState], fmt: FloatFormat | str) -> dict[str, LayerState]:
        """A state with another format in every operand, for the program that was compiled for this policy.

        Histories and means stay as they are. States of several formats, stacked, are what `jax.vmap` takes.

        Args:
          state: of this policy, which was resolved with `traced=True`.
          fmt: a format with the same carrier as the recipe's own: bfloat16, or float32 for what that cannot hold.

        Raises:
          ValueError: formats are not traced, or this one needs another carrier.
        """
        fmt = get_format(fmt)
        for plan in self.plans:
            if not self.traced:
                raise ValueError(f"{plan.path} has its format built in; resolve the rules with traced=True")
            for role in plan.roles:
                if (own := carrier(plan.recipe.role(role).fmt)) != carrier(fmt):
                    raise ValueError(f"{fmt.name} needs {carrier(fmt)} operands, and {plan.path} has {own} ones")
        return {
            path: {role: replace(role_state, grid=traced_grid(fmt)) for role, role_state in roles.items()}
            for path, roles in state.items()
        }

    def prepare(
        self,
        weights: Mapping[str, Array],
        state: Mapping[str, LayerState],
        *,
        key: Array | None = None,
        axis_name: str | None = None,
        collect: bool = False,
    ) -> tuple[dict[str, Prepared], dict[str, RoleStats]]:
        """Quantises every weight, once for the step.

        Args:
          weights: layer -> [inputs, outputs] float32.
          state: from `init` or `update`.
          key: of this step's stochastic rounding. None (evaluation): the same draws every time.
          axis_name: axis over which a tensor's own amax is combined.
          collect: gather all statistics, not amax alone.

        Returns:
          What the layers multiply with, and the weights' statistics, both by layer.
        """
        prepared, stats = {}, {}
        for plan in self.plans:
            key = jax.random.key(0) if key is None else key
            of_layer = jax.random.fold_in(key, zlib.crc32(plan.path.encode()))
            keys = {
                role: jax.random.fold_in(of_layer, i) if plan.recipe.role(role).rounding == "stochastic" else None
                for i, role in enumerate(ROLES)
            }
            roles = state[plan.path]
            # A table's rows are its vectors; a dense layer's weight is contracted over its inputs, then its outputs.
            axes = (1, 0) if plan.path in TABLES else (0, 1)
            # Every device holds the same weight: nothing to combine.
            forward, backward, stats[plan.path] = operand_pair(
                *(weights[plan.path], plan.recipe.weight, roles["weight"], axes, plan.native, keys["weight"], None),
                collect,
            )
            layer = Prepared(
                forward=forward,
                backward=backward,
                activation=roles.get("activation", roles["weight"]),
                gradient=roles.get("gradient", roles["weight"]),
                activation_key=keys["activation"],
                gradient_key=keys["gradient"],
                path=plan.path,
                shape=plan.shape,
                recipe=plan.recipe,
                native=plan.native,
                kernel=self.tiles if plan.kernel else None,
                axis_name=axis_name,
                collect=collect,
            )
            # The devices' activations differ, so their draws must; their weights are one, and so are its draws.
            prepared[plan.path] = layer if axis_name is None else layer.fold_keys(lax.axis_index(axis_name))
        return prepared, stats

    def weight_grids(self, weights: Mapping[str, Array], state: Mapping[str, LayerState]) -> dict[str, WeightGrid]:
        """Layer -> the grid that its weight is rounded to in the step about to be taken."""
        return {
            plan.path: policy_grid(
                weights[plan.path], plan.recipe.weight, state[plan.path]["weight"], 1 if plan.path in TABLES else 0
            )
            for plan in self.plans
        }

    def probes(self, prepared: Mapping[str, Prepared]) -> dict[str, Probe]:
        """A probe for every layer that has activations."""
        return {plan.path: prepared[plan.path].probe() for plan in self.plans if plan.path not in TABLES}

    def gather(
        self, weights: Mapping[str, RoleStats], probes: Mapping[str, Probe], axis_name: str
    ) -> dict[str, dict[str, RoleStats]]:
        """The statistics of all devices, layer -> role; probes as they came back from the backward pass."""
        found: dict[str, dict[str, RoleStats]] = {}
        for plan in self.plans:
            found[plan.path] = {"weight": weights[plan.path]}
            if plan.path in probes:
                probe = probes[plan.path]
                seen = {"activation": probe.activation, "gradient": probe.gradient}
                found[plan.path] |= {role: over_devices(stats, axis_name) for role, stats in seen.items()}
        return found

    def overflowed(self, state: Mapping[str, LayerState], stats: Mapping[str, Mapping[str, RoleStats]]) -> Array | bool:
        """Whether a gradient went beyond the largest value of its format, under a scale that does not follow it.

        That can be seen of its amax, also where the value was saturated. Scales that follow their gradient are left
        out: what saturates under them does so at any size of the loss.
        """
        found: Array | bool = False
        for plan in self.plans:
            role = plan.recipe.gradient
            if "gradient" in plan.roles and role.scaling in ("none", "static"):
                scale = np.float32(role.scale if role.scaling == "static" else 1.0)
                largest = stats[plan.path]["gradient"].amax * scale
                found |= largest > saturates_above(role.fmt, state[plan.path]["gradient"].grid)
        return found

    def update(
        self, state: Mapping[str, LayerState], stats: Mapping[str, Mapping[str, RoleStats]]
    ) -> dict[str, LayerState]:
        """The state after a step."""
        return {
            path: {role: next_state(role_state, stats[path][role].amax) for role, role_state in roles.items()}
            for path, roles in state.items()
        }

    def table(self) -> list[dict[str, Any]]:
        """One row a layer, for the manifest: layer, shape, format, scaling and rounding of each role, backend."""
        plans = {plan.path: plan for plan in self.plans}
        rows = []
        for path, shape in self.shapes:
            plan = plans.get(path)
            row: dict[str, Any] = {"layer": path, "shape": list(shape), "recipe": plan.recipe.name if plan else PLAIN}
            if plan:
                row |= {role: plan.recipe.role(role).describe() for role in plan.roles}
            row["backend"] = "16-bit" if plan is None else _backend(plan)
            rows.append(row | ({"note": plan.why} if plan and plan.why else {}))
        return rows

    def identity(self) -> dict[str, str]:
        """What must not change when a run resumes: the arithmetic of every quantised layer, not where it runs."""
        return {
            f"precision.layers.{plan.path}": " | ".join(plan.recipe.role(role).describe() for role in plan.roles)
            for plan in self.plans
        }

    def lines(self) -> list[str]:
        """The table for people: one line for all layers that run alike, blocks without their numbers."""
        groups: dict[str, list[str]] = {}
        for row in self.table():
            name = re.sub(r"^blocks\.\d+\.", "blocks.*.", row["layer"])
            note = f" ({row['note']})" if "note" in row else ""
            alike = groups.setdefault(f"{_by_role(row)}, {row['backend']}{note}", [])
            alike.append(f"{name} {'x'.join(map(str, row['shape']))}")
        return [
            f"{', '.join(dict.fromkeys(layers))}{f' [{len(layers)} layers]' if len(layers) > 1 else ''}: {what}"
            for what, layers in groups.items()
        ]


def _by_role(row: Mapping[str, Any]) -> str:
    """ "activation, weight e4m3fn delayed(16) | gradient e5m2 delayed(16)": roles of one format together."""
    roles: dict[str, list[str]] = {}
    for role in ROLES:
        if role in row:
            roles.setdefault(row[role], []).append(role)
    return " | ".join(f"{', '.join(names)} {what}" for what, names in roles.items()) or PLAIN


def resolve(
    rules: Sequence[tuple[str, str]],
    shapes: Mapping[str, tuple[int, int]],
    *,
    backend: str = "auto",
    strict: bool = False,
    traced: bool = False,
    kernel: str = "xla",
    tiles: TileTable = BY_SIZE,
) -> Policy:
    """Applies the rules to a model's layers.

    Args:
      rules: (pattern, recipe), in order.
      shapes: layer -> shape of its weight.
      backend: "native" (the formats' own dtypes), "emulated" (the same values in wider ones), or "auto": native where
        this machine has matrix units for the formats.
      strict: refuse a plan that this machine cannot multiply in 8 bits.
      traced: keep the formats in the state; such layers are emulated.
      kernel: what multiplies natively: "xla", its engines, or "pallas", our kernel where both operands have one type.
      tiles: how that kernel cuts its products.

    Raises:
      ValueError: a bad pattern or recipe, a rule that decides no layer, or one that `backend` or `strict` refuses.
    """
    parsed = [parse_rule(rule) for rule in rules]
    used, plans = set(), []
    hardware = fp8_hardware() if rules else ""
    for path, shape in shapes.items():
        matching = [i for i, (pattern, _) in enumerate(parsed) if pattern.fullmatch(path)]
        if not matching:
            continue
        used.add(matching[0])
        recipe = parsed[matching[0]][1]
        if recipe is not None:
            plans.append(_plan(path, shape, recipe, backend, hardware, traced, kernel == "pallas"))
    for i, (pattern, text) in enumerate(rules):
        if i not in used:
            taken = any(parsed[i][0].fullmatch(path) for path in shapes)
            how = "matches only layers that earlier rules have decided" if taken else "matches no layer"
            raise ValueError(f"precision rule {i + 1} ({pattern!r}, {text!r}) {how}; the layers are {_names(shapes)}")
    policy = Policy(tuple(plans), tuple(shapes.items()), traced, tiles)
    # What XLA may do is found by auditing what it did.
    if strict and (refused := [p for p in plans if p.why not in ("", MAY_CONVERT) and p.path not in TABLES]):
        raise ValueError(
            f"precision.strict: {len(refused)} layers would not be multiplied in 8 bits here, {refused[0].path} the"
            f" first: {refused[0].why}; use precision.strict=False to run them all the same"
        )
    return policy


def parse_rule(rule: tuple[str, str]) -> tuple[re.Pattern, Recipe | None]:
    """A rule's pattern and recipe.

    Raises:
      ValueError: it is no pair of texts, or one of them is malformed.
    """
    if not (isinstance(rule, (tuple, list)) and len(rule) == 2 and all(isinstance(part, str) for part in rule)):
        raise ValueError(f"precision rule {rule!r} is not a pair (pattern, recipe)")
    try:
        return re.compile(rule[0]), parse_recipe(rule[1])
    except re.error as e:
        raise ValueError(f"precision rule {tuple(rule)!r}: the pattern is no regular expression: {e}") from None


def _plan(
    path: str, shape: tuple[int, int], recipe: Recipe, backend: str, hardware: str, traced: bool, kernel: bool
) -> LayerPlan:
    """How a layer is run, and what stands in the way of 8-bit multiplication."""
    why = _obstacle(recipe, hardware, traced)
    if path in TABLES:
        return LayerPlan(path, shape, recipe, False, False, "rounded when looked up")
    possible = not traced and all(runs_natively(recipe.role(role)) for role in ROLES)
    if backend == "native" and not possible:
        raise ValueError(f"precision.backend=native: {path} cannot run as {recipe.name!r}: {why}; use auto or emulated")
    multiplied = bool(hardware) and not _without_unit(recipe)
    native = backend == "native" or (backend == "auto" and possible and multiplied)
    if not native and not why:
        why = "precision.backend=emulated"
    kernel = kernel and native and _has_one_type(recipe)
    if kernel and not has_wgmma():
        raise ValueError(
            f"precision.kernel=pallas: the kernel that would multiply {path} is made of instructions that compute"
            " capability 9.0 (H100, H200) alone has; use precision.kernel=xla"
        )
    return LayerPlan(path, shape, recipe, native, kernel, "" if kernel and why == MAY_CONVERT else why)


def _has_one_type(recipe: Recipe) -> bool:
    """Whether some product of the layer multiplies two operands of one type that FP8 matrix units take."""
    x, w, g = (recipe.role(role).fmt.name for role in ROLES)
    return any(a == b and a in UNIT_FORMATS for a, b in ((x, w), (x, g), (w, g)))


def _backend(plan: LayerPlan) -> str:
    if plan.native:
        return "native, Pallas kernel" if plan.kernel else "native"
    return "emulated"


def _obstacle(recipe: Recipe, hardware: str, traced: bool) -> str:
    if traced:
        return "the format is a traced value"
    foreign = [recipe.role(role) for role in ROLES if not runs_natively(recipe.role(role))]
    if foreign:
        return _why_foreign(foreign[0])
    if not hardware:
        return why_no_fp8()
    if others := _without_unit(recipe):
        return f"FP8 matrix units multiply {' and '.join(UNIT_FORMATS)}, not {others[0]}"
    e5m2 = get_format("e5m2")
    if recipe.gradient.fmt == e5m2 and e5m2 in (recipe.activation.fmt, recipe.weight.fmt):
        return MAY_CONVERT
    if recipe.activation.fmt == recipe.weight.fmt == e5m2:
        return MAY_CONVERT
    return ""


def _without_unit(recipe: Recipe) -> list[str]:
    """The recipe's formats that FP8 matrix units do not multiply."""
    names = [recipe.role(role).fmt.name for role in ROLES]
    return [name for name in names if name not in UNIT_FORMATS]


def _why_foreign(role: RoleRecipe) -> str:
    if role.scaling == "mx":
        return "block scales need matrix units with microscaling"
    return f"XLA has no dtype {role.fmt.name}"


def _names(shapes: Mapping[str, Any]) -> str:
    """Layer names with blocks counted: "blocks.0-3.attn.qkv, ..., lm_head"."""
    blocks = {int(m[1]) for name in shapes if (m := re.match(r"blocks\.(\d+)\.", name))}
    span = f"blocks.{min(blocks)}-{max(blocks)}." if blocks else ""
    names = [re.sub(r"^blocks\.\d+\.", span, name) for name in shapes]
    return ", ".join(dict.fromkeys(names))
