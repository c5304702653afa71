# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Polytopes whose integrals are estimated, together with how many points that takes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from pyro_cpa.partition.cells import Cells, Polytopes
from pyro_cpa.partition.convex import Bound

__all__ = ["NUM_POINTS", "EstimatedPolytopes"]

NUM_POINTS = 1024
"""Points of each integral where the caller does not say."""


@dataclass(frozen=True)
class EstimatedPolytopes(Cells):
    """Polytopes of any dimension; every integral over one of them is a mean over ``num_points`` points.

    Args:
        cells: R polytopes.
        num_points: rounded up to 16 times a power of two.
        seed: of the points, which are the same for all pairs of Gaussian and cell.
    """

    cells: Polytopes
    num_points: int = NUM_POINTS
    seed: int = 0

    @property
    def dim(self) -> int:  # type: ignore[override]
        return self.cells.dim

    def __len__(self) -> int:
        return len(self.cells)

    def __getitem__(self, index: Tensor) -> EstimatedPolytopes:
        return EstimatedPolytopes(self.cells[index], self.num_points, self.seed)

    def generators(self) -> Tensor:
        return self.cells.generators()

    def clip_to_box(self, low: Bound, high: Bound) -> list[np.ndarray]:
        return self.cells.clip_to_box(low, high)
