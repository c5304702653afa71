# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""The plane cut into polygons, or R^L into polytopes, with the tree of cuts that finds the cell of a point."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..compiled import array, runs_compiled
from .arrangement import Arrangement, Budget
from .convex import DivisibleCells
from .polygons import Polygons
from .polytopes import Polytopes
from .walls import Walls

__all__ = ["Plane"]


class Plane(Arrangement):
    """The plane, or R^dim for any larger dim, cut into convex cells.

    All cells are cut at once, each by one of its walls; the parts inherit the walls that cross them, until
    none is left. Where loops are compiled, polygons are cut one after the other instead, into the same parts.
    """

    def __init__(self, like: Tensor, dim: int = 2) -> None:
        self.cells: DivisibleCells = (
            Polygons.whole_plane(like) if dim == 2 else Polytopes.whole_space(dim, like)
        )
        self._slots = torch.zeros(1, dtype=torch.long, device=like.device)
        self._tree = _CutTree()

    def cut(self, walls: Walls, budget: Budget) -> Tensor:
        # Cleanest first, so that an exact wall decides before its noisy copy does.
        walls = walls[walls.tilt.log10().floor().argsort(stable=True)]
        walls = walls[walls.cell.argsort(stable=True)]
        if isinstance(self.cells, Polygons) and runs_compiled(walls.offset):
            return self._cut_polygons(self.cells, walls, budget)
        return self._cut_at_once(walls, budget)

    def _cut_polygons(self, cells: Polygons, walls: Walls, budget: Budget) -> Tensor:
        from .polygons_compiled import cut

        fields = cells.normals, cells.offsets, cells.starts, cells.ends
        rows = torch.column_stack([walls.normal, walls.offset, walls.tilt, walls.shift])
        first = torch.searchsorted(walls.cell, torch.arange(len(cells) + 1))
        arrays = [array(t) for t in (*fields, rows, first, self._slots)]
        kernel: Callable[..., Any] = cut
        *found, count = kernel(*arrays, len(self._tree), budget.max_regions)
        budget.check(count)
        edges, begin, parents, slots, node_slots, node_walls = map(torch.from_numpy, found)
        self._tree.add(node_slots, walls[node_walls])
        self.cells, self._slots = Polygons.of_edges(edges, begin), slots
        return parents

    def _cut_at_once(self, walls: Walls, budget: Budget) -> Tensor:
        R = len(self.cells)
        cells: Any = self.cells
        slots = self._slots
        parents = torch.arange(R, device=slots.device)
        finished: list[tuple[Any, Tensor, Tensor]] = []
        count = R
        while True:
            pending = torch.bincount(walls.cell, minlength=len(cells)) > 0
            finished.append((cells[~pending], parents[~pending], slots[~pending]))
            if not len(walls):
                break
            cells, parents, slots = cells[pending], parents[pending], slots[pending]
            walls = walls.of((pending.cumsum(0) - 1)[walls.cell])
            count += len(cells)
            budget.check(count)
            is_first = torch.ones_like(walls.cell, dtype=torch.bool)
            is_first[1:] = walls.cell.diff() > 0
            chosen, rest = walls[is_first], walls[~is_first]
            slots = self._tree.add(slots, chosen)
            parents = parents.repeat(2)
            rest = Walls.cat([rest, rest.of(rest.cell + len(cells))])
            cells = cells.cat(cells.halves(chosen))
            walls = rest[rest.cross(cells.generators()[rest.cell])]
        parents, order = torch.cat([parents for _, parents, _ in finished]).sort(stable=True)
        self.cells = cells.cat([cells for cells, _, _ in finished])[order]
        self._slots = torch.cat([slots for _, _, slots in finished])[order]
        return parents

    def locate(self, z: Tensor) -> Tensor:
        return self._tree.locate(z, self._slots)


class _CutTree:
    """The cuts as a binary tree: node j is a wall, with what lies below it and above it.

    Slot 0 holds the root, slots 1 + 2j and 2 + 2j the children of node j. A slot holds a node, or ~r for
    cell r.
    """

    def __init__(self) -> None:
        self._walls: list[tuple[Tensor, Tensor, Tensor]] = []
        self._size = 0
        self._table: tuple[Tensor, Tensor, Tensor] | None = None

    def __len__(self) -> int:
        return self._size

    def add(self, slots: Tensor, walls: Walls) -> Tensor:
        """Put one node into each of ``slots``; returns the slots of all lower, then of all upper children."""
        self._walls.append((slots, walls.normal, walls.offset))
        self._table = None
        nodes = torch.arange(self._size, self._size + len(slots), device=slots.device)
        self._size += len(slots)
        return torch.cat([1 + 2 * nodes, 2 + 2 * nodes])

    def locate(self, z: Tensor, leaves: Tensor) -> Tensor:
        """Cell of each point of z (N, 2); ``leaves`` are the slots of the cells, in order."""
        if self._size == 0:
            return torch.zeros(len(z), dtype=torch.long, device=z.device)
        if self._table is None:
            self._table = self._tabulate(leaves)
        content, normals, offsets = self._table
        found = content[:1].expand(len(z)).clone()
        active = torch.arange(len(z), device=z.device)
        while len(active):
            node = found[active]
            above = (normals[node] * z[active]).sum(-1) > offsets[node]
            found[active] = content[1 + 2 * node + above.long()]
            active = active[found[active] >= 0]
        return ~found

    def _tabulate(self, leaves: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Content of every slot, and the walls of all nodes."""
        slots, normals, offsets = (torch.cat(parts) for parts in zip(*self._walls, strict=True))
        content = torch.empty(1 + 2 * self._size, dtype=torch.long, device=leaves.device)
        content[slots] = torch.arange(self._size, device=leaves.device)
        content[leaves] = ~torch.arange(len(leaves), device=leaves.device)
        self._walls = [(slots, normals, offsets)]
        return content, normals, offsets
