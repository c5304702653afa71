# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
r"""A three-dimensional polytope's integrals as integrals over its slices, sums of positive terms.

.. math:: M = \phi_{t_0} \int e^{-t_0 \tau - \tau^2/2} \, M_2(\tau) \, d\tau

The mass :math:`M_2` of the slices is analytic between the heights of the vertices. There Gauss-Legendre
quadrature is used on panels, which are halved until the integrand's Legendre series, as the nodes tell it, has
converged. The tail is factored out with the frame's reference point, and nothing cancels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from numpy.polynomial import legendre
from torch import Tensor

from pyro_cpa.integrals.normal import gauss_legendre
from pyro_cpa.integrals.polytope_frame import WINDOW, Frame

__all__ = ["NODES", "Panels", "integrate", "per_pair"]

NODES = 16
_TOLERANCE = 1e-10  # of a cell's mass, for each panel
_DECAY, _SPREAD = 24.0, 9.0  # first panels: 16 nodes integrate exp(-x) over so many units, or exp(-x^2/2)
_FAST = 4.0  # what moves this much faster across the axis than along it is looked for
_LEVEL = 1e-12  # differences in height that are rounding, where they do not matter
_HALVINGS = 40
_PROGRESS = 4.0  # halving divides the error of a converging series by much more
_ROUNDING = 1e-4  # errors larger than this share of a panel are never taken for rounding
_AT_ONCE = 16384  # slices worked on at a time


class Panels(NamedTuple):
    """Q panels ``middle - half < tau < middle + half``, with what a function of slices is at their nodes."""

    pair: Tensor  # (Q,)
    middle: Tensor  # (Q,)
    half: Tensor  # (Q,)
    log_density: Tensor  # (Q, NODES) log of the integrand
    values: Tensor  # (Q, K, NODES) of the function
    log_mass: Tensor  # (Q,) log of the integral
    log_error: Tensor  # (Q,) log of its estimated error

    def tau(self) -> Tensor:
        """(Q, NODES) positions of the nodes."""
        x = _rule(self.half)[0]
        return self.middle[:, None] + self.half[:, None] * x

    def weights(self, reference: Tensor) -> Tensor:
        """(Q, NODES) of the quadrature, divided by exp(reference) of each pair."""
        weight = _rule(self.half)[1]
        return (self.log_density - reference[self.pair, None]).exp() * weight * self.half[:, None]


def per_pair(pair: Tensor, log_mass: Tensor, count: int) -> Tensor:
    """(P,) logs of the sums of exp(log_mass) over the panels of each pair."""
    nothing = log_mass.new_full((count,), -torch.inf)
    top = nothing.scatter_reduce(0, pair, log_mass, "amax")
    finite = torch.where(torch.isinf(top), 0.0, top)
    total = torch.zeros_like(nothing).index_add(0, pair, (log_mass - finite[pair]).exp())
    return total.log() + finite


def integrate(frame: Frame, function: Callable[[Frame, Tensor, Tensor], Tensor]) -> Panels:
    """Panels fine enough for all cells of a frame.

    Args:
        frame: P cells.
        function: takes the frame, cells (N,) and positions (N,); gives (K, N), the first row the log of the mass of
            slices.
    """
    count = len(frame.t0)
    panels = _evaluate(frame, function, *_first(frame))
    stuck = torch.zeros_like(panels.pair)
    for _ in range(_HALVINGS):
        total = per_pair(panels.pair, panels.log_mass, count)[panels.pair]
        coarse = (stuck < 2) & (panels.log_error > total + math.log(_TOLERANCE))
        if not bool(coarse.any()):
            break
        pair, half = panels.pair[coarse].repeat(2), panels.half[coarse] / 2
        middle = torch.cat([panels.middle[coarse] - half, panels.middle[coarse] + half])
        finer = _evaluate(frame, function, pair, middle, half.repeat(2))
        # What neither half of a panel makes smaller, twice, is rounding: of far means, or of thin cells far away.
        same = finer.log_error > panels.log_error[coarse].repeat(2) - math.log(_PROGRESS)
        same &= finer.log_error < finer.log_mass + math.log(_ROUNDING)
        same = same.unflatten(0, (2, -1)).all(0).repeat(2)
        stuck = torch.cat([stuck[~coarse], (stuck[coarse].repeat(2) + 1) * same])
        panels = Panels(*(torch.cat([old[~coarse], new]) for old, new in zip(panels, finer, strict=True)))
    return panels


def _first(frame: Frame) -> tuple[Tensor, Tensor, Tensor]:
    """Pair, middle and half width of panels between the breaks, no wider than the density's scale."""
    breaks = _breaks(frame)
    half = 0.5 * breaks.diff(dim=1)
    range_ = breaks[:, -1:] - breaks[:, :1]
    pair, column = (half > _LEVEL * range_).nonzero(as_tuple=True)
    middle, half = (breaks[:, :-1] + half)[pair, column], half[pair, column]
    pieces = torch.ceil(2 * half * (frame.t0[pair] / _DECAY + 1 / _SPREAD)).long()
    index = torch.repeat_interleave(pieces)
    order = torch.arange(len(index), device=index.device) - (pieces.cumsum(0) - pieces)[index]
    share = half[index] / pieces[index]
    return pair[index], middle[index] - half[index] + (2 * order + 1) * share, share


