# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Batches of convex cells: the geometry that partitions build and integrals consume."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["Cells", "Intervals", "Polygons", "WholeSpace"]


class Cells:
    """A batch of R convex cells of R^L (base class; ``len(cells)`` is R, ``cells[index]`` a sub-batch)."""

    dim: int

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: Tensor) -> Cells:
        raise NotImplementedError

    def generators(self) -> Tensor:
        """Homogeneous points (R, G, L + 1) whose non-negative combinations are the closed cells.

        A row ``(w v, w)`` with w > 0 is the point v, weighted by w = 1 / (1 + |v|); a row ``(u, 0)`` is
        the direction u in which the cell is unbounded; a row of zeros is padding.
        """
        raise NotImplementedError

    def interior_points(self) -> Tensor:
        """A finite point (R, L) in the interior of each cell, slivers and unbounded cells included.

        It is the sum of the generators. Their weights keep it near the nearest corners, and the depth
        behind any wall, relative to rounding at that point, is at least the deepest corner's divided by
        the number of corners.
        """
        total = self.generators().sum(1)
        weight = total[:, -1:]
        return torch.where(weight > 0, total[:, :-1] / torch.where(weight > 0, weight, 1.0), 0.0)


@dataclass(frozen=True)
class WholeSpace(Cells):
    """The single cell R^L of an affine decoder, in any dimension."""

    dim: int

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: Tensor) -> WholeSpace:
        return self

    def generators(self) -> Tensor:
        eye = torch.eye(self.dim, dtype=torch.float64)
        directions = torch.cat([eye, -eye])
        return torch.cat([directions, torch.zeros_like(directions[:, :1])], dim=1)[None]


@dataclass(frozen=True)
class Intervals(Cells):
    """R intervals ``[lower_r, upper_r]`` of the line; the outer ends are infinite.

    Args:
        lower: (R,) float64, ``-inf`` allowed.
        upper: (R,) float64, ``+inf`` allowed.
    """

    lower: Tensor
    upper: Tensor
    dim: int = 1

    def __len__(self) -> int:
        return self.lower.shape[0]

    def __getitem__(self, index: Tensor) -> Intervals:
        return Intervals(self.lower[index], self.upper[index])

    def generators(self) -> Tensor:
        ends = torch.stack([self.lower, self.upper], dim=1)
        finite = torch.isfinite(ends)
        weight = torch.where(finite, 1 / (1 + ends.abs()), 0.0)
        return torch.stack([torch.where(finite, ends * weight, ends.sign()), weight], dim=-1)


@dataclass(frozen=True)
class Polygons(Cells):
    r"""R convex polygons of the plane, bounded or not, each an unordered set of edges.

    Edge e of cell r lies on the line :math:`n \cdot z = c` with the cell on the side
    :math:`n \cdot z \le c`; its points are :math:`c\,n + s\,t` for ``start <= s <= end``, where
    :math:`t = (-n_2, n_1)` runs counter-clockwise around the cell. An edge may reach to infinity
    (``start = -inf`` and/or ``end = +inf``); a cell without edges is the whole plane, one with a single
    edge a half-plane. Widths of thin cells are read off ``offsets``, never off the vertices, so a sliver
    keeps its digits.

    Args:
        normals: (R, E, 2) unit outward normals, zero where padded.
        offsets: (R, E) signed distances c of the lines from the origin, ``+inf`` where padded.
        starts: (R, E) first end of each edge, ``-inf`` allowed; zero where padded.
        ends: (R, E) second end of each edge, ``+inf`` allowed; zero where padded.
    """

    normals: Tensor
    offsets: Tensor
    starts: Tensor
    ends: Tensor
    dim: int = 2

    def __len__(self) -> int:
        return self.offsets.shape[0]

    def __getitem__(self, index: Tensor) -> Polygons:
        return Polygons(self.normals[index], self.offsets[index], self.starts[index], self.ends[index])

    @staticmethod
    def whole_plane(like: Tensor) -> Polygons:
        """The plane as one cell without edges, with the dtype and device of ``like``."""
        empty = like.new_zeros(1, 0)
        return Polygons(like.new_zeros(1, 0, 2), empty, empty, empty)

    @staticmethod
    def cat(parts: Sequence[Polygons]) -> Polygons:
        """All cells of ``parts``, in order."""
        edges = max(part.offsets.shape[1] for part in parts)
        return Polygons(
            torch.cat([pad(p.normals, (0, 0, 0, edges - p.normals.shape[1])) for p in parts]),
            torch.cat([pad(p.offsets, (0, edges - p.offsets.shape[1]), value=torch.inf) for p in parts]),
            torch.cat([pad(p.starts, (0, edges - p.starts.shape[1])) for p in parts]),
            torch.cat([pad(p.ends, (0, edges - p.ends.shape[1])) for p in parts]),
        )

    @property
    def is_edge(self) -> Tensor:
        """(R, E) True for an edge, False for padding."""
        return torch.isfinite(self.offsets)

    def generators(self) -> Tensor:
        R, edges = self.offsets.shape
        if edges == 0:
            # Three directions that positively span the plane.
            fan = [[1.0, 0.0, 0.0], [-0.5, 0.75**0.5, 0.0], [-0.5, -(0.75**0.5), 0.0]]
            return self.offsets.new_tensor(fan).expand(R, -1, -1)
        is_edge = self.is_edge
        start_open, end_open = torch.isinf(self.starts), torch.isinf(self.ends)
        # Every corner is the start of one edge; only the edge that comes from infinity offers its end
        # instead, and a full line its foot point.
        along = torch.where(start_open, torch.where(end_open, 0.0, self.ends), self.starts)
        tangents = self.tangents
        points = (
            torch.where(is_edge, self.offsets, 0.0)[..., None] * self.normals + along[..., None] * tangents
        )
        weight = torch.where(is_edge, 1 / (1 + torch.linalg.vector_norm(points, dim=-1)), 0.0)
        corners = torch.cat([points * weight[..., None], weight[..., None]], dim=-1)
        if not bool((start_open | end_open).any()):
            return corners
        inward = -self.normals[:, 0] * (is_edge.sum(1) == 1)[:, None]
        rays = torch.stack([-_first(tangents, start_open), _first(tangents, end_open), inward], dim=1)
        return torch.cat([corners, pad(rays, (0, 1))], dim=1)

    @property
    def tangents(self) -> Tensor:
        """(R, E, 2) unit direction of each edge, counter-clockwise around the cell."""
        return torch.stack([-self.normals[..., 1], self.normals[..., 0]], dim=-1)


def _first(vectors: Tensor, mask: Tensor) -> Tensor:
    """The first of ``vectors`` (R, E, 2) at which ``mask`` (R, E) holds; zero where it never does."""
    index = mask.int().argmax(1)
    rows = torch.arange(len(mask), device=mask.device)
    return vectors[rows, index] * mask.any(1)[:, None]
