# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""The exact posterior of the latent where a label has been summed out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import Categorical, constraints
from torch.distributions.constraints import Constraint

from pyro_cpa.distributions import CPAMarginal, CPAPosterior

__all__ = ["MixturePosterior"]


class MixturePosterior(TorchDistribution):
    r"""Mixture of exact posteriors, one for each label, each row with its own weights.

    .. math:: p(z \mid x_n) = \sum_c w_{nc}\, p(z \mid x_n, y = c)

    Labels of weight zero cost nothing: one-hot weights give p(z | x, y) of labelled rows.

    Args:
        marginals: p(x | y = c) for each of the C labels.
        x: (N, D) data; NaN marks missing entries.
        log_weights: (N, C) normalised, ``-inf`` allowed.

    Shapes: batch_shape ``(N,)``, event_shape ``(L,)``; expands on the left. Draws and parameters carry no
    gradient.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> px = CPAMarginal(torch.nn.Linear(1, 2), scale=0.3)
        >>> posterior = MixturePosterior([px, px], torch.zeros(3, 2), torch.full((3, 2), 0.5).log())
        >>> torch.allclose(posterior.mean, px.posterior(torch.zeros(3, 2)).mean)
        True
    """

    arg_constraints: dict[str, Constraint] = {}
    support = constraints.real_vector
    has_rsample = False

    def __init__(self, marginals: Sequence[CPAMarginal], x: Tensor, log_weights: Tensor) -> None:
        self._log_weights = log_weights.detach()
        self._dtype = x.dtype
        self._components: list[tuple[int, Tensor, CPAPosterior]] = []
        for label, marginal in enumerate(marginals):
            rows = (self._log_weights[:, label] > -torch.inf).nonzero()[:, 0]
            if len(rows):
                self._components.append((label, rows, marginal.posterior(x[rows])))
        event = torch.Size([marginals[0].partition.latent_dim])
        super().__init__(torch.Size([len(x)]), event, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> MixturePosterior:
        new = self._get_checked_instance(MixturePosterior, _instance)
        for name in ("_log_weights", "_dtype", "_components"):
            setattr(new, name, getattr(self, name))
        super(MixturePosterior, new).__init__(torch.Size(batch_shape), self.event_shape, validate_args=False)
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """Exact log p(z | x), differentiable in z: sample_shape + batch_shape + (L,) to sample_shape + batch_shape."""
        shape = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        z = value.expand(shape + self.event_shape)
        terms = []
        for label, rows, posterior in self._components:
            found = posterior.log_prob(z[..., rows, :]) + self._log_weights[rows, label]
            absent = found.new_full(shape, -torch.inf)
            terms.append(absent.index_copy(len(shape) - 1, rows, found))
        return torch.stack(terms).logsumexp(0)

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Exact draws: a label by its weight, then z given it; sample_shape + batch_shape + (L,)."""
        outer = torch.Size(sample_shape) + self.batch_shape[:-1]
        label = Categorical(logits=self._log_weights).sample(outer)
        z = torch.empty(label.shape + self.event_shape, dtype=self._dtype, device=label.device)
        for c, rows, posterior in self._components:
            drawn = posterior.sample(outer).to(z)
            z[..., rows, :] = torch.where((label[..., rows] == c)[..., None], drawn, z[..., rows, :])
        return z

    def _moments(self) -> tuple[Tensor, Tensor]:
        """(N, L) means and (N, L, L) second moments."""
        first = self._log_weights.new_zeros(self._log_weights.shape[:1] + self.event_shape).to(self._dtype)
        second = first[..., None] * first[..., None, :]
        for label, rows, posterior in self._components:
            weight = self._log_weights[rows, label].exp().to(first)
            mean = posterior.mean
            square = posterior.covariance_matrix + mean[..., None] * mean[..., None, :]
            first.index_add_(0, rows, weight[:, None] * mean)
            second.index_add_(0, rows, weight[:, None, None] * square)
        return first, second

    @property
    def mean(self) -> Tensor:
        """(N, L) exact E[z | x]."""
        return self._moments()[0].expand(self.batch_shape + self.event_shape)

    @property
    def covariance_matrix(self) -> Tensor:
        """(N, L, L) exact Cov[z | x]."""
        first, second = self._moments()
        covariance = second - first[..., None] * first[..., None, :]
        return covariance.expand(self.batch_shape + covariance.shape[-2:])

    @property
    def variance(self) -> Tensor:
        """(N, L) exact variances of z given x."""
        return self.covariance_matrix.diagonal(dim1=-2, dim2=-1)
