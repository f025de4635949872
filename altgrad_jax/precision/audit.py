"""What the compiled program really multiplies: every matrix product of a train step, asked for and got.

XLA may convert FP8 operands to 16 bits before it multiplies them, pad them, or transpose them in kernels of their own,
and says so nowhere but in the optimised program. So that is what is read here. A product is known by the name under
which `precision.dot` traced it; those without such a name (attention's) are listed by where they come from.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from altgrad_jax.precision import hlo
from altgrad_jax.precision.policy import TABLES, Policy

GPU_ENGINES = ("cuBLASLt", "cuBLAS", "Triton")
PRODUCTS = ("forward", "dx", "dw")
OPERANDS = {"forward": ("activation", "weight"), "dx": ("gradient", "weight"), "dw": ("activation", "gradient")}
_SCOPE = re.compile(r"gemm:([\w.]+):(forward|dx|dw)")
_CUBLAS = re.compile(r'custom_call_target="(__cublas[^"]*)"')
_PALLAS = re.compile(r'custom_call_target="(mosaic_gpu[^"]*|__gpu\$xla\.gpu\.triton|tpu_custom_call)"')
_ATTENTION = re.compile(r'custom_call_target="(__cudnn\$fmha[^"]*)"')
# Instructions that hand on what they read, as it lies in memory.
_VIEWS = ("bitcast", "get-tuple-element", "reshape")


@dataclass(frozen=True)
class Gemm:
    """One matrix product of the compiled step.

    Attributes:
      layer: path of the dense layer; for other products, where they come from.
      product: "forward", "dx" or "dw"; "" if it is no dense layer's.
      shape: of the operands and result, as (batch, m, n, k).
      met: dtypes of the two operands where they are multiplied, by our names; "tf32" for float32 that tensor cores cut.
      engine: what multiplies: "cuBLASLt FP8", "cuBLASLt", "Triton", "Pallas", "cuDNN attention", "XLA".
      times: how often a step runs it.
      fast_accumulation: whether FP8 products are summed in the tensor core's short accumulator; None where none are.
      padding: dimensions that are longer than the layer's, as "50257 -> 50272".
      transposes: FP8 operands that a kernel of its own transposes first.
      instruction: its name in the program.
    """

    layer: str
    product: str
    shape: tuple[int, int, int, int]
    met: tuple[str, str]
    engine: str
    times: int
    fast_accumulation: bool | None
    padding: str
    transposes: int
    instruction: str

    @property
    def is_fp8(self) -> bool:
        """Whether two 8-bit floats meet."""
        return all(is_float8(name) for name in self.met)

    @property
    def multiply_adds(self) -> int:
        """Of one step."""
        return math.prod(self.shape) * self.times


@dataclass(frozen=True)
class Finding:
    """A layer's product: what was asked for, and what the program does.

    Attributes:
      layer: path of the dense layer.
      product: "forward", "dx" or "dw".
      asked: formats of the two operands.
      asks_fp8: whether both are 8-bit floats with a recipe.
      gemms: what it became; more than one where XLA has split or repeated it, none if it was not found.
    """

    layer: str
    product: str
    asked: tuple[str, str]
    asks_fp8: bool
    gemms: tuple[Gemm, ...]

    @property
    def got_fp8(self) -> bool:
        """Whether all of it is multiplied in 8 bits."""
        return bool(self.gemms) and all(gemm.is_fp8 for gemm in self.gemms)


@dataclass(frozen=True)
class Audit:
    """All products of a step: those of the dense layers, and the others."""

    findings: tuple[Finding, ...]
    others: tuple[Gemm, ...]

    @property
    def fallbacks(self) -> list[Finding]:
        """Products asked for in FP8 that are not multiplied in FP8."""
        return [finding for finding in self.findings if finding.asks_fp8 and not finding.got_fp8]

    def summary(self) -> dict[str, Any]:
        """For the manifest: counts of products, share of multiply-adds in FP8, engines, padding and transposes."""
        gemms = [gemm for finding in self.findings for gemm in finding.gemms] + list(self.others)
        total = sum(gemm.multiply_adds for gemm in gemms)
        in_fp8 = sum(gemm.multiply_adds for gemm in gemms if gemm.is_fp8)
        engines: dict[str, int] = defaultdict(int)
        for gemm in gemms:
            engines[f"{gemm.engine}, {' x '.join(sorted(gemm.met))}"] += 1
        return {
            "fp8_asked": sum(finding.asks_fp8 for finding in self.findings),
            "fp8_got": sum(finding.asks_fp8 and finding.got_fp8 for finding in self.findings),
            "not_found": [f"{f.layer}:{f.product}" for f in self.findings if not f.gemms],
            "multiply_adds": total,
            "fp8_share": in_fp8 / total if total else 0.0,
            "engines": dict(sorted(engines.items())),
            "padded": sum(bool(gemm.padding) for gemm in gemms),
            "fp8_transposes": sum(gemm.transposes for gemm in gemms),
        }

    def as_json(self) -> dict[str, Any]:
        """Everything: the summary and one entry a product."""
        return {
            "summary": self.summary(),
            "products": [asdict(finding) for finding in self.findings],
            "others": [asdict(gemm) for gemm in self.others],
        }

    def lines(self, no_units: str = "") -> list[str]:
        """For people: one line for products that differ only in their block's number, then `headline`."""
        groups: dict[str, int] = defaultdict(int)
        for finding in self.findings:
            layer = re.sub(r"^blocks\.\d+\.", "blocks.*.", finding.layer)
            got = "; ".join(dict.fromkeys(_describe(gemm) for gemm in finding.gemms)) or "not found in the program"
            groups[f"{layer} {finding.product}: asked {' x '.join(finding.asked)}, got {got}"] += 1
        for gemm in self.others:
            groups[f"{gemm.layer}: {_describe(gemm)}"] += 1
        lines = [f"{line} [{count} times]" if count > 1 else line for line, count in groups.items()]
        return [*lines, self.headline(no_units)]

    def headline(self, no_units: str = "") -> str:
        """The summary in a line.

        Args:
          no_units: why the machine multiplies no FP8 at all; "" where it does, or need not be known.
        """
        found = self.summary()
        if not found["fp8_asked"]:
            return "FP8 products: none asked for"
        if no_units and not found["fp8_got"]:
            return (
                f"FP8 products: {found['fp8_asked']} asked for, all emulated ({no_units}): operands are rounded to"
                " their formats and multiplied in wider ones, so the losses are FP8's and the speed is not"
            )
        return (
            f"FP8 products: {found['fp8_asked']} asked for, {found['fp8_got']} got;"
            f" {100 * found['fp8_share']:.1f} % of the step's multiply-adds in FP8"
        )

    def shortfall(self) -> str:
        """What `precision.strict` refuses, in a sentence; "" if nothing."""
        if not self.fallbacks:
            return ""
        first = self.fallbacks[0]
        got = "; ".join(_describe(gemm) for gemm in first.gemms) or "nothing the audit can find"
        return (
            f"{len(self.fallbacks)} of {self.summary()['fp8_asked']} products asked for in FP8 are not multiplied in"
            f" FP8, {first.layer} {first.product} the first: asked {' x '.join(first.asked)}, got {got}"
        )


