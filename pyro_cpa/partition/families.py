# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Affine maps of many cells at once, where cells cut from the same cell share almost all of the work.

Cells with the same parent differ only in the units that change inside the parent. The product with the weights
that follow is computed once a parent, without these few units, and for every cell those of them that are not
zero there are added one by one. No term is ever subtracted again: the sum is the same, in another order.
Term by term a sum is only worth while where it is compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..compiled import array, in_blocks
from .crossing import Crossing
from .graph import Graph, homogeneous_basis, pusher_with_magnitude
from .layers import Dense, Elementwise, Layer, sizes
from .lineage import Generation, ranges

__all__ = ["Chain", "Family"]

_SLOWER = 4  # times that a number takes longer in a sum of terms than in a product of matrices
_WORTH = 16  # times that a cell takes as long as a pair of a datum and a region


@dataclass(frozen=True)
class Family:
    """Maps of n cells to H numbers: those that they share with their siblings, and what each adds to them.

    Args:
        parent: (n,) which of the shared maps is a cell's.
        maps: (n', L + 1, H) shared.
        magnitude: (n', 2, H) what was added up to compute them.
        first: (n + 1,) where the terms of each cell begin.
        unit: (F,) of the layer before, for each term.
        unit_map: (F, L + 1) of its output.
        unit_magnitude: (F, 2) of its output.
        weight: (H_before, H) by which each term is multiplied.
    """

    parent: Tensor
    maps: Tensor
    magnitude: Tensor
    first: Tensor
    unit: Tensor
    unit_map: Tensor
    unit_magnitude: Tensor
    weight: Tensor

    def expand(self) -> tuple[Tensor, Tensor]:
        """Maps (n, L + 1, H) of all cells and magnitude (n, 2, H) of what was added up."""
        from .families_compiled import expand

        if not len(self.unit):
            return self.maps[self.parent], self.magnitude[self.parent]
        n, H = len(self.parent), self.maps.shape[-1]
        maps, magnitude = self.maps.new_empty(n, self.maps.shape[1], H), self.maps.new_empty(n, 2, H)
        own = (self.unit, self.unit_map, self.unit_magnitude, self.weight, self.weight.abs())
        split = (self.parent, self.first[:-1], self.first[1:], maps, magnitude)
        _run(expand, (self.maps, self.magnitude, *own), split)
        return maps, magnitude

    def crossing(self, generators: Tensor, layer: Elementwise) -> tuple[Crossing, bool]:
        """The units of a layer that takes these maps, as :func:`crossing_units` finds them; whether all maps are finite.

        Args:
            generators: (n, G, L + 1) of the cells.
            layer: the units.
        """
        from .families_compiled import planes, segments

        n, H = len(self.parent), self.maps.shape[-1]
        found = torch.zeros(n, H, dtype=torch.int8)
        finite = torch.empty(n, dtype=torch.bool)
        knots = layer.knots.expand(-1, H)
        split = (self.parent, self.first[:-1], self.first[1:], generators, found, finite)
        _run(segments, (self.maps, self.unit, self.unit_map, self.weight, knots), split)
        cell, unit = (found < 0).nonzero().unbind(1)
        plane, magnitude = (self.maps.new_empty(len(cell), columns) for columns in (self.maps.shape[1], 2))
        own = (self.unit, self.unit_map, self.unit_magnitude, self.weight, self.parent, self.first)
        _run(planes, (self.maps, self.magnitude, *own), (cell, unit, plane, magnitude))
        return Crossing(found, cell, unit, plane, magnitude), bool(finite.all())


def _run(kernel: Callable[..., None], shared: Sequence[Tensor], split: Sequence[Tensor]) -> None:
    in_blocks(kernel, [array(t) for t in shared], [(array(t), 0) for t in split], _WORTH * len(split[0]))


