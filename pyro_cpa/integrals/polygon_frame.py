# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
r"""Polygons seen from a Gaussian: whitened edges, the point nearest the mean, and axes to slice along.

In whitened coordinates :math:`y = C^{-1}(z - \mu)` edge j lies on :math:`u_j \cdot y = h_j` between ``first`` and
``last`` along the tangent :math:`(-u_2, u_1)`. Tensors have the edges first, (E, P) for P pairs of mean and cell.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_cpa.partition.cells import Polygons

__all__ = ["WINDOW", "Edges", "Frame", "Sight", "edge_frame", "longest", "nearest_frame", "sight", "whiten"]

WINDOW = 8.2  # beyond this distance from the nearest point lies less than 1e-15 of a cell's mass
_STEEP = 1e-15
_THIN = 0.3  # widths below this share of the density's scale are taken from pairs of edges, not from vertices


class Edges(NamedTuple):
    """What depends on cells and covariances only; (E, R) each, and the Cholesky factor's entries (R,)."""

    nx: Tensor  # normals, offsets and ends on the original plane; padded edges have offset and ends zero
    ny: Tensor
    offset: Tensor
    start: Tensor
    end: Tensor
    ux: Tensor  # whitened unit normal
    uy: Tensor
    shrink: Tensor  # whitened distance to the line = slack * shrink
    stretch: Tensor  # whitened length along the edge = length * stretch
    gx: Tensor  # gradient, on the original plane, of the whitened coordinate along the edge
    gy: Tensor
    padding: Tensor  # inf for a padded edge, else zero
    c11: Tensor
    c21: Tensor
    c22: Tensor

    def repeat(self, count: int) -> Edges:
        """The same cells for several means, the cells running fastest."""
        return Edges(
            *(f.unsqueeze(-2).expand(*f.shape[:-1], count, -1).reshape(*f.shape[:-1], -1) for f in self)
        )


def whiten(cells: Polygons, scale_tril: Tensor) -> Edges:
    """Edges of R cells as seen by R covariances, (R, 2, 2)."""
    if cells.offsets.shape[-1] == 0:
        pad = cells.offsets.new_zeros(len(cells), 1)
        cells = Polygons(torch.stack([pad, pad], -1), pad + torch.inf, pad, pad)
    c11, c21, c22 = scale_tril[:, 0, 0], scale_tril[:, 1, 0], scale_tril[:, 1, 1]
    nx, ny = cells.normals.unbind(-1)
    nx, ny, offset = nx.T, ny.T, cells.offsets.T
    padded = torch.isinf(offset)
    one, zero = torch.ones_like(offset), torch.zeros_like(offset)

    vx, vy = c11 * nx + c21 * ny, c22 * ny
    norm = torch.where(padded, one, torch.hypot(vx, vy))
    ux, uy = torch.where(padded, one, vx / norm), vy / norm
    gy = ux / c22
    gx = (-uy - c21 * gy) / c11
    return Edges(
        nx=nx.contiguous(),
        ny=ny.contiguous(),
        offset=torch.where(padded, zero, offset),
        start=cells.starts.T.contiguous(),
        end=cells.ends.T.contiguous(),
        ux=ux,
        uy=uy,
        shrink=1.0 / norm,
        stretch=norm / (c11 * c22),
        gx=torch.where(padded, zero, gx),
        gy=torch.where(padded, zero, gy),
        padding=torch.where(padded, one * torch.inf, zero),
        c11=c11,
        c21=c21,
        c22=c22,
    )


class Sight(NamedTuple):
    """A cell as the mean sees it: (E, P) for edges, (P,) for the nearest point."""

    h: Tensor  # whitened signed distance of every edge's line, positive if the mean is on the cell's side
    base: Tensor  # whitened tangent coordinate of the point offset * normal
    first: Tensor
    last: Tensor
    nearest: Tensor  # index of the edge nearest the mean
    yx: Tensor  # whitened nearest point of the cell, zero if the mean is inside
    yy: Tensor
    distance: Tensor  # its distance
    inside: Tensor


def pick(field: Tensor, index: Tensor) -> Tensor:
    """Row ``index[p]`` of column p."""
    return field.gather(0, index.unsqueeze(0)).squeeze(0)


def sight(edges: Edges, loc: Tensor) -> Sight:
    """Distances and nearest point; ``loc`` is (2, P)."""
    zx, zy = loc
    h = ((edges.offset - edges.nx * zx) - edges.ny * zy) * edges.shrink + edges.padding
    base = edges.gx * (edges.offset * edges.nx - zx) + edges.gy * (edges.offset * edges.ny - zy)
    first = edges.start * edges.stretch + base
    last = edges.end * edges.stretch + base
    foot = torch.minimum(first.clamp(min=0.0), last)
    square, nearest = (h * h + foot * foot).min(dim=0)
    inside = h.amin(dim=0) >= 0.0
    h_near, foot = pick(h, nearest), pick(foot, nearest)
    ux, uy = pick(edges.ux, nearest), pick(edges.uy, nearest)
    zero = torch.zeros_like(square)
    yx = torch.where(inside, zero, h_near * ux - foot * uy)
    yy = torch.where(inside, zero, h_near * uy + foot * ux)
    distance = torch.where(inside, zero, square.sqrt())
    return Sight(h, base, first, last, nearest, yx, yy, distance, inside)


