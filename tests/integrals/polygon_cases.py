# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Polygons for tests, made from half-planes or vertices alone."""

from __future__ import annotations

import math

import torch

from pyro_cpa.partition.cells import Polygons


def polygons(cells):
    """Polygons from lists of half-planes [(normal, offset), ...]; redundant half-planes are dropped."""
    rows = [_edges(half_planes) for half_planes in cells]
    width = max(len(row) for row in rows)
    pad = ((0.0, 0.0), math.inf, 0.0, 0.0)
    rows = [row + [pad] * (width - len(row)) for row in rows]
    columns = ([[edge[k] for edge in row] for row in rows] for k in range(4))
    normals, offsets, starts, ends = (torch.tensor(c, dtype=torch.float64) for c in columns)
    return Polygons(normals.reshape(len(cells), width, 2), offsets, starts, ends)


def _edges(half_planes):
    result = []
    for i, ((nx, ny), c) in enumerate(half_planes):
        start, end = -math.inf, math.inf
        for j, ((mx, my), d) in enumerate(half_planes):
            if i == j:
                continue
            rate = my * nx - mx * ny
            slack = d - c * (nx * mx + ny * my)
            if rate > 0:
                end = min(end, slack / rate)
            elif rate < 0:
                start = max(start, slack / rate)
            elif slack < 0:
                end = -math.inf
        if start < end:
            result.append(((nx, ny), c, start, end))
    return result


def from_vertices(points):
    """Half-planes of the convex polygon with these vertices, counter-clockwise."""
    result = []
    for (px, py), (qx, qy) in zip(points, points[1:] + points[:1], strict=True):
        length = math.hypot(qx - px, qy - py)
        nx, ny = (qy - py) / length, (px - qx) / length
        result.append(((nx, ny), nx * px + ny * py))
    return result


def moved(half_planes, angle=0.0, shift=(0.0, 0.0)):
    """The cell turned by ``angle`` about the origin, then shifted."""
    cos, sin = math.cos(angle), math.sin(angle)
    turned = [((cos * nx - sin * ny, sin * nx + cos * ny), c) for (nx, ny), c in half_planes]
    return [((nx, ny), c + nx * shift[0] + ny * shift[1]) for (nx, ny), c in turned]


def box(width, height):
    """The rectangle [0, width] x [0, height]."""
    return [((-1.0, 0.0), 0.0), ((0.0, -1.0), 0.0), ((1.0, 0.0), width), ((0.0, 1.0), height)]


def regular(corners, radius, phase=0.1):
    angles = [phase + 2 * math.pi * k / corners for k in range(corners)]
    return from_vertices([(radius * math.cos(a), radius * math.sin(a)) for a in angles])


def arrangement(lines, seed):
    """All cells that random lines in general position cut the plane into."""
    generator = torch.Generator().manual_seed(seed)
    angles = 2 * math.pi * torch.rand(lines, generator=generator, dtype=torch.float64)
    offsets = torch.randn(lines, generator=generator, dtype=torch.float64)
    cells = [[]]
    for angle, c in zip(angles.tolist(), offsets.tolist(), strict=True):
        n = (math.cos(angle), math.sin(angle))
        pieces = []
        for cell in cells:
            one, other = [*cell, (n, c)], [*cell, ((-n[0], -n[1]), -c)]
            crosses = any(edge[:2] == (n, c) for edge in _edges(one))
            kept = [one, other] if crosses else [one] if _edges(one) == _edges(cell) else [other]
            pieces += [[edge[:2] for edge in _edges(piece)] if crosses else cell for piece in kept]
        cells = pieces
    return cells
