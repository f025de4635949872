"""Formats against ml_dtypes, gfloat, and their definition written anew with fractions."""

import itertools
import math
from fractions import Fraction

import gfloat
import gfloat.formats
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from altgrad_jax.precision.formats import FloatFormat, family, get_format, registry
from altgrad_jax.precision.grid import stack_grids
from altgrad_jax.precision.rounding import round_to_format

INF, NAN = "inf", "NaN"
SMALL = [fmt for fmt in registry().values() if fmt.bits <= 8]
BY_NAME = {"ids": lambda fmt: fmt.name}

ML_DTYPES = [name for name in dir(ml_dtypes) if name.startswith(("float", "bfloat"))]
GFLOAT = {
    "e5m2": gfloat.formats.format_info_ocp_e5m2,
    "e4m3fn": gfloat.formats.format_info_ocp_e4m3,
    "e8m0fnu": gfloat.formats.format_info_ocp_e8m0,
    "e3m2fn": gfloat.formats.format_info_ocp_e3m2,
    "e2m3fn": gfloat.formats.format_info_ocp_e2m3,
    "e2m1fn": gfloat.formats.format_info_ocp_e2m1,
    "float16": gfloat.formats.format_info_binary16,
    "bfloat16": gfloat.formats.format_info_bfloat16,
    **{f"binary8p{p}": gfloat.formats.format_info_p3109(8, p) for p in range(1, 8)},
}


def assert_same(values, reference):
    """Equal, NaN for NaN and -0 for -0."""
    np.testing.assert_array_equal(values, reference)
    numbers = ~np.isnan(reference)
    np.testing.assert_array_equal(np.signbit(values)[numbers], np.signbit(reference)[numbers])


def to_float64(x) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # signalling NaNs
        return x.astype(np.float64)


def defined(code: int, e_bits: int, m_bits: int, bias: int, inf: bool = False, nan: str = "none") -> Fraction | str:
    """What a code of a signed format with zero means, written down from the definition in docs/formats.md."""
    sign, rest = divmod(code, 2 ** (e_bits + m_bits))
    exponent, mantissa = divmod(rest, 2**m_bits)
    ones = 2 ** (e_bits + m_bits) - 1
    if nan == "zero" and sign and not rest:
        return NAN
    if nan == "ieee" and exponent == 2**e_bits - 1:
        return NAN if mantissa else INF
    if nan == "top" and rest == ones:
        return NAN
    if inf and rest == ones - (nan == "top"):
        return INF
    hidden, power = (1, exponent) if exponent else (0, 1 if e_bits else 0)
    value = (hidden + Fraction(mantissa, 2**m_bits)) * Fraction(2) ** (power - bias)
    return -value if sign else value


def meaning(fmt: FloatFormat, code: int) -> Fraction | str:
    """What the code under test says of a code; exact, also beyond float64."""
    negative, magnitude = divmod(code, fmt.magnitudes)
    if magnitude <= fmt.max_magnitude and code != (fmt.nan_code if fmt.nan == "zero" else None):
        k, e = fmt.parts(magnitude)
        return (-k if negative else k) * Fraction(2) ** e
    return NAN if math.isnan(fmt.value(code)) else INF


# Values


@pytest.mark.parametrize("name", [*ML_DTYPES, "float16"])
def test_every_code_of_every_numpy_type(name):
    dtype = np.dtype(getattr(ml_dtypes, name, name))
    fmt = get_format(name)
    codes = np.arange(1 << fmt.bits).astype(fmt.code_dtype)
    assert fmt.code_dtype.itemsize == dtype.itemsize
    assert_same(fmt.values(), to_float64(codes.view(dtype)))
    info = ml_dtypes.finfo(dtype)
    assert (fmt.max, fmt.min_normal) == (float(info.max), float(info.smallest_normal))
    assert fmt.min_positive == float(info.smallest_subnormal)
    assert fmt.dtype in (None, dtype)


