# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""The point of a decoder's image nearest to a datum, by minimising over every affine piece."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..errors import UnsupportedModel
from ..integrals import nearest_point
from ..partition.cells import Cells, Intervals, Polygons, Polytopes, WholeSpace
from ._evidence import as_rows

__all__ = ["NearestPoint", "manifold_distance"]

_NUMBERS_AT_ONCE = 2**24
_FLAT = 1e-10  # of the steepest slope of a piece: what is less than this counts as none
_TRIED_AT_ONCE = 8  # regions of a datum
_ROUNDS = 50  # of damped steps, at most; two or three are taken


class NearestPoint(NamedTuple):
    """Distances (N,), in noise standard deviations, and the latents (N, L) of the nearest points."""

    distance: Tensor
    latent: Tensor


def manifold_distance(marginal: Any, x: Any) -> NearestPoint:
    r"""How far a datum lies from everything the decoder can say without noise.

    .. math:: \Delta(x) = \min_z \sqrt{(x - g(z))_{obs}^\top \, S_{x, obs}^{-1} \, (x - g(z))_{obs}}

    A datum far out on the manifold is improbable but not off it; this distance tells the two apart.

    Args:
        marginal: a :class:`~pyro_cpa.distributions.CPAMarginal`, of any L.
        x: (N, D); NaN marks missing cells, which are ignored.

    Returns:
        :class:`NearestPoint`, float64.

    Note:
        Exact, global minimum: a convex quadratic is minimised over every cell, inside or on its boundary. O(N R)
        for L = 1, O(N R E) for L = 2 with E edges per cell; for L > 2 a quadratic program for each pair of datum and
        region whose piece, continued to the whole space, comes nearer to the datum than the nearest point so far.

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
        per_row = len(cells) * max(
            2 * len(root), cells.offsets.shape[1] + 1 if isinstance(cells, Polygons) else 1
        )
        nearest = _nearest_in_polytopes if isinstance(cells, Polytopes) else _nearest
        for chunk in which.split(max(1, _NUMBERS_AT_ONCE // per_row)):
            data = torch.linalg.solve_triangular(root, rows[chunk][:, seen].mT, upper=False).mT
            z, r = nearest(cells, slopes, offsets, data)
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
            f"no nearest point is known for cells of type {type(cells).__name__}: expected WholeSpace, Intervals, "
            "Polygons or Polytopes"
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


class _Pieces:
    """Squared distances from the affine pieces of polytopes, as quadratic programs."""

    def __init__(self, cells: Polytopes, slopes: Tensor, offsets: Tensor) -> None:
        self.cells, self.slopes, self.offsets = cells, slopes, offsets
        # Rows of zeros, so that there are as many singular values as latents.
        L = slopes.shape[-1]
        self.basis, size, axes = torch.linalg.svd(pad(slopes, (0, 0, 0, L)), full_matrices=False)
        most = torch.where(size[:, :1] > 0, size[:, :1], 1.0)
        flat = size <= _FLAT * most
        self.flat = flat.any(1)
        # A tenth of the least singular value that counts: the others then converge by a factor of 100 a step.
        damping = 0.1 * torch.where(flat, most, size).amin(1, keepdim=True) * self.flat[:, None]
        damped = (size.square() + damping.square()).sqrt()
        self.gain = size / damped.square()
        self.axes = axes.mT
        # The lower factor C of the inverse CC' of the damped problem's matrix.
        self.tril = torch.linalg.qr((self.axes / damped[:, None]).mT).R.mT
        self.start = cells.interior_points()

    def lower_bounds(self, data: Tensor) -> Tensor:
        """(N, R) squared distances of data (N, D) from the whole planes that the pieces lie on, less rounding."""
        basis = self.basis[:, : self.slopes.shape[1]]
        distance = data[:, None] - self.offsets
        square = distance.square().sum(-1)
        return (1 - 1e-9) * square - torch.einsum("rdl,nrd->nrl", basis, distance).square().sum(-1)

    def minimise(self, data: Tensor, regions: Tensor) -> tuple[Tensor, Tensor]:
        """Nearest points (P, L) of the cells of regions (P,) to data (P, D), and squared distances (P,).

        A piece that is flat in some direction has no unique nearest point. There each step minimises the square plus a
        small multiple of the squared distance from the step before, and ends where nothing is gained.
        """
        z, square = self._step(data, regions, self.start[regions])
        active = self.flat[regions].nonzero()[:, 0]
        for _ in range(_ROUNDS):
            if not len(active):
                break
            new, lower = self._step(data[active], regions[active], z[active])
            gains = lower < square[active] * (1 - 1e-14)
            active, new, lower = active[gains], new[gains], lower[gains]
            z[active], square[active] = new, lower
        return z, square

    def _step(self, data: Tensor, regions: Tensor, origin: Tensor) -> tuple[Tensor, Tensor]:
        slopes = self.slopes[regions]
        residual = data - self.offsets[regions] - (slopes @ origin[..., None])[..., 0]
        along = (self.basis[regions, : slopes.shape[1]].mT @ residual[..., None])[..., 0]
        free = origin + (self.axes[regions] @ (self.gain[regions] * along)[..., None])[..., 0]
        z = nearest_point(self.cells[regions], free, self.tril[regions])
        residual = data - self.offsets[regions] - (slopes @ z[..., None])[..., 0]
        return z, residual.square().sum(-1)


def _nearest_in_polytopes(
    cells: Polytopes, slopes: Tensor, offsets: Tensor, data: Tensor
) -> tuple[Tensor, Tensor]:
    """The same as :func:`_nearest`, by quadratic programs; only for pieces that may come nearest."""
    pieces = _Pieces(cells, slopes, offsets)
    # In the order of what the pieces promise: once that is no less than what was found, the rest cannot do better.
    bounds, order = pieces.lower_bounds(data).sort(1)
    best = order[:, 0].clone()
    z, square = pieces.minimise(data, best)
    for first in range(1, order.shape[1], _TRIED_AT_ONCE):
        some = slice(first, first + _TRIED_AT_ONCE)
        rows, column = (bounds[:, some] < square[:, None]).nonzero(as_tuple=True)
        if not len(rows):
            break
        regions = order[rows, first + column]
        new, lower = pieces.minimise(data[rows], regions)
        least = square.scatter_reduce(0, rows, lower, "amin")
        won = (lower == least[rows]) & (lower < square[rows])
        square[rows[won]], z[rows[won]], best[rows[won]] = lower[won], new[won], regions[won]
    return z, best
