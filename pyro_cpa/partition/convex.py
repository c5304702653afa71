# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""What every batch of convex cells can do, whatever its dimension."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InvalidData
from .walls import Walls

__all__ = ["Bound", "Cells", "DivisibleCells", "weighted_points"]

Bound = float | Sequence[float]


class Cells:
    """A batch of R convex cells of R^L (base class; ``len(cells)`` is R, ``cells[index]`` a sub-batch)."""

    dim: int

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: Tensor) -> Cells:
        raise NotImplementedError

    def generators(self) -> Tensor:
        """Homogeneous points (R, G, L + 1) whose non-negative combinations are the closed cells.

        A row ``(w v, w)`` with w > 0 is the point v, weighted as by ``weighted_points``; a row
        ``(u, 0)`` is the direction u in which the cell is unbounded; a row of zeros is padding.
        """
        raise NotImplementedError

    def interior_points(self) -> Tensor:
        """A finite point (R, L) in the interior of each cell, slivers and unbounded cells included.

        It is the sum of the generators. Their weights keep it near the nearest corners, so that its
        depth behind any wall, relative to rounding at that point, is at least the deepest corner's
        divided by the number of corners.
        """
        generators = self.generators()
        points = generators * (generators[..., -1:] > 0)
        # Opposite directions of a strip cancel before the points, perhaps much smaller, are added.
        total = (generators - points).sum(1) + points.sum(1)
        weight = total[:, -1:]
        return (total[:, :-1] / weight).masked_fill(weight <= 0, 0.0)

    def clip_to_box(self, low: Bound, high: Bound) -> list[np.ndarray]:
        """Corners of each cell within a box, for drawing.

        Args:
            low: lower end of the box, one number or one for each coordinate.
            high: upper end.

        Returns:
            For each cell its V corners (V, L), counter-clockwise for L = 2; V = 0 for a cell outside the box.
        """
        raise InvalidData(f"cells can be drawn in one or two dimensions, but these have {self.dim}.")


class DivisibleCells(Cells):
    """Cells that walls cut in two (base class)."""

    @staticmethod
    def cat(parts: Sequence[Any]) -> Any:
        """All cells of ``parts``, which are of the same kind, in order."""
        raise NotImplementedError

    def halves(self, walls: Walls) -> tuple[Any, Any]:
        """Both parts of each cell: ``normal . z <= offset`` and the rest. Wall p crosses cell p."""
        raise NotImplementedError


def weighted_points(points: Tensor, exists: Tensor) -> Tensor:
    """Points (R, G, L) in homogeneous coordinates (R, G, L + 1), with weights w = 1 / (s + |v|); zero for
    padding.

    The scale s is the distance of the cell's farthest corner, at most 1. It is at least 1e-8, halfway
    between numbers of size 1 and their rounding errors: a corner nearer to the origin may be there by
    rounding only.
    """
    points = points.masked_fill(~exists[..., None], 0.0)
    distance = torch.linalg.vector_norm(points, dim=-1)
    scale = distance.amax(1, keepdim=True).clamp(1e-8, 1.0)
    weight = (exists / (scale + distance))[..., None]
    return torch.cat([points * weight, weight], dim=-1)
