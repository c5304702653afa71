# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Cells that are cut by walls, and remember how to find the cell of a point.

One class for the line, one for all other dimensions; the enumeration knows only their common interface.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import RegionBudgetExceeded
from .cells import Cells, Intervals
from .walls import Walls

__all__ = ["Arrangement", "Budget", "Line"]


@dataclass(frozen=True)
class Budget:
    """How many cells there may be, and which layer is being cut."""

    max_regions: int
    place: str

    def check(self, count: int) -> None:
        if count > self.max_regions:
            raise RegionBudgetExceeded(
                f"the decoder has more regions than max_regions={self.max_regions}: {count} reached at "
                f"{self.place}. Raise max_regions, or use fewer units or layers."
            )


class Arrangement(ABC):
    """A partition of R^L into convex cells, which starts as one cell and is refined by cutting."""

    cells: Cells

    @abstractmethod
    def cut(self, walls: Walls, budget: Budget) -> Tensor:
        """Cut every cell by its walls.

        Args:
            walls: walls that cross their cells.
            budget: raises where there would be more cells.

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

    def cut(self, walls: Walls, budget: Budget) -> Tensor:
        # Walls that cross a cell lie inside it, so that sorting all of them sorts them within the cells.
        points, order = (walls.offset * walls.normal[:, 0]).sort()
        noise = (walls.tilt * walls.offset.abs() + walls.shift)[order]
        apart = torch.ones_like(order, dtype=torch.bool)
        apart[1:] = points.diff() > noise[1:] + noise[:-1]
        points = points[apart]
        old = self.cells.upper
        budget.check(len(old) + len(points))
        upper = torch.cat([points, old]).sort().values
        self.cells = Intervals(torch.cat([self.cells.lower[:1], upper[:-1]]), upper)
        return torch.searchsorted(old, upper)

    def locate(self, z: Tensor) -> Tensor:
        return torch.searchsorted(self.cells.upper[:-1].contiguous(), z[:, 0].contiguous())
