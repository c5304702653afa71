# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""The exact marginal p(x) of a piecewise-affine decoder."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions.constraints import Constraint

from .. import integrals
from ..errors import InvalidData
from ..integrals.estimated_cells import NUM_POINTS
from ..partition import Partition, enumerate_regions
from .conditional import CPAConditional
from .constraints import real_or_missing_vector
from .expectation import evidence, evidence_and_omitted, evidence_with_error
from .fisher import differentiable_evidence
from .parameters import TOLERANCE, Shape, check_data, noise_factor, prior_factors
from .pieces import GaussianNoise, GaussianPrior, PiecewiseJoint
from .posterior import CPAPosterior

__all__ = ["CPAMarginal"]


class CPAMarginal(TorchDistribution):
    r"""Exact marginal of data under a continuous piecewise-affine decoder with Gaussian prior and noise.

    With g(z) = A_r z + b_r on the convex cell r of the latent space,

    .. math::

        p(x) = \int \mathcal N(x; g(z), S_x) \, \mathcal N(z; m, V) \, dz
             = \sum_r \mathcal N(x; A_r m + b_r, S_x + A_r V A_r^\top)
               \int_{\text{cell } r} \mathcal N(z; \mu_r(x), S_r) \, dz.

    Args:
        decoder: ``torch.nn.Module`` R^L -> R^D, or the :class:`~pyro_cpa.partition.Partition` of one.
        scale: standard deviation of x given z: a number or (D,).
        covariance_matrix: (D, D) covariance of x given z, instead of ``scale``.
        loc: (L,) prior mean m; zero by default.
        prior_covariance: (L, L) prior covariance V; the identity by default.
        latent_dim: L, where it cannot be read off the decoder's first layer.
        max_regions: more regions than this raise :class:`~pyro_cpa.errors.RegionBudgetExceeded`.
        memory_budget: bytes for the temporaries of one chunk of data.
        tolerance: share of p(x) that may be left out with regions which provably add no more; 0 for none. Partitions of
            a thousand regions and more are searched for those that matter, see :meth:`omitted_share`.
        num_points: of each integral where L > 3, rounded up to 16 times a power of two.

    Shapes: batch_shape ``()``, event_shape ``(D,)``; expands to any batch shape, so that it can stand in a plate.

    Raises:
        UnsupportedModule: the decoder is not piecewise affine.
        RegionBudgetExceeded: too many regions.
        InvalidData: parameters or data of the wrong shape, not finite, or not positive (definite).

    Note:
        Exact up to float64 rounding, in every tail. One evaluation costs O(N R) integrals of dimension L plus
        O(N R min(D, H)) for the Gaussian terms, H the last hidden width. ``log_prob`` is differentiable once in
        the decoder's parameters, ``scale``, ``covariance_matrix``, ``loc``, ``prior_covariance`` and x.
        Parameters are read when the distribution is made: make a new one after they change.

        With L > 3 and several regions the integrals are estimates by randomised quasi-Monte Carlo, without bias for
        p(x), and so is everything made of them (draws are exact given the estimated p(r | x)). They use the same
        ``num_points`` points for every datum and region and at every call: values are deterministic, no generator is
        touched, and between nearby parameters most of the error cancels. The gradient estimates that of log p(x); it is
        not the derivative of the estimate.

    References:
        R. Balestriero, S. Paris, R. Baraniuk (2020), "Analytical Probability Distributions and Exact
        Expectation-Maximization for Deep Generative Networks".

    Example:
        >>> _ = torch.manual_seed(0)
        >>> decoder = nn.Sequential(nn.Linear(1, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> px = CPAMarginal(decoder, scale=0.3)
        >>> x = px.sample((5,))
        >>> px.log_prob(x).shape
        torch.Size([5])
        >>> px.posterior(x).mean.shape
        torch.Size([5, 1])
    """

    arg_constraints: dict[str, Constraint] = {}
    support = real_or_missing_vector
    has_rsample = True

    def __init__(
        self,
        decoder: nn.Module | Partition,
        scale: Tensor | float | None = None,
        *,
        covariance_matrix: Tensor | None = None,
        loc: Tensor | None = None,
        prior_covariance: Tensor | None = None,
        latent_dim: int | None = None,
        max_regions: int = 200_000,
        memory_budget: int = 2**28,
        tolerance: float = TOLERANCE,
        num_points: int = NUM_POINTS,
        validate_args: bool | None = None,
    ) -> None:
        if not 0 <= tolerance < 1:
            raise InvalidData(f"tolerance is {tolerance}: expected a share of p(x), from 0 to less than 1")
        if isinstance(decoder, Partition):
            partition = decoder
        else:
            partition = enumerate_regions(decoder, max_regions=max_regions, latent_dim=latent_dim)
        self.partition = partition
        # Read once: weights may be random draws (PyroSample), which another reading would draw again.
        self._layers = partition.network.layers()
        D, L = partition.data_dim, partition.latent_dim
        like = partition.output_bias
        self._noise_scale = noise_factor(scale, covariance_matrix, D, like)
        self._prior_loc, self._prior_tril = prior_factors(loc, prior_covariance, L, like)
        self._dtype = next(
            (v.dtype for v in (scale, covariance_matrix) if isinstance(v, Tensor) and v.is_floating_point()),
            partition.dtype,
        )
        prior = GaussianPrior(self._prior_loc.detach(), self._prior_tril.detach())
        noise = GaussianNoise(self._noise_scale.detach())
        self.joint = PiecewiseJoint(partition, prior, noise, memory_budget, tolerance, num_points=num_points)
        super().__init__(torch.Size(), torch.Size([D]), validate_args=validate_args)

    def expand(self, batch_shape: Shape, _instance: Any = None) -> CPAMarginal:
        new = self._get_checked_instance(CPAMarginal, _instance)
        for name in ("partition", "_layers", "_noise_scale", "_prior_loc", "_prior_tril", "_dtype", "joint"):
            setattr(new, name, getattr(self, name))
        super(CPAMarginal, new).__init__(torch.Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @overload
    def log_prob(self, value: Tensor) -> Tensor: ...

    @overload
    def log_prob(self, value: Tensor, *, return_error: Literal[True]) -> tuple[Tensor, Tensor]: ...

    def log_prob(self, value: Tensor, *, return_error: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Exact log p(x); an estimate where L > 3.

        Args:
            value: (..., D) data; NaN marks a missing entry, which is marginalised out.
            return_error: also return the standard error of log p(x), 0 for L <= 3; both without gradients then.

        Returns:
            (...,) log-density of the observed entries (0 where all are missing), in the dtype of ``value``.
        """
        x = check_data(value, self.partition.data_dim)
        shape = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        if return_error:
            with torch.no_grad():
                both = evidence_with_error(self.joint, x)
            log_prob, error = (part.reshape(value.shape[:-1]).expand(shape).to(value.dtype) for part in both)
            return log_prob, error
        parameters = (self._noise_scale, self._prior_loc, self._prior_tril)
        if torch.is_grad_enabled():
            maps = self.partition.affine_maps(self._layers)
            found = differentiable_evidence(self.joint, x, *maps, *parameters)
        else:
            found = evidence(self.joint, x)
        return found.reshape(value.shape[:-1]).expand(shape).to(value.dtype)

    @torch.no_grad()
    def omitted_share(self, value: Tensor) -> Tensor:
        r"""Certified bounds on the share of p(x) that ``log_prob`` leaves out, with regions it does not look at.

        .. math::

            p(x)\, (1 - \text{share}) \le e^{\text{log_prob}(x)} \le p(x),
            \qquad \text{share} \le \text{tolerance}.

        Args:
            value: (..., D) data.

        Returns:
            (...,) bounds; 0 where all regions were looked at: for partitions of few regions, a few rows, and rows with
            missing entries.
        """
        found = evidence_and_omitted(self.joint, check_data(value, self.partition.data_dim))[1]
        return found.reshape(value.shape[:-1])

    def posterior(self, x: Tensor) -> CPAPosterior:
        """Exact p(z | x) of the rows of x (..., D): batch_shape (...,), event_shape (L,)."""
        return CPAPosterior(self.joint, x)

    def conditional(self, x: Tensor) -> CPAConditional:
        """Exact p(missing | observed) of the rows of x (..., D), in which NaN marks the missing entries."""
        return CPAConditional(self.joint, x)

    def rsample(self, sample_shape: Shape = torch.Size()) -> Tensor:  # noqa: B008
        """Reparameterised draws of x: z from the prior, decoded, plus noise."""
        shape = torch.Size(sample_shape) + self.batch_shape
        like = self._prior_loc
        z = (
            self._prior_loc
            + torch.randn(shape + like.shape, dtype=like.dtype, device=like.device) @ self._prior_tril.mT
        )
        region = self.partition.locate(z.detach())
        slopes, offsets = self.partition.affine_maps(self._layers)
        mean = (slopes[region] @ z[..., None])[..., 0] + offsets[region]
        noise = torch.randn_like(mean)
        diagonal = self._noise_scale.dim() == 1
        mean = mean + (noise * self._noise_scale if diagonal else noise @ self._noise_scale.mT)
        return mean.to(self._dtype)

    def _moments(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Prior probability, mean and covariance of z in each region, and the mean of x (all detached)."""
        joint, cells = self.joint, self.joint.cells
        R = len(cells)
        log_mass, mean, covariance = integrals.moments(
            cells, joint.prior.loc.expand(R, -1), joint.prior.scale_tril.expand(R, -1, -1)
        )
        probs = log_mass.exp()
        images = (joint.slopes @ mean[..., None])[..., 0] + joint.offsets
        return probs, images, covariance, probs @ images

    @property
    def mean(self) -> Tensor:
        """(..., D) exact E[x]."""
        mean = self._moments()[-1]
        return mean.to(self._dtype).expand(self.batch_shape + self.event_shape)

    @property
    def covariance_matrix(self) -> Tensor:
        """(..., D, D) exact Cov[x]."""
        probs, images, covariance, mean = self._moments()
        slopes = self.joint.slopes
        centred = images - mean
        within = torch.einsum("r,rdl,rlm,rem->de", probs, slopes, covariance, slopes)
        total = within + (probs[:, None] * centred).mT @ centred + self.joint.noise.covariance_matrix
        return total.to(self._dtype).expand(self.batch_shape + total.shape)

    @property
    def variance(self) -> Tensor:
        """(..., D) exact variances of x."""
        probs, images, covariance, mean = self._moments()
        slopes = self.joint.slopes
        within = ((slopes @ covariance) * slopes).sum(-1) + (images - mean).square()
        noise = self.joint.noise
        own = noise.scale**2 if noise.is_diagonal else noise.scale.square().sum(-1)
        return (probs @ within + own).to(self._dtype).expand(self.batch_shape + self.event_shape)
