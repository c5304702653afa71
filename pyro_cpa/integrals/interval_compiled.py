# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Moments of the standard normal on intervals compiled by numba: the same steps as ``normal``, a pair at a time.

Why each step is as it is stands there. Imported only if numba is installed.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from pyro_cpa.integrals.normal import DEPTH, HALF_LOG_2PI, NODES, SHORT, gauss_legendre

__all__ = ["moments"]

_SQRT_HALF = math.sqrt(0.5)
_SQRT_HALF_PI = math.sqrt(0.5 * math.pi)
# The Gauss-Legendre rule on (0, 1).
_NODES, _WEIGHTS = (0.5 * np.array(gauss_legendre(NODES)) + [0.5, 0.0]).T.copy()

_compile = njit(nogil=True, cache=True, error_model="numpy")


# All terms are positive: contracting products and sums only rounds less.
@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def _mills(x):
    if x <= 4.0:
        zeroth = math.exp(0.5 * x * x) * math.erfc(x * _SQRT_HALF) * _SQRT_HALF_PI
        first = 1.0 - x * zeroth
        return zeroth, first, zeroth - x * first
    if math.isinf(x):
        return 0.0, 0.0, 0.0
    # The farther out, the sooner the continued fraction is right.
    depth = DEPTH if x < 6.0 else 16 if x < 16.0 else 10 if x < 1e6 else 4
    # From its third level on as one quotient, by the recurrence of its convergents: divisions are slow.
    top, bottom, top_before, bottom_before = x, 1.0, 1.0, 0.0
    for level in range(3, depth):
        top, top_before = x * top + level * top_before, top
        bottom, bottom_before = x * bottom + level * bottom_before, bottom
    rest = 2.0 * depth / (x + math.sqrt(x * x + 4.0 * depth))
    ratio_2 = 2.0 * (bottom + rest * bottom_before) / (top + rest * top_before)
    ratio_1 = 1.0 / (x + ratio_2)
    zeroth = 1.0 / (x + ratio_1)
    first = zeroth * ratio_1
    return zeroth, first, first * ratio_2


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract", "reassoc"})
def _short(slope, curvature):
    """Integrals of 1, x, x^2 times exp(slope x + curvature x^2) over (0, 1), which changes by exp(3) at most."""
    zeroth, first, second = 0.0, 0.0, 0.0
    for k in range(NODES):
        x = _NODES[k]
        # The eighth root by its series, right to rounding up to 0.4: this takes several nodes at a time.
        y = 0.125 * x * (slope + curvature * x)
        high = 1 / 40320 + y * (
            1 / 362880 + y * (1 / 3628800 + y * (1 / 39916800 + y * (1 / 479001600 + y * (1 / 6227020800))))
        )
        low = 1 / 24 + y * (1 / 120 + y * (1 / 720 + y * (1 / 5040 + y * high)))
        root = 1.0 + y * (1.0 + y * (1 / 2 + y * (1 / 6 + y * low)))
        square = root * root
        term = _WEIGHTS[k] * (square * square) * (square * square)
        zeroth += term
        first += term * x
        second += term * x * x
    return zeroth, first, second


@_compile
def _truncated(near, width):
    """Log-mass, offset of the mean from max(near, 0), and variance on [near, near + width]."""
    start = max(near, 0.0)
    drop = width * (near + 0.5 * width)
    if width * (start + 0.5 * width) <= SHORT:
        zeroth, first, second = _short(-near * width, -0.5 * width * width)
        first, second = first / zeroth, second / zeroth
        log_mass = math.log(width * zeroth) - (0.5 * near * near + HALF_LOG_2PI)
        return log_mass, width * first + min(near, 0.0), width * width * (second - first * first)
    if near >= 0.0:
        zeroth, first, second = _mills(near)
        if drop < 60.0:  # what lies beyond is less than 1e-20 of the rest
            decay = math.exp(-drop)
            f0, f1, f2 = _mills(near + width)
            zeroth -= decay * f0
            first -= decay * (f1 + width * f0)
            second -= decay * (f2 + width * (2.0 * f1 + width * f0))
        first, second = first / zeroth, second / zeroth
        return math.log(zeroth) - (0.5 * near * near + HALF_LOG_2PI), first, second - first * first
    left, right = max(near, -50.0), min(near + width, 50.0)
    outside = 0.5 * (math.erfc(-left * _SQRT_HALF) + math.erfc(right * _SQRT_HALF))
    scale = math.exp(-HALF_LOG_2PI) / (1.0 - outside)
    left_density, right_density = scale * math.exp(-0.5 * left * left), scale * math.exp(-0.5 * right * right)
    mean = left_density - right_density
    return math.log1p(-outside), mean, 1.0 + left * left_density - right * right_density - mean * mean


@_compile
def moments(lower, upper, deviation, loc, result):
    """Log-mass, mean and variance of pairs (n, r) into ``result`` (N, R, 3); ``deviation`` is (N or 1, R)."""
    shared = deviation.shape[0] == 1
    for n in range(loc.shape[0]):
        for r in range(loc.shape[1]):
            mean, unit = loc[n, r], deviation[0 if shared else n, r]
            left, right = (lower[r] - mean) / unit, (upper[r] - mean) / unit
            mirrored = left + right < 0.0
            near = -right if mirrored else left
            log_mass, offset, variance = _truncated(near, (upper[r] - lower[r]) / unit)
            anchor = mean
            if near > 0.0:
                anchor = upper[r] if mirrored else lower[r]
            result[n, r, 0] = log_mass
            result[n, r, 1] = anchor + (-unit if mirrored else unit) * offset
            result[n, r, 2] = unit * unit * variance
