# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Where in a cell a Gaussian's density is highest."""

from __future__ import annotations

from functools import singledispatch

import torch
from torch import Tensor

from pyro_cpa.errors import UnsupportedModel
from pyro_cpa.integrals.estimated_cells import EstimatedPolytopes
from pyro_cpa.integrals.polygon import map_pairs
from pyro_cpa.integrals.polygon_frame import Edges, sight
from pyro_cpa.integrals.polytope import nearest_white
from pyro_cpa.partition.cells import Cells, Intervals, Polygons, Polytopes, WholeSpace

__all__ = ["nearest_point"]


@singledispatch
def nearest_point(cells: Cells, loc: Tensor, scale_tril: Tensor) -> Tensor:
    r"""The mode of Gaussians truncated to cells.

    .. math:: \arg\min_{z \in \text{cell}_r} (z - \mu_r)^\top S_r^{-1} (z - \mu_r)

    Args:
        cells: R cells of R^L.
        loc: (..., R, L) means, float64.
        scale_tril: (R, L, L) or (..., R, L, L) lower Cholesky factors, positive diagonal.

    Returns:
        (..., R, L) points of the closed cells; the mean itself where it lies in the cell.

    Raises:
        UnsupportedModel: if the kind of cell is unknown.

    Example:
        >>> import torch
        >>> cells = Intervals(torch.tensor([3.0]).double(), torch.tensor([4.0]).double())
        >>> nearest_point(cells, torch.zeros(1, 1).double(), torch.ones(1, 1, 1).double())
        tensor([[3.]], dtype=torch.float64)
    """
    raise UnsupportedModel(f"no nearest point is known for cells of type {type(cells).__name__}")


@nearest_point.register
def _whole_space(cells: WholeSpace, loc: Tensor, scale_tril: Tensor) -> Tensor:
    return loc


@nearest_point.register
def _intervals(cells: Intervals, loc: Tensor, scale_tril: Tensor) -> Tensor:
    return torch.minimum(torch.maximum(loc[..., 0], cells.lower), cells.upper).unsqueeze(-1)


@nearest_point.register
@torch.no_grad()
def _polygons(cells: Polygons, loc: Tensor, scale_tril: Tensor) -> Tensor:
    def points(edges: Edges, means: Tensor) -> Tensor:
        view = sight(edges, means)
        x, y = means
        return torch.stack([x + edges.c11 * view.yx, y + edges.c21 * view.yx + edges.c22 * view.yy])

    return map_pairs(cells, loc, scale_tril, 2, points).movedim(0, -1)


@nearest_point.register
@torch.no_grad()
def _polytopes(cells: Polytopes, loc: Tensor, scale_tril: Tensor) -> Tensor:
    return loc + (scale_tril @ nearest_white(cells, loc, scale_tril)[..., None])[..., 0]


@nearest_point.register
def _estimated(cells: EstimatedPolytopes, loc: Tensor, scale_tril: Tensor) -> Tensor:
    return nearest_point(cells.cells, loc, scale_tril)
