# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Cells that are cut by walls, and remember how to find the cell of a point.

One class for the line, one for all other dimensions; the enumeration knows only their common interface.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from .cells import Cells, Intervals
from .walls import Walls

__all__ = ["Arrangement", "Line"]


class Arrangement(ABC):
    """A partition of R^L into convex cells, which starts as one cell and is refined by cutting."""

    cells: Cells

    @abstractmethod
    def cut(self, walls: Walls, check: Callable[[int], None]) -> Tensor:
        """Cut every cell by its walls.

        Args:
            walls: walls that cross their cells.
            check: called with each new number of cells before they are made; raises if they are too many.

        Returns:
            (R,) for each new cell the index of the old one that it is part of, ascending.
        """

    @abstractmethod
    def locate(self, z: Tensor) -> Tensor:
        """Index (N,) of the one cell in which each point (N, L) lies."""


class Line(Arrangement):
    """The line, cut at points; cells are in ascending order and hold their upper ends."""

    def __init__(self, like: Tensor) -> None:
        infinity = like.new_full((1,), torch.inf)
        self.cells: Intervals = Intervals(-infinity, infinity)

    def cut(self, walls: Walls, check: Callable[[int], None]) -> Tensor:
        # Walls that cross a cell lie inside it, so that sorting all of them sorts them within the cells.
        points, order = (walls.offset * walls.normal[:, 0]).sort()
        noise = (walls.tilt * walls.offset.abs() + walls.shift)[order]
        apart = torch.ones_like(order, dtype=torch.bool)
        apart[1:] = points.diff() > noise[1:] + noise[:-1]
        points = points[apart]
        old = self.cells.upper
        check(len(old) + len(points))
        upper = torch.cat([points, old]).sort().values
        self.cells = Intervals(torch.cat([self.cells.lower[:1], upper[:-1]]), upper)
        return torch.searchsorted(old, upper)

    def locate(self, z: Tensor) -> Tensor:
        return torch.searchsorted(self.cells.upper[:-1].contiguous(), z[:, 0].contiguous())
