# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""What the partition tests measure with: errors against the decoder itself, areas, cells that hold a point."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from pyro_cpa.partition import Intervals, Partition, Polygons, Polytopes, WholeSpace
from pyro_cpa.partition.walls import NOISE, Walls

__all__ = ["area", "cells_holding", "clip_to_cube", "far_and_near", "round_trip_error", "volumes"]


def far_and_near(dim: int, count: int = 200) -> Tensor:
    """Points at every distance from 1e-6 to 1e6."""
    return torch.cat([torch.randn(count, dim) * scale for scale in (1e-6, 1e-3, 1.0, 30.0, 1e3, 1e6)])


@torch.no_grad()
def round_trip_error(decoder: nn.Module, part: Partition, z: Tensor) -> float:
    """Largest difference between the decoder and its affine piece, relative to what the decoder adds up."""
    region = part.locate(z)
    piece = (part.slopes[region] @ z[..., None])[..., 0] + part.offsets[region]
    if isinstance(decoder, nn.Sequential) and not any(isinstance(m, nn.BatchNorm1d) for m in decoder):
        size = 1 + z.abs()
        for layer in part.network.linears:
            size = size @ layer.weight.abs().mT + (0 if layer.bias is None else layer.bias.abs())
        size = size.amax(-1, keepdim=True)
    else:
        size = 1 + z.abs().amax(-1, keepdim=True) + decoder(z).abs().amax(-1, keepdim=True)
    return float(((decoder(z) - piece).abs() / size).max())


def area(corners: np.ndarray) -> float:
    """Area of a polygon (V, 2), or length of an interval (2, 1); 0 for an empty one."""
    if not len(corners):
        return 0.0
    if corners.shape[1] == 1:
        return float(corners[1, 0] - corners[0, 0])
    x, y = (corners - corners[0]).T
    return 0.5 * float((x * np.roll(y, -1) - y * np.roll(x, -1)).sum())


def cells_holding(cells, z: Tensor, margin: float) -> Tensor:
    """(N, R) whether z lies in each cell, deeper than ``margin`` (in units of 1 + |z|; negative: nearly in it)."""
    if isinstance(cells, WholeSpace):
        return torch.ones(len(z), 1, dtype=torch.bool)
    margin = margin * (1 + z.norm(dim=-1))[:, None]
    if isinstance(cells, Intervals):
        return (z - cells.lower >= margin) & (cells.upper - z >= margin)
    assert isinstance(cells, Polygons | Polytopes)
    # Where padded, offsets are infinite.
    depth = cells.offsets - torch.einsum("nl,rel->nre", z, cells.normals)
    return (depth >= margin[..., None]).all(-1)


def clip_to_cube(cells: Polytopes, size: float) -> Polytopes:
    """What of the cells lies within ``[-size, size]^L``; empty ones go."""
    for axis in range(cells.dim):
        for sign in (1.0, -1.0):
            normal = sign * torch.eye(cells.dim)[axis].expand(len(cells), -1)
            offset = torch.full((len(cells),), size)
            walls = Walls(torch.arange(len(cells)), normal, offset, *torch.full((2, len(cells)), NOISE))
            crossed = walls.cross(cells.generators())
            inside = ~crossed & ((cells.interior_points() * normal).sum(-1) < size)
            below, _ = cells[crossed].halves(walls[crossed])
            cells = Polytopes.cat([cells[inside], below])
    return cells


def volumes(cells: Polytopes) -> Tensor:
    """Volumes of bounded polytopes of R^3: pyramids from a point inside over each facet, a polygon."""
    apex, corners = cells.interior_points(), cells.points[..., :-1]
    total = torch.zeros(len(cells))
    for facet in range(cells.offsets.shape[1]):
        on = cells.tight[:, :, 1 + facet]
        count = on.sum(1, keepdim=True)
        normal = cells.normals[:, facet]
        height = torch.where(cells.is_facet[:, facet], cells.offsets[:, facet] - (normal * apex).sum(-1), 0.0)
        middle = (corners * on[..., None]).sum(1) / count.clamp(min=1)
        x_axis = torch.linalg.cross(normal, torch.eye(3)[normal.abs().argmin(1)])
        x_axis = x_axis / x_axis.norm(dim=-1, keepdim=True).clamp(min=1e-9)
        axes = torch.stack([x_axis, torch.linalg.cross(normal, x_axis)], -1)
        x, y = torch.where(on[..., None], (corners - middle[:, None]) @ axes, 0.0).unbind(-1)
        order = torch.where(on, torch.atan2(y, x), torch.inf).argsort(1)
        x, y = x.gather(1, order), y.gather(1, order)
        here = torch.arange(x.shape[1])
        following = torch.where(here + 1 < count, here + 1, 0)
        twice = (x * y.gather(1, following) - y * x.gather(1, following)) * (here < count)
        total += height * twice.sum(1).abs() / 6
    return total
