# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""The objective of bidirectional Helmholtz machines: the geometric mean of model and guide."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import CPAError, InvalidData, UnsupportedModel
from .draws import Draws
from .dreams import dream
from .log_weights import LogWeights
from .multi_sample import AbstractMultiSampleELBO
from .particles import sample_log_weights

__all__ = ["BiHelmholtzELBO", "HelmholtzDiagnostics", "LogZ"]


class HelmholtzDiagnostics(NamedTuple):
    """Of the last evaluation, from the same particles.

    Attributes:
        bound: minus the loss, estimate of log p~*, summed over data.
        iwae: importance-weighted estimate of log p, never below ``bound``.
        ess_model: effective sample size of the guide for p(z | x), as a share of S, a mean over data.
        ess_star: the same for p*(z | x), the geometric mean of posterior and guide.
    """

    bound: float
    iwae: float
    ess_model: float
    ess_star: float


class LogZ(NamedTuple):
    """Estimate of 2 log Z and the relative standard error of Z^2."""

    value: float
    relative_error: float


class BiHelmholtzELBO(AbstractMultiSampleELBO):
    r"""Bound of the bidirectional Helmholtz machine, which trains model and guide on one objective.

    With :math:`p^*(x, z) = \sqrt{p(x, z)\, q(x, z)} / Z` and :math:`q(x)` defined as :math:`p^*(x)`,

    .. math:: \log p^*(x) + 2 \log Z = \log \tilde p^*(x)
              = 2 \log \mathrm E_{q(z \mid x)} \sqrt{\frac{p(x, z)}{q(z \mid x)}}
              \approx 2 \log \frac1S \sum_{s=1}^S \sqrt{w_s}, \qquad Z \le 1 ,

    a lower bound of log p(x) and of log p*(x), tight where the guide is the posterior. With
    :math:`v_s = \mathrm{softmax}_s(\tfrac12 \log w_s)` the gradient is

    .. math:: \sum_s v_s \nabla \log p(x, z_s) + \sum_s (v_s - \tfrac1S) \nabla \log q(z_s \mid x) .

    Args:
        num_particles: S. With S = 1 the value is the ELBO, but the gradient of the guide is identically zero,
            so a step whose guide has parameters is refused; S = 1 is left for evaluation.
        plates, ...: as for every :class:`~pyro_cpa.infer.multi_sample.AbstractMultiSampleELBO`.

    Note:
        The value is the Renyi bound of order 1/2; its expectation grows with S from the ELBO to log p~*. The
        term -1/S changes no expectation, and makes the guide's gradient vanish exactly at the posterior. For
        the model the gradient is that of the estimate; for the guide it is consistent, with a bias of order
        1/S. No reparameterisation is needed: discrete guides are trained like any other.

    References:
        J. Bornschein, S. Shabanian, A. Fischer, Y. Bengio (2016), Bidirectional Helmholtz Machines.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         on = pyro.sample("on", dist.Bernoulli(0.5))
        ...         pyro.sample("x", dist.Bernoulli(0.2 + 0.6 * on), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("on", dist.Bernoulli(0.2 + 0.6 * x))  # the posterior
        >>> elbo = BiHelmholtzELBO(num_particles=4)
        >>> loss = elbo.loss(model, guide, torch.tensor([0.0, 1.0]))  # minus 2 log p(x)
        >>> round(loss, 4)
        1.3863
        >>> round(elbo.diagnostics.ess_star, 4)
        1.0
    """

    draws = Draws.DETACHED

    def __init__(self, num_particles: int = 10, **kwargs: Any) -> None:
        super().__init__(num_particles=num_particles, **kwargs)
        self._last: tuple[Tensor, Tensor, Tensor] | None = None

    def objective(self, weights: LogWeights) -> tuple[Tensor, Tensor]:
        log_w = weights.log_w.detach()
        count = len(log_w)
        if count == 1 and weights.log_q.requires_grad:
            raise InvalidData(
                "num_particles=1 leaves the parameters of the guide without a gradient: use at least 2."
            )
        self._last = log_w, weights.scale.detach(), weights.outer.detach()
        v = torch.softmax(log_w / 2, 0)
        surrogate = v * weights.log_p + (v - 1 / count) * weights.log_q
        return _log_star(log_w), surrogate.sum(0)

    @property
    def diagnostics(self) -> HelmholtzDiagnostics:
        """Bound and effective sample sizes of the last evaluation.

        Raises:
            CPAError: nothing has been evaluated yet.
        """
        if self._last is None:
            raise CPAError("no diagnostics yet: they describe the last step; evaluate the objective first.")
        log_w, scale, outer = self._last
        return HelmholtzDiagnostics(
            bound=float(outer + (scale * _log_star(log_w)).sum()),
            iwae=float(outer + (scale * _log_mean(log_w)).sum()),
            ess_model=_ess_share(log_w),
            ess_star=_ess_share(log_w / 2),
        )

    @torch.no_grad()
    def log_z(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        *args: Any,
        num_samples: int = 10_000,
        num_inner: int = 10,
        **kwargs: Any,
    ) -> LogZ:
        r"""Estimate 2 log Z, which turns the bound into log p*(x) = log p~*(x) - 2 log Z.

        .. math:: Z^2 = \mathrm E_{(x, z) \sim p} \Bigl[ \sqrt{\frac{q(z \mid x)}{p(x, z)}}\;
                  \mathrm E_{z' \sim q(\cdot \mid x)} \sqrt{\frac{p(x, z')}{q(z' \mid x)}} \Bigr]

        Args:
            model: observes its data with ``obs=``; its data are replaced by simulated ones.
            guide: a function of the data; draws the model's latents.
            args, kwargs: arguments of both. The elements of their plates count as independent draws of one
                model: rows that differ in covariates have a Z each, and are to be passed one at a time.
            num_samples: pairs (x, z), rounded up to whole calls of the model: longer data, fewer calls.
            num_inner: draws z' per pair.

        Returns:
            2 log Z <= 0, and the standard error of Z^2 relative to it.

        Raises:
            UnsupportedModel: the guide cannot be shown simulated data, or the objective names ``plates``.

        Note:
            Unbiased for Z^2, so its logarithm is low by half the squared relative error, and log p* high.
            Where the relative error is not small, the estimate means little.
        """
        if self.plates is not None:
            raise UnsupportedModel(
                f"log_z needs one weight per datum, but plates={self.plates} lets particles share latents: "
                "use an objective without plates=."
            )
        terms: list[Tensor] = []
        while sum(map(len, terms)) < num_samples:
            simulated = dream(model, guide, args, kwargs)
            inner = sample_log_weights(
                simulated.model,
                simulated.guide,
                args,
                kwargs,
                num_particles=num_inner,
                vectorize=self.vectorize_particles,
                max_plate_nesting=self.max_plate_nesting,
            )
            terms.append((_log_mean(inner.log_w / 2) - simulated.log_weights.log_w[0] / 2).flatten())
        log_terms = torch.cat(terms)
        relative = (log_terms - _log_mean(log_terms)).exp()
        error = relative.std() / math.sqrt(len(relative)) if len(relative) > 1 else math.nan
        return LogZ(float(_log_mean(log_terms)), float(error))


def _log_mean(log_values: Tensor) -> Tensor:
    """Logarithm of the mean over dim 0."""
    return log_values.logsumexp(0) - math.log(len(log_values))


def _log_star(log_w: Tensor) -> Tensor:
    """Estimate of log p~* from (S, ...) log-weights."""
    return 2 * _log_mean(log_w / 2)


def _ess_share(log_w: Tensor) -> float:
    """Effective sample size over S, a mean over data."""
    return float((2 * _log_mean(log_w) - _log_mean(2 * log_w)).exp().mean())
