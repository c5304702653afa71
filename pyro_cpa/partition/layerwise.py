# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""The enumeration itself: cells are cut layer by layer, at the walls of each layer's units."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from ..errors import InvalidData, RegionBudgetExceeded
from .arrangement import Arrangement, Line
from .graph import Graph, homogeneous_basis
from .layers import Elementwise, Layer
from .network import Network
from .plane import Plane
from .walls import Walls, crossing_walls

__all__ = ["cut_layer_by_layer"]

CHUNK_BYTES = 2**24
"""Temporaries of one step over cells: more falls out of the cache, less pays for more calls.

Measured: flat from 2**22 to 2**25."""

_BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"  # layers are counted in fractions


def cut_layer_by_layer(
    network: Network, layers: Sequence[Layer], max_regions: int, progress: bool = False
) -> tuple[Arrangement, tuple[Tensor, ...]]:
    """Cells of the network, and the segment (R, H) on which every unit of each activation layer is.

    Only cells and patterns are kept from layer to layer; affine maps are recomputed, chunk by chunk.
    """
    L = network.latent_dim
    like = torch.empty(0, dtype=torch.float64, device=network.device)
    arrangement: Arrangement = Line(like) if L == 1 else Plane(like, L)
    patterns: list[Tensor] = []
    graph = network.graph
    bar = tqdm(total=sum(graph.switches), disable=not progress, desc="regions", bar_format=_BAR)
    for index, layer in enumerate(layers):
        if isinstance(layer, Elementwise) and layer.switches:
            # The units' inputs are affine on every cell so far.
            value, place = graph.inputs[index][0], network.places[index]
            walls = _crossing(arrangement, graph, layers, patterns, value, layer, like, place, bar)

            def check(count: int, place: str = place) -> None:
                if count > max_regions:
                    raise RegionBudgetExceeded(
                        f"the decoder has more regions than max_regions={max_regions}: {count} reached at "
                        f"{place}. Raise max_regions, or use fewer units or layers."
                    )

            parents = arrangement.cut(walls, check)
            patterns = [pattern[parents] for pattern in patterns]
            patterns.append(_segments(arrangement, graph, layers, patterns, value, layer, like))
            bar.set_postfix_str(f"{len(arrangement.cells)} after {place}")
    bar.close()
    return arrangement, tuple(patterns)


def _crossing(
    arrangement: Arrangement,
    graph: Graph,
    layers: Sequence[Layer],
    patterns: Sequence[Tensor],
    value: int,
    layer: Elementwise,
    like: Tensor,
    place: str,
    bar: tqdm,
) -> Walls:
    """The walls of ``layer``, whose units take ``value``, that cross cells."""
    basis = homogeneous_basis(arrangement.cells.dim, like)
    generators = arrangement.cells.generators().to(like.device)
    walls = []
    for rows in _chunks(len(generators), generators.shape[1], graph.numbers(value)):
        chunk = [pattern[rows] for pattern in patterns]
        maps, magnitude = graph.push_magnitude(layers, chunk, *basis, value)
        if not bool((maps.abs() < torch.inf).all()):
            raise InvalidData(f"{place}: its input overflows float64. Scale the weights of the decoder down.")
        # A branch without units yet has one map for all cells.
        count = rows.stop - rows.start
        maps, magnitude = maps.expand(count, -1, -1), magnitude.expand(count, -1, -1)
        found = crossing_walls(generators[rows], maps, magnitude, layer)
        walls.append(found.of(found.cell + rows.start))
        bar.update(count / len(generators))
    return Walls.cat(walls)


def _segments(
    arrangement: Arrangement,
    graph: Graph,
    layers: Sequence[Layer],
    patterns: Sequence[Tensor],
    value: int,
    layer: Elementwise,
    like: Tensor,
) -> Tensor:
    """The segment (R, H) int8 of every unit of ``layer`` on each cell, read at an interior point."""
    points = arrangement.cells.interior_points().to(like.device)[:, None]
    one = like.new_ones(1)
    segments = []
    for rows in _chunks(len(points), 1, graph.numbers(value)):
        chunk = [pattern[rows] for pattern in patterns]
        values = graph.push(layers, chunk, points[rows], one, value)
        segments.append(layer.segments(values[:, 0]))
    return torch.cat(segments)


def _chunks(count: int, rows: int, width: int) -> Iterator[slice]:
    """Slices of cells whose temporaries, ``rows`` numbers for every unit of a layer, stay small."""
    size = max(1, CHUNK_BYTES // (8 * width * (rows + 8)))
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
