# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Factor analysis and probabilistic principal components: the affine generators, in closed form."""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyro_cpa.errors import InvalidData
from pyro_cpa.models.cpa_generator import CPAGenerator
from pyro_cpa.models.gaussian_noise import NoiseKind
from pyro_cpa.models.latent_model import check_count

__all__ = ["PPCA", "FactorAnalysis"]


class FactorAnalysis(CPAGenerator):
    r"""Affine decoder with diagonal noise.

    .. math:: z \sim N(0, I), \quad x \mid z \sim N(W z + \mu, \Psi), \qquad
        p(x) = N(x; \mu, \Psi + W W^\top), \qquad
        p(z \mid x) = N(z; G W^\top \Psi^{-1} (x - \mu), G), \quad G = (I + W^\top \Psi^{-1} W)^{-1}

    A :class:`CPAGenerator` with one region. ``log_prob``, ``log_evidence``, ``posterior`` and ``em_step`` are the
    textbook's formulas; ``guide``, ``marginal``, ``impute`` and ``fit`` go through the piecewise-affine
    machinery and agree with them to rounding.

    Args:
        data_dim: D.
        latent_dim: L, of any size.
        learn_mean: Whether mu is a parameter, or 0.
        noise_scale: Initial standard deviations of the noise, a number or (D,).

    Raises:
        InvalidData: For bad settings; by the methods, for data of another shape or with infinite entries.

    Note:
        W is determined up to a rotation only: compare fits by ``covariance_matrix``. Of two models in one process
        see :class:`CPAGenerator`.

    References:
        D. Rubin, D. Thayer (1982), "EM algorithms for ML factor analysis".
        Yang (2022), Training latent variable models with auto-encoding variational Bayes: a tutorial.

    Example:
        >>> from pyro_cpa.datasets import factor_analysis_toy
        >>> _ = torch.manual_seed(0)
        >>> x = factor_analysis_toy(num_train=200).x_train
        >>> fa = FactorAnalysis(data_dim=3, latent_dim=2)
        >>> losses = [fa.em_step(x) for _ in range(20)]
        >>> losses[19] < losses[0]
        True
        >>> torch.allclose(fa.log_prob(x), fa.marginal().log_prob(x), atol=1e-4)
        True
    """

    _noise: NoiseKind = "diagonal"
    decoder: nn.Linear

    def __init__(
        self,
        data_dim: int,
        latent_dim: int = 2,
        *,
        learn_mean: bool = True,
        noise_scale: float | Tensor = 1.0,
    ) -> None:
        check_count(data_dim=data_dim, latent_dim=latent_dim)
        decoder = nn.Linear(latent_dim, data_dim, bias=learn_mean)
        super().__init__(data_dim, latent_dim, decoder=decoder, noise=self._noise, noise_scale=noise_scale)

    @property
    def loadings(self) -> Tensor:
        """(D, L) W."""
        return self.decoder.weight

    @property
    def mean(self) -> Tensor:
        """(D,) mu."""
        bias: Any = self.decoder.bias
        return torch.zeros_like(self.loadings[:, 0]) if bias is None else bias

    @property
    def noise_variance(self) -> Tensor:
        """(D,) diagonal of Psi."""
        return self.likelihood.scale.expand(self.data_dim) ** 2

    @property
    def covariance_matrix(self) -> Tensor:
        """(D, D) covariance Psi + W W' of x."""
        return torch.diag(self.noise_variance) + self.loadings @ self.loadings.mT

    def posterior(self, x: Tensor) -> TorchDistribution:
        """p(z | x) in closed form, differentiable: batch shape (N,), event shape (L,)."""
        x = self.checked(x)
        missing = x.isnan()
        # Complete rows all have the same covariance: it is then computed once.
        observed = ~missing if bool(missing.any()) else ~missing[:1]
        weight = observed / self.noise_variance
        precision = torch.einsum("nd,dl,dm->nlm", weight, self.loadings, self.loadings)
        root = torch.linalg.cholesky(precision + torch.eye(self.latent_dim).to(precision))
        covariance = torch.cholesky_inverse(root)
        pull = (weight * torch.where(missing, 0.0, x - self.mean)) @ self.loadings
        mean = (covariance @ pull[..., None])[..., 0]
        return dist.MultivariateNormal(mean, covariance_matrix=covariance)

    def log_prob(self, x: Tensor) -> Tensor:
        """(N,) log p(x) of the observed entries in closed form, differentiable."""
        return self._log_prob(self.checked(x), self.posterior(x))

    def _log_prob(self, x: Tensor, posterior: TorchDistribution) -> Tensor:
        # log p(x, z) - log p(z | x) at the posterior mean: no difference of large squares where noise is small.
        z = posterior.mean
        log_root = posterior.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        at_mean = -log_root - 0.5 * math.log(2 * math.pi) * self.latent_dim
        likelihood = self.likelihood(z @ self.loadings.mT + self.mean).log_prob(x)
        return likelihood + self.standard_normal().log_prob(z) - at_mean

    @torch.no_grad()
    def em_step(self, x: Tensor) -> float:
        r"""One step of EM in closed form, all parameters at once.

        .. math:: [W\; \mu]_d = \Big(\sum_n x_{nd} E[\tilde z_n]^\top\Big) \Big(\sum_n E[\tilde z_n \tilde
            z_n^\top]\Big)^{-1}, \qquad \Psi_d = \frac1{N_d} \sum_n E[(x_{nd} - W_d z_n - \mu_d)^2]

        Sums run over the rows in which entry d is observed.

        Args:
            x: (N, D) data, NaN where missing.

        Returns:
            -log p(x) before the step, summed over the rows; it never rises from step to step.

        Raises:
            InvalidData: If a column leaves no noise, or too few entries are observed to solve for its loadings.
        """
        x = self.checked(x)
        posterior = self.posterior(x)
        loss = -self._log_prob(x, posterior).sum().item()
        learns_mean = self.decoder.bias is not None
        first = nn.functional.pad(posterior.mean, (0, int(learns_mean)), value=1.0)
        spread = nn.functional.pad(posterior.covariance_matrix, (0, int(learns_mean)) * 2)
        observed = (~x.isnan()).to(x)
        known = x.nan_to_num()
        variance = torch.einsum("nd,njk->djk", observed, spread)
        gram = variance + torch.einsum("nd,nj,nk->djk", observed, first, first)
        cross = torch.einsum("nd,nj->dj", known, first)
        maps, trouble = torch.linalg.solve_ex(gram, cross[..., None])
        maps = maps[..., 0]
        residual = (observed * (known - first @ maps.mT).square()).sum(0)
        residual = residual + torch.einsum("dj,djk,dk->d", maps, variance, maps)
        count = observed.sum(0)
        if self._noise == "scalar":
            residual, count = residual.sum(), count.sum()
        scale = (residual / count).sqrt()
        if bool(trouble.any()) or not bool((scale.isfinite() & (scale > 0)).all()):
            raise InvalidData(
                f"the step gives noise of scale {scale.tolist()}; expected positive numbers. Drop columns that are "
                "constant or almost never observed, or lower latent_dim."
            )
        self._write(maps[:, : self.latent_dim], maps[:, -1], scale)
        return loss

    @torch.no_grad()
    def _write(self, loadings: Tensor, mean: Tensor, scale: Tensor) -> None:
        self.decoder.weight.copy_(loadings)
        if self.decoder.bias is not None:
            self.decoder.bias.copy_(mean)
        self.likelihood.scale = scale