def test_types_that_xla_runs_are_stored_natively():
    native = {fmt.name for fmt in registry().values() if fmt.dtype is not None}
    assert native == {name.removeprefix("float8_") for name in ML_DTYPES if "8_" in name} | {
        "float16",
        "bfloat16",
        "float32",
    }
    for name in native:
        assert jnp.zeros(2, get_format(name).dtype).dtype == get_format(name).dtype


def test_float32_at_its_corners_and_at_random():
    fmt = get_format("float32")
    corners = [0, 1, 0x7F_FFFF, 0x80_0000, 0x3F80_0000, 0x7F7F_FFFF, 0x7F80_0000, 0x7F80_0001, 0x7FFF_FFFF]
    codes = np.array([*corners, *np.random.default_rng(0).integers(0, 2**31, 5000)], np.uint32)
    codes = np.concatenate([codes, codes | np.uint32(1 << 31)])
    assert_same(np.array([fmt.value(int(code)) for code in codes]), to_float64(codes.view(np.float32)))
    assert (fmt.max, fmt.min_positive) == (float(np.finfo(np.float32).max), 2.0**-149)
    with pytest.raises(ValueError, match=r"float32 has 2\^32 codes; tables go up to 2\^16"):
        fmt.values()


@pytest.mark.parametrize("name", GFLOAT)
def test_every_code_against_gfloat(name):
    fmt, info = get_format(name), GFLOAT[name]
    codes = np.arange(1 << fmt.bits)
    assert_same(fmt.values(), gfloat.decode_ndarray(info, codes))
    # gfloat writes the same numbers of a format; but for e8m0, it takes these for its own smallest subnormal.
    assert (fmt.bits, fmt.mantissa_bits, fmt.signed) == (info.k, info.precision - 1, info.is_signed)
    assert (fmt.exponent_bits, fmt.bias) == (info.expBits, info.bias)
    assert (fmt.max, fmt.negative_zero, fmt.inf) == (info.max, info.has_nz, info.num_infs > 0)
    assert (fmt.min_positive, fmt.min_normal) == (info.smallest, info.smallest_normal)
    assert np.isnan(fmt.values()).sum() == info.num_nans


def test_all_seven_p3109_formats_are_there():
    assert sum(name.startswith("binary8p") for name in registry()) == 7


@pytest.mark.parametrize("e_bits", range(8))
def test_eight_bit_family_by_definition(e_bits):
    fmt = family(7)[e_bits]
    assert (fmt.exponent_bits, fmt.mantissa_bits) == (e_bits, 7 - e_bits)
    bias = 2 ** (e_bits - 1) - 1 if e_bits > 1 else 0
    for code in range(256):
        assert meaning(fmt, code) == defined(code, e_bits, 7 - e_bits, bias)
        assert fmt.value(code) == defined(code, e_bits, 7 - e_bits, bias)
    assert math.copysign(1, fmt.value(0x80)) == -1
    assert len(fmt.finite_values()) == fmt.finite_count == 255


@pytest.mark.parametrize("e_bits", range(16))
def test_sixteen_bit_family_by_definition(e_bits):
    fmt, m_bits = family(15)[e_bits], 15 - e_bits
    bias = 2 ** (e_bits - 1) - 1 if e_bits > 1 else 0
    corners = [0, 1, 2**m_bits - 1, 2**m_bits, 2**m_bits + 1, 2**15 - 1, *(2**i for i in range(15))]
    sample = np.random.default_rng(e_bits).integers(0, 2**15, 200).tolist()
    for magnitude in (*corners, *sample):
        if magnitude < 2**15:
            for code in (magnitude, magnitude | 2**15):
                assert meaning(fmt, code) == defined(code, e_bits, m_bits, bias)
    if e_bits > 10:
        with pytest.raises(ValueError, match=rf"{fmt.name} reaches from 2\^-\d+ to 2\^\d+, beyond float64"):
            fmt.values()
        return
    codes = np.arange(2**16)
    exponent, mantissa = (codes >> m_bits) & (2**e_bits - 1), codes & (2**m_bits - 1)
    hidden = exponent > 0
    power = np.where(hidden, exponent, 1 if e_bits else 0) - bias
    value = np.ldexp(hidden + mantissa / 2**m_bits, power)
    assert_same(fmt.values(), np.where(codes >> 15, -value, value))


