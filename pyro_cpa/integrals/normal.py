# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
r"""The standard normal on one interval, exact in every tail: mass, moments, inverse distribution function.

Notation: an interval starts at ``near`` (the end nearest the mean, so its middle is not negative) and
has a given ``width``; results refer to the interval's point nearest the mean, ``max(near, 0)``. Widths come
in as such because the difference of two rounded ends would lose the digits of a narrow interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
from numpy.polynomial import legendre
from torch import Tensor

__all__ = [
    "DEPTH",
    "HALF_LOG_2PI",
    "NODES",
    "SHORT",
    "at_a_time",
    "gauss_legendre",
    "mills_moments",
    "truncated_moments",
    "truncated_quantile",
]

HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)
_SQRT_HALF = math.sqrt(0.5)
_SQRT_HALF_PI = math.sqrt(0.5 * math.pi)
SHORT = 3.0  # an interval over which the log-density falls by less than this is integrated by quadrature
DEPTH = 24  # levels of the continued fraction of a tail beyond 4
NODES = 10  # Gauss-Legendre nodes that do so to full precision


def at_a_time(count: int, device: torch.device) -> int:
    """How many elements to work on at a time, given how many a processor's cache holds; a GPU wants more."""
    return count * (torch.get_num_threads() if device.type == "cpu" else 16)


@cache
def gauss_legendre(count: int) -> tuple[tuple[float, float], ...]:
    """Nodes in (-1, 1) and weights of the Gauss-Legendre rule, as pairs of Python floats."""
    nodes, weights = legendre.leggauss(count)
    return tuple(zip(nodes.tolist(), weights.tolist(), strict=True))


