# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
r"""Polygons seen from a Gaussian: whitened edges, the point nearest the mean, and axes to slice along.

In whitened coordinates :math:`y = C^{-1}(z - \mu)` edge j lies on the line :math:`u_j \cdot y = h_j`, between
``first`` and ``last`` along its tangent :math:`(-u_{j2}, u_{j1})`. Tensors have the edges first: (E, P) for P
pairs of mean and cell.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_cpa.partition.cells import Polygons

__all__ = ["STEEP", "THIN", "WINDOW", "Edges", "Frame", "Sight", "sight", "slicing_frame", "whiten"]

WINDOW = 8.2  # beyond this distance from the nearest point lies less than 1e-14 of a cell's mass
THIN = 0.3  # a cell thinner than this share of the density's scale is sliced across its long edge
STEEP = 1e-15  # an edge this close to the slicing direction is parallel to it but for rounding


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
    c11, c21, c22 = scale_tril[:, 0, 0], scale_tril[:, 1, 0], scale_tril[:, 1, 1]
    nx, ny = (field.T.contiguous() for field in cells.normals.unbind(-1))
    padded = ~cells.is_edge.T
    one, zero = torch.ones_like(nx), torch.zeros_like(nx)
    vx, vy = c11 * nx + c21 * ny, c22 * ny
    norm = torch.where(padded, one, torch.hypot(vx, vy))
    ux, uy = torch.where(padded, one, vx / norm), vy / norm
    gy = ux / c22
    gx = (-uy - c21 * gy) / c11
    return Edges(
        nx=nx,
        ny=ny,
        offset=torch.where(padded, zero, cells.offsets.T),
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
    position: Tensor  # where along it the nearest point lies, on the original plane
    zx: Tensor  # nearest point of the cell on the original plane: the mean if that is inside
    zy: Tensor
    yx: Tensor  # whitened nearest point of the cell, zero if the mean is inside
    yy: Tensor
    distance: Tensor  # its distance
    inside: Tensor


def _pick(field: Tensor, index: Tensor) -> Tensor:
    """Row ``index[p]`` of column p."""
    return field.gather(0, index.unsqueeze(0)).squeeze(0)


def sight(edges: Edges, loc: Tensor) -> Sight:
    """Distances and nearest point; ``loc`` is (2, P)."""
    zx, zy = loc
    h = ((edges.offset - edges.nx * zx) - edges.ny * zy) * edges.shrink
    base = edges.gx * (edges.offset * edges.nx - zx) + edges.gy * (edges.offset * edges.ny - zy)
    first = torch.addcmul(base, edges.start, edges.stretch)
    last = torch.addcmul(base, edges.end, edges.stretch)
    foot = torch.minimum(first.clamp(min=0.0), last)
    square, nearest = torch.addcmul(h * h + edges.padding, foot, foot).min(dim=0)
    inside = h.amin(dim=0) >= 0.0
    h_near, foot = _pick(h, nearest), _pick(foot, nearest)
    ux, uy = _pick(edges.ux, nearest), _pick(edges.uy, nearest)
    nx, ny, offset = _pick(edges.nx, nearest), _pick(edges.ny, nearest), _pick(edges.offset, nearest)
    # Straight from the ends, for whitened coordinates know only as many digits of them as the mean is near.
    position = -_pick(base, nearest) / _pick(edges.stretch, nearest)
    position = torch.minimum(torch.maximum(position, _pick(edges.start, nearest)), _pick(edges.end, nearest))
    zx = torch.where(inside, zx, offset * nx - position * ny)
    zy = torch.where(inside, zy, offset * ny + position * nx)
    zero = torch.zeros_like(square)
    yx = torch.where(inside, zero, h_near * ux - foot * uy)
    yy = torch.where(inside, zero, h_near * uy + foot * ux)
    distance = torch.where(inside, zero, square.sqrt())
    return Sight(h, base, first, last, nearest, position, zx, zy, yx, yy, distance, inside)


class Frame(NamedTuple):
    r"""Orthonormal whitened axes at a reference point of each cell; (E, P) or (P,) each.

    With the reference point at :math:`y_0 = (t_0, s_0)`, the point (tau, eta) has the log-density

    .. math:: -|y_0|^2/2 - \log 2\pi - t_0\tau - \tau^2/2 - s_0\eta - \eta^2/2

    and lies in the cell if ``slack - along * tau - across * eta >= 0`` for all edges.
    """

    t0: Tensor
    s0: Tensor
    slack: Tensor
    along: Tensor
    across: Tensor  # never zero
    tau_first: Tensor  # ends of the edges along the slicing axis
    tau_last: Tensor
    zx: Tensor  # reference point on the original plane
    zy: Tensor
    jxt: Tensor  # image of the axes on the original plane: x = zx + jxt tau + jxs eta, y likewise
    jxs: Tensor
    jyt: Tensor
    jys: Tensor


def _longest(edges: Edges, view: Sight) -> tuple[Tensor, Tensor]:
    """The edge longest in sight of the mean, and whether the cell is thin there.

    A cell is thin if the chord from the middle of that edge straight across is short against the scale
    of the density.
    """
    square = (view.distance * view.distance + WINDOW * WINDOW - view.h * view.h).clamp(min=0.0)
    reach = square.sqrt()
    first, last = torch.maximum(view.first, -reach), torch.minimum(view.last, reach)
    length, at = (last - first).max(dim=0)
    middle = 0.5 * (_pick(first, at) + _pick(last, at))
    position = (middle - _pick(view.base, at)) / _pick(edges.stretch, at)
    nx, ny, offset = _pick(edges.nx, at), _pick(edges.ny, at), _pick(edges.offset, at)
    zx, zy = offset * nx - position * ny, offset * ny + position * nx
    gap = ((edges.offset - edges.nx * zx) - edges.ny * zy) * edges.shrink
    closing = -(edges.ux * _pick(edges.ux, at) + edges.uy * _pick(edges.uy, at))
    away = (closing <= 0.0).to(closing.dtype) * 1e300  # edges that do not close in
    chord = (gap / F.threshold(closing, 0.0, 1.0)).add_(away).add_(edges.padding).amin(dim=0)
    return at, (length > 0.0) & (chord * view.distance.clamp(min=1.0) < THIN)


def slicing_frame(edges: Edges, view: Sight) -> Frame:
    """Axes at the point nearest the mean, away from the mean; for a thin cell, along its longest edge.

    All is measured from one edge, the nearest or the longest. Nearly parallel edges are compared with it
    through sums or differences of their offsets and normals: the width of a thin cell keeps all its digits.
    """
    longest, thin = _longest(edges, view)
    at = torch.where(thin, longest, view.nearest)
    nx, ny, offset = _pick(edges.nx, at), _pick(edges.ny, at), _pick(edges.offset, at)
    ux, uy, h = _pick(edges.ux, at), _pick(edges.uy, at), _pick(view.h, at)
    gx, gy, stretch = _pick(edges.gx, at), _pick(edges.gy, at), _pick(edges.stretch, at)

    # Axes in terms of that edge's tangent and inward normal.
    coordinate = view.yy * ux - view.yx * uy
    side = torch.where(coordinate < 0.0, -1.0, 1.0).to(h.dtype)
    apart = view.distance > 0.0
    cos = torch.where(thin, side, torch.where(apart, coordinate / view.distance, torch.zeros_like(h)))
    sin = torch.where(thin, torch.zeros_like(h), torch.where(apart, -h / view.distance, torch.ones_like(h)))
    t0 = torch.where(thin, coordinate.abs(), view.distance)
    s0 = torch.where(thin, -h * cos, torch.zeros_like(h))

    # Reference point, and every edge's slack there.
    projection = (gx * (view.zx - offset * nx) + gy * (view.zy - offset * ny)) / stretch
    position = torch.where(thin, projection, view.position)
    sign = torch.sign(edges.nx * nx + edges.ny * ny)
    dx, dy = edges.nx - sign * nx, edges.ny - sign * ny
    turning = dy * nx - dx * ny
    gap = (edges.offset - sign * offset) - offset * (dx * nx + dy * ny)
    slack = torch.addcmul(gap, position, turning, value=-1.0).mul_(edges.shrink)
    slack = slack + (view.h - slack) * (view.inside & ~thin) + edges.padding
    zx = torch.where(thin, offset * nx - position * ny, view.zx)
    zy = torch.where(thin, offset * ny + position * nx, view.zy)

    p, q = turning * (edges.shrink / stretch), edges.ux * -ux - edges.uy * uy
    along = cos * p + sin * q
    across = F.hardshrink(cos * q - sin * p, STEEP)
    ex, ey = -cos * uy - sin * ux, cos * ux - sin * uy
    fy = ey / edges.c22
    fx = (ex - edges.c21 * fy) / edges.c11
    shift = fx * (edges.offset * edges.nx - zx) + fy * (edges.offset * edges.ny - zy)
    heading = -across * edges.stretch
    first, last = (
        (end * heading).nan_to_num_(0.0, torch.inf, -torch.inf) + shift for end in (edges.start, edges.end)
    )
    return Frame(
        t0=t0,
        s0=s0,
        slack=slack,
        along=along,
        across=across + (across == 0.0).to(across.dtype) * STEEP,
        tau_first=first,
        tau_last=last,
        zx=zx,
        zy=zy,
        jxt=edges.c11 * ex,
        jxs=edges.c11 * -ey,
        jyt=edges.c21 * ex + edges.c22 * ey,
        jys=edges.c22 * ex - edges.c21 * ey,
    )
