# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
r"""Integrals over polytopes of more than three dimensions, estimated by separation of variables.

Coordinate after coordinate is drawn from a normal law on an interval that holds all of the cell, given those before
it; the last one is integrated. With :math:`Z_k` the mass of the k-th interval under N(c_k, 1),

.. math:: M = (2\pi)^{-L/2} e^{-t_0^2/2} \; E \prod_k \sqrt{2\pi}\, Z_k(v_{<k})\, e^{-(g_k + c_k) v_k + c_k^2/2}

is an unbiased estimate whatever the intervals and centres c. Points come from a scrambled Sobol sequence, several times
with independent scrambles: how these differ gives the standard error.

References:
    A. Genz (1992), "Numerical computation of multivariate normal probabilities", Journal of Computational and Graphical
    Statistics 1. Z. I. Botev (2017), "The normal law under linear restrictions: simulation and estimation via minimax
    tilting", Journal of the Royal Statistical Society B 79. A. B. Owen (1997), "Scrambled net variance for integrals
    of smooth functions", Annals of Statistics 25.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

from pyro_cpa.integrals.normal import HALF_LOG_2PI, truncated_moments
from pyro_cpa.integrals.separation_frame import SeparationFrame

__all__ = ["SCRAMBLES", "Weighted", "draw", "log_interval_mass", "sobol", "truncated_draw"]

SCRAMBLES = 16
_NARROW = 1e-3  # an interval over which the log-density changes by less is exponential to 1e-7
_NEWTON = 3


@cache
def sobol(dim: int, num_points: int, seed: int = 0) -> Tensor:
    """(SCRAMBLES * n, dim) points of the open unit cube, at least ``num_points``, that depend on nothing global."""
    n = 2 ** math.ceil(math.log2(max(1, num_points / SCRAMBLES)))
    parts = [
        SobolEngine(dim, scramble=True, seed=SCRAMBLES * seed + k).draw(n, dtype=torch.float64)
        for k in range(SCRAMBLES)
    ]
    # The sequence has 30 binary digits: half of the last one away from 0 and 1.
    return torch.cat(parts).clamp(max=1 - 2.0**-30) + 2.0**-31


def _log_survival(x: Tensor) -> Tensor:
    return torch.special.log_ndtr(-x)


def log_interval_mass(low: Tensor, high: Tensor) -> Tensor:
    """Log of the standard normal's mass on [low, high]; ``-inf`` where the interval is empty."""
    flip = low + high < 0
    near, far = torch.where(flip, -high, low), torch.where(flip, -low, high)
    width = far - near
    top = _log_survival(near)
    found = top + torch.log(-torch.expm1(_log_survival(far) - top))
    middle = torch.where(torch.isfinite(far), near + 0.5 * width, 0.0)
    narrow = width * middle.abs().clamp(min=1.0) < _NARROW
    found = torch.where(narrow, width.log() - 0.5 * middle * middle - HALF_LOG_2PI, found)
    return torch.where(width > 0, found, -torch.inf)


def truncated_draw(low: Tensor, high: Tensor, level: Tensor) -> Tensor:
    """The point of [low, high] below which the share ``level`` (or 1 - level) of the standard normal's mass lies."""
    flip = low + high < 0
    near, far = torch.where(flip, -high, low), torch.where(flip, -low, high)
    width = (far - near).clamp(min=0.0)
    top = _log_survival(near)
    goal = torch.log1p(level * torch.expm1(_log_survival(far) - top))
    target = top + goal
    point = -torch.special.ndtri(target.clamp(min=-600.0).exp())
    # Far out: from the exponential law's quantile, by Newton's iteration on the log of the survival function.
    deep = near > 5.0
    if bool(deep.any()):
        start, depth, wanted = near[deep], -goal[deep], target[deep]
        x = start + 2 * depth / (start + torch.sqrt(start * start + 2 * depth))
        for _ in range(_NEWTON):
            survival = _log_survival(x)
            hazard = torch.exp(-0.5 * x * x - HALF_LOG_2PI - survival)
            x = x + (survival - wanted) / hazard
        point[deep] = x
    middle = torch.where(torch.isfinite(far), near + 0.5 * width, 0.0)
    fall = width * middle
    narrow = width * middle.abs().clamp(min=1.0) < _NARROW
    step = torch.where(fall.abs() > 1e-9, -torch.log1p(level * torch.expm1(-fall)) / fall, level)
    point = torch.where(narrow, near + width * step, point)
    point = torch.minimum(torch.maximum(point, near), torch.maximum(near, far))
    return torch.where(flip, -point, point)


class Weighted(NamedTuple):
    """S weighted points of each of P cells."""

    points: Tensor  # (P, L, S); of the last coordinate the mean given the others
    last_variance: Tensor  # (P, S) variance of the last coordinate given the others
    log_weight: Tensor  # (P, S), whose mean of exponentials is the mass


def draw(frame: SeparationFrame, uniform: Tensor) -> Weighted:
    """Weighted points of P cells from points (S, L - 1) of the unit cube."""
    P, L = frame.slope.shape
    room = frame.slack[..., None].expand(-1, -1, len(uniform))
    log_weight = -0.5 * frame.t0.square()[:, None]
    points = []
    for k in range(L):
        normal, rest = frame.normals[:, :, k, None], frame.rest[:, :, k, None]
        ends = (room - rest) / torch.where(normal == 0, 1.0, normal)
        high = torch.where(normal > 0, ends, torch.inf).amin(1)
        low = torch.where(normal < 0, ends, -torch.inf).amax(1)
        high = torch.minimum(high, frame.high[:, k, None])
        low = torch.maximum(low, frame.low[:, k, None])
        slope = frame.slope[:, k, None]
        # The last coordinate is integrated, not drawn.
        centre = frame.tilt[:, k, None] if k < L - 1 else -slope
        low, high = low - centre, high - centre
        mass = log_interval_mass(low, high)
        log_weight = log_weight + mass + 0.5 * centre * centre
        if k == L - 1:
            mean, variance = _interval_moments(low, high, mass)
            points.append(mean + centre)
            return Weighted(torch.stack(points, dim=1), variance, log_weight)
        value = truncated_draw(low, torch.maximum(high, low), uniform[:, k].expand(P, -1)) + centre
        value = torch.where(mass > -torch.inf, value, 0.0)
        log_weight = log_weight - (slope + centre) * value
        room = room - normal * value[:, None]
        points.append(value)
    raise AssertionError("a cell has at least one dimension")


def _interval_moments(low: Tensor, high: Tensor, log_mass: Tensor) -> tuple[Tensor, Tensor]:
    high = torch.maximum(low, high)
    flip = low + high < 0
    near, far = torch.where(flip, -high, low), torch.where(flip, -low, high)
    # The end beyond the mean is no nearer to it: nothing is left at 50 deviations, and inf - inf is NaN.
    near = near.clamp(min=-50.0)
    _, offset, variance = truncated_moments(near, far - near)
    mean = near.clamp(min=0.0) + offset
    mean = torch.where(flip, -mean, mean)
    inside = log_mass > -torch.inf
    return torch.where(inside, mean, 0.0), torch.where(inside, variance, 0.0)
