"""Names and descriptions of formats: what they mean, which are refused, and that a format has one name."""

from fractions import Fraction

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from altgrad_jax.precision.formats import FloatFormat, default_bias, family, get_format, registry
from tests.precision.test_formats import defined, meaning


@pytest.mark.parametrize(
    "spelling, name",
    [
        ("bf16", "bfloat16"),
        ("fp16", "float16"),
        ("f16", "float16"),
        ("fp32", "float32"),
        ("f32", "float32"),
        ("float8_e5m2", "e5m2"),
        ("float6_e2m3fn", "e2m3fn"),
        ("float4_e2m1fn", "e2m1fn"),
        # Widths and options that describe a format with a name of its own.
        ("e5m2:inf=1,nan=1", "e5m2"),
        ("e5m2:nan=ieee,inf=1,bias=15", "e5m2"),
        ("e4m3:nan=1", "e4m3fn"),
        ("e4m3:nan=zero,bias=8", "e4m3fnuz"),
        ("e5m10:inf=1,nan=1", "float16"),
        ("e8m7:inf=1,nan=1", "bfloat16"),
        ("e3m2", "e3m2fn"),
        ("e3m4:nan=0", "e3m4:inf=0,nan=0"),
        ("e2m5:bias=1,inf=0,nan=0", "e2m5"),
        ("e5m2:inf=1,nan=zero,bias=16", "binary8p3"),
    ],
)
def test_other_spellings(spelling, name):
    assert get_format(spelling) is registry()[name]
    assert get_format(spelling).name == name


def test_a_format_is_its_own_name():
    fmt = FloatFormat("mine", 4, 3, 5)
    assert get_format(fmt) is fmt
    for name, fmt in registry().items():
        assert fmt.name == name and get_format(name) is fmt


def test_plain_names_are_the_ieee_style_types():
    assert [get_format(name).max for name in ("e3m4", "e4m3", "e5m2")] == [15.5, 240, 57344]
    assert [fmt.max for fmt in family(7)[3:6]] == [31, 480, 114688]
    assert default_bias(0) == default_bias(1) == 0 and default_bias(5) == 15


@pytest.mark.parametrize(
    "name, said",
    [
        ("e5m2fnu", "unknown format 'e5m2fnu': did you mean 'e5m2fnuz'?"),
        ("bf61", "unknown format 'bf61': did you mean 'bf16'?"),
        ("E5M2", "unknown format 'E5M2': did you mean 'e5m2'?"),
        ("binary8p8", "unknown format 'binary8p8': did you mean 'binary8p"),
        ("e4m3fn:bias=3", "unknown format 'e4m3fn:bias=3': did you mean 'e4m3fn'?"),
        ("", "unknown format ''"),
        ("e9m9", "format e9m9 has 19 bits with its sign; 2 to 16 are possible"),
        ("e0m0", "format e0m0 has 1 bits with its sign; 2 to 16 are possible"),
        ("e0m7:nan=ieee,inf=1", "e0m7:nan=ieee,inf=1: nan=ieee needs inf=1, an exponent and a mantissa bit"),
        ("e7m0:nan=1,inf=1", "nan=ieee needs inf=1, an exponent and a mantissa bit"),
        ("e4m3:nan=ieee", "nan=ieee needs inf=1"),
        ("e3m4:bias=x", "format e3m4:bias=x: bias='x' is no integer"),
        ("e3m4:bias=1.5", "bias='1.5' is no integer"),
        ("e3m4:bias", "bias='' is no integer"),
        ("e3m4:base=1", "format e3m4:base=1: unknown option 'base'; there are bias, inf and nan"),
        ("e3m4:inf=2", "inf is 0 or 1, nan is 0, 1, ieee, top or zero"),
        ("e3m4:nan=quiet", "inf is 0 or 1, nan is 0, 1, ieee, top or zero"),
        ("e3m4:bias=1,bias=2", "format e3m4:bias=1,bias=2: an option is empty or given twice"),
        ("e3m4:bias=1,", "an option is empty or given twice"),
        ("e1m0:nan=1", "format e1m0:nan=1 has no finite value but 0"),
        ("e3m4:bias=900", "format e3m4:bias=900 has no value within float32's range"),
        ("e3m4:bias=-900", "format e3m4:bias=-900 has no value within float32's range"),
    ],
)
def test_impossible_names_are_refused(name, said):
    with pytest.raises(ValueError) as refused:
        get_format(name)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


KINDS = {"0": "none", "ieee": "ieee", "top": "top", "zero": "zero"}


@given(
    e_bits=st.integers(0, 8),
    m_bits=st.integers(0, 8),
    bias=st.none() | st.integers(-140, 140),
    inf=st.booleans(),
    nan=st.sampled_from(["0", "1", "ieee", "top", "zero"]),
    order=st.permutations(["bias", "inf", "nan"]),
)
@example(e_bits=4, m_bits=3, bias=7, inf=True, nan="0", order=["bias", "inf", "nan"])
@example(e_bits=1, m_bits=1, bias=0, inf=True, nan="ieee", order=["bias", "inf", "nan"])
@settings(max_examples=100, deadline=None)
def test_described_formats_mean_what_they_describe(e_bits, m_bits, bias, inf, nan, order):
    assume(1 <= e_bits + m_bits <= 8)
    kind = {**KINDS, "1": "ieee" if inf else "top"}[nan]
    options = {"bias": bias, "inf": int(inf), "nan": nan}
    text = ",".join(f"{option}={options[option]}" for option in order if options[option] is not None)
    bias = (2 ** (e_bits - 1) - 1 if e_bits > 1 else 0) if bias is None else bias
    codes = range(2 ** (1 + e_bits + m_bits))
    meanings = [defined(code, e_bits, m_bits, bias, inf, kind) for code in codes]
    positive = [value for value in meanings if isinstance(value, Fraction) and value > 0]
    possible = kind != "ieee" or (inf and e_bits and m_bits)
    if not (possible and positive and max(positive) >= 2**-126 and min(positive) <= 2**127):
        with pytest.raises(ValueError, match=f"format e{e_bits}m{m_bits}"):
            get_format(f"e{e_bits}m{m_bits}:{text}")
        return
    fmt = get_format(f"e{e_bits}m{m_bits}:{text}")
    assert [meaning(fmt, code) for code in codes] == meanings
    assert get_format(fmt.name) == fmt, "its name is a spelling of it"
    longest = f"e{e_bits}m{m_bits}:nan={kind.replace('none', '0')},bias={bias},inf={int(inf)}"
    assert get_format(longest) == fmt and get_format(longest).name == fmt.name
