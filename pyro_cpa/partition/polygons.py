# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Convex polygons of the plane, bounded or not: how they are stored, cut and drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from .convex import Bound, DivisibleCells, weighted_points
from .walls import NOISE, Walls

__all__ = ["Polygons"]


@dataclass(frozen=True)
class Polygons(DivisibleCells):
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
    def of_edges(edges: Tensor, first: Tensor) -> Polygons:
        """Cells from rows (normal, offset, start, end); those of cell r are ``first[r]`` to ``first[r + 1] - 1``."""
        many = first.diff()
        cell = torch.repeat_interleave(many)
        place = cell, torch.arange(len(edges), device=first.device) - first[cell]
        fields = edges.new_zeros(len(many), int(many.max()), 5)
        fields[..., 2] = torch.inf
        fields[place] = edges
        normals, *others = (part.squeeze(-1).contiguous() for part in fields.split([2, 1, 1, 1], -1))
        return Polygons(normals, *others)

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
            # Three directions that positively span the plane; the origin tells the sign of what is constant on it.
            fan = [[1.0, 0.0, 0.0], [-0.5, 0.75**0.5, 0.0], [-0.5, -(0.75**0.5), 0.0], [0.0, 0.0, 1.0]]
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
        corners = weighted_points(points, is_edge)
        if not bool((start_open | end_open).any()):
            return corners
        inward = -self.normals[:, 0] * (is_edge.sum(1) == 1)[:, None]
        rays = torch.stack([-_first(tangents, start_open), _first(tangents, end_open), inward], dim=1)
        return torch.cat([corners, pad(rays, (0, 1))], dim=1)

    @property
    def tangents(self) -> Tensor:
        """(R, E, 2) unit direction of each edge, counter-clockwise around the cell."""
        return torch.stack([-self.normals[..., 1], self.normals[..., 0]], dim=-1)

    def halves(self, walls: Walls) -> tuple[Polygons, Polygons]:
        """Both parts of each cell: ``normal . z <= offset`` and the rest. Wall p crosses cell p.

        Every edge is clipped by the wall along its own line, and the new edge is what the other edges leave of
        the wall: no corner is ever computed from another corner, and unbounded edges need no special case.
        """
        normal, offset = walls.normal[:, None], walls.offset[:, None]
        is_edge, c = self.is_edge, torch.where(self.is_edge, self.offsets, 0.0)
        # On edge e the wall is where  s slope = gap;  on the wall edge e is where  -s slope = room.
        slope = (self.tangents * normal).sum(-1)
        cosine = (self.normals * normal).sum(-1)
        gap, room = offset - c * cosine, c - offset * cosine
        parallel = slope.abs() <= 2 * walls.tilt[:, None]
        crossing = torch.where(parallel, torch.where(gap >= 0, torch.inf, -torch.inf), gap / slope)
        rising = parallel | (slope > 0)
        below_starts = torch.where(rising, self.starts, torch.maximum(self.starts, crossing))
        below_ends = torch.where(rising, torch.minimum(self.ends, crossing), self.ends)
        above_starts = torch.where(rising, torch.maximum(self.starts, crossing), self.starts)
        above_ends = torch.where(rising, self.ends, torch.minimum(self.ends, crossing))
        limits = is_edge & ~parallel
        meets = -room / slope
        # A column without limit, for cells without edges.
        high = pad(torch.where(limits & (slope < 0), meets, torch.inf), (0, 1), value=torch.inf).amin(1)
        low = pad(torch.where(limits & (slope > 0), meets, -torch.inf), (0, 1), value=-torch.inf).amax(1)
        below = _with_edge(self, is_edge, below_starts, below_ends, walls.normal, walls.offset, low, high)
        above = _with_edge(self, is_edge, above_starts, above_ends, -walls.normal, -walls.offset, -high, -low)
        return below, above

    def clip_to_box(self, low: Bound, high: Bound) -> list[np.ndarray]:
        R = len(self)
        cells, shown = self, torch.arange(R, device=self.offsets.device)
        for axis in (0, 1):
            for sign, ends in ((1.0, high), (-1.0, low)):
                normal = self.offsets.new_zeros(len(cells), 2)
                normal[:, axis] = sign
                offset = normal.new_full((len(cells),), sign * float(np.broadcast_to(ends, 2)[axis]))
                walls = Walls(shown, normal, offset, *offset.new_full((2, len(cells)), NOISE))
                crossed = walls.cross(cells.generators())
                inside = ~crossed & ((cells.interior_points() * normal).sum(-1) < offset)
                below, _ = cells[crossed].halves(walls[crossed])
                cells = Polygons.cat([cells[inside], below])
                shown = torch.cat([shown[inside], shown[crossed]])
        # Around a convex polygon the normals of the edges turn counter-clockwise.
        angle = torch.where(
            cells.is_edge, torch.atan2(cells.normals[..., 1], cells.normals[..., 0]), torch.inf
        )
        order = angle.argsort(dim=1)
        distance = torch.where(cells.is_edge, cells.offsets, 0.0)[..., None]
        corners = distance * cells.normals + cells.starts[..., None] * cells.tangents
        in_order = corners.gather(1, order[..., None].expand(-1, -1, 2)).cpu().numpy()
        drawn = [np.empty((0, 2))] * R
        for r, points, count in zip(shown.tolist(), in_order, cells.is_edge.sum(1).tolist(), strict=True):
            drawn[r] = points[:count]
        return drawn


def _with_edge(
    cells: Polygons,
    is_edge: Tensor,
    starts: Tensor,
    ends: Tensor,
    normal: Tensor,
    offset: Tensor,
    start: Tensor,
    end: Tensor,
) -> Polygons:
    """The cells with clipped edges and one new edge each; empty edges go, padding moves to the end."""
    starts = torch.cat([starts, start[:, None]], dim=1)
    ends = torch.cat([ends, end[:, None]], dim=1)
    keep = (starts < ends) & pad(is_edge, (0, 1), value=True)
    edges = int(keep.sum(1).max()) if len(keep) else 0
    order = keep.int().argsort(dim=1, descending=True, stable=True)[:, :edges]
    keep = keep.gather(1, order)
    normals = torch.cat([cells.normals, normal[:, None]], dim=1).gather(1, order[..., None].expand(-1, -1, 2))
    offsets = torch.cat([cells.offsets, offset[:, None]], dim=1).gather(1, order)
    return Polygons(
        torch.where(keep[..., None], normals, 0.0),
        torch.where(keep, offsets, torch.inf),
        torch.where(keep, starts.gather(1, order), 0.0),
        torch.where(keep, ends.gather(1, order), 0.0),
    )


def _first(vectors: Tensor, mask: Tensor) -> Tensor:
    """The first of ``vectors`` (R, E, 2) at which ``mask`` (R, E) holds; zero where it never does."""
    index = mask.int().argmax(1)
    rows = torch.arange(len(mask), device=mask.device)
    return vectors[rows, index] * mask.any(1)[:, None]
