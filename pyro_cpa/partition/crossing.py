# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Which units change their segment inside which cells, and the walls on which they do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .layers import Elementwise
from .lineage import Generation, children
from .walls import NOISE, Walls

__all__ = ["Crossing", "crossing_units"]


@dataclass(frozen=True)
class Crossing:
    """The units of one layer on R cells: their segments, and P pairs of a cell and a unit that changes inside it.

    Args:
        segments: (R, H) int8; that of a unit that changes means nothing.
        cell: (P,) ascending.
        unit: (P,).
        plane: (P, L + 1) the unit's input on the cell, slopes and offset.
        magnitude: (P, 2) what was added up to compute them.
    """

    segments: Tensor
    cell: Tensor
    unit: Tensor
    plane: Tensor
    magnitude: Tensor

    @staticmethod
    def cat(parts: Sequence[Crossing]) -> Crossing:
        """All cells of ``parts``, in order."""
        first = [0]
        for part in parts:
            first.append(first[-1] + len(part.segments))
        return Crossing(
            torch.cat([part.segments for part in parts]),
            torch.cat([part.cell + start for part, start in zip(parts, first, strict=False)]),
            torch.cat([part.unit for part in parts]),
            torch.cat([part.plane for part in parts]),
            torch.cat([part.magnitude for part in parts]),
        )

    def walls(self, generators: Tensor, layer: Elementwise) -> Walls:
        """The walls that cross cells, whose generators are (R, G, L + 1)."""
        found = []
        units = layer.at(self.unit)
        for knots, bends in zip(units.knots, units.bends, strict=True):
            # knots and bends are (P,) or (1,).
            bent = bends.expand(len(self.unit)).nonzero()[:, 0]
            cell, plane, knot = self.cell[bent], self.plane[bent], knots.expand(len(self.unit))[bent]
            size = torch.linalg.vector_norm(plane[:, :-1], dim=1)
            tilt, shift = NOISE * self.magnitude[bent].mT / size
            walls = Walls(
                cell=cell,
                normal=plane[:, :-1] / size[:, None],
                offset=(knot - plane[:, -1]) / size,
                tilt=tilt,
                shift=shift + NOISE * knot.abs() / size,
            )
            # A wall whose offset overflows crosses nothing: its depths are infinite or NaN.
            found.append(walls[walls.cross(generators[cell]).nonzero()[:, 0]])
        return Walls.cat(found)

    def generation(self, parents: Tensor, points: Tensor, layer: Elementwise) -> Generation:
        """The parts into which the cells were cut.

        Args:
            parents: (R',) the cell that each part was cut from, ascending.
            points: (R', L) a point inside each part.
            layer: the units.
        """
        segments = self.segments.index_select(0, parents)
        if len(self.segments) == 1:
            # Inside the whole space all units change, for all parts: one product of matrices.
            values = points @ self.plane[:, :-1].mT + self.plane[:, -1]
            segments[:, self.unit] = layer.at(self.unit).segments(values)
        else:
            child, pair = children(parents, len(self.segments), self.cell)
            unit, plane = self.unit[pair], self.plane[pair]
            value = (points[child] * plane[:, :-1]).sum(1) + plane[:, -1]
            segments[child, unit] = layer.at(unit).segments(value[None])[0]
        many = torch.bincount(self.cell, minlength=len(self.segments))
        first_pair = torch.cat([many.new_zeros(1), many.cumsum(0)])
        return Generation(parents, segments, first_pair, self.unit)


def crossing_units(generators: Tensor, maps: Tensor, magnitude: Tensor, layer: Elementwise) -> Crossing:
    """The units of one layer on R cells.

    Args:
        generators: (R, G, L + 1) of the cells.
        maps: (R, L + 1, H) affine map of each cell to the units' inputs.
        magnitude: (R, 2, H) what was added up to compute them.
        layer: the units.
    """
    segments = torch.zeros(maps.shape[0], maps.shape[2], dtype=torch.int8, device=maps.device)
    changes = torch.zeros_like(segments, dtype=torch.bool)
    for knots in layer.knots:
        values = generators @ torch.cat([maps[:, :-1], maps[:, -1:] - knots], dim=1)
        above, below = values.amax(1) > 0, values.amin(1) < 0
        segments += above
        changes |= above & below
    cell, unit = changes.nonzero().unbind(1)
    return Crossing(segments, cell, unit, maps[cell, :, unit], magnitude[cell, :, unit])
