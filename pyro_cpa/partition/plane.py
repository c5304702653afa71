# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""The plane cut into convex polygons, with the tree of cuts that finds the polygon of a point."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from .arrangement import Arrangement
from .cells import Polygons
from .walls import Walls

__all__ = ["Plane", "halves"]


def halves(cells: Polygons, walls: Walls) -> tuple[Polygons, Polygons]:
    """Both parts of each cell: ``normal . z <= offset`` and the rest. Wall p crosses cell p.

    Every edge is clipped by the wall along its own line, and the new edge is what the other edges leave of
    the wall: no corner is ever computed from another corner, and unbounded edges need no special case.
    """
    normal, offset = walls.normal[:, None], walls.offset[:, None]
    is_edge, c = cells.is_edge, torch.where(cells.is_edge, cells.offsets, 0.0)
    # On edge e the wall is where  s slope = gap;  on the wall edge e is where  -s slope = room.
    slope = (cells.tangents * normal).sum(-1)
    cosine = (cells.normals * normal).sum(-1)
    gap, room = offset - c * cosine, c - offset * cosine
    parallel = slope.abs() <= 2 * walls.tilt[:, None]
    crossing = torch.where(parallel, torch.where(gap >= 0, torch.inf, -torch.inf), gap / slope)
    rising = parallel | (slope > 0)
    below_starts = torch.where(rising, cells.starts, torch.maximum(cells.starts, crossing))
    below_ends = torch.where(rising, torch.minimum(cells.ends, crossing), cells.ends)
    above_starts = torch.where(rising, torch.maximum(cells.starts, crossing), cells.starts)
    above_ends = torch.where(rising, cells.ends, torch.minimum(cells.ends, crossing))
    limits = is_edge & ~parallel
    meets = -room / slope
    # A column without limit, for cells without edges.
    high = pad(torch.where(limits & (slope < 0), meets, torch.inf), (0, 1), value=torch.inf).amin(1)
    low = pad(torch.where(limits & (slope > 0), meets, -torch.inf), (0, 1), value=-torch.inf).amax(1)
    below = _with_edge(cells, is_edge, below_starts, below_ends, walls.normal, walls.offset, low, high)
    above = _with_edge(cells, is_edge, above_starts, above_ends, -walls.normal, -walls.offset, -high, -low)
    return below, above


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


class Plane(Arrangement):
    """The plane, cut into convex polygons.

    All cells are cut at once, each by one of its walls; the parts inherit the walls that cross them, until
    none is left.
    """

    def __init__(self, like: Tensor) -> None:
        self.cells: Polygons = Polygons.whole_plane(like)
        self._slots = torch.zeros(1, dtype=torch.long, device=like.device)
        self._tree = _CutTree()

    def cut(self, walls: Walls, check: Callable[[int], None]) -> Tensor:
        R = len(self.cells)
        # Cleanest first, so that an exact wall decides before its noisy copy does.
        walls = walls[walls.tilt.log10().floor().argsort(stable=True)]
        walls = walls[walls.cell.argsort(stable=True)]
        cells, slots = self.cells, self._slots
        parents = torch.arange(R, device=slots.device)
        finished: list[tuple[Polygons, Tensor, Tensor]] = []
        count = R
        while True:
            pending = torch.bincount(walls.cell, minlength=len(cells)) > 0
            finished.append((cells[~pending], parents[~pending], slots[~pending]))
            if not len(walls):
                break
            cells, parents, slots = cells[pending], parents[pending], slots[pending]
            walls = walls.of((pending.cumsum(0) - 1)[walls.cell])
            count += len(cells)
            check(count)
            is_first = torch.ones_like(walls.cell, dtype=torch.bool)
            is_first[1:] = walls.cell.diff() > 0
            chosen, rest = walls[is_first], walls[~is_first]
            slots = self._tree.add(slots, chosen)
            parents = parents.repeat(2)
            rest = Walls.cat([rest, rest.of(rest.cell + len(cells))])
            cells = Polygons.cat(halves(cells, chosen))
            walls = rest[rest.cross(cells.generators()[rest.cell])]
        self.cells = Polygons.cat([cells for cells, _, _ in finished])
        self._slots = torch.cat([slots for _, _, slots in finished])
        return torch.cat([parents for _, parents, _ in finished])

    def locate(self, z: Tensor) -> Tensor:
        return self._tree.locate(z, self._slots)


class _CutTree:
    """The cuts as a binary tree: node j is a wall, with what lies below it and above it.

    Slot 0 holds the root, slots 1 + 2j and 2 + 2j the children of node j. A slot holds a node, or ~r for
    cell r.
    """

    def __init__(self) -> None:
        self._normals: list[Tensor] = []
        self._offsets: list[Tensor] = []
        self._slots: list[Tensor] = []
        self._size = 0

    def add(self, slots: Tensor, walls: Walls) -> Tensor:
        """Put one node into each of ``slots``; returns the slots of all lower, then of all upper children."""
        self._normals.append(walls.normal)
        self._offsets.append(walls.offset)
        self._slots.append(slots)
        nodes = torch.arange(self._size, self._size + len(slots), device=slots.device)
        self._size += len(slots)
        return torch.cat([1 + 2 * nodes, 2 + 2 * nodes])

    def locate(self, z: Tensor, leaves: Tensor) -> Tensor:
        """Cell of each point of z (N, 2); ``leaves`` are the slots of the cells."""
        if self._size == 0:
            return torch.zeros(len(z), dtype=torch.long, device=z.device)
        self._normals, self._offsets, self._slots = (
            [torch.cat(parts)] for parts in (self._normals, self._offsets, self._slots)
        )
        normals, offsets = self._normals[0], self._offsets[0]
        child = leaves.new_empty(1 + 2 * self._size)
        child[self._slots[0]] = torch.arange(self._size, device=child.device)
        child[leaves] = ~torch.arange(len(leaves), device=child.device)
        found = child[:1].expand(len(z)).clone()
        active = torch.arange(len(z), device=z.device)
        while len(active):
            node = found[active]
            above = (normals[node] * z[active]).sum(-1) > offsets[node]
            found[active] = child[1 + 2 * node + above.long()]
            active = active[found[active] >= 0]
        return ~found
