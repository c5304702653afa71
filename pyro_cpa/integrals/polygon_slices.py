# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
r"""A polygon's mass and moments as an integral over its slices, a sum of positive terms.

.. math:: M = \int \phi(t)\, [\Phi(u(t)) - \Phi(l(t))]\, dt

The lower and upper boundary l, u are piecewise linear; between their breaks, on panels short against every
scale of the integrand, Gauss-Legendre quadrature is exact to rounding. Nothing cancels, and the tail is factored
out with the frame's reference point.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_cpa.integrals.normal import gauss_legendre
from pyro_cpa.integrals.polygon_frame import WINDOW, Frame

__all__ = ["Panels", "cut", "integrate"]

_NODES = 20
_REACH = 5.0  # largest width of a panel times the largest rate of change of the log-integrand
_STEEP = 1e-15  # an edge this close to the slicing direction only bounds the slices' range
_SQRT_HALF = math.sqrt(0.5)
_SQRT_HALF_PI = math.sqrt(0.5 * math.pi)


class Panels(NamedTuple):
    """Q panels: slices ``[bottom - bottom_rate tau, top - top_rate tau]`` for tau around ``middle``; (Q,) each."""

    pair: Tensor
    middle: Tensor
    half: Tensor
    bottom: Tensor
    bottom_rate: Tensor
    top: Tensor
    top_rate: Tensor


def cut(frame: Frame) -> Panels:
    """Panels of all cells, in the order of their pairs."""
    square = WINDOW * WINDOW + 4.0
    high = square / (frame.t0 + torch.sqrt(frame.t0 * frame.t0 + square))
    low = torch.full_like(high, -WINDOW)

    infinite = torch.full_like(frame.slack, torch.inf)
    steep = frame.across.abs() < _STEEP
    wall = frame.slack / frame.along
    low = torch.maximum(low, torch.where(steep & (frame.along < 0.0), wall, -infinite).amax(dim=0))
    high = torch.minimum(high, torch.where(steep & (frame.along > 0.0), wall, infinite).amin(dim=0))

    # Where an edge leaves the window |eta| <= WINDOW the window bounds the slice instead.
    left = (frame.slack - WINDOW * frame.across) / frame.along
    right = (frame.slack + WINDOW * frame.across) / frame.along
    left, right = torch.minimum(left, right), torch.maximum(left, right)
    left, right = torch.nan_to_num(left, nan=-torch.inf), torch.nan_to_num(right, nan=torch.inf)
    ends = [torch.minimum(torch.maximum(torch.nan_to_num(t), left), right) for t in (frame.tau_first, frame.tau_last)]
    breaks = torch.cat([*ends, low.unsqueeze(0), high.unsqueeze(0)])
    breaks = torch.minimum(torch.maximum(breaks, low), high).sort(dim=0).values
    lengths = breaks.diff(dim=0)
    which, pair = torch.nonzero(lengths > 0.0, as_tuple=True)

    height, rate = frame.slack / frame.across, frame.along / frame.across
    above, below = frame.across >= _STEEP, frame.across <= -_STEEP
    middle = (breaks[:-1] + 0.5 * lengths)[which, pair]
    top, top_rate = _active(height, rate, above, pair, middle, 1.0)
    bottom, bottom_rate = _active(height, rate, below, pair, middle, -1.0)
    keep = (top - top_rate * middle) > (bottom - bottom_rate * middle)
    length = lengths[which, pair]
    panels = (pair, middle, 0.5 * length, bottom, bottom_rate, top, top_rate)
    pair, middle, half, bottom, bottom_rate, top, top_rate = (field[keep] for field in panels)

    slope = torch.maximum(bottom_rate.abs(), top_rate.abs()) * (1.0 + frame.s0[pair].abs())
    fastest = torch.maximum((frame.t0[pair] + middle).abs().clamp(min=1.0), slope)
    pieces = torch.ceil(2.0 * half * fastest / _REACH).clamp(min=1.0)
    count = pieces.long()
    index = torch.repeat_interleave(count)
    order = torch.arange(index.shape[0], device=index.device) - (count.cumsum(0) - count)[index]
    half, pieces = half[index], pieces[index]
    middle = middle[index] + half * ((2.0 * order + 1.0) / pieces - 1.0)
    order_of_pairs = torch.argsort(pair[index], stable=True)
    fields = (pair[index], middle, half / pieces, bottom[index], bottom_rate[index], top[index], top_rate[index])
    return Panels(*(field[order_of_pairs] for field in fields))


def _active(
    height: Tensor, rate: Tensor, bounding: Tensor, pair: Tensor, middle: Tensor, side: float
) -> tuple[Tensor, Tensor]:
    """The line that bounds each panel from one side (side = 1: above, -1: below), the window included."""
    height = torch.where(bounding, height * side, torch.full_like(height, torch.inf))
    rate = torch.where(bounding, rate * side, torch.zeros_like(rate))
    window = height.new_full((1, pair.shape[0]), WINDOW)
    heights = torch.cat([height.index_select(1, pair), window])
    rates = torch.cat([rate.index_select(1, pair), torch.zeros_like(window)])
    active = (heights - rates * middle).argmin(dim=0, keepdim=True)
    return side * heights.gather(0, active)[0], side * rates.gather(0, active)[0]


def integrate(frame: Frame, panels: Panels) -> list[Tensor]:
    r"""Integrals of 1, tau, eta, tau^2, tau eta, eta^2 under ``exp(-t0 tau - tau^2/2 - s0 eta - eta^2/2)``, (P,) each."""
    center = 0.5 * (panels.top + panels.bottom)
    center_rate = 0.5 * (panels.top_rate + panels.bottom_rate)
    radius = 0.5 * (panels.top - panels.bottom)
    radius_rate = 0.5 * (panels.top_rate - panels.bottom_rate)
    t0, s0 = frame.t0[panels.pair], frame.s0[panels.pair]

    widest = radius - radius_rate * panels.middle + radius_rate.abs() * panels.half
    farthest = (s0 + center - center_rate * panels.middle).abs() + (center_rate * panels.half).abs()
    short = (widest <= 0.8) & (widest * farthest <= 4.0)
    result = [torch.zeros_like(frame.t0) for _ in range(6)]
    for chosen, slice_integrals in ((short, _short_slices), (~short, _long_slices)):
        index = torch.nonzero(chosen).squeeze(-1)
        if index.shape[0] == 0:
            continue
        c, cr, d, dr, t, s, middle, half = (
            field[index] for field in (center, center_rate, radius, radius_rate, t0, s0, panels.middle, panels.half)
        )
        sums = [torch.zeros_like(c) for _ in range(6)]
        for node, weight in gauss_legendre(_NODES):
            tau = middle + half * node
            eta, reach = c - cr * tau, d - dr * tau
            zeroth, first, second = slice_integrals(s, eta, reach)
            factor = half * torch.exp(-tau * (t + 0.5 * tau)) * weight
            zeroth, first, second = zeroth * factor, first * factor, second * factor
            for total, term in zip(
                sums, (zeroth, zeroth * tau, first, zeroth * tau * tau, first * tau, second), strict=True
            ):
                total += term
        for total, term in zip(result, sums, strict=True):
            total.index_add_(0, panels.pair[index], term)
    return result


def _short_slices(s0: Tensor, center: Tensor, radius: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Integrals of 1, eta, eta^2 over slices across which the density changes by a modest factor."""
    slope = (s0 + center) * radius
    curvature = 0.5 * radius * radius
    zeroth, first, second = torch.zeros_like(center), torch.zeros_like(center), torch.zeros_like(center)
    for node, weight in gauss_legendre(10):
        term = weight * torch.exp(-node * (slope + node * curvature))
        zeroth += term
        first += term * node
        second += term * (node * node)
    scale = radius * torch.exp(-center * (s0 + 0.5 * center))
    zeroth, first, second = zeroth * scale, first * scale * radius, second * scale * radius * radius
    return zeroth, first + center * zeroth, second + center * (2.0 * first + center * zeroth)


def _long_slices(s0: Tensor, center: Tensor, radius: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same over any slices, in closed form, mirrored to the side of the smaller tail."""
    sign = torch.sign(s0 + center)
    middle = (s0 + center).abs()
    near, far = middle - radius, middle + radius
    scale = torch.exp(0.5 * s0 * s0)
    near_density, far_density = scale * torch.exp(-0.5 * near * near), scale * torch.exp(-0.5 * far * far)
    zeroth = scale * _SQRT_HALF_PI * (torch.erfc(near * _SQRT_HALF) - torch.erfc(far * _SQRT_HALF))
    first = sign * (near_density - far_density)
    second = zeroth + near * near_density - far * far_density
    return zeroth, first - s0 * zeroth, second - s0 * (2.0 * first - s0 * zeroth)