def test_values_beyond_float64_are_exact_in_parts():
    fmt = get_format("e15m0")
    assert fmt.parts(fmt.max_magnitude) == (1, 16384)
    assert fmt.parts(1) == (1, -16382)
    assert fmt.parts(0)[0] == 0
    assert (fmt.max, fmt.min_positive, fmt.max_exponent) == (math.inf, 0.0, 16384)


def test_tables_are_copies():
    fmt = get_format("e5m2")
    fmt.values()[:] = 0
    assert fmt.max == 57344 == np.nanmax(fmt.values()[:0x7C])


def test_codes_that_there_are_not():
    fmt = get_format("e5m2")
    with pytest.raises(ValueError, match="e5m2 has 256 codes; 256 is none of them"):
        fmt.value(256)
    with pytest.raises(ValueError, match="e5m2 has no finite magnitude code 124"):
        fmt.parts(0x7C)


@pytest.mark.parametrize("fmt", [fmt for fmt in registry().values() if fmt.bits <= 16], **BY_NAME)
def test_special_codes_mean_what_they_say(fmt):
    assert (fmt.inf_code is not None) == fmt.inf
    assert fmt.inf_code is None or fmt.value(fmt.inf_code) == math.inf
    assert (fmt.nan_code is not None) == (fmt.nan != "none")
    assert fmt.nan_code is None or math.isnan(fmt.value(fmt.nan_code))
    if fmt.negative_zero:
        assert fmt.value(fmt.magnitudes) == 0 and math.copysign(1, fmt.value(fmt.magnitudes)) == -1


def test_finite_count():
    for fmt in SMALL:
        assert fmt.finite_count == len(fmt.finite_values())
    assert get_format("float32").finite_count == 2 * int(np.float32(np.finfo(np.float32).max).view(np.uint32)) + 1


# Spacing


@pytest.mark.parametrize("fmt", SMALL, **BY_NAME)
def test_ulp_is_the_distance_to_the_next_value(fmt):
    values = fmt.finite_values()
    values = values[values >= 0]
    gaps = np.diff(values)
    np.testing.assert_array_equal(fmt.ulp(values[:-1]), gaps)
    np.testing.assert_array_equal(fmt.ulp(-values[:-1]), gaps)
    np.testing.assert_array_equal(fmt.ulp(values[:-1] + gaps / 2), gaps)
    # The largest has the spacing of its own binade, which it may begin.
    begins = math.frexp(values[-1])[0] == 0.5 and len(values) > 2
    assert fmt.ulp(values[-1]) in (gaps[-1], 2 * gaps[-1] if begins else gaps[-1])


def test_ulp_of_native_types_is_numpys():
    x = np.abs(np.random.default_rng(0).standard_normal(1000)).astype(np.float16)
    x = np.concatenate([x, np.array([0, 2.0**-24, 2.0**-14, 1, 60000], np.float16)])
    np.testing.assert_array_equal(get_format("float16").ulp(x), np.spacing(x).astype(np.float64))
    y = np.random.default_rng(0).integers(0, 0x7F80_0000, 1000).astype(np.uint32).view(np.float32)
    np.testing.assert_array_equal(get_format("float32").ulp(y), np.spacing(y).astype(np.float64))


