# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
r"""A polygon's mass and moments as an integral over its slices, a sum of positive terms.

.. math:: M = \int \phi(t)\, [\Phi(u(t)) - \Phi(l(t))]\, dt

The lower and upper boundary l, u are piecewise linear; between their breaks, on panels short against every
scale of the integrand, Gauss-Legendre quadrature is exact to rounding. Nothing cancels, and the tail is
factored out with the frame's reference point.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_cpa.integrals.normal import at_a_time, gauss_legendre
from pyro_cpa.integrals.polygon_frame import WINDOW, Frame

__all__ = ["DECAY", "SHORT", "SMOOTH", "SPREAD", "Panels", "by_width", "cut", "integrate"]

DECAY, SPREAD = 26.0, 6.0  # 16 nodes integrate exp(-x) over so many units, or exp(-x^2/2), to 1e-12
SHORT = 0.17  # share of those units that 8 nodes do as well
SMOOTH = 0.7  # 6 nodes integrate exp(-b x - x^2/2) to rounding over |x| < w if max(b, 2 w) w is no larger
_BLOCK = 32768  # nodes per thread worked on at a time: what a processor's cache holds
_SQRT_HALF = math.sqrt(0.5)
_SQRT_HALF_PI = math.sqrt(0.5 * math.pi)


class Panels(NamedTuple):
    """Q panels, (Q,) each.

    At ``tau = middle + half x``, |x| < 1, the slice is ``center + center_rate x`` plus or minus
    ``radius + radius_rate x``.
    """

    pair: Tensor
    middle: Tensor
    half: Tensor
    center: Tensor
    center_rate: Tensor
    radius: Tensor
    radius_rate: Tensor
    size: Tensor  # in units of what the quadrature takes in one go, at most 1


def _sort_rows(rows: Tensor) -> Tensor:
    """Sorts each column of a few rows in place, by odd-even transposition: much faster than ``sort``."""
    count = rows.shape[0]
    for turn in range(count):
        stop = count - (count - turn) % 2
        upper, lower = rows[turn % 2 : stop : 2], rows[turn % 2 + 1 : stop : 2]
        smaller = torch.minimum(upper, lower)
        torch.maximum(upper, lower, out=lower)
        upper.copy_(smaller)
    return rows


def _breaks(frame: Frame) -> Tensor:
    """Where the slices' boundary may bend, between the window's ends: (2 E + 2, P), ascending."""
    # The nearest point is the reference point, or close to it in a thin cell: the density gains little.
    square = WINDOW * WINDOW + 4.0
    high = square / (frame.t0 + torch.sqrt(frame.t0 * frame.t0 + square))
    low = -(4.0 / frame.t0).clamp(max=WINDOW)
    # Where an edge leaves the window |eta| <= WINDOW the window bounds the slice instead.
    left = torch.add(frame.slack, frame.across, alpha=-WINDOW).div_(frame.along)
    right = torch.add(frame.slack, frame.across, alpha=WINDOW).div_(frame.along)
    left, right = torch.minimum(left, right), torch.maximum(left, right)
    first = torch.minimum(torch.maximum(frame.tau_first, left), right).nan_to_num_()
    last = torch.minimum(torch.maximum(frame.tau_last, left), right)
    # A vertex is the first end of one edge and the last of another: it counts once.
    leaves = last != frame.tau_last
    last.nan_to_num_()
    edges = first.shape[0]
    breaks = torch.cat([low.unsqueeze(0), first, last, high.unsqueeze(0)])
    inner = breaks[1:-1]
    torch.minimum(torch.maximum(inner, low, out=inner), high, out=inner)
    breaks[edges + 1 : -1].sub_(low).mul_(leaves).add_(low)
    _sort_rows(inner)
    return breaks


def _distance(frame: Frame, side: float, *points: Tensor) -> list[Tensor]:
    """How far the cell reaches up (side = 1) or down (-1) from the axis at given points, (K, P) each."""
    across = side * frame.across
    bounding = F.threshold(across, 0.0, 1.0)
    height = frame.slack / bounding + (across <= 0.0).to(across.dtype) * 1e300
    rate = frame.along / bounding
    reach = [torch.full_like(point, WINDOW) for point in points]
    for line in range(height.shape[0]):
        for point, least in zip(points, reach, strict=True):
            torch.minimum(least, torch.addcmul(height[line], rate[line], point, value=-1.0), out=least)
    return reach


def cut(frame: Frame) -> Panels:
    """Cuts every cell of a frame into panels."""
    breaks = _breaks(frame)
    half = 0.5 * breaks.diff(dim=0)
    middle = breaks[:-1] + half
    # The boundary is a straight line on each panel: two inner points tell it, whichever edges it belongs to.
    inner = middle - 0.5 * half, middle + 0.5 * half
    (up_1, up_2), (down_1, down_2) = _distance(frame, 1.0, *inner), _distance(frame, -1.0, *inner)
    radius = 0.25 * ((up_1 + down_1) + (up_2 + down_2))
    kept = torch.nonzero(((half > 0.0) & (radius > 0.0)).view(-1)).squeeze(-1)
    pair = torch.arange(breaks.shape[1], device=kept.device).expand_as(half).reshape(-1).index_select(0, kept)
    up_1, up_2, down_1, down_2, middle, half, radius = (
        field.reshape(-1).index_select(0, kept)
        for field in (up_1, up_2, down_1, down_2, middle, half, radius)
    )
    radius_rate = 0.5 * ((up_2 - up_1) + (down_2 - down_1))
    center = 0.25 * ((up_1 - down_1) + (up_2 - down_2))
    center_rate = 0.5 * ((up_2 - up_1) - (down_2 - down_1))

    slope = center_rate.abs() + radius_rate.abs()
    decay = 2.0 * half * frame.t0.index_select(0, pair) + 2.0 * slope * frame.s0.index_select(0, pair).abs()
    size = decay / DECAY + 2.0 * torch.maximum(half, slope) / SPREAD
    return _split(Panels(pair, middle, half, center, center_rate, radius, radius_rate, size))


def _split(panels: Panels) -> Panels:
    """Splits each panel into equal pieces of size 1 at most."""
    pieces = torch.ceil(panels.size)
    count = pieces.long()
    index = torch.repeat_interleave(count)
    order = torch.arange(index.shape[0], device=index.device) - (count.cumsum(0) - count).index_select(
        0, index
    )
    pair, middle, half, center, center_rate, radius, radius_rate, size = (
        f.index_select(0, index) for f in panels
    )
    share = 1.0 / pieces.index_select(0, index)
    shift = (2.0 * order + 1.0) * share - 1.0
    return Panels(
        pair=pair,
        middle=middle + shift * half,
        half=share * half,
        center=center + shift * center_rate,
        center_rate=share * center_rate,
        radius=radius + shift * radius_rate,
        radius_rate=share * radius_rate,
        size=share * size,
    )


def integrate(frame: Frame, panels: Panels) -> Tensor:
    """Integrals of 1, tau, eta, tau^2, tau eta, eta^2 over each panel under the frame's density: (6, Q).

    The density is ``exp(-t0 tau - tau^2/2 - s0 eta - eta^2/2)``.
    """
    result = frame.t0.new_empty(6, panels.pair.shape[0])
    few = panels.size <= SHORT
    block = at_a_time(_BLOCK, result.device)
    for chosen, slices in by_width(frame, panels):
        for nodes, sized in ((8, few), (16, ~few)):
            for index in torch.nonzero(chosen & sized).squeeze(-1).split(block // nodes):
                part = Panels(*(field.index_select(0, index) for field in panels))
                t0, s0 = frame.t0.index_select(0, part.pair), frame.s0.index_select(0, part.pair)
                result[:, index] = _quadrature(part, t0, s0, slices, nodes)
    return result


def by_width(frame: Frame, panels: Panels) -> Iterator[tuple[Tensor, Callable[..., list[Tensor]]]]:
    """Which panels are served by which of the functions that integrate over slices."""
    s0 = frame.s0.index_select(0, panels.pair)
    widest = panels.radius + panels.radius_rate.abs()
    change = widest * torch.maximum((s0 + panels.center).abs() + panels.center_rate.abs(), 2.0 * widest)
    # Between close ends the difference of two error functions would lose digits.
    smooth, thin = change <= SMOOTH, s0 != 0.0
    yield smooth, partial(_narrow_slices, nodes=6)
    yield ~smooth & thin, partial(_narrow_slices, nodes=12)
    yield ~smooth & ~thin, _wide_slices


def _quadrature(
    panels: Panels, t0: Tensor, s0: Tensor, slices: Callable[..., list[Tensor]], nodes: int
) -> Tensor:
    """The six integrals over each panel, (6, Q), from the slices' own at Gauss-Legendre nodes."""
    middle, half = panels.middle, panels.half
    rule = torch.tensor(gauss_legendre(nodes), dtype=half.dtype, device=half.device)
    x, weight = rule[:, :1], rule[:, 1]
    log_density = (x * half).add_(middle)
    log_density.mul_(log_density * -0.5 - t0)
    center = torch.addcmul(panels.center, x, panels.center_rate)
    radius = torch.addcmul(panels.radius, x, panels.radius_rate)
    zeroth, first, second = slices(s0, center, radius, log_density)
    powers = torch.stack([weight, weight * x[:, 0], weight * x[:, 0] ** 2])
    # From x to tau = middle + half x.
    one, by_x, by_xx = (powers @ zeroth).mul_(half)
    first, by_x_first = (powers[:2] @ first).mul_(half)
    second = (weight @ second).mul_(half)
    tau = middle * one + half * by_x
    tau_tau = middle * tau + half * (middle * by_x + half * by_xx)
    return torch.stack([one, tau, first, tau_tau, middle * first + half * by_x_first, second])