class Chain:
    """The layers at the beginning of a network that are linear and units by turns.

    Args:
        graph: the wiring.
        layers: all layers.
        like: a tensor of the wanted dtype and device.
    """

    def __init__(self, graph: Graph, layers: Sequence[Layer], like: Tensor) -> None:
        points, constant = homogeneous_basis(graph.widths[0], like)
        self._start = points, torch.zeros_like(points[:, :2])
        self._push = pusher_with_magnitude(constant)
        self._links: list[tuple[Dense, Elementwise]] = []
        self._weights: list[Tensor] = []
        while 2 * len(self._links) + 1 < len(layers):
            i = 2 * len(self._links)
            dense, units = layers[i], layers[i + 1]
            follows = graph.inputs[i] == (i,) and graph.inputs[i + 1] == (i + 1,)
            if not (isinstance(dense, Dense) and type(units) is Elementwise and units.switches and follows):
                break
            self._links.append((dense, units))
            self._weights.append(dense.weight.mT.contiguous())

    def __len__(self) -> int:
        """Number of layers of units."""
        return len(self._links)

    def family(self, generations: Sequence[Generation], rows: slice) -> Family:
        """Maps of some cells of the last generation to the inputs of the units that come next."""
        dense, _ = self._links[len(generations)]
        weight = self._weights[len(generations)]
        if not generations:
            return self._alone(self._push(dense, [self._start], None), weight)
        _, units = self._links[len(generations) - 1]
        last = generations[-1]
        parents = last.parents[rows]
        start, stop = int(parents[0]), int(parents[-1]) + 1
        maps, magnitude = self.family(generations[:-1], slice(start, stop)).expand()
        parent = parents - start
        many = last.first_pair[start : stop + 1].diff()
        if _SLOWER * int(many[parent].sum()) > (len(parents) - len(maps)) * len(weight):
            # Where many units change inside a cell, as inside the whole space, its parts have little in common.
            outputs = self._push(units, [(maps[parent], magnitude[parent])], last.pattern[rows])
            return self._alone(self._push(dense, [outputs], None), weight)

        # A unit that is left out of the product is zero in it; the others are on the segment of any of the parts.
        any_part = torch.searchsorted(parents, torch.arange(start, stop, device=parents.device))
        pattern = last.pattern[rows][any_part]
        shared, shared_magnitude = self._push(units, [(maps, magnitude)], pattern)
        pairs = slice(int(last.first_pair[start]), int(last.first_pair[stop]))
        left_out = torch.repeat_interleave(many), slice(None), last.unit[pairs]
        shared[left_out] = 0.0
        shared_magnitude[left_out] = 0.0

        # The terms of each cell.
        many = many[parent]
        cell = torch.repeat_interleave(many)
        unit = last.unit[ranges(last.first_pair[parents], many, cell)]
        segments = last.pattern[rows][cell, unit][None]
        here = parent[cell], slice(None), unit
        given = maps[here].mT[None], magnitude[here].mT[None]
        own, own_magnitude = self._push(units.at(unit), [given], segments)
        own_magnitude += sizes(own)
        counts = (own[0] != 0).any(0).nonzero()[:, 0]
        many = torch.bincount(cell[counts], minlength=len(parents))
        shared, shared_magnitude = self._push(dense, [(shared, shared_magnitude)], None)
        return Family(
            parent=parent,
            maps=shared,
            magnitude=shared_magnitude,
            first=torch.cat([many.new_zeros(1), many.cumsum(0)]),
            unit=unit[counts],
            unit_map=own[0, :, counts].mT,
            unit_magnitude=own_magnitude[0, :, counts].mT,
            weight=weight,
        )

    @staticmethod
    def _alone(pushed: tuple[Tensor, ...], weight: Tensor) -> Family:
        """Cells that share nothing: their maps and magnitude."""
        maps, magnitude = pushed
        n, none = len(maps), torch.zeros(0, dtype=torch.long)
        return Family(
            parent=torch.arange(n),
            maps=maps,
            magnitude=magnitude,
            first=none.new_zeros(n + 1),
            unit=none,
            unit_map=maps.new_empty(0, maps.shape[1]),
            unit_magnitude=maps.new_empty(0, 2),
            weight=weight,
        )
