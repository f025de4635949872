"""Names and descriptions of formats: what they mean, which are refused, and that a format has one name."""

from fractions import Fraction

import gfloat
import gfloat.formats
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from altgrad_jax.precision.formats import FloatFormat, default_bias, family, get_format, registry
from altgrad_jax.precision.grid import Grid
from altgrad_jax.precision.rounding import decode, encode
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
        # Upper case, and what torch, JAX, ONNX, XLA, Triton, CUDA and P3109 write.
        ("E5M2", "e5m2"),
        ("E4M3FN", "e4m3fn"),
        ("F8E4M3FN", "e4m3fn"),
        ("f8E4M3FNUZ", "e4m3fnuz"),
        ("FLOAT8E5M2FNUZ", "e5m2fnuz"),
        ("torch.float8_e8m0fnu", "e8m0fnu"),
        ("jnp.float8_e4m3b11fnuz", "e4m3b11fnuz"),
        ("fp8_e5m2", "e5m2"),
        ("fp8e4nv", "e4m3fn"),
        ("tl.float8e4b8", "e4m3fnuz"),
        ("fp8e5b16", "e5m2fnuz"),
        ("__nv_fp8_e5m2", "e5m2"),
        ("CUDA_R_8F_E5M2", "e5m2"),
        ("CUDA_R_8F_UE8M0", "e8m0fnu"),
        ("F6E2M3FN", "e2m3fn"),
        ("fp4", "e2m1fn"),
        ("BFLOAT16", "bfloat16"),
        ("Half", "float16"),
        ("binary8p4se", "binary8p4"),
        ("Binary8P1SE", "binary8p1"),
        ("binary8p4sf", "e4m3fnuz"),
        ("p3109_k8p3sf", "e5m2fnuz"),
        ("E4M3:INF=1,NAN=1", "e4m3"),
        (" e3m4 ", "e3m4"),
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
        ("e5m2fnu", "unknown format 'e5m2fnu': with these widths there are e5m2 (largest 57344), e5m2fnuz (largest"),
        ("e\uff14m\uff13", "unknown format 'e\uff14m\uff13'"),  # digits of another script
        ("torch.float", "unknown format 'torch.float': torch's is float32; Python's and NumPy's is float64"),
        ("tl.float8e4b15", "unknown format 'tl.float8e4b15': Triton's format of this name is e4m3:bias=15 here"),
        ("BF8", "format 'BF8' can mean e5m2 (largest 57344) or e5m2fnuz (largest 57344): name one"),
        ("hf8", "format 'hf8' can mean e4m3fn (largest 448) or e4m3 (largest 240): name one"),
        ("bf61", "unknown format 'bf61': did you mean 'bf16'?"),
        ("binary8p8", "unknown format 'binary8p8': did you mean 'binary8p"),
        ("e4m3fn:bias=3", "unknown format 'e4m3fn:bias=3': with these widths there are e4m3 (largest 240), e4m3fn (la"),
        ("", "unknown format ''"),
        ("e9m9", "format e9m9:bias=255,inf=0,nan=0 has 19 bits with its sign; 2 to 16 are possible, and float32"),
        ("e0m0", "format e0m0:bias=0,inf=0,nan=0 has 1 bits with its sign; 2 to 16 are possible"),
        ("e999m999", "has 1999 bits"),
        ("e0m7:nan=ieee,inf=1", "inf=1,nan=ieee cannot be: nan=ieee needs inf=1, an exponent and a mantissa bit"),
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
        ("e1m0:nan=1", "format e1m0:bias=0,inf=0,nan=top has no finite value but 0"),
        ("e3m4:bias=900", "format e3m4:bias=900,inf=0,nan=0 has no value within float32's range"),
        ("e3m4:bias=-900", "format e3m4:bias=-900,inf=0,nan=0 has no value within float32's range"),
    ],
)
def test_impossible_names_are_refused(name, said):
    with pytest.raises(ValueError) as refused:
        get_format(name)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "name, said",
    [
        ("E4M3", "format 'E4M3' can mean e4m3fn (largest 448) or e4m3 (largest 240): name one"),
        ("fp8_e4m3", "e4m3fn (largest 448) or e4m3 (largest 240)"),
        ("torch.float8_e4m3", "e4m3fn (largest 448) or e4m3 (largest 240)"),
        ("F8E4M3", "e4m3fn (largest 448) or e4m3 (largest 240)"),
        ("FP8", "e4m3fn (largest 448) or e5m2 (largest 57344)"),
        ("float6", "e3m2fn (largest 28) or e2m3fn (largest 7.5)"),
        ("E8M0", "e8m0fnu (largest 1.70141e+38) or e8m0:bias=127,inf=0,nan=0 (largest 3.40282e+38)"),
        ("fp8e4b15", "unknown format 'fp8e4b15'"),
        (
            "mxfp8",
            "'mxfp8' is a recipe, of e4m3fn, and no format: it says how layers are quantised, and goes into config",
        ),
        ("HYBRID", "'HYBRID' is a recipe, of e4m3fn and e5m2, and no format"),
        ("float64", "unknown format 'float64': no format here is wider than float32"),
        ("TF32", "unknown format 'TF32': with 19 bits it is wider"),
        ("zebra", "unknown format 'zebra': python -m altgrad_jax.formats lists them"),
        ("binary8p8se", "format binary8p8se: P3109 has precisions of 1 to 7 in 8 bits"),
        ("binary99p3se", "has 99 bits"),
    ],
)
def test_names_that_lead_astray_are_answered(name, said):
    with pytest.raises(ValueError) as refused:
        get_format(name)
    assert said in str(refused.value)


