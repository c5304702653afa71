# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
r"""Polytopes seen from a Gaussian: whitened facets, the point nearest the mean, and axes to slice along.

In whitened coordinates :math:`y = C^{-1}(z - \mu)` the first axis leads from the mean to the cell's nearest point
:math:`y_0`. At :math:`y = y_0 + \tau e_1 + s`, with s across the first axis, the Gaussian has the density

.. math:: \phi(y) = (2\pi)^{-L/2} \exp(-t_0^2/2 - t_0 \tau - \tau^2/2 - |s|^2/2), \qquad t_0 = |y_0|.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_cpa.integrals.polytope_nearest import nearest_in_half_spaces
from pyro_cpa.partition.cells import Polytopes

__all__ = ["WINDOW", "Frame", "Sight", "facing", "generators_on", "sight", "whiten"]

WINDOW = 8.6  # beyond this distance from the nearest point lies less than 1e-13 of a cell's mass
_ALIGNED = 0.9  # normals with a larger cosine are compared by their difference
_THIN = 0.3  # cells thinner than this share of the density's scale are measured from one of their sides


class Sight(NamedTuple):
    """P cells as their means see them."""

    normals: Tensor  # (P, F, L) whitened unit normals, zero where padded
    sizes: Tensor  # (P, F) a distance from the facet on the original space over its whitened one
    distances: Tensor  # (P, F) whitened distances of the facets from the mean, +inf where padded
    point: Tensor  # (P, L) whitened nearest point, zero if the mean is inside
    held: Tensor  # (P, L) facets that the nearest point lies on, -1 for none


def whiten(normals: Tensor, scale_tril: Tensor) -> tuple[Tensor, Tensor]:
    """Whitened unit normals (..., F, L) and their sizes (..., F); padding stays zero, of size 1."""
    normals = normals @ scale_tril
    sizes = torch.linalg.vector_norm(normals, dim=-1)
    sizes = torch.where(sizes > 0, sizes, 1.0)
    return normals / sizes[..., None], sizes


def sight(cells: Polytopes, loc: Tensor, scale_tril: Tensor) -> Sight:
    """Facets and nearest points of P cells for means (P, L) and Cholesky factors (P, L, L)."""
    normals, sizes = whiten(cells.normals, scale_tril)
    distances = (cells.offsets - (cells.normals @ loc[..., None])[..., 0]) / sizes
    return Sight(normals, sizes, distances, *nearest_in_half_spaces(normals, distances))


class Frame(NamedTuple):
    """Axes at the nearest point of P cells; the facets are where ``along tau + across . s <= slack``."""

    t0: Tensor  # (P,) distance of the nearest point
    image: Tensor  # (P, L, L) columns: what one step along each axis is on the original space
    origin: Tensor  # (P, L) nearest point on the original space
    along: Tensor  # (P, F) zero where padded
    across: Tensor  # (P, F, L - 1) zero where padded
    slack: Tensor  # (P, F) +inf where padded
    pivot: Tensor  # (P,) the facet to measure from
    # The same three for points on the pivot's hyperplane: of facets nearly parallel to the pivot, the
    # differences from it. They keep the digits of the width of a thin cell.
    along_gap: Tensor
    across_gap: Tensor
    slack_gap: Tensor
    vertices: Tensor  # (P, G, L) on the axes, NaN where there is none
    rays: Tensor  # (P, G + 2 K, L) unit rays, lines and opposite lines on the axes, zero where there is none
    tight: Tensor  # (P, G + 2 K, F) True where a vertex or ray lies on a facet; lines lie on all


def facing(cells: Polytopes, loc: Tensor, scale_tril: Tensor) -> Frame:
    """The frames of P cells. For a mean inside its cell the first axis leads to the nearest facet."""
    view = sight(cells, loc, scale_tril)
    P, L = loc.shape
    every = torch.arange(P, device=loc.device)
    t0 = torch.linalg.vector_norm(view.point, dim=1)
    inside = t0 == 0
    facet = torch.where(inside, view.distances.argmin(1), view.held[:, 0].clamp(min=0))
    first = torch.where(
        inside[:, None], view.normals[every, facet], view.point / torch.where(inside, 1.0, t0)[:, None]
    )
    axes = _basis(first)
    image = scale_tril @ axes.mT
    origin = loc + (scale_tril @ view.point[..., None])[..., 0]

    vertices, rays = generators_on(axes, cells, origin, scale_tril)
    vertices = torch.where(cells.is_vertex[..., None], vertices, torch.nan)

    straight = view.normals @ axes.mT
    offsets = torch.where(cells.is_facet, cells.offsets, 0.0)
    slack = (offsets - (cells.normals @ origin[..., None])[..., 0]) / view.sizes
    pivot = _pivot(facet, straight, slack, vertices, rays, cells.is_facet)
    normal, offset = cells.normals[every, pivot], offsets[every, pivot]
    cosine = (cells.normals @ normal[..., None])[..., 0]
    sign = torch.where(cosine.abs() > _ALIGNED, cosine.sign(), 0.0)
    turned = cells.normals - sign[..., None] * normal[:, None]
    slack_gap = (offsets - sign * offset[:, None]) - (turned @ origin[..., None])[..., 0]
    held = (view.held == pivot[:, None]).any(1)
    at_pivot = torch.where(held, 0.0, offset - (normal * origin).sum(1))
    turned = turned @ image / view.sizes[..., None]
    padding = torch.where(cells.is_facet, 0.0, torch.inf)
    return Frame(
        t0=t0,
        image=image,
        origin=origin,
        along=straight[..., 0],
        across=straight[..., 1:],
        slack=(slack_gap + sign * at_pivot[:, None]) / view.sizes + padding,
        pivot=pivot,
        along_gap=turned[..., 0],
        across_gap=turned[..., 1:],
        slack_gap=slack_gap / view.sizes + padding,
        vertices=vertices,
        rays=rays,
        tight=torch.cat(
            [cells.tight[..., 1:], cells.is_facet[:, None].expand(-1, 2 * cells.lines.shape[1], -1)], dim=1
        ),
    )


def generators_on(
    axes: Tensor, cells: Polytopes, origin: Tensor, scale_tril: Tensor
) -> tuple[Tensor, Tensor]:
    """What spans P cells, on whitened axes (rows of (P, L, L)) at an origin (P, L).

    Returns:
        vertices (P, G, L), zero where there is none, and unit rays (P, G + 2 K, L): rays, lines and opposite lines, zero
        where there is none.
    """

    def on_axes(vectors: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(scale_tril, vectors.mT, upper=False).mT @ axes.mT

    is_vertex, points = cells.is_vertex[..., None], cells.points[..., :-1]
    vertices = on_axes(torch.where(is_vertex, points - origin[:, None], 0.0))
    rays = on_axes(torch.cat([torch.where(is_vertex, 0.0, points), cells.lines, -cells.lines], dim=1))
    length = torch.linalg.vector_norm(rays, dim=-1, keepdim=True)
    return vertices, rays / torch.where(length > 0, length, 1.0)


def _basis(first: Tensor) -> Tensor:
    """Orthonormal rows (P, L, L), of which the first is given: a reflection that takes a unit vector to it.

    A zero vector gives the identity.
    """
    eye = torch.eye(first.shape[1], dtype=first.dtype, device=first.device)
    sign = torch.where(first[:, :1] < 0, -1.0, 1.0)
    mirror = first + sign * eye[0]
    rows = eye - mirror[..., None] * mirror[:, None] * (2 / mirror.square().sum(1))[:, None, None]
    given = (first != 0).any(1)[:, None]
    return torch.cat([torch.where(given, first, eye[0])[:, None], rows[:, 1:]], dim=1)


def _pivot(
    facet: Tensor, normals: Tensor, slack: Tensor, vertices: Tensor, rays: Tensor, is_facet: Tensor
) -> Tensor:
    """The facet with the thinnest layer of the cell behind it, if that is thin, else the given one."""
    behind = slack[:, None] - vertices @ normals.mT
    widest = behind.nan_to_num(nan=0.0).amax(1)
    leaves = (rays @ normals.mT < -1e-12).any(1)
    width, thinnest = torch.where(is_facet & ~leaves, widest, torch.inf).min(1)
    return torch.where(width < _THIN, thinnest, facet)
