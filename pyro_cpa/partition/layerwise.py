# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""The enumeration itself: cells are cut layer by layer, at the walls of each layer's units."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from ..compiled import runs_compiled
from ..errors import InvalidData
from .arrangement import Arrangement, Budget, Line
from .crossing import Crossing, crossing_units
from .families import Chain
from .graph import Graph, homogeneous_basis
from .layers import Elementwise, Layer
from .lineage import Lineage
from .network import Network
from .plane import Plane
from .walls import Walls

__all__ = ["cut_layer_by_layer"]

CHUNK_BYTES = 2**25
"""Temporaries of one step over cells: more falls out of the cache, less pays for more calls.

Measured: flat from 2**25 to 2**26."""

_BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"  # layers are counted in fractions


def cut_layer_by_layer(
    network: Network, layers: Sequence[Layer], max_regions: int, progress: bool = False
) -> tuple[Arrangement, tuple[Tensor, ...]]:
    """Cells of the network, and the segment (R, H) on which every unit of each activation layer is.

    Only cells, patterns and descent are kept from layer to layer; affine maps are recomputed, chunk by chunk.
    """
    L = network.latent_dim
    like = torch.empty(0, dtype=torch.float64, device=network.device)
    arrangement: Arrangement = Line(like) if L == 1 else Plane(like, L)
    maps = _Maps(network.graph, layers, like)
    bar = tqdm(total=sum(network.graph.switches), disable=not progress, desc="regions", bar_format=_BAR)
    for index, layer in enumerate(layers):
        if isinstance(layer, Elementwise) and layer.switches:
            place = network.places[index]

            # The units' inputs are affine on every cell so far.
            crossing, walls = _crossing(arrangement, maps, index, layer, place, bar)
            parents = arrangement.cut(walls, Budget(max_regions, place))
            points = arrangement.cells.interior_points().to(like.device)
            maps.lineage.append(crossing.generation(parents, points, layer))
            bar.set_postfix_str(f"{len(arrangement.cells)} after {place}")
    bar.close()
    return arrangement, tuple(maps.lineage.patterns())


class _Maps:
    """Affine maps of cells to the inputs of units."""

    def __init__(self, graph: Graph, layers: Sequence[Layer], like: Tensor) -> None:
        self.graph, self.layers = graph, layers
        self.lineage = Lineage()
        self._chain = Chain(graph, layers, like)
        self._compiled = runs_compiled(like)
        self._basis = homogeneous_basis(graph.widths[0], like)

    def crossing(
        self, index: int, layer: Elementwise, rows: slice, generators: Tensor
    ) -> tuple[Crossing, bool]:
        """The units of a layer on some cells, and whether all maps are finite."""
        if self._compiled and len(self.lineage.generations) < len(self._chain):
            return self._chain.family(self.lineage.generations, rows).crossing(generators, layer)
        value = self.graph.inputs[index][0]
        patterns = self.lineage.patterns(rows)
        maps, magnitude = self.graph.push_magnitude(self.layers, patterns, *self._basis, value)
        # A branch without units yet has one map for all cells.
        maps, magnitude = (t.expand(len(generators), -1, -1) for t in (maps, magnitude))
        return crossing_units(generators, maps, magnitude, layer), bool((maps.abs() < torch.inf).all())


def _crossing(
    arrangement: Arrangement, maps: _Maps, index: int, layer: Elementwise, place: str, bar: tqdm
) -> tuple[Crossing, Walls]:
    """The units of layer ``index`` on all cells, and the walls that cross cells."""
    generators = arrangement.cells.generators().to(layer.knots.device)
    found = []
    numbers = maps.graph.numbers(maps.graph.inputs[index][0])
    for rows in _chunks(len(generators), generators.shape[1], numbers):
        crossing, finite = maps.crossing(index, layer, rows, generators[rows])
        if not finite:
            raise InvalidData(f"{place}: its input overflows float64. Scale the weights of the decoder down.")
        found.append(crossing)
        bar.update((rows.stop - rows.start) / len(generators))
    crossing = Crossing.cat(found)
    return crossing, crossing.walls(generators, layer)


def _chunks(count: int, rows: int, width: int) -> Iterator[slice]:
    """Slices of cells whose temporaries, ``rows`` numbers for every unit of a layer, stay small."""
    size = max(1, CHUNK_BYTES // (8 * width * (rows + 8)))
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
