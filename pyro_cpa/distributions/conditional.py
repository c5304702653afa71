# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""The exact law of missing data given observed data."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

from ..errors import InvalidData
from .expectation import evidence, region_posteriors
from .missing import missing_given_observed
from .parameters import Shape, check_data
from .parts import gathered
from .pieces import PiecewiseJoint
from .posterior import CPAPosterior

__all__ = ["CPAConditional"]


class CPAConditional(TorchDistribution):
    r"""Exact p(missing | observed) under a piecewise-affine decoder, as a law over completed data.

    .. math::

        p(x_{mis} | x_{obs}) = \sum_r p(r | x_{obs}) \, \mathrm{law}\big(A_r z + b_r + \epsilon \,\big|\,
            z \in \text{cell } r, x_{obs}\big)

    Draws, means and covariances are over whole rows: observed entries keep their value and have no variance.
    Made by :meth:`CPAMarginal.conditional`.

    Args:
        joint: partition, prior and noise.
        x: (..., D) data in which NaN marks the missing entries.

    Shapes: batch_shape ``x.shape[:-1]``, event_shape ``(D,)``.

    Note:
        Exact; one E-step over the observed entries. Parameters are detached.

    Example:
        >>> from pyro_cpa.distributions import CPAMarginal
        >>> _ = torch.manual_seed(0)
        >>> decoder = torch.nn.Sequential(torch.nn.Linear(1, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> filled = CPAMarginal(decoder, scale=0.3).conditional(torch.tensor([[0.5, torch.nan]]))
        >>> filled.mean[0, 0].item(), filled.variance[0, 0].item()
        (0.5, 0.0)
    """

    arg_constraints: dict[str, Constraint] = {}
    support = constraints.real_vector
    has_rsample = False

    def __init__(self, joint: PiecewiseJoint, x: Tensor, *, validate_args: bool | None = None) -> None:
        self.joint = joint
        self._x = check_data(x.detach(), joint.partition.data_dim)
        self._base_shape = x.shape[:-1]
        self._dtype = x.dtype
        self._latent = CPAPosterior(joint, x)
        super().__init__(self._base_shape, x.shape[-1:], validate_args=validate_args)

    def expand(self, batch_shape: Shape, _instance: Any = None) -> CPAConditional:
        new = self._get_checked_instance(CPAConditional, _instance)
        x = self._x.reshape(self._base_shape + self._x.shape[-1:]).expand(
            torch.Size(batch_shape) + self._x.shape[-1:]
        )
        CPAConditional.__init__(new, self.joint, x.to(self._dtype), validate_args=False)
        new._validate_args = self._validate_args
        return new

    def _shaped(self, values: Tensor) -> Tensor:
        return values.reshape(self.batch_shape + values.shape[1:]).to(self._dtype)

    @property
    def missing(self) -> Tensor:
        """(..., D) True where an entry is missing."""
        return self._x.isnan().reshape(self.batch_shape + self.event_shape)

    @property
    def mean(self) -> Tensor:
        """(..., D) the data, with E[x_mis | x_obs] in place of the missing entries."""
        found = []
        for part, posterior in region_posteriors(self.joint, self._x):
            x, probs = self._x[part.rows], posterior.log_probs.exp()
            decoded = torch.einsum("nr,rdl,nrl->nd", probs, part.joint.slopes, posterior.mean)
            decoded = decoded + probs @ part.joint.offsets
            if self.joint.noise.is_diagonal:
                found.append((part.rows, torch.where(x.isnan(), decoded, x)))
            else:
                given = missing_given_observed(self.joint.noise.covariance_matrix, x)
                found.append((part.rows, given.known + (given.gain @ decoded[..., None])[..., 0]))
        return self._shaped(gathered(found, len(self._x)))

    @property
    def covariance_matrix(self) -> Tensor:
        """(..., D, D) Cov[x_mis | x_obs], zero rows and columns for observed entries."""
        found = []
        for part, posterior in region_posteriors(self.joint, self._x):
            slopes, probs = part.joint.slopes, posterior.log_probs.exp()
            images = torch.einsum("rdl,nrl->nrd", slopes, posterior.mean) + part.joint.offsets
            centred = images - torch.einsum("nr,nrd->nd", probs, images)[:, None]
            decoded = torch.einsum("nr,nrd,nre->nde", probs, centred, centred)
            decoded = decoded + torch.einsum(
                "nr,rdl,nrlm,rem->nde", probs, slopes, posterior.covariance, slopes
            )
            given = missing_given_observed(self.joint.noise.covariance_matrix, self._x[part.rows])
            found.append((part.rows, given.gain @ decoded @ given.gain.mT + given.left))
        return self._shaped(gathered(found, len(self._x)))

    @property
    def variance(self) -> Tensor:
        """(..., D) variances of the missing entries, 0 for observed ones."""
        if not self.joint.noise.is_diagonal:
            return self.covariance_matrix.diagonal(dim1=-2, dim2=-1)
        found = []
        for part, posterior in region_posteriors(self.joint, self._x):
            slopes, probs = part.joint.slopes, posterior.log_probs.exp()
            images = torch.einsum("rdl,nrl->nrd", slopes, posterior.mean) + part.joint.offsets
            centred = images - torch.einsum("nr,nrd->nd", probs, images)[:, None]
            within = torch.einsum("nrlm,rdl,rdm->nrd", posterior.covariance, slopes, slopes)
            total = torch.einsum("nr,nrd->nd", probs, within + centred.square()) + self.joint.noise.scale**2
            found.append((part.rows, torch.where(self._x[part.rows].isnan(), total, 0.0)))
        return self._shaped(gathered(found, len(self._x)))

    @torch.no_grad()
    def sample(self, sample_shape: Shape = torch.Size()) -> Tensor:  # noqa: B008
        """Exact completions: sample_shape + batch_shape + (D,), observed entries kept."""
        z = self._latent.sample(sample_shape).double()
        chunks = self.joint.latent_chunks(z.reshape(-1, z.shape[-1]))
        decoded = torch.cat([self.joint.decode(part) for _, part in chunks])
        decoded = decoded.reshape(torch.Size(sample_shape).numel(), *self._x.shape)
        noise = torch.randn_like(decoded)
        if self.joint.noise.is_diagonal:
            x = torch.where(self._x.isnan(), decoded + self.joint.noise.scale * noise, self._x)
        else:
            given = missing_given_observed(self.joint.noise.covariance_matrix, self._x)
            spread = torch.linalg.eigh(given.left)
            root = spread.eigenvectors * spread.eigenvalues.relu().sqrt()[:, None]
            x = given.known + (given.gain @ decoded[..., None] + root @ noise[..., None])[..., 0]
            x = torch.where(self._x.isnan(), x, self._x)
        return x.reshape(torch.Size(sample_shape) + self.batch_shape + self.event_shape).to(self._dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        """Exact log p(x_mis | x_obs) of completed data.

        Args:
            value: (..., D) complete rows that agree with the observed entries.

        Returns:
            (...,) log p(x) - log p(x_obs); 0 where nothing is missing.

        Raises:
            InvalidData: ``value`` changes an observed entry, or is incomplete.
        """
        check_data(value, self.event_shape[0])
        shape = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        full = value.double().expand(shape + self.event_shape).reshape(-1, self.event_shape[0])
        known = self._x.reshape(self.batch_shape + self.event_shape).expand(shape + self.event_shape)
        known = known.reshape(full.shape)
        if bool(full.isnan().any()):
            raise InvalidData("a completed datum still holds NaN: give every entry a value")
        if not torch.allclose(torch.where(known.isnan(), full, known), full, rtol=1e-6):
            raise InvalidData(
                "a completed datum differs from the observed entries: change only the missing ones"
            )
        observed = evidence(self.joint, self._x).reshape(self.batch_shape)
        return (evidence(self.joint, full).reshape(shape) - observed).to(self._dtype)
