"""encode and decode: every code of every format, against the definition and against ml_dtypes."""

from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from altgrad_jax.precision.formats import FloatFormat, get_format, registry
from altgrad_jax.precision.rounding import OVERFLOWS, ROUNDINGS, decode, encode, round_to_format
from tests.precision.numpy_rounding import (
    FLOAT32_MAX,
    NATIVE,
    SMALL,
    assert_same,
    magnitudes,
    random_floats,
    round_reference,
    telling_inputs,
)

FORMATS = [
    *(name for name, fmt in registry().items() if fmt.signed and fmt.bits <= 16),
    *("e4m0:bias=3", "e3m0:bias=-2,nan=zero", "e6m0:inf=1", "e0m5:bias=3,nan=1", "e1m3:bias=-7", "e4m2:inf=1,nan=top"),
    *("e8m5:bias=140", "e5m3:bias=140", "e7m0:bias=149", "e8m0:bias=200", "e0m1:bias=-9", "e3m2:bias=130,inf=1,nan=1"),
]


def definition(fmt: FloatFormat) -> np.ndarray:
    """The value of every code, float64."""
    finite = magnitudes(fmt)
    special = np.full(2 ** (fmt.exponent_bits + fmt.mantissa_bits) - finite.size, np.nan)
    if fmt.inf:
        special[0] = np.inf
    positive = np.concatenate([finite, special])
    values = np.concatenate([positive, -positive])
    if fmt.nan == "zero":
        values[positive.size] = np.nan
    return values


@pytest.mark.parametrize("name", FORMATS)
def test_every_code_there_and_back(name):
    fmt = get_format(name)
    codes = np.arange(2**fmt.bits).astype(fmt.code_dtype)
    expected = definition(fmt)
    values = np.asarray(decode(codes, fmt))
    with np.errstate(over="ignore", under="ignore"):
        assert_same(values, expected.astype(np.float32), expected, f"{name} decoded")
    again = np.asarray(jax.jit(partial(encode, fmt=fmt, overflow="special"))(values))
    assert again.dtype == fmt.code_dtype == codes.dtype
    # Left out: values that float32 lacks, and NaNs, of which one code of each sign is written.
    nan, finite = np.isnan(expected), codes % fmt.magnitudes < magnitudes(fmt).size
    ordinary = (expected != 0) & np.isfinite(expected) & (values == expected)
    exact = np.where(finite, ordinary | (codes % fmt.magnitudes == 0), np.isinf(expected)) & ~nan
    np.testing.assert_array_equal(again[exact], codes[exact])
    if fmt.nan != "none":
        assert nan.any()
        assert len(set(again[nan])) == 1 and np.isnan(expected[again[nan][0]])
    if abs(fmt.min_exponent) < 140 - fmt.mantissa_bits and fmt.max_exponent <= 127:
        assert (exact | nan).all()
    assert exact.sum() > 100 or fmt.bits < 8


@pytest.mark.parametrize("rounding", ["nearest", "toward_zero"])
@pytest.mark.parametrize("name", ["e5m2", "e0m7", "e7m0", "e2m1fn", "e4m3fnuz", "binary8p3", "e0m5:bias=3,nan=1"])
def test_codes_are_those_of_the_rounded_values(name, rounding):
    fmt = get_format(name)
    x = np.concatenate([telling_inputs(fmt), random_floats(0, 10_000)])
    x = x[~np.isnan(x)]
    for overflow in OVERFLOWS:
        codes = np.asarray(jax.jit(partial(encode, fmt=fmt, rounding=rounding, overflow=overflow))(x))
        expected = round_reference(x, fmt, rounding, overflow)
        assert_same(definition(fmt)[codes], expected, x, f"{name} {overflow}")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_encode_and_round_agree(rounding, dtype):
    x = jnp.asarray(np.clip(np.nan_to_num(random_floats(1, 20_000)), -6e4, 6e4), dtype)
    key = jax.random.key(7)

    @partial(jax.jit, static_argnums=1)
    def both(x, name):
        codes = encode(x, name, rounding, key=key)
        return decode(codes, name), round_to_format(x, name, rounding, key=key)

    for name in ("e5m2", "e4m3fnuz", "e0m7", "e4m3b11fnuz"):
        decoded, rounded = (np.asarray(a).astype(np.float32) for a in both(x, name))
        assert_same(decoded, rounded, np.asarray(x, np.float32), f"{name} {rounding}")


