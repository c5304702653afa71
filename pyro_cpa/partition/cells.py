# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Batches of convex cells: the geometry that partitions build and integrals consume."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .convex import Bound, Cells, weighted_points
from .polygons import Polygons
from .polytopes import Polytopes

__all__ = ["Cells", "Intervals", "Polygons", "Polytopes", "WholeSpace"]


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

    def clip_to_box(self, low: Bound, high: Bound) -> list[np.ndarray]:
        like = torch.empty(0, dtype=torch.float64)
        if self.dim == 1:
            return Intervals(like.new_tensor([-torch.inf]), like.new_tensor([torch.inf])).clip_to_box(
                low, high
            )
        if self.dim == 2:
            return Polygons.whole_plane(like).clip_to_box(low, high)
        return super().clip_to_box(low, high)


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
        infinite = ends.abs() == torch.inf
        found = weighted_points(ends[..., None], ~infinite)
        found[..., 0] += ends.sign() * infinite
        if not bool(infinite.all()):
            return found
        # The whole line has no end: the origin tells the sign of what is constant on it.
        origin = found.new_tensor([0.0, 1.0])
        return torch.cat([found, origin.expand(len(found), 1, 2)], dim=1)

    def clip_to_box(self, low: Bound, high: Bound) -> list[np.ndarray]:
        low, high = (float(np.asarray(end).item()) for end in (low, high))
        ends = torch.stack([self.lower.clamp(min=low), self.upper.clamp(max=high)], dim=1).cpu().numpy()
        return [pair[:, None] if pair[0] < pair[1] else np.empty((0, 1)) for pair in ends]
