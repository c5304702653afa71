# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""The amortised guide of factor analysis."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_cpa.models.latent_model import check_count

__all__ = ["LinearGuide"]


class LinearGuide(PyroModule):
    r"""Gaussian guide whose mean is affine in x and whose covariance all rows share.

    .. math:: q(z \mid x) = N(V x + c, U U^\top)

    The family holds the exact posterior of :class:`FactorAnalysis`: once trained, its bound closes on the
    evidence, which makes it the ground for watching E- and M-phases (``AlternatingTrainer``).

    Args:
        data_dim: D.
        latent_dim: L.

    References:
        Yang (2022), Training latent variable models with auto-encoding variational Bayes: a tutorial.

    Example:
        >>> from pyro.infer import TraceMeanField_ELBO
        >>> from pyro_cpa.models.factor_analysis import FactorAnalysis
        >>> fa, guide = FactorAnalysis(data_dim=3, latent_dim=2), LinearGuide(3, 2)
        >>> TraceMeanField_ELBO()(fa.model, guide)(torch.randn(5, 3)).shape
        torch.Size([])
    """

    scale_tril: Any

    def __init__(self, data_dim: int, latent_dim: int) -> None:
        super().__init__()
        check_count(data_dim=data_dim, latent_dim=latent_dim)
        self.loc = nn.Linear(data_dim, latent_dim)
        self.scale_tril = PyroParam(torch.eye(latent_dim), constraints.lower_cholesky)

    def forward(self, x: Tensor, *, size: int | None = None) -> Tensor:
        """Draws z given x (N, D); ``size`` as for ``FactorAnalysis.model``."""
        rows = x.shape[-2]
        subsample = None if size is None else torch.arange(rows, device=x.device)
        with pyro.plate("data", size or rows, subsample=subsample):
            return pyro.sample("z", dist.MultivariateNormal(self.loc(x), scale_tril=self.scale_tril))