@pytest.mark.parametrize("name", [*NATIVE, *SMALL])
def test_codes_of_ml_dtypes(name):
    fmt, dtype = get_format(name), {**NATIVE, **SMALL}[name]
    x = np.concatenate([telling_inputs(fmt), random_floats(2, 100_000)])
    x = np.append(x[~np.isnan(x)], np.uint32([0x7FC00000, 0xFFC00000]).view(np.float32))
    with np.errstate(over="ignore", invalid="ignore"):
        native = x.astype(dtype)
    expected = native.view(fmt.code_dtype)
    codes = np.asarray(jax.jit(partial(encode, fmt=name, overflow="special"))(x))
    # Without NaN, ml_dtypes makes -0 of NaN and 0 of -NaN.
    told = slice(None) if fmt.nan != "none" else ~np.isnan(x)
    np.testing.assert_array_equal(codes[told], expected[told])
    if fmt.nan in ("ieee", "top"):
        assert len(set(codes[np.isnan(x)])) == 2, "one of each sign"


def test_codes_of_nan_without_a_nan():
    # As ml_dtypes: the code of -0.
    for name, dtype in SMALL.items():
        code, back = jax.jit(lambda x, name=name: (encode(x, name), decode(encode(x, name), name)))(np.float32(np.nan))
        assert int(code) == int(np.float32(np.nan).astype(dtype).view(np.uint8)) == get_format(name).magnitudes
        assert np.signbit(back) and back == 0


def test_float32_is_its_own_code():
    bits = np.random.default_rng(0).integers(0, 2**32, 10_000, dtype=np.uint32)
    bits = bits[~np.isnan(bits.view(np.float32))]
    np.testing.assert_array_equal(
        jax.jit(partial(encode, fmt="float32", overflow="special"))(bits.view(np.float32)), bits
    )
    np.testing.assert_array_equal(np.asarray(decode(bits, "float32")).view(np.uint32), bits)


def test_values_beyond_float32_decode_to_infinity_or_zero():
    values = np.asarray(decode(np.arange(2**15, dtype=np.uint16), "e15m0"))
    exponent = np.arange(2**15) - 1 - 16382  # of codes from 1
    assert (values[1:] == np.where(exponent > 127, np.inf, np.where(exponent < -149, 0, values))[1:]).all()
    assert np.isfinite(values).sum() < 2**15 and values[np.isfinite(values)].max() == 2.0**127 < FLOAT32_MAX
    assert values[16382 + 1 - 149] == 2.0**-149


def test_native_arrays_are_taken_by_their_bits():
    for name, dtype in {**NATIVE, **SMALL, "e8m0fnu": ml_dtypes.float8_e8m0fnu}.items():
        fmt = get_format(name)
        codes = np.arange(1 << fmt.bits).astype(fmt.code_dtype)
        native = codes.view(dtype)
        for array in (native, native[:3].reshape(3, 1), native[5]):
            expected = np.asarray(array).astype(np.float32)
            assert_same(decode(array, name), expected, expected, name)
            assert_same(decode(array, dtype), expected, expected, name)
    x = jnp.asarray([1, -2, 448, jnp.nan], jnp.float8_e4m3fn)
    expected = np.float32([1, -2, 448, np.nan])
    for decoded in (decode(x, "e4m3fn"), jax.jit(partial(decode, fmt="F8E4M3FN"))(x)):
        assert_same(decoded, expected, expected)


def test_what_is_no_code_is_refused():
    for codes, name, said in (
        (
            jnp.ones(2, jnp.float8_e5m2),
            "e4m3fn",
            "are integers or arrays of its own dtype, not float8_e5m2",
        ),
        (60.7, "e5m2", "not float64"),
        (jnp.arange(3.0), "e5m2", "not float32"),
        ([True], "e5m2", "not bool"),
        (np.int64([3, 16]), "e2m1fn", "e2m1fn has the codes 0 to 15; 16 is none of them"),
        (jnp.uint8([3, 77]), "e2m3fn", "e2m3fn has the codes 0 to 63; 77 is none of them"),
        (300, "e4m3fnuz", "e4m3fnuz has the codes 0 to 255; 300 is none of them"),
        (np.int8([-1]), "e5m2", "-1 is none of them"),
        (2**32, "float32", "4294967296 is none of them"),
        (np.uint64([2**63 + 1]), "e5m2", "is none of them"),
    ):
        with pytest.raises(ValueError) as refused:
            decode(codes, name)
        assert said in str(refused.value)
    with pytest.raises(ValueError, match="^traced codes of e5m2 must be uint8, not int32: whether they are codes"):
        jax.jit(partial(decode, fmt="e5m2"))(jnp.arange(3))
    traced = np.asarray(jax.jit(partial(decode, fmt="e2m1fn"))(jnp.uint8([7, 15, 16, 255])))
    np.testing.assert_array_equal(traced, [6, -6, np.nan, np.nan])
    # Codes of another width are codes, where they can be seen.
    np.testing.assert_array_equal(decode([0x3C, 0xBC], "e5m2"), [1, -1])
    np.testing.assert_array_equal(decode(jnp.array([2, 15], jnp.uint4), "e2m1fn"), [1, -6])
