# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Quantiles of one latent coordinate under mixtures of Gaussians truncated to cells."""

from __future__ import annotations

from functools import singledispatch

import torch
from torch import Tensor

from .. import integrals
from ..partition.cells import Cells, Intervals, Polygons, WholeSpace
from ..partition.walls import Walls

__all__ = ["log_mass_below", "mixture_quantiles"]

# Each halves the bracket: 50 leave 1e-15 of it.
BISECTIONS = 50


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
    r"""Solve :math:`P(z_j \le t) = q` for every row and level by bisection.

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
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        at = middle[:, rows].reshape(-1)
        below = log_mass_below(cells[every], loc[every], scale_tril[every], axis, at)
        mass = (log_weights.repeat(Q) + below).exp().reshape(Q, P)
        cdf = torch.zeros_like(middle).index_add(1, rows, mass)
        reached = cdf >= levels[:, None]
        low, high = torch.where(reached, low, middle), torch.where(reached, middle, high)
    return (low + high) / 2


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
def _polygons(cells: Polygons, loc: Tensor, scale_tril: Tensor, axis: int, at: Tensor) -> Tensor:
    normal = torch.zeros_like(loc)
    normal[:, axis] = 1.0
    exact = torch.zeros_like(at)
    walls = Walls(torch.arange(len(at), device=at.device), normal, at, exact, exact)
    crossed = walls.cross(cells.generators())
    inside = (cells.interior_points()[:, axis] <= at) & ~crossed
    found = torch.full_like(at, -torch.inf)
    if bool(inside.any()):
        found[inside] = integrals.log_mass(cells[inside], loc[inside], scale_tril[inside])
    if bool(crossed.any()):
        below, _ = cells[crossed].halves(walls[crossed])
        found[crossed] = integrals.log_mass(below, loc[crossed], scale_tril[crossed])
    return found
