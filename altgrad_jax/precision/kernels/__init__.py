"""Kernels for operands that XLA's own engines do not multiply as they are, each with its plain reference."""