class Frame(NamedTuple):
    r"""Orthonormal whitened axes at a reference point; (E, P) or (P,) each.

    The point (tau, eta) has log-density :math:`-(t_0^2 + s_0^2)/2 - \log 2\pi - t_0\tau - \tau^2/2 - s_0\eta - \eta^2/2`
    and lies in the cell if ``slack - along * tau - across * eta >= 0`` for all edges.
    """

    t0: Tensor
    s0: Tensor
    slack: Tensor
    along: Tensor
    across: Tensor
    tau_first: Tensor  # ends of the edges along the slicing axis
    tau_last: Tensor
    zx: Tensor  # reference point on the original plane
    zy: Tensor
    jxx: Tensor  # image of the axes on the original plane: z = reference + (jxx, jyx) tau + (jxy, jyy) eta
    jxy: Tensor
    jyx: Tensor
    jyy: Tensor


def longest(edges: Edges, view: Sight) -> tuple[Tensor, Tensor]:
    """The edge longest in sight of the mean, and whether the cell is thin there.

    A cell is thin if the chord from that edge's middle straight across is short against the density's scale;
    its width must then be read off pairs of edges, for vertices would lose its digits.
    """
    square = (view.distance * view.distance - view.h * view.h + WINDOW * WINDOW).clamp(min=0.0)
    reach = square.sqrt()
    first, last = torch.maximum(view.first, -reach), torch.minimum(view.last, reach)
    length, at = (last - first).max(dim=0)
    middle = 0.5 * (pick(first, at) + pick(last, at))
    ux, uy = pick(edges.ux, at), pick(edges.uy, at)
    closing = -(edges.ux * ux + edges.uy * uy)
    turning = edges.uy * ux - edges.ux * uy
    gap = view.h + pick(view.h, at) * closing - middle * turning
    chord = torch.where(closing > 0.0, gap / closing, torch.full_like(gap, torch.inf)).amin(dim=0)
    return at, (length > 0.0) & (chord * view.distance.clamp(min=1.0) < _THIN)


def _slacks(edges: Edges, at: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Whitened slack of every edge at ``position`` on the line of edge ``at``, its rate along it, and that point.

    Nearly parallel edges are compared through sums or differences of their offsets and normals, so that the
    gap between them keeps all its digits.
    """
    nx, ny, offset = pick(edges.nx, at), pick(edges.ny, at), pick(edges.offset, at)
    sign = torch.sign(edges.nx * nx + edges.ny * ny)
    dx, dy = edges.nx - sign * nx, edges.ny - sign * ny
    rate = dy * nx - dx * ny
    gap = (edges.offset - sign * offset) - offset * (dx * nx + dy * ny)
    slack = (gap - position * rate) * edges.shrink + edges.padding
    return slack, rate * edges.shrink, offset * nx - position * ny, offset * ny + position * nx


def _frame(
    edges: Edges,
    view: Sight,
    axis: tuple[Tensor, Tensor, Tensor],
    origin: tuple[Tensor, Tensor],
    reference: tuple[Tensor, Tensor],
    slack: Tensor,
    along: Tensor,
) -> Frame:
    ex, ey, turn = axis
    fx, fy = -ey * turn, ex * turn
    # Edges along the slicing direction but for rounding become steep lines that start and end at one place.
    across = F.hardshrink(edges.ux * fx + edges.uy * fy, _STEEP)
    heading = -turn * across
    across = across + (across == 0.0) * _STEEP
    shift = view.h * along - origin[0]
    return Frame(
        t0=origin[0],
        s0=origin[1],
        slack=slack,
        along=along,
        across=across,
        tau_first=(view.first * heading).nan_to_num_(nan=0.0, posinf=torch.inf, neginf=-torch.inf) + shift,
        tau_last=(view.last * heading).nan_to_num_(nan=0.0, posinf=torch.inf, neginf=-torch.inf) + shift,
        zx=reference[0],
        zy=reference[1],
        jxx=edges.c11 * ex,
        jxy=edges.c11 * fx,
        jyx=edges.c21 * ex + edges.c22 * ey,
        jyy=edges.c21 * fx + edges.c22 * fy,
    )


def nearest_frame(edges: Edges, view: Sight, loc: Tensor) -> Frame:
    """Axes at the cell's nearest point, slicing away from the mean (or across the nearest edge from inside)."""
    at = view.nearest
    base, stretch = pick(view.base, at), pick(edges.stretch, at)
    position = torch.minimum(torch.maximum(-base / stretch, pick(edges.start, at)), pick(edges.end, at))
    slack, _, zx, zy = _slacks(edges, at, position)
    apart = view.distance > 0.0
    ex = torch.where(apart, view.yx / view.distance, -pick(edges.ux, at))
    ey = torch.where(apart, view.yy / view.distance, -pick(edges.uy, at))
    slack = torch.where(view.inside, view.h, slack)
    zx, zy = torch.where(view.inside, loc[0], zx), torch.where(view.inside, loc[1], zy)
    turn, zero = torch.ones_like(ex), torch.zeros_like(ex)
    along = edges.ux * ex + edges.uy * ey
    return _frame(edges, view, (ex, ey, turn), (view.distance, zero), (zx, zy), slack, along)


def edge_frame(edges: Edges, view: Sight, at: Tensor) -> Frame:
    """Axes along edge ``at`` of a thin cell, with the point of its line nearest the cell's nearest point as origin."""
    ux, uy = pick(edges.ux, at), pick(edges.uy, at)
    coordinate = view.yy * ux - view.yx * uy
    turn = torch.where(coordinate < 0.0, -torch.ones_like(ux), torch.ones_like(ux))
    stretch = pick(edges.stretch, at)
    position = (coordinate - pick(view.base, at)) / stretch
    slack, rate, zx, zy = _slacks(edges, at, position)
    axis = (-uy * turn, ux * turn, turn)
    return _frame(
        edges, view, axis, (coordinate.abs(), -pick(view.h, at)), (zx, zy), slack, rate * turn / stretch
    )
