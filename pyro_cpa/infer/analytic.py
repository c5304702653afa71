# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""The evidence lower bound with every integral that has a closed form taken in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer import TraceEnum_ELBO
from pyro.infer.util import Dice
from pyro.ops import packed
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_cpa.errors import InvalidData

__all__ = ["AnalyticELBO"]

Site = Any  # a node of a trace: a dictionary whose type Pyro does not spell out
Pair = tuple[poutine.Trace, poutine.Trace]


class AnalyticELBO(TraceEnum_ELBO):
    r"""ELBO with closed-form divergences *and* parallel enumeration.

    .. math::
        \mathcal L = \sum_y q(y|x)\Bigl[\,\mathrm E_{q(z|x,y)} \log p(x|y,z)
            - \mathrm{KL}\bigl(q(z|x,y)\,\|\,p(z|y)\bigr)\Bigr] - \mathrm{KL}\bigl(q(y|x)\,\|\,p(y)\bigr)

    Sites marked ``infer={"enumerate": "parallel"}`` are summed out, exactly as in
    :class:`pyro.infer.TraceEnum_ELBO`. The sampled log-ratio of every other site is replaced by its
    Kullback-Leibler divergence, as in :class:`pyro.infer.TraceMeanField_ELBO`, wherever that is right:

    - a formula is registered with :func:`torch.distributions.kl_divergence`;
    - the site has the same scale and mask in model and guide;
    - everything that precedes it in the model also precedes it in the guide, so that the divergence's
      parameters cannot depend on the site's own value;
    - its prior does not depend on a variable that is summed out in the model alone.

    Any other site keeps its sampled log-ratio, so the bound is right for every model; ``analytic_sites``
    names those that got the formula. After each call the two terms are at hand, in the units of the loss
    (plates summed and scaled, particles averaged): ``loss == kl - reconstruction``.

    Attributes:
        reconstruction: Expected log-likelihood of the last call. A term that the model's own enumeration
            ties to the likelihood counts as part of it.
        kl: Divergence of guide from prior of the last call, the sum of ``kl_by_site``.
        kl_by_site: The same, site by site: a latent variable that the model ignores shows here as 0.
        analytic_sites: Names of the sites whose divergence was taken in closed form.

    Args:
        num_particles: Draws of the sites that remain sampled.
        strict_enumeration_warning: Whether to warn if nothing is enumerated (here a normal use).
        **kwargs: As for :class:`pyro.infer.ELBO`: ``max_plate_nesting``, ``vectorize_particles``, ...

    Raises:
        InvalidData: If ``num_particles`` is not a positive integer.

    Note:
        Cost: that of ``TraceEnum_ELBO`` plus one contraction per latent site for the report. Same mean as
        ``TraceEnum_ELBO`` and ``Trace_ELBO``; the same value, draw for draw, as ``TraceMeanField_ELBO``
        where that applies. ``max_plate_nesting``, if not given, is found by one trial run for each new
        pair of model and guide; the trial leaves the CPU random state as it was.

    References:
        Kingma and Welling (2014), Auto-encoding variational Bayes.
        Yang (2022), Training latent variable models with auto-encoding variational Bayes: a tutorial.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", 3):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", 3):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.5))
        >>> elbo = AnalyticELBO()
        >>> loss = elbo.loss(model, guide, torch.tensor([-1.0, 0.0, 2.0]))
        >>> round(elbo.kl, 4), elbo.analytic_sites   # 3 * KL(N(0, 1/4) | N(0, 1)) + (1 + 4) / 8
        (1.5794, ('z',))
        >>> abs(loss - (elbo.kl - elbo.reconstruction)) < 1e-5
        True
    """

    def __init__(
        self, num_particles: int = 1, *, strict_enumeration_warning: bool = False, **kwargs: Any
    ) -> None:
        if not isinstance(num_particles, int) or num_particles < 1:
            raise InvalidData(f"num_particles is {num_particles!r}; give a positive integer.")
        super().__init__(num_particles, strict_enumeration_warning=strict_enumeration_warning, **kwargs)
        self.analytic_sites: tuple[str, ...] = ()
        self._loss = math.nan
        self._kl_by_site: dict[str, Tensor] = {}
        self._nesting_is_guessed = self.max_plate_nesting == math.inf
        self._probed: tuple[Callable[..., Any], Callable[..., Any]] | None = None

    @property
    def kl_by_site(self) -> dict[str, float]:
        return {name: float(kl) / self.num_particles for name, kl in self._kl_by_site.items()}

    @property
    def kl(self) -> float:
        return math.fsum(self.kl_by_site.values())

    @property
    def reconstruction(self) -> float:
        return self.kl - self._loss

    def loss(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any) -> float:
        """Returns minus the bound, without building a graph for it to be differentiated."""
        self._loss = super().loss(model, guide, *args, **kwargs)
        return self._loss

    def loss_and_grads(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> float:
        """Returns minus the bound and adds its gradient to the parameters' ``grad``."""
        self._loss = super().loss_and_grads(model, guide, *args, **kwargs)
        return self._loss

    def differentiable_loss(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """Returns minus the bound as a scalar tensor; a plain number of it where gradients are off."""
        if not torch.is_grad_enabled():
            return torch.tensor(self.loss(model, guide, *args, **kwargs))
        loss = super().differentiable_loss(model, guide, *args, **kwargs)
        self._loss = loss.item()
        return loss

    def _guess_max_plate_nesting(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        with torch.random.fork_rng(devices=[]):
            super()._guess_max_plate_nesting(model, guide, args, kwargs)
        self._probed = (model, guide)

    def _get_traces(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Iterator[Pair]:
        if self._nesting_is_guessed and self._probed != (model, guide):
            self.max_plate_nesting = math.inf
        self._kl_by_site = {}
        for model_trace, guide_trace in super()._get_traces(model, guide, args, kwargs):
            summed_out = _symbols_summed_out_in_model(model_trace, guide_trace)
            self.analytic_sites = _use_closed_forms(model_trace, guide_trace, summed_out)
            for name, kl in _divergences(model_trace, guide_trace, summed_out):
                self._kl_by_site[name] = self._kl_by_site.get(name, 0.0) + kl
            yield model_trace, guide_trace


def _sample_sites(trace: poutine.Trace) -> dict[str, Site]:
    return {name: site for name, site in trace.nodes.items() if site["type"] == "sample"}


def _latent_sites(trace: poutine.Trace) -> dict[str, Site]:
    return {name: site for name, site in _sample_sites(trace).items() if not site["is_observed"]}


def _plates(trace: poutine.Trace, site: Site) -> frozenset[str]:
    frames = site["cond_indep_stack"]
    return frozenset(trace.plate_to_symbol[frame.name] for frame in frames if frame.vectorized)


def _symbols_summed_out_in_model(model_trace: poutine.Trace, guide_trace: poutine.Trace) -> set[str]:
    return {
        site["infer"]["_enumerate_symbol"]
        for name, site in _latent_sites(model_trace).items()
        if name not in guide_trace and "_enumerate_symbol" in site["infer"]
    }


def _use_closed_forms(
    model_trace: poutine.Trace, guide_trace: poutine.Trace, summed_out: set[str]
) -> tuple[str, ...]:
    """Puts KL divergences in the place of sampled log-ratios; returns the names of the sites concerned.

    Only the cost of a site is exchanged. What enumeration weighs it with (the guide's probabilities of
    the enumerated values) is kept elsewhere in the trace and stays.
    """
    guide_sites = _latent_sites(guide_trace)
    rank = {name: position for position, name in enumerate(guide_sites)}
    names = []
    latest = -1
    for name, model_site in _latent_sites(model_trace).items():
        if name not in guide_sites:
            continue
        guide_site = guide_sites[name]
        ordered = rank[name] > latest
        latest = max(latest, rank[name])
        enumerated = "_enumerate_dim" in guide_site["infer"] or "_enum_total" in guide_site["infer"]
        tied = not summed_out.isdisjoint(model_site["packed"]["log_prob"]._pyro_dims)
        if not ordered or enumerated or tied or not _same_handlers(model_site, guide_site):
            continue
        try:
            kl = kl_divergence(guide_site["fn"], model_site["fn"])
        except NotImplementedError:
            continue
        kl = scale_and_mask(kl, scale=guide_site["scale"], mask=guide_site["mask"])
        if not isinstance(kl, Tensor):  # a wholly masked pair: the log-ratio is zero as well
            continue
        symbols = {**guide_site["infer"]["_dim_to_symbol"], **model_site["infer"]["_dim_to_symbol"]}
        guide_site["packed"]["log_prob"] = packed.pack(kl, symbols)
        model_site["packed"]["log_prob"] = packed.pack(torch.zeros_like(kl), symbols)
        names.append(name)
    return tuple(names)


def _same_handlers(model_site: Site, guide_site: Site) -> bool:
    """Whether scale and mask agree: otherwise the log-ratio is no multiple of the divergence."""
    return all(_equal(model_site[key], guide_site[key]) for key in ("scale", "mask"))


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or torch.equal(a, b)
    return type(a) is type(b) and a == b


@torch.no_grad()
def _divergences(
    model_trace: poutine.Trace, guide_trace: poutine.Trace, summed_out: set[str]
) -> Iterator[tuple[str, Tensor]]:
    """Yields the cost of each guide site, log q - log p or its closed form, averaged over enumeration."""
    plates = {name: _plates(guide_trace, site) for name, site in _sample_sites(guide_trace).items()}
    dice = Dice(guide_trace, plates)
    for name, site in _latent_sites(guide_trace).items():
        costs = {plates[name]: [site["packed"]["log_prob"]]}
        if name in model_trace:
            model_site: Site = model_trace.nodes[name]
            log_prior = model_site["packed"]["log_prob"]
            if not summed_out.isdisjoint(log_prior._pyro_dims):
                continue
            costs.setdefault(_plates(model_trace, model_site), []).append(packed.neg(log_prior))
        yield name, torch.as_tensor(dice.compute_expectation(costs))
