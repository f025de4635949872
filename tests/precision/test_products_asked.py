"""What the products ask of XLA: how precisely they are to be summed, and the lengths of their operands.

Neither changes a result on a CPU, so it is read from the traced program.
"""

import re
from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.extend.core import jaxprs_in_params

from altgrad_jax.precision.dot import matmul
from tests.precision.layers import F32, run

FORWARD, DX, DW = "forward", "dx", "dw"
FAST, FULL = None, (lax.Precision.HIGHEST,) * 2


def equations(jaxpr) -> Iterator:
    """All of a program, those of the programs inside it too."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


def traced_products(function, *shapes: tuple[int, ...]) -> dict[str, dict]:
    """By the product's name: what it asks for, and its operands' shapes and dtypes. The arguments are float32."""
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    found = {}
    for equation in equations(jax.make_jaxpr(function)(*arguments).jaxpr):
        if equation.primitive.name == "dot_general":
            [product] = re.findall(r"gemm:layer:(\w+)", str(equation.source_info.name_stack))
            assert product not in found
            found[product] = {
                "precision": equation.params["precision"],
                "shapes": [variable.aval.shape for variable in equation.invars],
                "dtypes": {variable.aval.dtype for variable in equation.invars},
            }
    assert set(found) == {FORWARD, DX, DW}
    return found


def layer_products(text: str, native: bool, rows: int, inputs: int, outputs: int) -> dict[str, dict]:
    """Of a quantised layer."""
    layer = lambda x, w, g: vars(run(x, w, None, g, text, native=native))  # noqa: E731
    return traced_products(layer, (rows, inputs), (inputs, outputs), (rows, outputs))


def plain_products(dtype: jnp.dtype) -> dict[str, dict]:
    """Of a layer that no rule quantises."""

    def layer(x, w, g):
        y, back = jax.vjp(partial(matmul, compute_dtype=dtype, out_dtype=F32, path="layer"), x, w)
        return y, back(g)

    return traced_products(layer, (12, 10), (10, 6), (12, 6))


@pytest.mark.parametrize("text", ["e5m2", "hybrid", "e4m3fn scaling=current granularity=channel"])
def test_short_sums_forward_alone(text):
    """At the default precision the tensor cores keep about 14 bits of a sum of FP8 products."""
    found = layer_products(text, True, 32, 64, 48)
    assert all(dtype.itemsize == 1 for product in found.values() for dtype in product["dtypes"])
    assert {name: product["precision"] for name, product in found.items()} == {FORWARD: FAST, DX: FULL, DW: FULL}


def test_emulated_products_are_16_bit_ones():
    found = layer_products("hybrid", False, 32, 64, 48)
    assert {dtype for product in found.values() for dtype in product["dtypes"]} == {jnp.dtype("bfloat16")}
    assert {product["precision"] for product in found.values()} == {None}


@pytest.mark.parametrize("outputs", [250, 256, 50257])
def test_fp8_operands_are_padded_to_what_fills_tiles(outputs):
    """Lengths that 16 does not divide become multiples of 64; others stay, though 64 does not divide them."""
    vocabulary = {250: 256, 256: 256, 50257: 50304}[outputs]
    found = layer_products("hybrid", True, 48, 80, outputs)
    assert {name: product["shapes"] for name, product in found.items()} == {
        FORWARD: [(48, 80), (80, vocabulary)],
        DX: [(48, vocabulary), (80, vocabulary)],
        DW: [(48, 80), (48, vocabulary)],
    }
    # Of scales along the contraction each product has operands of its own.
    by_vector = layer_products("e4m3fn scaling=current granularity=channel", True, 48, 80, outputs)
    assert {n: p["shapes"] for n, p in by_vector.items()} == {n: p["shapes"] for n, p in found.items()}


def test_16_bit_operands_are_not_padded():
    found = layer_products("hybrid", False, 12, 10, 250)
    assert found[FORWARD]["shapes"] == [(12, 10), (10, 250)]


def test_float32_is_multiplied_in_float32():
    """Where the precision is the default, GPUs take TF32."""
    assert {product["precision"] for product in plain_products(F32).values()} == {FULL}
    assert {product["precision"] for product in plain_products(jnp.dtype("bfloat16")).values()} == {None}
    # Formats that bfloat16 does not hold are emulated in float32.
    found = layer_products("e0m15 scaling=current", False, 12, 10, 6)
    assert {product["precision"] for product in found.values()} == {FULL}
