# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Walls: the hyperplanes on which a unit changes its slope."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["NOISE", "Walls"]

NOISE = 16 * torch.finfo(torch.float64).eps
"""Rounding error granted to a computed wall, per unit of what was added up to compute it.

A wall that reaches no deeper than this into a cell cannot be told from one that touches it: walls of
duplicated neurons, walls through a common corner and units whose slopes cancel would otherwise leave
regions of width 1e-16. Sums of a few hundred terms err by one or two eps of their absolute sum, corners by
as much again; 16 covers both. What is lost by leaving such a wall out is no more than the rounding error of
the network itself."""


@dataclass(frozen=True)
class Walls:
    """P hyperplanes ``normal . z = offset``, each with a cell that it may cut.

    Args:
        cell: (P,) index of the cell.
        normal: (P, L) unit normals.
        offset: (P,) signed distances from the origin.
        tilt: (P,) uncertainty of the direction: the wall's position errs by ``tilt |z| + shift`` near z.
        shift: (P,) uncertainty of the offset.
    """

    cell: Tensor
    normal: Tensor
    offset: Tensor
    tilt: Tensor
    shift: Tensor

    def __len__(self) -> int:
        return self.cell.shape[0]

    def __getitem__(self, index: Tensor) -> Walls:
        return Walls(*(field[index] for field in self._fields()))

    def _fields(self) -> tuple[Tensor, ...]:
        return self.cell, self.normal, self.offset, self.tilt, self.shift

    def of(self, cell: Tensor) -> Walls:
        """The same hyperplanes for other cells."""
        return Walls(cell, *self._fields()[1:])

    @staticmethod
    def cat(parts: Sequence[Walls]) -> Walls:
        if len(parts) == 1:
            return parts[0]
        return Walls(*(torch.cat(fields) for fields in zip(*(part._fields() for part in parts), strict=True)))

    def cross(self, generators: Tensor) -> Tensor:
        """(P,) whether wall p has points of its cell, deeper than rounding, on both sides.

        Args:
            generators: (P, G, L + 1) of the cell of each wall.
        """
        plane = torch.cat([self.normal, -self.offset[:, None]], dim=1)
        depth = (generators @ plane[..., None])[..., 0]
        reach = generators[..., :-1].abs().sum(-1)
        noise = self.tilt[:, None] * reach + self.shift[:, None] * generators[..., -1]
        return (depth > noise).any(1) & (depth < -noise).any(1)