def test_ulps_by_hand():
    e5m2 = get_format("e5m2")
    assert e5m2.ulp([0, 1, 1.9, 2, -3, 2.0**-14, 2.0**-15, 57344]).tolist() == [
        *(2.0**-16, 0.25, 0.25, 0.5, 0.5),
        *(2.0**-16, 2.0**-16, 2.0**13),
    ]
    assert get_format("e0m7").ulp([0, 0.9, 2.0**-7]).tolist() == [2.0**-7] * 3


def test_ulp_where_the_grid_has_none_is_nan():
    for fmt in (*SMALL, get_format("float16"), get_format("float32")):
        beyond = np.nextafter(fmt.max, np.inf)
        assert np.isnan(fmt.ulp([np.nan, np.inf, -np.inf, beyond, -2 * fmt.max])).all()
        assert fmt.ulp(fmt.max) > 0 and fmt.ulp(-fmt.max) > 0
    assert get_format("e11m4").ulp(1e300) == 2.0 ** (math.frexp(1e300)[1] - 5) and np.isnan(
        get_format("e11m4").ulp(np.inf)
    )


# Formats of one's own


@pytest.mark.parametrize(
    "fields, said",
    [
        (dict(nan="foo"), "format mine has nan='foo', which is not one of none, ieee, top, zero"),
        (dict(nan="ieee"), "nan=ieee needs inf=1, an exponent and a mantissa bit"),
        (dict(nan="ieee", inf=True, exponent_bits=0), "nan=ieee needs inf=1, an exponent and a mantissa bit"),
        (dict(mantissa_bits=-1), "format mine has exponent_bits=4 and mantissa_bits=-1; neither can be below 0"),
        (dict(exponent_bits=8, mantissa_bits=10), "format mine has 19 bits with its sign; 2 to 16 are possible"),
        (dict(exponent_bits=8, mantissa_bits=23, bias=126, inf=True, nan="ieee"), "has 32 bits"),
        (dict(nan="zero", signed=False), "nan=zero needs a sign and a zero"),
        (dict(has_zero=False), "only formats without a sign can be without zero"),
        (dict(exponent_bits=0, mantissa_bits=1, nan="top"), "has no finite value but 0"),
        (dict(bias=-10_000), "has no value within float32's range"),
        (dict(dtype_name="float8_e4m3fn"), "format mine is not that of its dtype_name='float8_e4m3fn'"),
        (dict(dtype_name="float8_e9"), "has dtype_name='float8_e9', which is no floating dtype"),
        (dict(dtype_name="uint8"), "has dtype_name='uint8', which is no floating dtype"),
        (dict(exponent_bits=4.0), "exponent_bits=4.0 is of the wrong type"),
        (dict(bias=np.int32(7)), "is of the wrong type"),
        (dict(inf=1), "inf=1 is of the wrong type; it must be of type bool"),
        (dict(name=None), "name=None is of the wrong type"),
    ],
)
def test_a_format_that_cannot_be_is_refused(fields, said):
    with pytest.raises((TypeError, ValueError)) as refused:
        FloatFormat(**(dict(name="mine", exponent_bits=4, mantissa_bits=3, bias=5) | fields))
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_a_name_is_of_one_format():
    with pytest.raises(ValueError, match="^'e5m2' is the name of another format"):
        round_to_format(np.float32(1), FloatFormat("e5m2", 4, 3, 7))


def test_families_and_stacks_that_there_are_not():
    for bits in (0, -1, 16, 40):
        with pytest.raises(ValueError, match=rf"^family\({bits}\): formats have 1 to 15 bits beside the sign$"):
            family(bits)
    for formats in ("e5m2", [], ()):
        with pytest.raises(ValueError, match="^stack_grids takes a list of one or more formats, not"):
            stack_grids(formats)


def test_a_format_may_be_an_argument_of_a_jitted_function():
    x = np.float32([1.3, 500.0])
    for fmt, expected in ((get_format("e4m3fn"), [1.25, 448]), (FloatFormat("mine", 4, 3, 5), [1.25, 512])):
        np.testing.assert_array_equal(jax.jit(round_to_format)(x, fmt), expected)