def test_names_that_were_ours_before_stay():
    assert [get_format(name).max for name in ("e4m3", "float8_e4m3", "e8m0")] == [240, 240, 2.0**128]


@pytest.mark.parametrize("bits, precision", [(8, 1), (8, 3), (8, 5), (6, 3), (4, 2), (12, 7), (5, 5)])
@pytest.mark.parametrize("kind", ["se", "sf", "ue", "uf"])
def test_p3109_by_gfloat(bits, precision, kind):
    if kind[0] == "s" and precision == bits:
        return
    signedness = gfloat.types.Signedness.Signed if kind[0] == "s" else gfloat.types.Signedness.Unsigned
    info = gfloat.formats.format_info_p3109(
        bits, precision, signedness, gfloat.Domain.Extended if kind[1] == "e" else gfloat.Domain.Finite
    )
    fmt = get_format(f"binary{bits}p{precision}{kind}")
    np.testing.assert_array_equal(fmt.values(), gfloat.decode_ndarray(info, np.arange(2**bits)))
    np.testing.assert_array_equal(decode(np.arange(2**bits), fmt), fmt.values().astype(np.float32))
    if kind[0] == "u":
        with pytest.raises(ValueError, match="has no sign: its values can be shown, and numbers are not rounded to it"):
            Grid.of(fmt)


def test_a_dtype_names_its_format():
    torch_like = type("dtype", (), {"__module__": "torch", "__str__": lambda self: "torch.float8_e4m3fnuz"})()
    for dtype, name in (
        (jnp.float8_e5m2, "e5m2"),
        (np.dtype(ml_dtypes.float8_e4m3), "e4m3"),
        (ml_dtypes.float6_e3m2fn, "e3m2fn"),
        (np.float16, "float16"),
        (jnp.zeros(1, jnp.bfloat16).dtype, "bfloat16"),
        (torch_like, "e4m3fnuz"),
    ):
        assert get_format(dtype).name == name
    for wrong in (None, 8, 1.5, Grid.of("e5m2"), object(), ("e5m2",), np.zeros(2), jnp.ones(2)):
        with pytest.raises(
            TypeError, match="^a format is a FloatFormat, a name such as 'e4m3fn', or a dtype; .* is none"
        ):
            get_format(wrong)
    for call in (encode, decode):
        with pytest.raises(TypeError, match="Grid is none of these"):
            call(np.uint8([1]) if call is decode else np.float32([1]), Grid.of("e5m2"))
    for wrong in (float, int, np.complex64):
        with pytest.raises(ValueError, match="^unknown format '"):
            get_format(wrong)


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
