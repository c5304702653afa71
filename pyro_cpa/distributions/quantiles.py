# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Quantiles of one latent coordinate under mixtures of Gaussians truncated to cells."""

from __future__ import annotations

from collections.abc import Callable
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor

from .. import integrals
from ..integrals.estimated_cells import EstimatedPolytopes
from ..partition.cells import Cells, Intervals, Polygons, Polytopes, WholeSpace
from ..partition.walls import Walls

__all__ = ["log_mass_below", "mixture_quantiles"]

# A bracket as short as this share of its first length is done.
RESOLUTION = 1e-14
# Rarely are more than a dozen needed; bisection alone would take 47.
MAX_STEPS = 100


def mixture_quantiles(
    levels: Tensor,
    mean: Tensor,
    deviation: Tensor,
    axis: int,
    rows: Tensor,
    log_weights: Tensor,
    cells: Cells,
    loc: Tensor,
    scale_tril: Tensor,
) -> Tensor:
    r"""Solve :math:`P(z_j \le t) = q` for every row and level.

    Args:
        levels: (Q,) probabilities q in (0, 1).
        mean: (N,) mean of coordinate j in each row.
        deviation: (N,) its standard deviation.
        axis: the coordinate j.
        rows: (P,) row of each component.
        log_weights: (P,) log-probability of each component less the log-mass of its cell.
        cells: P cells.
        loc: (P, L) means of the components before truncation.
        scale_tril: (P, L, L) their Cholesky factors.

    Returns:
        (Q, N) quantiles.
    """
    # Cantelli's inequality brackets every quantile of every distribution.
    odds = (levels / (1 - levels)).sqrt()[:, None]
    low, high = mean - deviation / odds, mean + deviation * odds
    Q, P = len(levels), len(rows)
    every = torch.arange(P, device=rows.device).repeat(Q)

    def excess(at: Tensor) -> Tensor:
        below = log_mass_below(
            cells[every], loc[every], scale_tril[every], axis, at[:, rows].reshape(-1).contiguous()
        )
        mass = (log_weights.repeat(Q) + below).exp().reshape(Q, P)
        return torch.zeros_like(at).index_add(1, rows, mass) - levels[:, None]

    return _root(excess, low, high)


def _root(function: Callable[[Tensor], Tensor], low: Tensor, high: Tensor) -> Tensor:
    """Zeros of increasing functions between ``low`` and ``high``: inverse quadratic steps where safe, else halving.

    References:
        T. R. Chandrupatla (1997), "A new hybrid quadratic/bisection algorithm for finding the zero of a nonlinear
        function without using derivatives", Advances in Engineering Software 28.
    """
    width = high - low
    b, a = low, high
    fb, fa = function(b), function(a)
    c, fc, share = b, fb, torch.full_like(b, 0.5)
    for _ in range(MAX_STEPS):
        at = a + share * (b - a)
        value = function(at)
        same = value.sign() == fa.sign()
        c, fc = torch.where(same, a, b), torch.where(same, fa, fb)
        b, fb = torch.where(same, b, a), torch.where(same, fb, fa)
        a, fa = at, value
        length = (b - a).abs()
        smallest = RESOLUTION * width
        if bool(((length <= smallest) | (fa == 0)).all()):
            break
        xi, phi = (a - b) / (c - b), (fa - fb) / (fc - fb)
        quadratic = (fa / (fb - fa)) * (fc / (fb - fc)) + ((c - a) / (b - a)) * (fa / (fc - fa)) * (
            fb / (fc - fb)
        )
        safe = (phi.square() < xi) & ((1 - phi).square() < 1 - xi) & quadratic.isfinite()
        share = torch.where(safe, quadratic, 0.5)
        least = (0.5 * smallest / length).clamp(max=0.5)
        share = torch.where(fa == 0, 0.0, share.clamp(least, 1 - least))
    return torch.where(fa.abs() <= fb.abs(), a, b)


@singledispatch
def log_mass_below(cells: Cells, loc: Tensor, scale_tril: Tensor, axis: int, at: Tensor) -> Tensor:
    """(P,) log of the mass that N(loc, S) puts on the part of each cell with z[axis] <= at; at (P,)."""
    raise NotImplementedError(f"no quantiles over cells of type {type(cells).__name__}")


@log_mass_below.register
def _whole_space(cells: WholeSpace, loc: Tensor, scale_tril: Tensor, axis: int, at: Tensor) -> Tensor:
    deviation = torch.linalg.vector_norm(scale_tril[..., axis, :], dim=-1)
    return torch.special.log_ndtr((at - loc[..., axis]) / deviation)


@log_mass_below.register
def _intervals(cells: Intervals, loc: Tensor, scale_tril: Tensor, axis: int, at: Tensor) -> Tensor:
    part = Intervals(cells.lower, torch.minimum(cells.upper, at))
    found = integrals.log_mass(part, loc, scale_tril)
    return torch.where(part.lower < part.upper, found, -torch.inf)


@log_mass_below.register
def _estimated(cells: EstimatedPolytopes, loc: Tensor, scale_tril: Tensor, axis: int, at: Tensor) -> Tensor:
    def estimated(parts: Polytopes) -> EstimatedPolytopes:
        return EstimatedPolytopes(parts, cells.num_points, cells.seed)

    return _mass_below(cells.cells, loc, scale_tril, axis, at, estimated)


@log_mass_below.register(Polygons)
@log_mass_below.register(Polytopes)
def _divisible(cells: Polygons | Polytopes, loc: Tensor, scale_tril: Tensor, axis: int, at: Tensor) -> Tensor:
    return _mass_below(cells, loc, scale_tril, axis, at, lambda parts: parts)


def _mass_below(
    cells: Polygons | Polytopes,
    loc: Tensor,
    scale_tril: Tensor,
    axis: int,
    at: Tensor,
    integrated: Callable[[Any], Cells],
) -> Tensor:
    """The cells are cut; ``integrated`` says how the parts are integrated over."""
    normal = torch.zeros_like(loc)
    normal[:, axis] = 1.0
    exact = torch.zeros_like(at)
    walls = Walls(torch.arange(len(at), device=at.device), normal, at, exact, exact)
    crossed = walls.cross(cells.generators())
    inside = (cells.interior_points()[:, axis] <= at) & ~crossed
    found = torch.full_like(at, -torch.inf)
    if bool(inside.any()):
        found[inside] = integrals.log_mass(integrated(cells[inside]), loc[inside], scale_tril[inside])
    if bool(crossed.any()):
        below, _ = cells[crossed].halves(walls[crossed])
        found[crossed] = integrals.log_mass(integrated(below), loc[crossed], scale_tril[crossed])
    return found