# Binades


def run(first: int, last: int, count: int) -> dict[int, int]:
    return dict.fromkeys(range(first, last + 1), count)


@pytest.mark.parametrize(
    "name, counts",
    [
        ("e5m2", {-16: 1, -15: 2, **run(-14, 15, 4)}),
        ("e4m3fn", {-9: 1, -8: 2, -7: 4, **run(-6, 7, 8), 8: 7}),
        ("e4m3b11fnuz", {-13: 1, -12: 2, -11: 4, **run(-10, 4, 8)}),
        ("e0m7", {-7: 1, -6: 2, -5: 4, -4: 8, -3: 16, -2: 32, -1: 64}),
        ("e1m6", {-5: 1, -4: 2, -3: 4, -2: 8, -1: 16, 0: 32, 1: 64}),
        ("e7m0", run(-62, 64, 1)),
        ("e8m0fnu", run(-127, 127, 1)),
        ("binary8p7", {-6: 1, -5: 2, -4: 4, -3: 8, -2: 16, -1: 32, 0: 63}),
        ("e2m1fn", {-1: 1, **run(0, 2, 2)}),
        ("bfloat16", {**{-133 + i: 2**i for i in range(7)}, **run(-126, 127, 128)}),
    ],
)
def test_values_per_binade_by_hand(name, counts):
    assert get_format(name).values_per_binade() == counts


@pytest.mark.parametrize("fmt", [*SMALL, get_format("float16"), get_format("e6m9")], **BY_NAME)
def test_values_per_binade_is_a_count(fmt):
    positive = fmt.finite_values()
    exponents, counts = np.unique(np.frexp(positive[positive > 0])[1] - 1, return_counts=True)
    assert fmt.values_per_binade() == dict(zip(exponents.tolist(), counts.tolist(), strict=True))


def test_binades_add_up():
    for fmt in registry().values():
        assert sum(fmt.values_per_binade().values()) == fmt.max_magnitude + (not fmt.has_zero)


# One grid up to a power of two


def test_e1m6_is_four_times_e0m7():
    e0m7, e1m6 = get_format("e0m7"), get_format("e1m6")
    assert_same(e1m6.values(), 4 * e0m7.values())
    assert e1m6.same_grid_factor(e0m7) == 2 and e0m7.same_grid_factor(e1m6) == -2
    x = np.random.default_rng(0).standard_normal(10_000).astype(np.float32) / 3
    np.testing.assert_array_equal(round_to_format(4 * x, e1m6), 4 * np.asarray(round_to_format(x, e0m7)))


def test_no_other_two_of_the_family_are_one_grid():
    found = {(a.name, b.name) for a, b in itertools.permutations(family(7), 2) if a.same_grid_factor(b) is not None}
    assert found == {("e0m7", "e1m6"), ("e1m6", "e0m7")}
    assert [f.same_grid_factor(f) for f in family(7)] == [0] * 8


def test_same_grid_factor_is_a_ratio_of_values():
    found = []
    for one, other in itertools.permutations(SMALL, 2):
        a, b = one.finite_values(), other.finite_values()
        factor = None
        if a.shape == b.shape:
            ratio = a[-1] / b[-1]
            factor = math.frexp(ratio)[1] - 1 if math.frexp(ratio)[0] == 0.5 and (a == ratio * b).all() else None
        assert one.same_grid_factor(other) == factor, (one.name, other.name)
        found += [(one.name, other.name)] if factor is not None else []
    # OCP's E4M3 has no infinity and two NaN codes, P3109's two infinities and one NaN: 126 positive values each.
    assert ("e4m3fn", "binary8p4") in found and ("e4m3fnuz", "e4m3b11fnuz") in found


def test_same_grid_beyond_float64():
    assert get_format("e1m14").same_grid_factor(get_format("e0m15")) == 2
    assert get_format("e15m0").same_grid_factor(get_format("e14m1")) is None
