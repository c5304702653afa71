# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""The guide that is the exact posterior."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn

from ..distributions import CPAMarginal, CPAPosterior
from ..distributions.pieces import PiecewiseJoint
from ..partition import Partition, enumerate_regions
from .structure import ExactProblem, identical, read_problem

__all__ = ["AutoCPAPosterior"]


class AutoCPAPosterior(AutoGuide):
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

    Raises:
        UnsupportedModel: at the first call, naming the site that does not fit.

    Note:
        Exact up to float64 rounding. Each call traces the model once (to read data, noise and prior) and runs
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
    ) -> None:
        super().__init__(model, create_plates=create_plates)
        # In a tuple, as AutoGuide keeps the model: the decoder's parameters are the model's, not the guide's.
        self._decoder = (decoder,)
        self.max_regions = max_regions
        self.memory_budget = memory_budget
        self._checked = False
        self._latent_dim: int | None = None
        self._enumerated: tuple[list[Tensor], Partition] | None = None
        self._solved: tuple[tuple[Any, ...], CPAPosterior] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Unlike its base, which drops the model from the very guide that is copied. What can be computed again is left out.
        return self.__dict__ | {"master": None, "_enumerated": None, "_solved": None}

    @property
    def decoder(self) -> nn.Module:
        return self._decoder[0]

    def partition(self) -> Partition:
        """The regions of the decoder as it is now; enumerated only when its parameters have changed."""
        state = [t.detach() for t in (*self.decoder.parameters(), *self.decoder.buffers())]
        # Values are compared rather than version counters, which writes through ``.data`` leave as they are.
        if self._enumerated is None or not _same(self._enumerated[0], state):
            partition = enumerate_regions(self.decoder, self.max_regions, latent_dim=self._latent_dim)
            self._enumerated = ([t.clone() for t in state], partition)
        return self._enumerated[1]

    def problem(self, *args: Any, **kwargs: Any) -> ExactProblem:
        """The model's call as prior, noise and data, with the graph to the model's parameters."""
        with poutine.block():
            trace = poutine.trace(self.model).get_trace(*args, **kwargs)
        return self._read(trace)

    def _read(self, trace: poutine.Trace) -> ExactProblem:
        problem = read_problem(trace, self.decoder, check_mean=not self._checked)
        self._checked = True
        # Not every decoder tells it.
        self._latent_dim = problem.prior_loc.shape[-1]
        return problem

    def marginal(self, *args: Any, **kwargs: Any) -> CPAMarginal:
        """The exact :class:`~pyro_cpa.distributions.CPAMarginal` of one datum, differentiable in the parameters."""
        return self._marginal(self.problem(*args, **kwargs))

    def joint(self, problem: ExactProblem) -> PiecewiseJoint:
        """Partition, prior and noise of a call, detached: what an E-step needs."""
        return self._marginal(problem).joint

    def _marginal(self, problem: ExactProblem) -> CPAMarginal:
        return CPAMarginal(
            self.partition(),
            **_noise_argument(problem.noise_scale),
            loc=problem.prior_loc,
            prior_covariance=problem.prior_tril @ problem.prior_tril.mT,
            memory_budget=self.memory_budget,
        )

    def log_evidence(self, *args: Any, **kwargs: Any) -> Tensor:
        """Exact log p(x) of every datum of the call, differentiable in the model's parameters."""
        problem = self.problem(*args, **kwargs)
        return self._marginal(problem).log_prob(problem.x)

    def posterior(self, *args: Any, **kwargs: Any) -> CPAPosterior:
        """Exact p(z | x) of every datum of the call."""
        return self._posterior(self.problem(*args, **kwargs))

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

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw the latent from its exact posterior, in the plates of the model."""
        with torch.no_grad(), poutine.block():
            trace = poutine.trace(self.model).get_trace(*args, **kwargs)
        plates, subsamples = self._enter_plates(trace, *args, **kwargs)
        if subsamples is not None:
            # The guide's plates draw the minibatch; the data are read again on it.
            with torch.no_grad(), poutine.block():
                replayed = poutine.replay(self.model, trace=subsamples)
                trace = poutine.trace(replayed).get_trace(*args, **kwargs)
        with torch.no_grad(), poutine.block():
            problem = self._read(trace)
            posterior = self._posterior(problem)
        with ExitStack() as stack:
            for frame in trace.nodes[problem.latent]["cond_indep_stack"]:
                stack.enter_context(plates[frame.name])
            mask = trace.nodes[problem.latent]["mask"]
            if mask is not None:
                stack.enter_context(poutine.mask(mask=mask))
            values = {problem.latent: pyro.sample(problem.latent, posterior)}
        if problem.unobserved is not None:
            values |= self._sample_unobserved(problem, plates, values, *args, **kwargs)
        return values

    def _enter_plates(
        self, trace: poutine.Trace, *args: Any, **kwargs: Any
    ) -> tuple[dict[str, pyro.plate], poutine.Trace | None]:
        """The guide's plates by name, and a trace of their minibatches where some plate is subsampled."""
        self._prototype_frames = {
            frame.name: frame
            for _, site in trace.iter_stochastic_nodes()
            for frame in site["cond_indep_stack"]
        }
        for frame in self._prototype_frames.values():
            if not frame.vectorized:
                raise NotImplementedError(
                    f"plate '{frame.name}' is sequential: AutoCPAPosterior needs vectorised plates (with pyro.plate)"
                )
        with poutine.trace() as drawn:
            plates = self._create_plates(*args, **kwargs)
        subsampled = (
            any(p.subsample_size != p.size for p in plates.values()) or self.create_plates is not None
        )
        return plates, (drawn.trace if subsampled else None)

    def _sample_unobserved(
        self,
        problem: ExactProblem,
        plates: dict[str, pyro.plate],
        values: dict[str, Tensor],
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Draw the masked-out data that ``obs_mask`` turns into a latent, given z: the model's own conditional."""
        name = problem.unobserved
        assert name is not None
        with torch.no_grad(), poutine.block():
            given = poutine.condition(self.model, data={k: v.detach() for k, v in values.items()})
            site: Any = poutine.trace(given).get_trace(*args, **kwargs).nodes[name]
        with ExitStack() as stack:
            for frame in site["cond_indep_stack"]:
                stack.enter_context(plates[frame.name])
            if site["mask"] is not None:
                stack.enter_context(poutine.mask(mask=site["mask"]))
            return {name: pyro.sample(name, site["fn"])}

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
