# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""The joint law of latent and data, one Gaussian piece per region of the decoder."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ..compiled import array, in_blocks, runs_compiled
from ..integrals.estimated_cells import NUM_POINTS, EstimatedPolytopes
from ..partition import Partition
from ..partition.cells import Cells, Polytopes
from .missing import log_likelihood, observed_tril
from .pruning import RegionTree

__all__ = ["GaussianNoise", "GaussianPrior", "Maps", "PiecewiseJoint", "Pieces", "Whitened"]

_NUMBERS = 2**22  # of the maps that are factored at once


class GaussianPrior(NamedTuple):
    """z ~ N(loc, scale_tril scale_tril'); loc (L,), scale_tril (L, L) lower triangular."""

    loc: Tensor
    scale_tril: Tensor


class GaussianNoise(NamedTuple):
    """x | z ~ N(g(z), Sx): ``scale`` (D,) standard deviations, or (D, D) lower Cholesky factor of Sx."""

    scale: Tensor

    @property
    def is_diagonal(self) -> bool:
        return self.scale.dim() == 1

    @property
    def covariance_matrix(self) -> Tensor:
        """(D, D) Sx."""
        return torch.diag(self.scale**2) if self.is_diagonal else self.scale @ self.scale.mT


class Pieces(NamedTuple):
    r"""What region r says of datum n when it is treated as if it filled the whole latent space.

    Attributes:
        log_k: (N, R) :math:`\log N(x_n; A_r m + b_r, S_x + A_r V A_r^\top)`.
        loc: (N, R, L) mean of the Gaussian :math:`p(z | x_n, A_r, b_r)`.
        scale_tril: (R, L, L) its Cholesky factor; (N, R, L, L) where each datum misses its own entries.
    """

    log_k: Tensor
    loc: Tensor
    scale_tril: Tensor

    def pairs(self, rows: Tensor, regions: Tensor) -> Pieces:
        """The pieces of P pairs of datum and region: (P,), (P, L), (P, L, L)."""
        shared = self.scale_tril.dim() == 3
        tril = self.scale_tril[regions] if shared else self.scale_tril[rows, regions]
        return Pieces(self.log_k[rows, regions], self.loc[rows, regions], tril)


class Maps(NamedTuple):
    """Least-squares problems of the regions, factored: whitened images as functions of whitened latents u ~ N(0, I).

    Attributes:
        directions: (R, L, D') q, of which the slopes are combinations; orthonormal together with the rows of u itself.
        offsets: (R, D').
        inverse: (R, L, L) lower triangular: u is ``inverse`` times the projections on the directions.
        shift: (R,) what log k has from the region alone.
    """

    directions: Tensor
    offsets: Tensor
    inverse: Tensor
    shift: Tensor

    @classmethod
    def factored(cls, columns: Tensor, offsets: Tensor) -> Maps:
        """Of maps with slopes' columns (..., R, L, D') and offsets (..., R, D').

        Modified Gram-Schmidt on the stacked matrix [A; I], last column first: with A'A, that is K'K = I + A'A, the
        condition number would be squared, which small noise makes large (1e12 at a noise of 1e-6).
        """
        L = columns.shape[-2]
        eye = torch.eye(L, dtype=columns.dtype, device=columns.device)
        q = list(torch.cat([columns, eye.expand(*columns.shape[:-1], L)], dim=-1).unbind(-2))
        factor = columns.new_zeros(*columns.shape[:-2], L, L)
        for j in reversed(range(L)):
            norm = torch.linalg.vector_norm(q[j], dim=-1)
            factor[..., j, j] = norm
            q[j] = q[j] / norm[..., None]
            for i in range(j):
                projection = (q[j] * q[i]).sum(-1)
                factor[..., j, i] = projection
                q[i] = q[i] - projection[..., None] * q[j]
        directions = torch.stack([column[..., :-L] for column in q], dim=-2)
        inverse = torch.linalg.solve_triangular(factor, eye.expand(factor.shape), upper=False)
        return cls(directions, offsets, inverse, -factor.diagonal(dim1=-2, dim2=-1).log().sum(-1))

    def of(self, regions: Tensor) -> Maps:
        """Those of some regions (...,)."""
        return Maps(*(field[regions] for field in self))