class PPCA(FactorAnalysis):
    r"""Probabilistic principal components: factor analysis with one noise variance, :math:`\Psi = \sigma^2 I`.

    Its maximum likelihood is known in closed form, :meth:`fit_closed_form`. Arguments as for
    :class:`FactorAnalysis`, with ``noise_scale`` a number.

    References:
        M. Tipping, C. Bishop (1999), "Probabilistic Principal Component Analysis".

    Example:
        >>> _ = torch.manual_seed(0)
        >>> ppca = PPCA(data_dim=4, latent_dim=1)
        >>> best = ppca.fit_closed_form(torch.randn(50, 4))
        >>> best.shape, ppca.likelihood.scale.shape
        (torch.Size([50]), torch.Size([]))
    """

    _noise = "scalar"

    @torch.no_grad()
    def fit_closed_form(self, x: Tensor) -> Tensor:
        r"""The global maximum of the likelihood, from the eigenvalues of the data's covariance.

        .. math:: \sigma^2 = \frac1{D - L} \sum_{j > L} \lambda_j, \qquad W = U_L (\Lambda_L - \sigma^2 I)^{1/2}

        Args:
            x: (N, D) complete data.

        Returns:
            (N,) log p(x) at the maximum.

        Raises:
            InvalidData: If entries are missing (use ``em_step`` or ``fit``), L is not below D, or the data do
                not vary in the directions left to the noise.
        """
        x = self.checked(x)
        if bool(x.isnan().any()):
            raise InvalidData("x holds NaN; the closed form needs complete rows. Use em_step or fit.")
        if self.latent_dim >= self.data_dim:
            raise InvalidData(
                f"latent_dim is {self.latent_dim}; expected less than data_dim, {self.data_dim}."
            )
        mean = self.mean if self.decoder.bias is None else x.mean(0)
        centred = (x - mean).double()
        values, vectors = torch.linalg.eigh(centred.mT @ centred / len(x))
        split = self.data_dim - self.latent_dim
        variance = values[:split].mean()
        if not bool(variance > len(values) * torch.finfo(values.dtype).eps * values[-1]):
            raise InvalidData(
                f"the data fill only {self.latent_dim} dimensions, which leaves a noise of variance "
                f"{variance.item():.3g}; expected a positive one. Lower latent_dim or give more rows."
            )
        loadings = vectors[:, split:] * (values[split:] - variance).sqrt()
        self._write(loadings, mean, variance.sqrt().to(x))
        return self.log_prob(x)
