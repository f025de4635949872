"""Arithmetic of a training step, and how much of the device's it uses.

Model FLOPs are those that the mathematics needs, not what the program does: recomputation does not count, and
attention counts as if no position were masked. PaLM (arXiv 2204.02311), appendix B, has this convention; a token costs
6 operations for every weight that multiplies it (two forward, four backward) and 12 layers x width x context for
attention. Utilisation (MFU) is measured against the device's 16-bit peak, also where products are in FP8, so that a
faster format shows as a higher figure; it may then exceed 1.
"""

import re

from altgrad_jax.model import GPTConfig

# Dense 16-bit tensor operations a second with float32 sums, from the makers' data sheets; the first match counts.
PEAK_FLOPS = (
    (r"B200", 2.25e15),
    (r"H200|GH200|H100.*(SXM|HBM3)", 989.4e12),
    (r"H100.*NVL", 835.5e12),
    (r"H100", 756e12),  # PCIe
    (r"A100", 312e12),
    (r"L40S", 362e12),
    (r"\bL4\b", 121e12),
    (r"RTX 4090", 165.2e12),
    (r"TPU v6", 918e12),
    (r"TPU v5p", 459e12),
    (r"TPU v5", 197e12),
    (r"TPU v4", 275e12),
)


def model_flops_per_token(model: GPTConfig) -> int:
    """Floating-point operations of training on one token, forward and backward."""
    width = model.n_embd
    # A classifier's output layer multiplies one position of a block.
    outputs = model.labels / model.block_size if model.labels else model.vocab_size
    weights = model.n_layer * 12 * width * width + round(width * outputs)
    return 6 * weights + 12 * model.n_layer * width * model.block_size


def peak_flops(device_kind: str) -> float | None:
    """16-bit operations a second of a device, by JAX's name of its kind; None if it is not known."""
    return next((peak for pattern, peak in PEAK_FLOPS if re.search(pattern, device_kind)), None)


def peak_of(device_kind: str, tflops: float) -> float | None:
    """The peak to assume: `tflops` (1e12 operations a second) if it is above 0, else the device's own."""
    return tflops * 1e12 if tflops > 0 else peak_flops(device_kind)
