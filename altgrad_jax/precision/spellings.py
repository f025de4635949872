"""How other libraries spell the formats: torch, JAX, ONNX, XLA, MLIR, Triton, CUDA. Text alone; knows no format."""

import re

ALIASES = {
    **{"bf16": "bfloat16", "fp16": "float16", "f16": "float16", "half": "float16", "fp32": "float32", "f32": "float32"},
    "single": "float32",
    **{"fp4": "e2m1fn", "float4": "e2m1fn", "f4": "e2m1fn", "ue8m0": "e8m0fnu"},
    # Triton's, behind fp8 or float8.
    **{"e4nv": "e4m3fn", "e5": "e5m2", "e4b8": "e4m3fnuz", "e5b16": "e5m2fnuz"},
}
# Names that libraries disagree on -> the formats that they mean. Written exactly as one of ours, such as e4m3 or
# float8_e4m3, a name means that one.
AMBIGUOUS = {
    **dict.fromkeys(("e4m3",), ("e4m3fn", "e4m3")),
    **dict.fromkeys(("e8m0",), ("e8m0fnu", "e8m0")),
    **dict.fromkeys(("fp8", "float8", "f8"), ("e4m3fn", "e5m2")),
    **dict.fromkeys(("fp6", "float6", "f6"), ("e3m2fn", "e2m3fn")),
    "bf8": ("e5m2", "e5m2fnuz"),
    "hf8": ("e4m3fn", "e4m3"),
}
# Names of what is no format here -> why.
ELSEWHERE = {
    **dict.fromkeys(("float64", "fp64", "f64", "double"), "no format here is wider than float32"),
    "float": "torch's is float32; Python's and NumPy's is float64, which is wider than the formats here",
    "e4b15": "Triton's format of this name is e4m3:bias=15 here",
    "tf32": "with 19 bits it is wider than the 16 of the formats here, and is not float32",
    **dict.fromkeys(("int8", "i8", "int4", "i4"), "integers are no formats here; e0m7 and its like are fixed point"),
}
_MODULES = re.compile(r"^(?:[a-z_]\w*\.)+")  # torch. jnp. ml_dtypes. tl.
_KINDS = re.compile(r"^(?:__nv_)?(?:(?:float|fp|f)[468]_?|cuda_r_[468]f_)(?=u?e\d)")
_P3109 = re.compile(r"(?:binary|p3109_k)(\d{1,2})p(\d{1,2})([su])([ef])")


def own_spelling(text: str) -> str:
    """A name as written, without the prefix of its dtype: float8_e5m2 is e5m2."""
    return ALIASES.get(text, re.sub(r"^float[468]_(?=e\d)", "", text))


def plain_spelling(text: str) -> str:
    """A name in lower case, without what libraries put around it: torch.float8_e5m2, F8E5M2, FLOAT8E5M2 are e5m2."""
    name, colon, options = text.strip().lower().partition(":")
    name = _KINDS.sub("", _MODULES.sub("", name))
    return ALIASES.get(name, name) + colon + options


def p3109(text: str) -> tuple[int, int, bool, bool] | None:
    """(bits, precision, signed, extended) of a name such as binary8p4se, IEEE P3109's; None if it is none."""
    match = _P3109.fullmatch(text)
    return match and (int(match[1]), int(match[2]), match[3] == "s", match[4] == "e")