def _breaks(frame: Frame) -> Tensor:
    """Where slices change, (P, B) in ascending order: at vertices, and where fast edges and sides come into sight.

    What crosses the window in a short time gets panels of its own, where no node could miss it.
    """
    # The nearest point is the reference point, or close to it in a thin cell: the density gains little.
    square = WINDOW * WINDOW + 4.0
    high = square / (frame.t0 + torch.sqrt(frame.t0 * frame.t0 + square))
    low = -(4.0 / frame.t0).clamp(max=WINDOW)
    height, steepness = frame.vertices[..., 0], frame.rays[..., 0]
    lowest, highest = height.nan_to_num(nan=torch.inf).amin(1), height.nan_to_num(nan=-torch.inf).amax(1)
    low = torch.where((steepness < -_LEVEL).any(1), low, torch.maximum(low, lowest))[:, None]
    high = torch.where((steepness > _LEVEL).any(1), high, torch.minimum(high, highest))[:, None]
    seen = torch.linalg.vector_norm(frame.vertices[..., 1:], dim=-1) < WINDOW
    inner = torch.cat([torch.where(seen, height, torch.nan), _edges(frame), _sides(frame)], dim=1)
    inner = torch.where((inner > low) & (inner < high), inner, high)
    count = int((inner < high).sum(1).max()) if len(inner) else 0
    inner = inner.topk(count, dim=1, largest=False).values
    return torch.cat([low, inner, high], dim=1)


def _edges(frame: Frame) -> Tensor:
    """Heights (P, B) at which fast edges enter or leave the window; NaN for none."""
    P, G, L = frame.vertices.shape
    on = frame.tight.to(frame.t0.dtype)
    # Two facets meet in a line, so that a vertex and another one, or a ray, on both are joined by an edge.
    joined = on[:, :G] @ on.mT >= L - 1
    joined[:, :, :G] &= ~torch.eye(G, dtype=torch.bool, device=on.device)
    ahead = torch.nn.functional.pad(frame.vertices, (0, 0, 0, on.shape[1] - G), value=torch.nan)
    is_ray = (frame.rays != 0).any(-1)[:, None]
    step = torch.where(is_ray[..., None], frame.rays[:, None], ahead[:, None] - frame.vertices[:, :, None])
    across = step[..., 1:]
    a = across.square().sum(-1)
    b = (across * frame.vertices[:, :, None, 1:]).sum(-1)
    c = frame.vertices[..., 1:].square().sum(-1)[..., None] - WINDOW**2
    root = torch.sqrt(b * b - a * c)  # NaN for an edge that stays out of sight
    fast = joined & (a > (_FAST * step[..., 0]) ** 2)
    end = torch.where(is_ray, torch.inf, 1.0)
    found = []
    for sign in (-1.0, 1.0):
        share = (sign * root - b) / a
        hit = fast & (share > 0) & (share < end)
        found.append(torch.where(hit, frame.vertices[..., :1] + share * step[..., 0], torch.nan).flatten(1))
    return torch.cat(found, dim=1)


def _sides(frame: Frame) -> Tensor:
    """Heights (P, 2 F) at which the lines of steep facets enter or leave the window; NaN for others."""
    size = torch.linalg.vector_norm(frame.across, dim=-1)
    fast = frame.along.abs() > _FAST * size
    along = torch.where(fast, frame.along, 1.0)
    found = [
        torch.where(fast, (frame.slack + sign * WINDOW * size) / along, torch.nan) for sign in (-1.0, 1.0)
    ]
    return torch.cat(found, dim=1)


def _evaluate(
    frame: Frame,
    function: Callable[[Frame, Tensor, Tensor], Tensor],
    pair: Tensor,
    middle: Tensor,
    half: Tensor,
) -> Panels:
    x, weight, series = _rule(half)
    tau = middle[:, None] + half[:, None] * x
    slices = pair[:, None].expand_as(tau).reshape(-1), tau.reshape(-1)
    parts = [function(frame, *part) for part in zip(*(s.split(_AT_ONCE) for s in slices), strict=True)]
    values = torch.cat(parts, dim=1).reshape(-1, *tau.shape).movedim(0, 1)
    log_density = values[:, 0] - tau * (frame.t0[pair, None] + 0.5 * tau)
    peak = log_density.amax(1, keepdim=True)
    peak = torch.where(torch.isinf(peak), 0.0, peak)
    density = (log_density - peak).exp()
    size = peak[:, 0] + half.log()
    # How far the series has fallen over its last terms, two by two for the sake of even functions, and where
    # it will be at the first term that the quadrature gets wrong.
    terms = (density @ series.T).abs().unflatten(1, (NODES // 2, 2)).sum(2)
    last = terms[:, -1:].clamp(min=torch.finfo(half.dtype).tiny)
    steps = torch.arange(3, 0, -1, device=half.device)
    ratio = (last / terms[:, -4:-1].clamp(min=torch.finfo(half.dtype).tiny)) ** (1 / steps)
    ahead = ratio.amax(1).clamp(max=1.0) ** (NODES / 4)
    return Panels(
        pair=pair,
        middle=middle,
        half=half,
        log_density=log_density,
        values=values,
        log_mass=(density @ weight).log() + size,
        log_error=(2 * last[:, 0] * ahead).log() + size,
    )


@cache
def _series(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    rule = torch.tensor(gauss_legendre(NODES), dtype=torch.float64, device=device)
    x, weight = rule.unbind(1)
    polynomials = torch.as_tensor(legendre.legvander(x.cpu().numpy(), NODES - 1), device=device)
    degree = torch.arange(NODES, device=device)
    return x, weight, (polynomials * weight[:, None]).T * (degree[:, None] + 0.5)


def _rule(like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Nodes, weights and the matrix that takes values at nodes to coefficients of Legendre polynomials."""
    return _series(like.device)
