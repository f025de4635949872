"""The optimizers' rules once more, in NumPy and float64, one array at a time, from formulas and value tables.

Each class is made with the initial weight and steps on gradients; `w` is the weight now.
"""

import numpy as np

from altgrad_jax.precision.formats import get_format


def fitted_scale(w, fmt) -> float:
    """The power of two that leaves between one and two binades above the largest weight."""
    top = min(get_format(fmt).max, 2.0**50)
    return 2.0 ** np.floor(np.log2(top / 2 / np.abs(w).max()))


def stiffness(w, fmt, scale=None):
    scale = fitted_scale(w, fmt) if scale is None else scale
    return get_format(fmt).ulp(w * scale) / scale


class Adam:
    """Moments, bias corrected; subclasses say what becomes of gradient and update."""

    def __init__(self, w, *, rate, fmt=None, b1=0.9, b2=0.95, eps=1e-8, decay=0.1):
        self.w, self.rate, self.fmt = np.asarray(w, np.float64), rate, fmt
        self.b1, self.b2, self.eps, self.decay = b1, b2, eps, decay
        self.m, self.v, self.t = np.zeros_like(self.w), np.zeros_like(self.w), 0

    def before(self, g):
        return g

    def after(self, u):
        return u + self.decay * self.w

    def step(self, g):
        self.t += 1
        g = self.before(np.asarray(g, np.float64))
        self.m = self.b1 * self.m + (1 - self.b1) * g
        self.v = self.b2 * self.v + (1 - self.b2) * g * g
        u = (self.m / (1 - self.b1**self.t)) / (np.sqrt(self.v / (1 - self.b2**self.t)) + self.eps)
        self.move(-self.rate * self.after(u))

    def move(self, update):
        self.w = self.w + update


class ManifoldBefore(Adam):
    largest = 1e6

    def before(self, g):
        return g * np.where(self.w == 0, 1.0, np.minimum(stiffness(self.w, self.fmt), self.largest))


class ManifoldRelative(Adam):
    def after(self, u):
        s = stiffness(self.w, self.fmt)
        return u * s / s.mean() + self.decay * self.w


class ManifoldUlps(Adam):
    def after(self, u):
        return (u + self.decay * np.sign(self.w)) * stiffness(self.w, self.fmt)


class AdamSR(Adam):
    """`bits(t)`: the 32 random bits of every element in step t, counted from 0."""

    def __init__(self, w, *, bits, **options):
        super().__init__(w, **options)
        self.bits = bits

    def move(self, update):
        scale = fitted_scale(self.w, self.fmt)
        x = ((self.w + update).astype(np.float32) * np.float32(scale)).astype(np.float32)
        self.w = stochastic(x, self.fmt, self.bits(self.t - 1)) / scale


def stochastic(x, name, bits):
    """Up with the chance of the distance from below, as told by the low bits that float32 has beyond the spacing."""
    fmt, size = get_format(name), np.abs(x.astype(np.float64))
    exponent = np.floor(np.log2(np.where(size > 0, size, 1.0)))
    spacing = fmt.ulp(size)
    below = np.floor(size / spacing) * spacing
    cut = np.clip(np.log2(spacing) - (exponent - 23), 0, 23).astype(np.int64)
    drawn = (bits.astype(np.int64) & ((1 << cut) - 1)) / (1 << cut)
    smallest = fmt.min_positive
    drawn = np.where(size < smallest, 1 - (bits + 1.0) / 2**32, drawn)  # there: up if bits / 2^32 < share
    up = (size - below) / spacing + drawn >= 1
    return np.sign(x) * np.minimum(below + up * spacing, fmt.max)


class Grid:
    """`draws(t)`: uniform numbers of step t, counted from 0."""

    def __init__(self, w, *, scale, fmt, draws, momentum=0.9, decay=1e-4, clip=10.0):
        self.w, self.v, self.t = np.asarray(w, np.float64), np.zeros(np.shape(w)), 0
        self.scale, self.fmt, self.draws = scale, fmt, draws
        self.momentum, self.decay, self.clip = momentum, decay, clip

    def step(self, g):
        self.v = self.momentum * self.v + g + self.decay * self.w
        rungs = np.floor(np.clip(self.scale * self.v, -self.clip, self.clip) + self.draws(self.t)).astype(int)
        values = get_format(self.fmt).finite_values() / fitted_scale(self.w, self.fmt)
        place = np.abs(self.w[..., None] - values).argmin(-1)
        self.w = values[np.clip(place - rungs, 0, values.size - 1)]
        self.t += 1


class Madam:
    def __init__(self, w, *, rate, b=0.999, clip=10.0, largest=3.0):
        self.w, self.v, self.t = np.asarray(w, np.float64), np.zeros(np.shape(w)), 0
        self.rate, self.b, self.clip = rate, b, clip
        self.largest = largest * np.sqrt(np.mean(self.w**2))

    def step(self, g):
        self.t += 1
        self.v = self.b * self.v + (1 - self.b) * g**2
        u = np.divide(g, np.sqrt(self.v / (1 - self.b**self.t)), out=np.zeros_like(g), where=self.v > 0)
        u = np.clip(u, -self.clip, self.clip)
        self.w = np.clip(self.w * np.exp(-self.rate * np.sign(self.w) * u), -self.largest, self.largest)
