"""Reading HLO: a program written by hand, and one of JAX's own."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from altgrad_jax.precision import hlo

PROGRAM = """HloModule jit_f, is_scheduled=true, entry_computation_layout={(f32[2,3]{1,0})->f32[2,2]{1,0}}

%body (p: (s32[], bf16[2,3])) -> (s32[], bf16[2,3]) {
  %p = (s32[], bf16[2,3]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x.1 = bf16[2,3]{1,0} get-tuple-element(%p), index=1
  ROOT %t = (s32[], /*index=1*/bf16[2,3]{1,0}) tuple(%i, /*index=1*/%x.1)
}

%cond (p.2: (s32[], bf16[2,3])) -> pred[] {
  %p.2 = (s32[], bf16[2,3]{1,0}) parameter(0)
  ROOT %c = pred[] constant(false)
}

ENTRY %main.9 (x: f32[2,3]) -> f32[2,2] {
  %x = f32[2,3]{1,0} parameter(0)
  %start = (s32[], bf16[2,3]{1,0:T(8,128)}) custom-call(%x), custom_call_target="start", metadata={op_name="a/b"}
  %loop.1 = (s32[], bf16[2,3]{1,0}) while(%start), condition=%cond, body=%body, backend_config={KNOWN}
  %again = (s32[], bf16[2,3]{1,0}) while(%loop.1), condition=%cond, body=%body
  ROOT %y = f32[2,2]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={1}
}
""".replace("{KNOWN}", '{"known_trip_count":{"n":"7"}}')


def test_instructions_types_and_scopes():
    module = hlo.parse(PROGRAM)
    assert module.entry == "main.9" and list(module.computations) == ["body", "cond", "main.9"]
    start = module.computations["main.9"].instructions["start"]
    assert start.shapes == (hlo.Shape("s32", ()), hlo.Shape("bf16", (2, 3)))
    assert (start.opcode, start.operands, start.op_name) == ("custom-call", ("x",), "a/b")
    result = module.computations["body"].instructions["t"]
    assert result.operands == ("i", "x.1") and module.computations["body"].root == "t"
    dot = module.computations["main.9"].instructions["y"]
    assert (dot.opcode, dot.operands, dot.op_name) == ("dot", ("x", "x"), "")


def test_how_often_computations_run():
    """A loop of seven, and one whose length XLA does not say, which counts once."""
    module = hlo.parse(PROGRAM)
    assert module.executions() == {"main.9": 1, "body": 8, "cond": 8}
    instructions = module.computations["main.9"].instructions
    assert [instructions[name].trips() for name in ("loop.1", "again", "y")] == [7, None, 1]


@pytest.mark.parametrize("text", ["", "def f(x): return x", "HloModule m\n\n%f (p: f32[]) -> f32[] {\n}\n"])
def test_other_texts_are_refused(text):
    with pytest.raises(ValueError, match="no HLO text"):
        hlo.parse(text)
    with pytest.raises(ValueError, match="no HLO text"):
        hlo.parse("ENTRY %m (x: f32[]) -> f32[] {\n  %x = f32[] add(%x\n}\n")


def test_a_program_of_jax_itself():
    """Loops in loops: their lengths multiply."""

    def f(x):
        inner = lambda x, _: (jnp.sin(x @ x), None)  # noqa: E731
        outer = lambda x, _: (lax.scan(inner, x, None, length=5)[0] + 1, None)  # noqa: E731
        return lax.scan(outer, x, None, length=3)[0]

    module = hlo.parse(jax.jit(f).lower(jnp.ones((64, 64))).compile().as_text())
    counts = module.executions()
    dots = [
        counts[computation.name]
        for computation in module.computations.values()
        for instruction in computation.instructions.values()
        if instruction.opcode == "dot"
    ]
    assert sum(dots) == 15