def mills_moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""Scaled tail moments of the standard normal, for ``x >= 0``:

    .. math:: m_k(x) = \int_0^\infty y^k \, e^{-x y - y^2 / 2} \, dy, \qquad k = 0, 1, 2.

    ``m_0`` is the Mills ratio; beyond x = 4 the continued fraction gives all three without cancellation.
    """
    near = x.clamp(max=4.0)
    scaled = near * _SQRT_HALF
    zeroth = torch.exp(scaled * scaled).mul_(torch.erfc(scaled)).mul_(_SQRT_HALF_PI)
    first = 1.0 - near * zeroth
    second = zeroth - near * first

    ratio = 2.0 * DEPTH / (x + torch.sqrt(x * x + 4.0 * DEPTH))
    for level in range(DEPTH - 1, 2, -1):
        ratio.add_(x).reciprocal_().mul_(level)
    ratio_2 = 2.0 / (x + ratio)
    ratio_1 = 1.0 / (x + ratio_2)
    tail = 1.0 / (x + ratio_1)
    tail_first = tail * ratio_1

    far = (x > 4.0).to(x.dtype)  # lerp with weights 0 and 1 is exact, and much faster than where
    return (
        torch.lerp(zeroth, tail, far),
        torch.lerp(first, tail_first, far),
        torch.lerp(second, tail_first * ratio_2, far),
    )


def _by_kind(
    near: Tensor, width: Tensor, *functions: Callable[..., Tensor], level: Tensor | None = None
) -> Tensor:
    """Applies to each interval the function for its kind (short, beyond the mean, around it): (K, ...)."""
    arguments = [argument.reshape(-1) for argument in (near, width, level) if argument is not None]
    start = near.reshape(-1).clamp(min=0.0)
    short = width.reshape(-1) * (start + 0.5 * width.reshape(-1)) <= SHORT
    beyond = near.reshape(-1) >= 0.0
    result = near.new_empty(3 if level is None else 1, start.shape[0])
    for chosen, function in zip((short, ~short & beyond, ~short & ~beyond), functions, strict=True):
        index = torch.nonzero(chosen).squeeze(-1)
        if index.shape[0] > 0:
            result[:, index] = function(*(argument.index_select(0, index) for argument in arguments))
    return result.reshape(result.shape[0], *near.shape)


def truncated_moments(near: Tensor, width: Tensor) -> Tensor:
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
    return _by_kind(near, width, _short_moments, _beyond_moments, _around_moments)


def _short_integrals(near: Tensor, width: Tensor) -> list[Tensor]:
    r"""``\int_0^1 x^k exp(-near w x - (w x)^2 / 2) dx`` for k = 0, 1, 2, for a short interval of width w."""
    slope, curvature = -near * width, -0.5 * width * width
    sums = [torch.zeros_like(slope) for _ in range(3)]
    for node, weight in gauss_legendre(NODES):
        x = 0.5 * (1.0 + node)
        term = torch.mul(slope, x).add_(curvature, alpha=x * x).exp_()
        for power, total in enumerate(sums):
            total.add_(term, alpha=0.5 * weight * x**power)
    return sums


def _short_moments(near: Tensor, width: Tensor) -> Tensor:
    # All terms are positive, and the width is factored out.
    zeroth, first, second = _short_integrals(near, width)
    log_mass = torch.log(width * zeroth) - (0.5 * near * near + HALF_LOG_2PI)
    first, second = first / zeroth, second / zeroth
    offset = width * first + near.clamp(max=0.0)
    return torch.stack([log_mass, offset, width * width * (second - first * first)])


def _beyond_moments(near: Tensor, width: Tensor) -> Tensor:
    drop = width * (near + 0.5 * width)
    reach = width * (drop < 750.0)  # a far end that no longer counts is replaced,
    reach.nan_to_num_(nan=0.0)  # for inf * 0 is not 0
    decay = torch.exp(-drop)
    m0, m1, m2 = mills_moments(near)
    f0, f1, f2 = mills_moments(near + reach)
    zeroth = m0 - decay * f0
    first = (m1 - decay * (f1 + reach * f0)) / zeroth
    second = (m2 - decay * (f2 + reach * (2.0 * f1 + reach * f0))) / zeroth
    log_mass = torch.log(zeroth) - (0.5 * near * near + HALF_LOG_2PI)
    return torch.stack([log_mass, first, second - first * first])


def _around_moments(near: Tensor, width: Tensor) -> Tensor:
    # The density underflows long before 50 standard deviations, and 50 * 0 is 0 where inf * 0 is not.
    left, right = near.clamp(min=-50.0), (near + width).clamp(max=50.0)
    outside = 0.5 * (torch.erfc(-left * _SQRT_HALF) + torch.erfc(right * _SQRT_HALF))
    scale = math.exp(-HALF_LOG_2PI) / (1.0 - outside)
    left_density = scale * torch.exp(-0.5 * left * left)
    right_density = scale * torch.exp(-0.5 * right * right)
    mean = left_density - right_density
    variance = 1.0 + left * left_density - right * right_density - mean * mean
    return torch.stack([torch.log1p(-outside), mean, variance])


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
    return _by_kind(near, width, _short_quantile, _beyond_quantile, _around_quantile, level=level)[0]


def _short_quantile(near: Tensor, width: Tensor, level: Tensor) -> Tensor:
    total = width * _short_integrals(near, width)[0]
    # Start from the exponential law with the same log-density at both ends.
    rate = (near + 0.5 * width).clamp(min=1e-9)  # flatter laws are uniform to rounding
    point = -torch.log1p(level * torch.expm1(-rate * width)) / rate
    for _ in range(4):
        excess = point * _short_integrals(near, point)[0] - level * total
        point = point - excess * torch.exp(point * (near + 0.5 * point))
    return torch.minimum(point, width) + near.clamp(max=0.0)


def _beyond_quantile(near: Tensor, width: Tensor, level: Tensor) -> Tensor:
    m0 = mills_moments(near)[0]
    drop = width * (near + 0.5 * width)
    reach = (width * (drop < 750.0)).nan_to_num_(nan=0.0)
    kept = -torch.expm1(torch.log(mills_moments(near + reach)[0] / m0) - drop)
    # -log survival is convex and above near y + y^2/2, so the first guess is on the right of the root.
    goal = -torch.log1p(-level * kept)
    point = 2.0 * goal / (near + torch.sqrt(near * near + 2.0 * goal)).clamp(min=torch.finfo(near.dtype).tiny)
    for _ in range(7):
        tail = mills_moments(near + point)[0]
        hazard = point * (near + 0.5 * point) - torch.log(tail / m0)
        point = (point - (hazard - goal) * tail).clamp(min=0.0)
    return torch.minimum(point, width)


def _around_quantile(near: Tensor, width: Tensor, level: Tensor) -> Tensor:
    below = 0.5 * torch.erfc(-near * _SQRT_HALF)
    above = 0.5 * torch.erfc((near + width) * _SQRT_HALF)
    mass = 1.0 - below - above
    lower_tail, upper_tail = below + level * mass, above + (1.0 - level) * mass
    magnitude = -torch.special.ndtri(torch.minimum(lower_tail, upper_tail))
    return torch.where(lower_tail < upper_tail, -magnitude, magnitude)