def audit(text: str, policy: Policy, compute_dtype: str = "bfloat16", steps: int = 1) -> Audit:
    """Reads a compiled step.

    Args:
      text: its optimised HLO, `compiled.as_text()`.
      policy: what was asked for; its `shapes` name the dense layers.
      compute_dtype: operands of layers without a recipe.
      steps: how many steps the program takes.

    Raises:
      ValueError: the text is no HLO, or not as the versions of XLA write it that this was made for.
    """
    try:
        return _audit(text, policy, compute_dtype, steps)
    except (KeyError, IndexError, StopIteration) as e:
        raise ValueError(f"the audit cannot read this program: {type(e).__name__} {e}") from e


def _audit(text: str, policy: Policy, compute_dtype: str, steps: int) -> Audit:
    shapes = {path: shape for path, shape in policy.shapes if path not in TABLES}
    by_product: dict[tuple[str, str], list[Gemm]] = defaultdict(list)
    others = []
    for gemm in find_gemms(text, shapes):
        gemm = replace(gemm, times=max(1, gemm.times // steps))
        if gemm.layer in shapes:
            by_product[gemm.layer, gemm.product].append(gemm)
        else:
            others.append(gemm)
    plans = {plan.path: plan for plan in policy.plans}
    findings = []
    for layer in shapes:
        for product in PRODUCTS:
            plan = plans.get(layer)
            formats = [plan.recipe.role(role).fmt if plan else None for role in OPERANDS[product]]
            first, second = (fmt.name if fmt else compute_dtype for fmt in formats)
            asks = all(fmt is not None and fmt.bits == 8 for fmt in formats)
            findings.append(Finding(layer, product, (first, second), asks, tuple(by_product[layer, product])))
    return Audit(tuple(findings), tuple(others))


def find_gemms(text: str, shapes: Mapping[str, tuple[int, int]]) -> list[Gemm]:
    """Every matrix product of a compiled program.

    Args:
      text: optimised HLO.
      shapes: layer -> (inputs, outputs), to tell padding.
    """
    module = hlo.parse(text)
    counts = module.executions()
    gemms = []
    for computation in module.computations.values():
        for instruction in computation.instructions.values():
            if counts[computation.name] and (engine := _engine(instruction, computation)):
                gemms.append(_gemm(instruction, engine, computation, module, counts[computation.name], shapes))
    return gemms


def is_float8(name: str) -> bool:
    """Whether a dtype's name, by XLA's or our convention, is that of an 8-bit float."""
    return re.fullmatch(r"(f8)?e\d+m\d+\w*", name) is not None


def _engine(instruction: hlo.Instruction, computation: hlo.Computation) -> str:
    """What multiplies, or "" for an instruction that is no matrix product."""
    if instruction.opcode == "dot":
        return "Triton" if _in_triton(computation) else "XLA"
    if instruction.opcode != "custom-call":
        return ""
    if found := _CUBLAS.search(instruction.attributes):
        return "cuBLASLt FP8" if found[1].endswith("$f8") else "cuBLASLt" if "$lt" in found[1] else "cuBLAS"
    if _ATTENTION.search(instruction.attributes):
        return "cuDNN attention"
    if _PALLAS.search(instruction.attributes) and _SCOPE.search(instruction.op_name):
        return "Pallas"
    return ""


def _in_triton(computation: hlo.Computation) -> bool:
    """Whether these are the insides of a fusion that Triton compiles: XLA names them so."""
    return computation.name.startswith(("gemm_fusion", "triton_gemm")) or "block_fusion" in computation.name


def _gemm(
    instruction: hlo.Instruction,
    engine: str,
    computation: hlo.Computation,
    module: hlo.Module,
    times: int,
    shapes: Mapping[str, tuple[int, int]],
) -> Gemm:
    operands = [computation.instructions[name] for name in instruction.operands[:2]]
    left, right = (operand.shapes[0] for operand in operands)
    scope = _SCOPE.search(instruction.op_name)
    layer, product = (scope[1], scope[2]) if scope else (_origin(instruction), "")
    met = our_name(left.dtype), our_name(right.dtype)
    if met == ("float32", "float32") and engine in GPU_ENGINES and _is_default_precision(instruction):
        met = "tf32", "tf32"  # what tensor cores make of float32 unless they are told not to
    in_fp8 = is_float8(met[0]) and is_float8(met[1])
    shape = _attention_shape(instruction) if engine == "cuDNN attention" else _shape(instruction, left, right)
    return Gemm(
        layer=layer,
        product=product,
        shape=shape,
        met=met,
        engine=engine,
        times=times,
        fast_accumulation=_is_default_precision(instruction) if in_fp8 else None,
        padding=_padding(shape, product, shapes.get(layer)),
        transposes=sum(_is_transposed(operand, computation, module) for operand in operands) if in_fp8 else 0,
        instruction=instruction.name,
    )


def our_name(dtype: str) -> str:
    """XLA's name of a dtype as ours: "f8e4m3fn" -> "e4m3fn", "bf16" -> "bfloat16"."""
    return {"bf16": "bfloat16", "f16": "float16", "f32": "float32", "f64": "float64"}.get(
        dtype, dtype.removeprefix("f8")
    )


def _origin(instruction: hlo.Instruction) -> str:
    """The last scopes of a product that has no name of ours."""
    if not instruction.op_name:
        return "made by XLA"
    backward = "transpose(" in instruction.op_name
    names = re.findall(r"[\w,]+->\w+|\w+", instruction.op_name.split("/", 1)[-1])
    kept = [name for name in names if "->" in name] or names[-2:]
    return f"{' '.join(kept)}{' (backward)' if backward else ''}"


def _dims(instruction: hlo.Instruction, side: str, kind: str) -> tuple[int, ...]:
    """Contracting or batch dimensions, from a dot's attributes or a custom call's configuration."""
    found = re.search(rf"\b{side}_{kind}_dims=\{{([\d,]*)\}}", instruction.attributes)
    if not found:
        found = re.search(rf'"{side}_{kind}_dimensions":\s*\[([\d,"\s]*)\]', instruction.attributes)
    return tuple(int(d.strip(' "')) for d in found[1].split(",") if d) if found else ()


def _shape(instruction: hlo.Instruction, left: hlo.Shape, right: hlo.Shape) -> tuple[int, int, int, int]:
    """(batch, m, n, k)."""
    contracted, batch = _dims(instruction, "lhs", "contracting"), _dims(instruction, "lhs", "batch")
    if not contracted:  # Pallas: the kernels here take both operands with the contraction last
        contracted = (len(left.dims) - 1,)
    k, b = (math.prod(left.dims[d] for d in which) for which in (contracted, batch))
    return b, math.prod(left.dims) // max(k * b, 1), math.prod(right.dims) // max(k * b, 1), k


def _attention_shape(instruction: hlo.Instruction) -> tuple[int, int, int, int]:
    """(batch x heads x products, T, S, D): two products forward, five backward."""
    found = re.search(r'"intermediate_tensor_shape":\s*\{.*?"dimensions":\s*\[([\d,"\s]*)\]', instruction.attributes)
    if not found:
        raise ValueError(f"the audit does not know the shape of {instruction.name}, cuDNN's attention")
    dims = [int(d.strip(' "')) for d in found[1].split(",")]
    width = instruction.shapes[0].dims[-1]
    products = 5 if "Backward" in instruction.attributes else 2
    return dims[0] * dims[1] * products, dims[2], dims[3], width


def _is_default_precision(instruction: hlo.Instruction) -> bool:
    """Whether both operands have XLA's default precision, at which it sums FP8 products in short accumulators."""
    found = re.search(r'"operand_precision":\s*\[([^\]]*)\]|operand_precision=\{([^}]*)\}', instruction.attributes)
    return found is None or "HIGH" not in (found[1] or found[2]).upper()


def _padding(shape: tuple[int, int, int, int], product: str, layer: tuple[int, int] | None) -> str:
    """The layer's dimensions that are longer in the product, with their new lengths."""
    if layer is None:
        return ""
    _, m, n, k = shape
    inputs, outputs = layer
    # The number of tokens is not the layer's, so it is not known here.
    known, actual = {
        "forward": ((inputs, outputs), (k, _nearest(outputs, (m, n)))),
        "dx": ((outputs, inputs), (k, _nearest(inputs, (m, n)))),
        "dw": ((inputs, outputs), (_nearest(inputs, (m, n)), _nearest(outputs, (n, m)))),
    }[product]
    return ", ".join(f"{a} -> {b}" for a, b in zip(known, actual, strict=True) if 0 < b - a < 256)


def _nearest(length: int, candidates: Iterable[int]) -> int:
    """The candidate that is this length, or this length padded."""
    return min(candidates, key=lambda c: c - length if c >= length else math.inf)


def _is_transposed(operand: hlo.Instruction, computation: hlo.Computation, module: hlo.Module) -> bool:
    """Whether an FP8 operand comes from a kernel that does nothing but transpose it."""
    while operand.opcode in _VIEWS and operand.operands:
        operand = computation.instructions[operand.operands[0]]
    read = [computation.instructions[name].shapes for name in operand.operands]
    if not read or not all(is_float8(shape.dtype) for shapes in read for shape in shapes):
        return False  # it is written by what rounds it, or by the caller
    if operand.opcode == "fusion":
        inner = module.computations[next(operand.called())]
        return any(instruction.opcode in ("transpose", "copy") for instruction in inner.instructions.values())
    return operand.opcode in ("transpose", "copy")


def _describe(gemm: Gemm) -> str:
    """ "e4m3fn x e5m2 by cuBLASLt FP8, fast accumulation, 1 operand transposed"."""
    notes = [f"{' x '.join(gemm.met)} by {gemm.engine}"]
    if gemm.fast_accumulation is not None:
        notes.append("fast accumulation" if gemm.fast_accumulation else "full accumulation")
    if gemm.padding:
        notes.append(f"padded {gemm.padding}")
    if gemm.transposes:
        notes.append(f"{gemm.transposes} operand{'s' if gemm.transposes > 1 else ''} transposed")
    if gemm.times > 1:
        notes.append(f"{gemm.times} times a step")
    return ", ".join(notes)
