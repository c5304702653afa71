# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Batches of convex cells: the geometry that partitions build and integrals consume."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Cells", "Intervals", "Polygons", "WholeSpace"]


class Cells:
    """A batch of R convex cells of R^L (base class; ``len(cells)`` is R, ``cells[index]`` a sub-batch)."""

    dim: int

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: Tensor) -> Cells:
        raise NotImplementedError


@dataclass(frozen=True)
class WholeSpace(Cells):
    """The single cell R^L of an affine decoder, in any dimension."""

    dim: int

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: Tensor) -> WholeSpace:
        return self


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


@dataclass(frozen=True)
class Polygons(Cells):
    r"""R convex polygons of the plane, bounded or not, each an unordered set of edges.

    Edge e of cell r lies on the line :math:`n \cdot z = c` with the cell on the side
    :math:`n \cdot z \le c`; its points are :math:`c\,n + s\,t` for ``start <= s <= end``, where
    :math:`t = (-n_2, n_1)` runs counter-clockwise around the cell. An edge may reach to infinity
    (``start = -inf`` and/or ``end = +inf``); a cell without edges is the whole plane, one with a single
    edge a half-plane. Widths of thin cells are read off ``offsets``, never off the vertices, so a sliver keeps its digits.

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

    @property
    def is_edge(self) -> Tensor:
        """(R, E) True for an edge, False for padding."""
        return torch.isfinite(self.offsets)

    @property
    def tangents(self) -> Tensor:
        """(R, E, 2) unit direction of each edge, counter-clockwise around the cell."""
        return torch.stack([-self.normals[..., 1], self.normals[..., 0]], dim=-1)
