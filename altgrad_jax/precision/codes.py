"""What `decode` takes for codes: integers that the format has, or arrays of its own dtype, by their bits."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from altgrad_jax.precision.formats import FloatFormat, get_format

Array = jax.Array


def as_codes(codes: Any, fmt: FloatFormat) -> Array:
    """Codes of the format, of its `code_dtype`.

    Raises:
      ValueError: they are of a dtype that is none of codes, or the format has no such code.
    """
    if isinstance(codes, jax.core.Tracer):
        return _traced(codes, fmt)
    codes = np.asarray(codes)
    if codes.dtype.kind not in "iu" and jnp.issubdtype(codes.dtype, jnp.integer):
        codes = codes.astype(np.int64)  # int4 and its like
    if codes.dtype.kind not in "iu":
        return jnp.asarray(_own_bits(codes, fmt).view(fmt.code_dtype))
    last = (1 << fmt.bits) - 1
    wrong = codes[(codes < 0) | (codes > last)]
    if wrong.size:
        raise ValueError(f"{fmt.name} has the codes 0 to {last}; {wrong[0]} is none of them")
    return jnp.asarray(codes.astype(fmt.code_dtype))


def _traced(codes: Array, fmt: FloatFormat) -> Array:
    if codes.dtype == fmt.code_dtype:
        return codes
    if jnp.issubdtype(codes.dtype, jnp.integer):
        raise ValueError(
            f"traced codes of {fmt.name} must be {fmt.code_dtype}, not {codes.dtype}: whether they are codes cannot be"
            " seen here"
        )
    bits = jnp.dtype(f"uint{jnp.finfo(_own_bits(codes, fmt).dtype).bits}")
    return lax.bitcast_convert_type(codes, bits).astype(fmt.code_dtype)


def _own_bits(codes, fmt: FloatFormat):
    """The array itself, if it is of the format's own dtype. Raises ValueError."""
    try:
        own = get_format(codes.dtype) == fmt
    except (TypeError, ValueError):
        own = False
    if not own:
        raise ValueError(
            f"codes of {fmt.name} are integers or arrays of its own dtype, not {codes.dtype}; encode makes codes of"
            " numbers"
        )
    return codes