def _narrow_slices(
    s0: Tensor, center: Tensor, radius: Tensor, log_density: Tensor, nodes: int
) -> list[Tensor]:
    """Integrals of 1, eta, eta^2 over slices across which the density changes by a modest factor."""
    slope = (s0 + center).mul_(radius)
    curvature = torch.mul(radius, radius).mul_(-0.5)
    even, odd, square = torch.zeros_like(center), torch.zeros_like(center), torch.zeros_like(center)
    for node, weight in gauss_legendre(nodes)[nodes // 2 :]:
        growing = torch.mul(curvature, node * node).add_(slope, alpha=node)
        falling = growing.sub(slope, alpha=2.0 * node).exp_()
        growing.exp_()
        odd.add_(growing, alpha=-weight * node).add_(falling, alpha=weight * node)
        falling.add_(growing)
        even.add_(falling, alpha=weight)
        square.add_(falling, alpha=weight * node * node)
    scale = center.mul(-0.5).sub_(s0).mul_(center).add_(log_density).exp_().mul_(radius)
    even.mul_(scale)
    odd.mul_(scale.mul_(radius))
    square.mul_(scale.mul_(radius))
    # From the slice's center to the axis.
    square.addcmul_(center, odd, value=2.0).addcmul_(center * center, even)
    return [even, odd.addcmul_(center, even), square]


def _wide_slices(s0: Tensor, center: Tensor, radius: Tensor, log_density: Tensor) -> list[Tensor]:
    """The same for s0 = 0 over slices of any width, from the side of the smaller tail."""
    low, high = center - radius, center + radius
    low_density = torch.mul(low, low).mul_(-0.5).add_(log_density).exp_()
    high_density = torch.mul(high, high).mul_(-0.5).add_(log_density).exp_()
    middle = center.abs_()
    zeroth = torch.sub(middle, radius).mul_(_SQRT_HALF).erfc_()
    zeroth.sub_(middle.add_(radius).mul_(_SQRT_HALF).erfc_()).mul_(log_density.exp_().mul_(_SQRT_HALF_PI))
    second = torch.addcmul(zeroth, low, low_density).addcmul_(high, high_density, value=-1.0)
    return [zeroth, low_density.sub_(high_density), second]
