# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""What the partition tests measure with: errors against the decoder itself, areas, cells that hold a point."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from pyro_cpa.partition import Intervals, Partition, Polygons, WholeSpace

__all__ = ["area", "cells_holding", "far_and_near", "round_trip_error"]


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
    assert isinstance(cells, Polygons)
    offsets = torch.where(cells.is_edge, cells.offsets, torch.inf)
    depth = offsets - torch.einsum("nl,rel->nre", z, cells.normals)
    return (depth >= margin[..., None]).all(-1)
