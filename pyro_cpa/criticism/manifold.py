# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""The point of a decoder's image nearest to a datum, by minimising over every affine piece."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import UnsupportedModel
from ..partition.cells import Cells, Intervals, Polygons, WholeSpace
from ._evidence import as_rows

__all__ = ["NearestPoint", "manifold_distance"]

_CANDIDATES_AT_ONCE = 2_000_000


class NearestPoint(NamedTuple):
    """Distances (N,), in noise standard deviations, and the latents (N, L) of the nearest points."""

    distance: Tensor
    latent: Tensor


def manifold_distance(marginal: Any, x: Any) -> NearestPoint:
    r"""How far a datum lies from everything the decoder can say without noise.

    .. math:: \Delta(x) = \min_z \sqrt{(x - g(z))_{obs}^\top \, S_{x, obs}^{-1} \, (x - g(z))_{obs}}

    A datum far out on the manifold is improbable but not off it; this distance tells the two apart.

    Args:
        marginal: a :class:`~pyro_cpa.distributions.CPAMarginal` with L <= 2, or an affine decoder.
        x: (N, D); NaN marks missing cells, which are ignored.

    Returns:
        :class:`NearestPoint`, float64.

    Raises:
        UnsupportedModel: L > 2 with several regions.

    Note:
        Exact, global minimum: a convex quadratic is minimised over every cell, inside or on an edge. O(N R)
        for L = 1, O(N R E) for L = 2 with E edges per cell.

    Example:
        >>> from pyro_cpa.distributions import CPAMarginal
        >>> decoder = torch.nn.Linear(1, 2)
        >>> with torch.no_grad():
        ...     _ = decoder.weight.copy_(torch.tensor([[1.0], [0.0]])), decoder.bias.zero_()
        >>> manifold_distance(CPAMarginal(decoder, scale=0.5), torch.tensor([[7.0, 1.0]])).distance.item()
        2.0
    """
    rows = as_rows(x).to(torch.float64)
    joint, cells = marginal.joint, marginal.partition.cells
    distance = torch.zeros(len(rows), dtype=torch.float64)
    latent = torch.zeros(len(rows), marginal.partition.latent_dim, dtype=torch.float64)
    patterns, members = torch.unique(rows.isnan(), dim=0, return_inverse=True)
    for index, missing in enumerate(patterns):
        seen = ~missing
        root = torch.linalg.cholesky(joint.noise.covariance_matrix[seen][:, seen])
        slopes = torch.linalg.solve_triangular(root, joint.slopes[:, seen], upper=False)
        offsets = torch.linalg.solve_triangular(root, joint.offsets[:, seen].mT, upper=False).mT
        which = (members == index).nonzero().flatten()
        per_row = len(cells) * (cells.offsets.shape[1] + 1 if isinstance(cells, Polygons) else 1)
        for chunk in which.split(max(1, _CANDIDATES_AT_ONCE // per_row)):
            data = torch.linalg.solve_triangular(root, rows[chunk][:, seen].mT, upper=False).mT
            z, r = _nearest(cells, slopes, offsets, data)
            residual = data - (slopes[r] @ z[..., None])[..., 0] - offsets[r]
            distance[chunk], latent[chunk] = residual.norm(dim=-1), z
    return NearestPoint(distance, latent)


def _nearest(cells: Cells, slopes: Tensor, offsets: Tensor, data: Tensor) -> tuple[Tensor, Tensor]:
    """Latents (N, L) and regions (N,) of the points of the whitened pieces nearest to ``data`` (N, D)."""
    gram = slopes.mT @ slopes
    # |data - A z - b|^2 = z'Gz - 2 c'z + |data - b|^2
    c = data @ slopes.permute(1, 0, 2).flatten(1)
    c = c.unflatten(1, slopes.shape[::2]) - (slopes.mT @ offsets[..., None])[..., 0]
    base = (data[:, None] - offsets).square().sum(-1)
    z = _candidates(cells, gram, c)
    value = (z * ((gram[:, None] @ z[..., None])[..., 0] - 2 * c[:, :, None])).sum(-1) + base[..., None]
    value = torch.where(z.isnan().any(-1), torch.inf, value).flatten(1)
    best = value.argmin(dim=1)
    return z.flatten(1, 2)[torch.arange(len(data)), best], best // z.shape[2]


def _candidates(cells: Cells, gram: Tensor, c: Tensor) -> Tensor:
    """(N, R, M, L) points among which each cell's minimiser is; NaN where one lies outside its cell."""
    # A piece that is flat in some direction has many minimisers: the shortest is tried inside the cell, and
    # if it lies outside, the set of minimisers either misses the cell or crosses an edge.
    free = (torch.linalg.pinv(gram, hermitian=True) @ c[..., None])[..., 0]
    if isinstance(cells, WholeSpace):
        return free[:, :, None]
    if isinstance(cells, Intervals):
        return free.clamp(cells.lower[:, None], cells.upper[:, None])[:, :, None]
    if not isinstance(cells, Polygons):
        raise UnsupportedModel(
            f"manifold_distance minimises over intervals and polygons, not {type(cells).__name__}: use a "
            "latent space of dimension 1 or 2"
        )
    inside = ((free[:, :, None] * cells.normals).sum(-1) <= cells.offsets).all(-1)
    free = torch.where(inside[..., None], free, torch.nan)
    foot = torch.where(cells.is_edge, cells.offsets, 0.0)[..., None] * cells.normals
    along = cells.tangents
    pull = torch.einsum("nrek,rek->nre", c[:, :, None] - (gram[:, None] @ foot[..., None])[..., 0], along)
    curvature = (along * (gram[:, None] @ along[..., None])[..., 0]).sum(-1)
    s = torch.where(curvature > 0, pull / curvature, 0.0).clamp(cells.starts, cells.ends)
    on_edge = torch.where(cells.is_edge[..., None], foot + s[..., None] * along, torch.nan)
    return torch.cat([free[:, :, None], on_edge], dim=2)
