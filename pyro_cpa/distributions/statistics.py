# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
r"""Sufficient statistics of the complete data under the exact posterior.

They carry both the analytic M-step and, by Fisher's identity, the gradient of the evidence:

.. math::

    \nabla \log p(x) = \mathbb{E}_{p(z, x_{mis} | x)}
        [\nabla \log \mathcal N(x; g(z), S_x) + \nabla \log \mathcal N(z; m, V)].
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .expectation import RegionPosterior
from .missing import missing_given_observed
from .pieces import PiecewiseJoint

__all__ = ["SufficientStatistics", "accumulate", "with_one"]


def with_one(mean: Tensor) -> Tensor:
    """(..., L) -> (..., L + 1): z~ = (z, 1)."""
    return torch.cat([mean, torch.ones_like(mean[..., :1])], dim=-1)


@dataclass(frozen=True)
class SufficientStatistics:
    r"""Sums over data of posterior expectations, region by region, with :math:`\tilde z = (z, 1)`; additive.

    The memory is O(R (L + 1)(D + L)), whatever the number of data.

    Attributes:
        zz: (R, L + 1, L + 1) :math:`\sum_n w_n E[\tilde z \tilde z^\top 1_r]`; its last entry is the count.
        xz: (R, D, L + 1) :math:`\sum_n w_n E[x \tilde z^\top 1_r]`.
        xx: (D,) :math:`\sum_n w_n E[x_d^2]` for diagonal noise, (D, D) second moments for a full covariance.
    """

    zz: Tensor
    xz: Tensor
    xx: Tensor

    def __add__(self, other: SufficientStatistics) -> SufficientStatistics:
        return SufficientStatistics(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @classmethod
    def zeros(cls, joint: PiecewiseJoint) -> SufficientStatistics:
        """What no data say."""
        D, L = joint.partition.data_dim, joint.partition.latent_dim
        like, R = joint.noise.scale, len(joint.cells)
        return cls(like.new_zeros(R, L + 1, L + 1), like.new_zeros(R, D, L + 1), torch.zeros_like(like))

    def add_(self, part: SufficientStatistics, regions: Tensor | None) -> None:
        """Adds in place what a part says of some regions, or of all."""
        if regions is None:
            self.zz.add_(part.zz)
            self.xz.add_(part.xz)
        else:
            self.zz.index_add_(0, regions, part.zz)
            self.xz.index_add_(0, regions, part.xz)
        self.xx.add_(part.xx)

    @property
    def count(self) -> Tensor:
        """Scalar: the total weight of the data."""
        return self.zz[:, -1, -1].sum()

    def residual(self, slopes: Tensor, offsets: Tensor) -> Tensor:
        """Sum of E[(x - g(z))^2] per dimension (D,), or of outer products (D, D) for a full covariance."""
        maps = torch.cat([slopes, offsets[..., None]], dim=-1)
        fitted = maps @ self.zz
        if self.xx.dim() == 1:
            return self.xx + (maps * (fitted - 2 * self.xz)).sum((0, 2))
        cross = torch.einsum("rdj,rej->de", maps, self.xz)
        return self.xx - cross - cross.mT + torch.einsum("rdj,rej->de", maps, fitted)

    def expected_log_joint(
        self, slopes: Tensor, offsets: Tensor, noise_scale: Tensor, prior_loc: Tensor, prior_tril: Tensor
    ) -> Tensor:
        """Sum over data of E[log p(x, z)], without the prior's term where the prior has no gradient.

        Its gradient is that of log p(X), if the statistics were taken under these arguments.
        """
        noise, loc, tril = (tensor.to(self.xx) for tensor in (noise_scale, prior_loc, prior_tril))
        expected = self.expected_log_likelihood(slopes, offsets, noise)
        if loc.requires_grad or tril.requires_grad:
            expected = expected + self.expected_log_prior(loc, tril)
        return expected

    def expected_log_likelihood(self, slopes: Tensor, offsets: Tensor, noise_scale: Tensor) -> Tensor:
        """Sum over data of E[log N(x; g(z), Sx)], differentiable in all three arguments."""
        residual = self.residual(slopes, offsets)
        if noise_scale.dim() == 1:
            square = (residual / noise_scale**2).sum()
            log_det = noise_scale.log().sum()
        else:
            square = torch.cholesky_solve(residual, noise_scale).trace()
            log_det = noise_scale.diagonal().log().sum()
        constant = 0.5 * math.log(2 * math.pi) * slopes.shape[1]
        return -0.5 * square - self.count * (log_det + constant)

    def expected_log_prior(self, loc: Tensor, scale_tril: Tensor) -> Tensor:
        """Sum over data of E[log N(z; loc, scale_tril scale_tril')], differentiable in both arguments."""
        moments = self.zz.sum(0)
        cross = torch.outer(loc, moments[-1, :-1])
        scatter = moments[:-1, :-1] - cross - cross.mT + self.count * torch.outer(loc, loc)
        square = torch.cholesky_solve(scatter, scale_tril).trace()
        constant = 0.5 * math.log(2 * math.pi) * loc.shape[0]
        return -0.5 * square - self.count * (scale_tril.diagonal().log().sum() + constant)


def accumulate(
    joint: PiecewiseJoint, x: Tensor, posterior: RegionPosterior, weights: Tensor | None = None
) -> SufficientStatistics:
    """The statistics of the rows of x (N, D), each counted ``weights`` (N,) times (once by default).

    Missing entries enter by their conditional expectation given z and the observed entries, so that the result has
    the form of complete data.
    """
    probs = posterior.log_probs.exp()
    if weights is not None:
        probs = probs * weights[:, None]
    mean = probs[..., None] * posterior.mean
    first = torch.cat([mean, probs[..., None]], dim=-1)
    scatter = mean[..., :, None] * posterior.mean[..., None, :]
    scatter = scatter.addcmul_(probs[..., None, None], posterior.covariance)
    if not bool(x.isnan().any()):
        sums = (first.flatten(1).mT @ with_one(x)).unflatten(0, first.shape[1:])
        weighted = x if weights is None else x * weights[:, None]
        xx = (weighted * x).sum(0) if joint.noise.is_diagonal else weighted.mT @ x
        return SufficientStatistics(
            _second_moments(scatter.sum(0), sums[..., -1]), sums[..., :-1].mT.contiguous(), xx
        )
    second = _second_moments(scatter, first)
    maps = torch.cat([joint.slopes, joint.offsets[..., None]], dim=-1)
    count = torch.ones_like(x[:, 0]) if weights is None else weights
    complete = _complete_diagonal if joint.noise.is_diagonal else _complete_full
    xz, xx = complete(joint, x, maps, first, second, count)
    return SufficientStatistics(second.sum(0), xz, xx)


def _second_moments(scatter: Tensor, first: Tensor) -> Tensor:
    """(..., L + 1, L + 1) moments of z~ = (z, 1) from E[z z'] (..., L, L) and E[z~] (..., L + 1)."""
    top = torch.cat([scatter, first[..., :-1, None]], dim=-1)
    return torch.cat([top, first[..., None, :]], dim=-2)


def _complete_diagonal(
    joint: PiecewiseJoint, x: Tensor, maps: Tensor, first: Tensor, second: Tensor, count: Tensor
) -> tuple[Tensor, Tensor]:
    """A missing entry is g_d(z) plus noise of variance s_d^2, independent of everything else."""
    missing = x.isnan()
    absent = missing.to(x.dtype)
    known = torch.where(missing, 0.0, x)
    moments = torch.einsum("nrjk,nd->rdjk", second, absent)
    filled = torch.einsum("rdj,rdjk->rdk", maps, moments)
    xz = torch.einsum("nrj,nd->rdj", first, known) + filled
    xx = count @ known.square() + (filled * maps).sum((0, 2)) + (count @ absent) * joint.noise.scale**2
    return xz, xx


def _complete_full(
    joint: PiecewiseJoint, x: Tensor, maps: Tensor, first: Tensor, second: Tensor, count: Tensor
) -> tuple[Tensor, Tensor]:
    """A missing entry regresses on the observed ones through the noise's correlation."""
    known, gain, left = missing_given_observed(joint.noise.covariance_matrix, x)
    R, D, J = maps.shape
    fitted = torch.einsum("rdj,nrjk->ndrk", maps, second).flatten(2)
    xz = torch.einsum("nrj,nd->rdj", first, known)
    xz = xz + torch.einsum("nde,nef->df", gain, fitted).reshape(D, R, J).movedim(1, 0)
    columns = maps.movedim(1, -1).flatten(0, 1)
    mean = first.flatten(1) @ columns
    cross = torch.einsum("nd,ne->de", known, (gain @ mean[..., None])[..., 0])
    outer = gain @ (fitted @ columns) @ gain.mT
    xx = (count[:, None] * known).mT @ known + cross + cross.mT
    return xz, xx + (outer + count[:, None, None] * left).sum(0)
