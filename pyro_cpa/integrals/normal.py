# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
r"""The standard normal on one interval, exact in every tail: mass, moments, inverse distribution function.

Notation: an interval starts at ``near`` (the end nearest the mean, so its middle is not negative) and
has a given ``width``; results refer to the interval's point nearest the mean, ``max(near, 0)``. Widths come
in as such because the difference of two rounded ends would lose the digits of a narrow interval.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from numpy.polynomial import legendre
from torch import Tensor

__all__ = ["HALF_LOG_2PI", "gauss_legendre", "mills_moments", "truncated_moments", "truncated_quantile"]

HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)
_SQRT_HALF = math.sqrt(0.5)
_SQRT_HALF_PI = math.sqrt(0.5 * math.pi)
_SHORT = 3.0  # an interval over which the log-density falls by less than this is integrated by quadrature
_NODES = 10  # Gauss-Legendre nodes that do so to full precision


@cache
def gauss_legendre(count: int) -> tuple[tuple[float, float], ...]:
    """Nodes in (-1, 1) and weights of the Gauss-Legendre rule, as pairs of Python floats."""
    nodes, weights = legendre.leggauss(count)
    return tuple(zip(nodes.tolist(), weights.tolist(), strict=True))


def mills_moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""Scaled tail moments of the standard normal, for any ``x >= -10``:

    .. math:: m_k(x) = \int_0^\infty y^k \, e^{-x y - y^2 / 2} \, dy, \qquad k = 0, 1, 2.

    ``m_0`` is the Mills ratio; beyond x = 4 the continued fraction gives all three without cancellation.
    """
    scaled = x * _SQRT_HALF
    zeroth = _SQRT_HALF_PI * torch.exp(scaled * scaled) * torch.erfc(scaled)
    first = 1.0 - x * zeroth
    second = zeroth - x * first

    depth = 24
    ratio = 2.0 * depth / (x + torch.sqrt(x * x + 4.0 * depth))
    for level in range(depth - 1, 2, -1):
        ratio = level / (x + ratio)
    ratio_2 = 2.0 / (x + ratio)
    ratio_1 = 1.0 / (x + ratio_2)
    tail = 1.0 / (x + ratio_1)

    far = x > 4.0
    zeroth = torch.where(far, tail, zeroth)
    first = torch.where(far, tail * ratio_1, first)
    second = torch.where(far, tail * ratio_1 * ratio_2, second)
    return zeroth, first, second


