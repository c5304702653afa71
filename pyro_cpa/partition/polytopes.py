# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Convex polytopes of R^L, bounded or not, for any L: how they are stored and cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad

from .convex import DivisibleCells, weighted_points
from .double_description import edges, facets, front, onto, unit
from .walls import Walls

__all__ = ["Polytopes"]


@dataclass(frozen=True)
class Polytopes(DivisibleCells):
    r"""R convex polytopes of R^L, bounded or not, by their facets and by what generates them.

    .. math::

        \text{cell} = \{z : n_f \cdot z \le c_f \; \forall f\}
                    = \text{conv}(\text{vertices}) + \text{cone}(\text{rays}) + \text{span}(\text{lines})

    A vertex v is stored as (v, 1) and a ray u as (u, 0), which are one kind of generator of the cone over the
    cell. Which facets each generator lies on is kept next to it, so that edges are found without computing
    ranks. Lines are the directions along which the cell is unbounded both ways: a half-space of R^3 has two, one
    vertex (any point of its wall) and one ray.

    Args:
        normals: (R, F, L) unit outward normals, zero where padded.
        offsets: (R, F) signed distances of the facets from the origin, ``+inf`` where padded.
        points: (R, G, L + 1) vertices and unit rays, zero where padded.
        tight: (R, G, 1 + F) True where a generator lies on a facet; the first column is infinity, on which the
            rays lie.
        lines: (R, K, L) orthonormal directions, zero where padded.

    Note:
        Half-spaces are exact, vertices are derived: read widths of thin cells off ``offsets``.

    References:
        K. Fukuda, A. Prodon (1996), "Double description method revisited", Section 2.
    """

    normals: Tensor
    offsets: Tensor
    points: Tensor
    tight: Tensor
    lines: Tensor
    dim: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "dim", self.normals.shape[-1])

    def __len__(self) -> int:
        return self.offsets.shape[0]

    def __getitem__(self, index: Tensor) -> Polytopes:
        return Polytopes(*(part[index] for part in self._fields()))

    def _fields(self) -> tuple[Tensor, ...]:
        return self.normals, self.offsets, self.points, self.tight, self.lines

    @staticmethod
    def whole_space(dim: int, like: Tensor) -> Polytopes:
        """R^dim as one cell: the origin and ``dim`` lines, with the dtype and device of ``like``."""
        eye = torch.eye(dim + 1, dtype=like.dtype, device=like.device)
        return Polytopes(
            normals=like.new_zeros(1, 0, dim),
            offsets=like.new_zeros(1, 0),
            points=eye[None, -1:],
            tight=torch.zeros(1, 1, 1, dtype=torch.bool, device=like.device),
            lines=eye[None, :-1, :-1],
        )

    @staticmethod
    def cat(parts: Sequence[Polytopes]) -> Polytopes:
        """All cells of ``parts``, in order."""
        parts = [part for part in parts if len(part)] or list(parts[:1])
        F, G, K = (max(n) for n in zip(*(p._sizes() for p in parts), strict=True))
        padded = [
            (
                pad(p.normals, (0, 0, 0, F - f)),
                pad(p.offsets, (0, F - f), value=torch.inf),
                pad(p.points, (0, 0, 0, G - g)),
                pad(p.tight, (0, F - f, 0, G - g)),
                pad(p.lines, (0, 0, 0, K - k)),
            )
            for p, (f, g, k) in ((p, p._sizes()) for p in parts)
        ]
        return Polytopes(*(torch.cat(fields) for fields in zip(*padded, strict=True)))

    def _sizes(self) -> tuple[int, int, int]:
        return self.offsets.shape[1], self.points.shape[1], self.lines.shape[1]

    @property
    def is_facet(self) -> Tensor:
        """(R, F) True for a facet, False for padding."""
        return torch.isfinite(self.offsets)

    @property
    def is_vertex(self) -> Tensor:
        """(R, G) True for a vertex, False for a ray or padding."""
        return self.points[..., -1] > 0

    @property
    def is_ray(self) -> Tensor:
        """(R, G) True for a ray, False for a vertex or padding."""
        return ~self.is_vertex & (self.points != 0).any(-1)

    def generators(self) -> Tensor:
        return torch.cat([self._weighted, pad(torch.cat([self.lines, -self.lines], dim=1), (0, 1))], dim=1)

    @cached_property
    def _weighted(self) -> Tensor:
        """(R, G, L + 1) the points, scaled as ``generators`` promises."""
        is_vertex = self.is_vertex
        return torch.where(
            is_vertex[..., None], weighted_points(self.points[..., :-1], is_vertex), self.points
        )

    def halves(self, walls: Walls) -> tuple[Polytopes, Polytopes]:
        """Both parts of each cell: ``normal . z <= offset`` and the rest. Wall p crosses cell p.

        A vertex that is on the wall but for rounding belongs to both parts, and takes the wall as a facet.
        """
        along = (self.lines @ walls.normal[..., None])[..., 0]
        across = (along.abs() > walls.tilt[:, None] * self.lines.abs().sum(-1)).any(1)
        free, bound = across.nonzero()[:, 0], (~across).nonzero()[:, 0]
        parts = []
        if len(free):
            parts.append(self[free]._open(walls[free], along[free]))
        if len(bound) or not parts:
            parts.append(self[bound]._split(walls[bound]))
        back = torch.cat([free, bound]).argsort()
        below, above = (Polytopes.cat(side)[back] for side in zip(*parts, strict=True))
        return below, above

    def _open(self, walls: Walls, along: Tensor) -> tuple[Polytopes, Polytopes]:
        """Parts of cells one of whose lines crosses the wall: it becomes a ray, all else goes onto the wall."""
        size = torch.linalg.vector_norm(along, dim=1, keepdim=True)
        share = along / size
        direction = (share[:, None] @ self.lines)[:, 0]
        depth = self.points @ torch.cat([walls.normal, -walls.offset[:, None]], dim=1)[..., None]
        # The wall meets the lines' span along the direction in which it is steepest there.
        shift = depth[..., 0] / size
        points = self.points - pad(shift[..., None] * direction[:, None], (0, 1))
        points = torch.where(self.is_ray[..., None], unit(points), points)
        exists = self.is_vertex | self.is_ray
        on_wall = torch.cat([self.tight, exists[..., None]], dim=2)
        # A reflection that takes the direction to one of the lines keeps the others orthonormal.
        row = share.abs().argmax(1)
        here = torch.arange(len(row), device=row.device)
        mirror = share.clone()
        mirror[here, row] += torch.where(share[here, row] < 0, -1.0, 1.0)
        turn = 2 * (mirror[:, None] @ self.lines) / mirror.square().sum(1)[:, None, None]
        lines = self.lines - mirror[..., None] * turn
        lines[here, row] = lines[:, -1].clone()
        lines = lines[:, :-1]
        # The ray lies on every facet so far and at infinity, but not on the wall.
        ray_tight = pad(pad(self.is_facet, (1, 0), value=True), (0, 1))[:, None]
        kept = pad(exists, (0, 1), value=True)
        tight = torch.cat([on_wall, ray_tight], dim=1)

        def part(sign: float) -> Polytopes:
            ray = pad(-sign * direction, (0, 1))[:, None]
            return self._with_wall(walls, sign, torch.cat([points, ray], dim=1), kept, tight, lines)

        return part(1.0), part(-1.0)

    def _split(self, walls: Walls) -> tuple[Polytopes, Polytopes]:
        """Parts of cells whose lines are all parallel to the wall: it meets them in edges and vertices."""
        weighted = self._weighted
        plane = torch.cat([walls.normal, -walls.offset[:, None]], dim=1)
        depth = (weighted @ plane[..., None])[..., 0]
        noise = (
            walls.tilt[:, None] * weighted[..., :-1].abs().sum(-1) + walls.shift[:, None] * weighted[..., -1]
        )
        above, below = depth > noise, depth < -noise
        exists = self.is_vertex | self.is_ray
        on_wall = exists & ~above & ~below
        cell, up, down = edges(self.tight, exists, self._rank(), above, below)
        high, low = depth[cell, up], -depth[cell, down]
        met = low[:, None] * weighted[cell, up] + high[:, None] * weighted[cell, down]
        is_vertex = met[:, -1:] > 0
        met = torch.where(is_vertex, met / torch.where(is_vertex, met[:, -1:], 1.0), unit(met))
        planes = torch.cat([self.normals, -torch.where(self.is_facet, self.offsets, 0.0)[..., None]], dim=2)
        shared = (self.tight[cell, up] & self.tight[cell, down])[:, 1:, None]
        met = onto(met, torch.cat([planes[cell] * shared, plane[cell, None]], dim=1))
        # New vertices behind the old ones, as many columns as the cell with most has.
        count = torch.bincount(cell, minlength=len(self))
        column = torch.arange(len(cell), device=cell.device) - (count.cumsum(0) - count)[cell]
        most = int(count.max()) if len(count) else 0
        points = pad(self.points, (0, 0, 0, most))
        tight = pad(torch.cat([self.tight, on_wall[..., None]], dim=2), (0, 0, 0, most))
        is_new = pad(torch.zeros_like(exists), (0, most))
        column = column + exists.shape[1]
        points[cell, column] = met
        tight[cell, column, :-1] = self.tight[cell, up] & self.tight[cell, down]
        tight[cell, column, -1] = True
        is_new[cell, column] = True
        sides = (pad(exists & ~other, (0, most)) | is_new for other in (above, below))
        lower, upper = (
            self._with_wall(walls, sign, points, kept, tight, self.lines)
            for sign, kept in zip((1.0, -1.0), sides, strict=True)
        )
        return lower, upper

    def _rank(self) -> Tensor:
        """(R,) least number of facets that an edge lies on."""
        return self.dim - 1 - (self.lines != 0).any(-1).sum(1)

    def _with_wall(
        self, walls: Walls, sign: float, points: Tensor, kept: Tensor, tight: Tensor, lines: Tensor
    ) -> Polytopes:
        """The cells with the wall as one more facet and the ``kept`` generators; padding moves to the end."""
        normals = torch.cat([self.normals, sign * walls.normal[:, None]], dim=1)
        offsets = torch.cat([self.offsets, sign * walls.offset[:, None]], dim=1)
        order, kept = front(kept)
        points = points.gather(1, order[..., None].expand(-1, -1, points.shape[2]))
        tight = tight.gather(1, order[..., None].expand(-1, -1, tight.shape[2])) & kept[..., None]
        is_facet = facets(tight) & torch.isfinite(offsets)
        columns, is_facet = front(is_facet)
        infinity = tight[..., :1]
        tight = tight[..., 1:].gather(2, columns[:, None].expand(-1, tight.shape[1], -1))
        used = (lines != 0).any(-1)
        lines_order, used = front(used)
        return Polytopes(
            normals=normals.gather(1, columns[..., None].expand(-1, -1, self.dim)) * is_facet[..., None],
            offsets=torch.where(is_facet, offsets.gather(1, columns), torch.inf),
            points=torch.where(kept[..., None], points, 0.0),
            tight=torch.cat([infinity, tight & is_facet[:, None]], dim=2),
            lines=lines.gather(1, lines_order[..., None].expand(-1, -1, self.dim)),
        )
