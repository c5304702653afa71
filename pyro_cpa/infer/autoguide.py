# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""The guide that is the exact posterior."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from ..distributions import CPAMarginal, CPAPosterior
from ..distributions.parameters import TOLERANCE, check_gaussian
from ..distributions.pieces import GaussianNoise, GaussianPrior, PiecewiseJoint
from ..integrals.estimated_cells import NUM_POINTS
from ..partition import Partition, enumerate_regions
from .decoder_guide import AbstractDecoderGuide
from .structure import ExactProblem, identical

__all__ = ["AutoCPAPosterior"]


class AutoCPAPosterior(AbstractDecoderGuide):
    r"""Exact posterior of a model with a piecewise-affine decoder, as a Pyro guide without parameters.

    For a model :math:`z \sim \mathcal N(m, V),\; x \sim \mathcal N(g(z), S_x)` the guide draws from

    .. math::

        q(z) = p(z | x), \qquad \log p(x, z) - \log q(z) = \log p(x) \text{ at every } z,

    so that every bound is tight: ``SVI(model, guide, optim, Trace_ELBO()).step(x)`` returns -log p(x), the same at
    every draw, and its expected gradient is the gradient of -log p(x). Parameters are detached in the guide.

    Args:
        model: a Pyro model with one Gaussian latent vector and one Gaussian observed vector whose mean is
            ``decoder(z)``; sites and scales are found in its trace. Plates (subsampled too), NaN in the data
            (``NanMaskedNormal``), masks and ``obs_mask`` are honoured.
        decoder: the piecewise-affine module.
        create_plates: as for every Pyro AutoGuide.
        max_regions: more regions than this raise ``RegionBudgetExceeded``.
        memory_budget: bytes for the temporaries of one chunk of data.
        num_points: of integrals where the latent has more than three dimensions; see
            :class:`~pyro_cpa.distributions.CPAMarginal`.

    Raises:
        UnsupportedModel: at the first call, naming the site that does not fit.

    Note:
        Exact up to float64 rounding; with more than three latent dimensions evidence and region probabilities are
        estimates. Each call traces the model once (to read data, noise and prior) and runs
        one E-step; regions are enumerated anew only when the decoder's parameters changed.

    References:
        R. Balestriero, S. Paris, R. Baraniuk (2020), "Analytical Probability Distributions and Exact
        Expectation-Maximization for Deep Generative Networks".

    Example:
        >>> import pyro.distributions as dist
        >>> _ = torch.manual_seed(0)
        >>> decoder = nn.Sequential(nn.Linear(1, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        ...         pyro.sample("x", dist.Normal(decoder(z), 0.3).to_event(1), obs=x)
        >>> guide = AutoCPAPosterior(model, decoder=decoder)
        >>> guide.log_evidence(torch.zeros(4, 2)).shape
        torch.Size([4])
    """

    def __init__(
        self,
        model: Callable[..., Any],
        decoder: nn.Module,
        *,
        create_plates: Callable[..., pyro.plate | Iterable[pyro.plate]] | None = None,
        max_regions: int = 200_000,
        memory_budget: int = 2**28,
        num_points: int = NUM_POINTS,
    ) -> None:
        super().__init__(model, decoder, create_plates=create_plates)
        self.max_regions = max_regions
        self.memory_budget = memory_budget
        self.num_points = num_points
        self._enumerated: tuple[list[Tensor], Partition] | None = None
        self._solved: tuple[tuple[Any, ...], CPAPosterior] | None = None

    _recomputed = ("_enumerated", "_solved")

    def partition(self) -> Partition:
        """The regions of the decoder as it is now; enumerated only when it has changed."""
        state = [t.detach() for t in (*self.decoder.parameters(), *self.decoder.buffers())]
        # Values are compared rather than version counters, which writes through ``.data`` leave as they are.
        kept, network = self._enumerated, None
        if kept is not None and kept[1].network.is_current:
            if _same(kept[0], state):
                return kept[1]
            network = kept[1].network if kept[1].network.is_plain else None
        partition = enumerate_regions(network or self.decoder, self.max_regions, latent_dim=self._latent_dim)
        self._enumerated = ([t.clone() for t in state], partition)
        return partition

    def marginal(self, *args: Any, **kwargs: Any) -> CPAMarginal:
        """The exact :class:`~pyro_cpa.distributions.CPAMarginal` of one datum, differentiable in the parameters."""
        return self._marginal(self.problem(*args, **kwargs))

    def joint(self, problem: ExactProblem) -> PiecewiseJoint:
        """Partition, prior and noise of a call, as copies: what an E-step needs."""
        partition = self.partition()
        read = problem.prior_loc, problem.prior_tril, problem.noise_scale
        loc, tril, scale = (tensor.detach().to(partition.output_weight, copy=True) for tensor in read)
        check_gaussian(loc, tril, f"the prior of site '{problem.latent}'")
        check_gaussian(None, scale, f"the noise of site '{problem.observed}'")
        prior, noise = GaussianPrior(loc, tril), GaussianNoise(scale)
        budget, num_points = self.memory_budget, self.num_points
        return PiecewiseJoint(partition, prior, noise, budget, TOLERANCE, num_points=num_points)

    def _marginal(self, problem: ExactProblem) -> CPAMarginal:
        return CPAMarginal(
            self.partition(),
            **_noise_argument(problem.noise_scale),
            loc=problem.prior_loc,
            prior_covariance=problem.prior_tril @ problem.prior_tril.mT,
            memory_budget=self.memory_budget,
            num_points=self.num_points,
        )

    def log_evidence(self, *args: Any, **kwargs: Any) -> Tensor:
        """Exact log p(x) of every datum of the call, differentiable in the model's parameters."""
        problem = self.problem(*args, **kwargs)
        return self._marginal(problem).log_prob(problem.x)

    @torch.no_grad()
    def log_evidence_with_error(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """log p(x) of every datum of the call and its standard error: 0 up to three latent dimensions."""
        problem = self.problem(*args, **kwargs)
        return self._marginal(problem).log_prob(problem.x, return_error=True)

    def posterior(self, *args: Any, **kwargs: Any) -> CPAPosterior:
        """Exact p(z | x) of every datum of the call."""
        return self._posterior(self.problem(*args, **kwargs))

    def _law(self, problem: ExactProblem) -> CPAPosterior:
        return self._posterior(problem)

    def _posterior(self, problem: ExactProblem) -> CPAPosterior:
        partition = self.partition()
        given = (partition, problem.x, problem.prior_loc, problem.prior_tril, problem.noise_scale)
        if self._solved is None or not all(
            identical(a, b) for a, b in zip(self._solved[0], given, strict=True)
        ):
            with torch.no_grad():
                posterior = self._marginal(problem).posterior(problem.x)
            kept = tuple(g.detach().clone() if isinstance(g, Tensor) else g for g in given)
            self._solved = (kept, posterior)
        return self._solved[1]

    @torch.no_grad()
    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Posterior median of every latent coordinate."""
        problem = self.problem(*args, **kwargs)
        return {problem.latent: self._posterior(problem).quantiles([0.5])[0]}

    @torch.no_grad()
    def quantiles(self, quantiles: list[float] | Tensor, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Posterior quantiles of every latent coordinate; the first dimension runs over ``quantiles``."""
        problem = self.problem(*args, **kwargs)
        return {problem.latent: self._posterior(problem).quantiles(quantiles)}


def _noise_argument(noise_scale: Tensor) -> dict[str, Any]:
    if noise_scale.dim() == 1:
        return {"scale": noise_scale}
    return {"covariance_matrix": noise_scale @ noise_scale.mT}


def _same(kept: list[Tensor], now: list[Tensor]) -> bool:
    return len(kept) == len(now) and all(identical(a, b) for a, b in zip(kept, now, strict=True))
