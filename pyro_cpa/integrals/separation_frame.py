# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
r"""Polytopes of any dimension, turned for separation of variables: what bounds each coordinate, given those before it.

At the cell's point :math:`y_0` nearest the mean (in whitened coordinates) the axes are the normals of the facets that hold
it, one after the other made orthogonal, then those of the facets that are closest. With
:math:`y = y_0 + Q^\top v` the Gaussian and the facets are

.. math:: \phi(y) = (2\pi)^{-L/2} e^{-t_0^2/2}\, e^{-g \cdot v - |v|^2/2}, \qquad N v \le h, \qquad g = Q y_0,

and for the facets that hold the point N is lower triangular: each bounds one more coordinate.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_cpa.integrals.polytope_frame import generators_on, sight
from pyro_cpa.partition.cells import Polytopes

__all__ = ["SeparationFrame", "turned"]

_SPANNED = 1e-9  # what is left of a normal that earlier axes span
_OBLIQUE = 0.1  # of a facet's normal so much must be new to make an axis
_FLAT = 1e-13  # components of normals and rays that are rounding


class SeparationFrame(NamedTuple):
    """Coordinates of P cells around their nearest points."""

    t0: Tensor  # (P,) distance of the nearest point
    slope: Tensor  # (P, L) g
    tilt: Tensor  # (P, L) centres of the laws that coordinates are drawn from
    origin: Tensor  # (P, L) nearest point on the original space
    image: Tensor  # (P, L, L) columns: what one step along each axis is on the original space
    normals: Tensor  # (P, F, L) N, zero where padded
    slack: Tensor  # (P, F) h, +inf where padded
    low: Tensor  # (P, L) least value of each coordinate on the cell
    high: Tensor  # (P, L) largest
    rest: Tensor  # (P, F, L) least value of what the coordinates after each add to N v
    pressure: Tensor  # (P, F) multipliers of the facets that hold the point: g . v is -sum of pressure (N v)
    facet: Tensor  # (P, L) the facet that each axis comes from, -1 for none
    room: Tensor  # (P, F) how far the cell reaches behind each facet, +inf where it has no end


def turned(cells: Polytopes, loc: Tensor, scale_tril: Tensor) -> SeparationFrame:
    """The frames of P cells for means (P, L) and Cholesky factors (P, L, L)."""
    view = sight(cells, loc, scale_tril)
    origin = loc + (scale_tril @ view.point[..., None])[..., 0]
    slack = (cells.offsets - (cells.normals @ origin[..., None])[..., 0]) / view.sizes
    F = slack.shape[1]
    # A facet that holds the nearest point has no slack but for rounding.
    is_held = torch.zeros(len(loc), F + 1, dtype=torch.bool, device=loc.device)
    is_held.scatter_(1, torch.where(view.held >= 0, view.held, F), True)
    is_held = is_held[:, :F] & cells.is_facet
    slack = torch.where(cells.is_facet, torch.where(is_held, 0.0, slack.clamp(min=0.0)), torch.inf)
    pressure = _pressure(view.normals, is_held, view.point)
    axes, tilt, facet = _axes(view.normals, slack, is_held, pressure)
    image = scale_tril @ axes.mT
    normals = view.normals @ axes.mT
    low, high, room = _extent(cells, origin, scale_tril, axes, normals, slack)
    end = torch.where(normals > _FLAT, low[:, None], torch.where(normals < -_FLAT, high[:, None], 0.0))
    least = torch.where(normals.abs() > _FLAT, normals * end, 0.0)
    rest = torch.nn.functional.pad(least[..., 1:], (0, 1)).flip(-1).cumsum(-1).flip(-1)
    return SeparationFrame(
        t0=torch.linalg.vector_norm(view.point, dim=1),
        slope=(axes @ view.point[..., None])[..., 0],
        tilt=tilt,
        origin=origin,
        image=image,
        normals=torch.where(normals.abs() > _FLAT, normals, 0.0),
        slack=slack,
        low=low,
        high=high,
        rest=rest,
        pressure=pressure,
        facet=facet,
        room=room,
    )


def _pressure(normals: Tensor, is_held: Tensor, point: Tensor) -> Tensor:
    """(P, F) multipliers of the facets that hold the nearest point: minus the point is their combination."""
    held = torch.where(is_held[..., None], normals, 0.0)
    found = torch.linalg.pinv(held.mT, rtol=1e-10) @ -point[..., None]
    return torch.where(is_held, found[..., 0].clamp(min=0.0), 0.0)


def _axes(normals: Tensor, slack: Tensor, is_held: Tensor, pressure: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Orthonormal rows (P, L, L), the centres (P, L) of the laws along them, and the facets (P, L) they come from.

    The slack s of a facet of multiplier p has nearly the density exp(-p s) in the tail, whatever the slacks of the others:
    centred so, the weights of points hardly differ there.
    """
    P, _, L = normals.shape
    left = normals.clone()
    eye = torch.eye(L, dtype=normals.dtype, device=normals.device)
    spare = eye.expand(P, L, L).clone()
    axes: list[Tensor] = []
    tilt, chosen = [], []
    every = torch.arange(P, device=normals.device)
    for _ in range(L):
        size = torch.linalg.vector_norm(left, dim=-1)
        score = torch.where(is_held & (size > _SPANNED), -1.0 - pressure, torch.inf)
        near = torch.where(size > _OBLIQUE, slack / size.clamp(min=_OBLIQUE), torch.inf)
        value, facet = torch.where(score.isinf(), near, score).min(1)
        # No facet left that bounds a new direction: any will do.
        spare_size = torch.linalg.vector_norm(spare, dim=-1)
        other = spare_size.argmax(1)
        found = value < torch.inf
        axis = torch.where(found[:, None], left[every, facet], spare[every, other])
        length = torch.linalg.vector_norm(axis, dim=-1)
        axis = axis / length[:, None]
        for q in axes:  # again, for the sake of rounding
            axis = axis - (axis * q).sum(1, keepdim=True) * q
        axis = axis / torch.linalg.vector_norm(axis, dim=-1, keepdim=True)
        axes.append(axis)
        tilt.append(torch.where(found, pressure[every, facet] * length, 0.0))
        chosen.append(torch.where(found, facet, -1))
        left = left - (left @ axis[..., None]) * axis[:, None]
        spare = spare - (spare @ axis[..., None]) * axis[:, None]
    return torch.stack(axes, dim=1), torch.stack(tilt, dim=1), torch.stack(chosen, dim=1)


def _extent(
    cells: Polytopes, origin: Tensor, scale_tril: Tensor, axes: Tensor, normals: Tensor, slack: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Least and largest value (P, L) of every coordinate on the cells, and their reach (P, F) behind each facet."""
    vertices, rays = generators_on(axes, cells, origin, scale_tril)
    is_vertex = cells.is_vertex[..., None]
    low = torch.where(is_vertex, vertices, torch.inf).amin(1).clamp(max=0.0)
    high = torch.where(is_vertex, vertices, -torch.inf).amax(1).clamp(min=0.0)
    low = torch.where((rays < -_FLAT).any(1), -torch.inf, low)
    high = torch.where((rays > _FLAT).any(1), torch.inf, high)
    behind = torch.where(is_vertex, slack[:, None] - vertices @ normals.mT, 0.0).amax(1)
    return low, high, torch.where((rays @ normals.mT < -_FLAT).any(1), torch.inf, behind)