def _short_integrals(near: Tensor, width: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""``\int_0^1 x^k exp(-near w x - (w x)^2 / 2) dx`` for k = 0, 1, 2, for a short interval of width w."""
    slope = near * width
    curvature = 0.5 * width * width
    sums = [torch.zeros_like(slope) for _ in range(3)]
    for node, weight in gauss_legendre(_NODES):
        x = 0.5 * (1.0 + node)
        term = torch.exp(-x * (slope + x * curvature))
        for power, total in enumerate(sums):
            total.add_(term, alpha=0.5 * weight * x**power)
    return sums[0], sums[1], sums[2]


def truncated_moments(near: Tensor, width: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""Log-mass, mean and variance of the standard normal on ``[near, near + width]``.

    Args:
        near: end of the interval nearest zero, ``-inf`` allowed; the middle is not negative.
        width: width, zero and ``+inf`` allowed.

    Returns:
        ``(log_mass, offset, variance)``, the mean being ``max(near, 0) + offset``.

    Note:
        Relative precision about 1e-13 for any interval: short ones by quadrature of positive terms, tails by
        scaled tail moments, the others by the error function. A point has log-mass ``-inf`` and variance 0.
    """
    start = near.clamp(min=0.0)
    drop = width * (start + 0.5 * width)
    short = drop <= _SHORT

    # Short: all terms are positive, the width is factored out.
    zeroth, first, second = _short_integrals(near, width)
    log_mass = -0.5 * near * near + torch.log(width * zeroth)
    share = first / zeroth
    offset = width * share + near.clamp(max=0.0)
    variance = width * width * (second / zeroth - share * share)

    # Long and beyond the mean. A far end that no longer counts is replaced, for inf * 0 is not 0.
    m0, m1, m2 = mills_moments(start)
    reach = torch.where(drop < 750.0, width, torch.zeros_like(width))
    decay = torch.exp(-drop)
    f0, f1, f2 = mills_moments(start + reach)
    d0 = m0 - decay * f0
    d1 = m1 - decay * (f1 + reach * f0)
    d2 = m2 - decay * (f2 + reach * (2.0 * f1 + reach * f0))
    share = d1 / d0
    beyond = ~short & (near >= 0.0)
    log_mass = torch.where(beyond, torch.log(d0) - 0.5 * start * start, log_mass)
    offset = torch.where(beyond, share, offset)
    variance = torch.where(beyond, d2 / d0 - share * share, variance)

    # Long and around the mean. The density underflows long before 50 standard deviations; inf * 0 would not.
    around = ~short & (near < 0.0)
    left, right = near.clamp(min=-50.0), (near + width).clamp(max=50.0)
    outside = 0.5 * (torch.erfc(-left * _SQRT_HALF) + torch.erfc(right * _SQRT_HALF))
    scale = math.exp(-HALF_LOG_2PI) / (1.0 - outside)
    left_density = scale * torch.exp(-0.5 * left * left)
    right_density = scale * torch.exp(-0.5 * right * right)
    mean = left_density - right_density
    log_mass = torch.where(around, torch.log1p(-outside), log_mass - HALF_LOG_2PI)
    offset = torch.where(around, mean, offset)
    spread = 1.0 + left * left_density - right * right_density - mean * mean
    return log_mass, offset, torch.where(around, spread, variance)


def truncated_quantile(near: Tensor, width: Tensor, level: Tensor) -> Tensor:
    r"""Point of ``[near, near + width]`` below which the share ``level`` of its standard normal mass lies.

    Args:
        near: end of the interval nearest zero, ``-inf`` allowed; the middle is not negative.
        width: width, zero and ``+inf`` allowed.
        level: share in [0, 1).

    Returns:
        The point's distance from ``max(near, 0)`` (negative below zero).

    Note:
        Newton's iteration on the log of the survival function (tails) or on the distribution function (short
        intervals), both started where it converges quadratically; closed form around the mean.
    """
    start = near.clamp(min=0.0)
    drop = width * (start + 0.5 * width)
    short = drop <= _SHORT

    # Short: start from the exponential law with the same log-density at both ends.
    total = width * _short_integrals(near, width)[0]
    rate = near + 0.5 * width
    flat = rate * width < 1e-8
    safe = torch.where(flat, torch.ones_like(rate), rate)
    point = torch.where(flat, level * width, -torch.log1p(level * torch.expm1(-safe * width)) / safe)
    for _ in range(4):
        excess = point * _short_integrals(near, point)[0] - level * total
        point = point - excess * torch.exp(point * (near + 0.5 * point))
    result = torch.minimum(point, width) + near.clamp(max=0.0)

    # Beyond the mean: -log survival is convex and above start y + y^2/2, so the first guess is on its right.
    m0 = mills_moments(start)[0]
    reach = torch.where(drop < 750.0, width, torch.zeros_like(width))
    kept = -torch.expm1(torch.log(mills_moments(start + reach)[0] / m0) - drop)
    goal = -torch.log1p(-level * kept)
    point = 2.0 * goal / (start + torch.sqrt(start * start + 2.0 * goal))
    for _ in range(7):
        tail = mills_moments(start + point)[0]
        hazard = point * (start + 0.5 * point) - torch.log(tail / m0)
        point = point - (hazard - goal) * tail
    point = torch.where(goal > 0.0, point, torch.zeros_like(point))
    result = torch.where(~short & (near >= 0.0), torch.minimum(point, width), result)

    # Around the mean: from the side of the smaller tail.
    below = 0.5 * torch.erfc(-near * _SQRT_HALF)
    above = 0.5 * torch.erfc((near + width) * _SQRT_HALF)
    mass = 1.0 - below - above
    lower_tail = below + level * mass
    upper_tail = above + (1.0 - level) * mass
    magnitude = -torch.special.ndtri(torch.minimum(lower_tail, upper_tail))
    point = torch.where(lower_tail < upper_tail, -magnitude, magnitude)
    return torch.where(~short & (near < 0.0), point, result)
