# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""An independent enumeration of the regions of R^L in exact rational arithmetic, one cell at a time."""

from __future__ import annotations

from fractions import Fraction
from itertools import product

from rational import _pieces
from torch import nn

__all__ = ["count_regions"]

Vertices = dict[tuple[Fraction, ...], frozenset[int]]


def _value(point, normal, constant):
    return sum((a * x for a, x in zip(normal, point, strict=True)), constant)


def _clip(cell: Vertices, values: dict, sign: int, wall: int) -> Vertices:
    """Vertices of the part of a cell where ``sign * value <= 0``, and the walls that each lies on.

    All segments between kept and lost vertices are cut. Points that are no vertices lie on fewer walls than some
    vertex does, and are dropped.
    """
    found = {}
    for p, walls in cell.items():
        if sign * values[p] < 0:
            found[p] = walls
        elif values[p] == 0:
            found[p] = walls | {wall}
    for p in cell:
        for q in cell:
            if sign * values[p] < 0 < sign * values[q]:
                share = values[p] / (values[p] - values[q])
                met = tuple(x + share * (y - x) for x, y in zip(p, q, strict=True))
                found[met] = cell[p] & cell[q] | {wall} | found.get(met, frozenset())
    sets = set(found.values())
    return {p: walls for p, walls in found.items() if not any(walls < other for other in sets)}


def count_regions(decoder: nn.Sequential, latent_dim: int, box: int) -> int:
    """Number of regions of a decoder R^L -> R^D within ``[-box, box]^L``, exactly.

    A wall cuts a region if it has points strictly inside it.
    """
    corners = product(
        *[((-k - 1, -Fraction(box)), (~k - latent_dim, Fraction(box))) for k in range(latent_dim)]
    )
    cell = {tuple(x for _, x in corner): frozenset(name for name, _ in corner) for corner in corners}
    identity = [
        (tuple(Fraction(int(i == j)) for j in range(latent_dim)), Fraction(0)) for i in range(latent_dim)
    ]
    regions = [(cell, identity)]
    wall = 0
    for module in decoder:
        if isinstance(module, nn.Linear):
            weight = [[Fraction(w) for w in row] for row in module.weight.tolist()]
            bias = [Fraction(v) for v in module.bias.tolist()]
            regions = [(cell, _affine(weight, bias, maps)) for cell, maps in regions]
            continue
        pieces = _pieces(module)
        for unit in range(len(regions[0][1])):
            cut = []
            for cell, maps in regions:
                cut += _bend(cell, maps, unit, pieces, wall)
            regions = cut
            wall += len(pieces)
    return len(regions)


def _affine(weight, bias, maps):
    dims = range(len(maps[0][0]))
    return [
        (
            tuple(sum((w * a[k] for w, (a, _) in zip(row, maps, strict=True)), Fraction(0)) for k in dims),
            sum((w * c for w, (_, c) in zip(row, maps, strict=True)), v),
        )
        for row, v in zip(weight, bias, strict=True)
    ]


def _bend(cell, maps, unit, pieces, wall):
    """Cut one region at the knots of one unit, and apply the unit on each part."""
    a, c = maps[unit]
    parts, rest = [], cell
    for k, (knot, slope, intercept) in enumerate(pieces):
        part = rest
        if knot is not None:
            values = {p: _value(p, a, c - knot) for p in rest}
            if not rest or min(values.values()) >= 0:
                continue
            whole = max(values.values()) <= 0
            part = rest if whole else _clip(rest, values, 1, wall + k)
            rest = {} if whole else _clip(rest, values, -1, wall + k)
        if part:
            bent = (tuple(slope * x for x in a), slope * c + intercept)
            parts.append((part, [*maps[:unit], bent, *maps[unit + 1 :]]))
    return parts