class Whitened(NamedTuple):
    """Noise-whitened least-squares problem of a batch: data (N, D'), squared residual (N,) and log-determinant (N,) outside
    of the D' rows, and the maps: of the regions, or, with a leading N, of each datum's observed entries."""

    data: Tensor
    residual: Tensor
    log_det: Tensor
    maps: Maps


def _solve(w: Whitened, regions: Tensor, prior: GaussianPrior) -> tuple[Tensor, Tensor]:
    """log k (N, K) and means (N, K, L) of regions (K,), or of those of each datum (N, K), compiled."""
    from .pieces_compiled import solve

    N, K, L = len(w.data), regions.shape[-1], w.maps.inverse.shape[-1]
    log_k, loc = w.data.new_empty(N, K), w.data.new_empty(N, K, L)
    shared = [array(field) for field in (*w.maps, prior.loc, prior.scale_tril)]
    split = array(w.data), array(-0.5 * w.residual - w.log_det), log_k.numpy(), loc.numpy()
    if regions.dim() == 1:
        shared.append(array(regions[None]))
        in_blocks(solve, shared, [(part, 0) for part in split], N * K)
    else:
        in_blocks(solve, shared, [(part, 0) for part in (array(regions), *split)], N * K)
    return log_k, loc


class PiecewiseJoint:
    """Partition, prior and noise together, detached and in float64: everything the exact posterior needs.

    Args:
        partition: regions and affine maps of the decoder.
        prior: law of z.
        noise: law of x given z.
        memory_budget: bytes that the temporaries of one chunk of data may take; bounds the peak memory of every
            method whatever the number of data.
        tolerance: share of p(x) that may be left out with regions which provably matter less; see ``parts``.
        regions: (R,) indices, if only these of the partition's regions are meant.
        num_points: of integrals that are estimates.
    """

    def __init__(
        self,
        partition: Partition,
        prior: GaussianPrior,
        noise: GaussianNoise,
        memory_budget: int = 2**28,
        tolerance: float = 0.0,
        regions: Tensor | None = None,
        num_points: int = NUM_POINTS,
    ) -> None:
        self.partition = partition
        self.prior = prior
        self.noise = noise
        self.memory_budget = memory_budget
        self.tolerance = tolerance
        self.regions = regions
        self.num_points = num_points
        self.tree: RegionTree | None = None  # made by ``parts`` where it pays
        self._complete: tuple[Tensor, Tensor, Maps] | None = None

    @cached_property
    def cells(self) -> Cells:
        """Those of the partition; beyond three dimensions their integrals are estimates."""
        cells = self.partition.cells if self.regions is None else self.partition.cells[self.regions]
        if isinstance(cells, Polytopes) and cells.dim > 3:
            return EstimatedPolytopes(cells, self.num_points)
        return cells

    @property
    def is_exact(self) -> bool:
        """Whether the integrals over the cells are exact, as they are up to three dimensions."""
        return not isinstance(self.cells, EstimatedPolytopes)

    @cached_property
    def slopes(self) -> Tensor:
        """(R, D, L)"""
        return self.partition.slopes if self.regions is None else self.partition.maps_of(self.regions)[0]

    @cached_property
    def offsets(self) -> Tensor:
        """(R, D)"""
        return self.partition.offsets if self.regions is None else self.partition.maps_of(self.regions)[1]

    def only(self, regions: Tensor) -> PiecewiseJoint:
        """The same of some regions (P,), for complete data."""
        part = PiecewiseJoint(
            self.partition, self.prior, self.noise, self.memory_budget, 0.0, regions, self.num_points
        )
        part._complete = self.whitened_maps()
        return part

    def chunks(self, x: Tensor) -> Iterator[slice]:
        """Consecutive slices of the rows of x (N, D) whose temporaries fit ``memory_budget``."""
        rows = max(1, self.pairs_in_budget(x) // len(self.cells))
        for start in range(0, x.shape[0], rows):
            yield slice(start, min(start + rows, x.shape[0]))

    def pairs_in_budget(self, x: Tensor) -> int:
        """Pairs of a row of x (N, D) and a region whose temporaries fit ``memory_budget``."""
        D, L = self.partition.data_dim, self.partition.latent_dim
        width = D * (L + 2) if bool(x.isnan().any()) else min(D, self.partition.output_weight.shape[-1] + 1)
        # About 8 temporaries of L x L, and 2 of the residual's width, per pair.
        return self.memory_budget // (8 * (8 * (1 + L + L * L) + 2 * width))

    def latent_chunks(self, z: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Consecutive slices of the rows of z (M, L), and their rows, whose decoded maps fit ``memory_budget``."""
        _, D, L = self.slopes.shape
        rows = max(1, self.memory_budget // (8 * D * (L + 4)))
        for start in range(0, max(1, z.shape[0]), rows):
            part = slice(start, start + rows)
            yield part, z[part]

    def decode(self, z: Tensor) -> Tensor:
        """g(z) for latents z (M, L): (M, D), differentiable in z."""
        region = self.partition.locate(z.detach())
        return (self.slopes[region] @ z[..., None])[..., 0] + self.offsets[region]

    def log_joint(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x, z) row by row: x (M, D), z (M, L), result (M,)."""
        white = torch.linalg.solve_triangular(self.prior.scale_tril, (z - self.prior.loc).mT, upper=False)
        log_scale = self.prior.scale_tril.diagonal().log().sum() + 0.5 * math.log(2 * math.pi) * z.shape[-1]
        return log_likelihood(x, self.decode(z), self.noise.scale) - 0.5 * white.square().sum(0) - log_scale

    def pieces(self, x: Tensor) -> Pieces:
        """The Gaussian pieces of the rows of x (N, D) float64; NaN entries are marginalised out."""
        missing = x.isnan()
        return self.pieces_of(self._whiten_incomplete(x, missing) if bool(missing.any()) else self.whiten(x))

    def pieces_of(self, w: Whitened, regions: Tensor | None = None) -> Pieces:
        """The Gaussian pieces of a whitened least-squares problem.

        Args:
            w: data and maps.
            regions: (N, K) for each datum only these; by default those of this joint law.
        """
        tril, each = self.prior.scale_tril, w.maps.inverse.dim() > 3
        if regions is None and not each:
            regions = self.regions
        if not each and runs_compiled(w.data):
            every = torch.arange(len(w.maps.shift)) if regions is None else regions
            log_k, loc = _solve(w, every, self.prior)
            return Pieces(log_k, loc, tril @ (w.maps.inverse if regions is None else w.maps.inverse[regions]))
        maps = w.maps if regions is None else w.maps.of(regions)
        distance = w.data[:, None] - maps.offsets
        of = "rld,nrd->nrl" if maps.inverse.dim() == 3 else "nrld,nrd->nrl"
        projection = torch.einsum(of, maps.directions, distance)
        u = torch.einsum(of, maps.inverse, projection)
        # The residual is evaluated at the solution rather than as a difference of squares: rounding of the projections
        # only enters it squared.
        distance = distance - torch.einsum(of, maps.directions.mT, projection)
        square = w.residual[:, None] + distance.square().sum(-1) + u.square().sum(-1)
        log_k = maps.shift - w.log_det[:, None] - 0.5 * square
        return Pieces(log_k, self.prior.loc + u @ tril.mT, tril @ maps.inverse)

    def _latent_whitened(self, columns: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        """Affine maps of u, where z = loc + scale_tril u and u ~ N(0, I); slopes as their columns (R, L, D)."""
        loc, tril = self.prior
        return torch.einsum("lk,rld->rkd", tril, columns), offsets + torch.einsum("l,rld->rd", loc, columns)

    def _divide_by_noise(self, columns: Tensor) -> Tensor:
        """Lx^-1 columns, for columns (..., D, C)."""
        if self.noise.is_diagonal:
            return columns / self.noise.scale[:, None]
        return torch.linalg.solve_triangular(self.noise.scale, columns, upper=False)

    def whiten(self, x: Tensor) -> Whitened:
        """Project on the span of the last layer (all maps share it), so that work per pair is min(D, H + 1)."""
        basis, log_det, maps = self.whitened_maps()
        white = self._divide_by_noise(x.mT).mT
        if basis.shape[0] == basis.shape[1]:
            return Whitened(white, white.new_zeros(len(x)), log_det.expand(len(x)), maps)
        data = white @ basis
        residual = (white - data @ basis.mT).square().sum(-1)
        return Whitened(data, residual, log_det.expand(len(x)), maps)

    def whitened_maps(self) -> tuple[Tensor, Tensor, Maps]:
        """Basis (D, D') of the whitened images' span, log-determinant, and the maps of all regions of the partition."""
        if self._complete is None:
            part, noise = self.partition, self.noise
            shared = torch.cat([part.output_weight, part.output_bias[:, None]], dim=1)
            basis, coefficients = torch.eye(len(shared), dtype=shared.dtype, device=shared.device), None
            if shared.shape[0] > shared.shape[1]:
                basis, coefficients = torch.linalg.qr(self._divide_by_noise(shared))
            scale = noise.scale if noise.is_diagonal else noise.scale.diagonal()
            log_det = scale.log().sum() + 0.5 * math.log(2 * math.pi) * part.data_dim
            R, L, D = part.num_regions, part.latent_dim, basis.shape[1]
            like = basis.new_empty
            maps = Maps(like(R, L, D), like(R, D), like(R, L, L), like(R))
            size = max(1, _NUMBERS // (D * (L + 1)))
            for rows in (slice(start, start + size) for start in range(0, R, size)):
                if coefficients is None:
                    slopes, offsets = part.maps_of(rows)
                    columns, offsets = (
                        self._divide_by_noise(slopes).mT,
                        self._divide_by_noise(offsets.mT).mT,
                    )
                else:
                    columns = part.feature_slopes[rows].mT @ coefficients[:, :-1].mT
                    offsets = part.feature_offsets[rows] @ coefficients[:, :-1].mT + coefficients[:, -1]
                for field, values in zip(
                    maps, Maps.factored(*self._latent_whitened(columns, offsets)), strict=True
                ):
                    field[rows] = values
            self._complete = basis, log_det, maps
        return self._complete

    def _whiten_incomplete(self, x: Tensor, missing: Tensor) -> Whitened:
        """Each datum keeps its own observed rows: the missing ones become zero rows of the problem."""
        observed = (~missing).to(x.dtype)
        columns, offsets = self._latent_whitened(self.slopes.mT, self.offsets)
        data = torch.where(missing, 0.0, x)
        log_2pi = 0.5 * math.log(2 * math.pi) * observed.sum(-1)
        if self.noise.is_diagonal:
            weight = observed / self.noise.scale
            log_det = (observed * self.noise.scale.log()).sum(-1) + log_2pi
            maps = Maps.factored(columns * weight[:, None, None], offsets * weight[:, None])
            return Whitened(data * weight, log_2pi * 0, log_det, maps)
        tril = observed_tril(self.noise.covariance_matrix, missing)
        R, L, D = columns.shape
        every = torch.cat([offsets.mT, columns.permute(2, 0, 1).reshape(D, R * L)], dim=1)
        every = torch.cat([data[..., None], observed[..., None] * every], dim=-1)
        white = torch.linalg.solve_triangular(tril, every, upper=False)
        log_det = tril.diagonal(dim1=-2, dim2=-1).log().sum(-1) + log_2pi
        columns, offsets = white[..., 1 + R :].mT.unflatten(1, (R, L)), white[..., 1 : 1 + R].mT
        return Whitened(white[..., 0], log_2pi * 0, log_det, Maps.factored(columns, offsets))
