# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""From any Pyro fit to ArviZ: one conversion, the same content under ArviZ 0.2x and 1.x."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.infer import MCMC
from pyro.poutine import Trace
from torch import Tensor

from ..errors import InvalidData, UnsupportedModel
from ._arviz_versions import assemble
from ._sites import Layout, Site, read_layout

__all__ = ["to_arviz"]

Values = dict[str, list[Tensor]]


def to_arviz(
    source: Any,
    *args: Any,
    model: Callable[..., Any] | None = None,
    num_samples: int = 1000,
    prior_samples: int | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    coords: Mapping[str, Sequence[Any]] | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
) -> Any:
    r"""Converts a fitted model into ArviZ's container, every group from one pass over the posterior draws.

    The pointwise log-likelihood of datum n in draw s is

    .. math:: \ell_{sn} = \log p(x_n \mid \theta_s)

    with the local latents integrated out **exactly** where that is possible: when the observed site is a
    :class:`~pyro_cpa.distributions.CPAMarginal`, or when the guide knows its evidence
    (:class:`~pyro_cpa.infer.AutoCPAPosterior`, and the fits built on it). Otherwise
    :math:`\ell_{sn} = \log p(x_n \mid \theta_s, z_{sn})`. The attribute ``latents`` of the group
    ``log_likelihood`` says which: ``"integrated out"`` or ``"conditioned on"``.

    Args:
        source: one of

            - a guide, trained by ``SVI`` (an ``AutoGuide`` knows its model; else give ``model=``);
            - an object with attributes ``model`` and ``guide``, such as a fitted
              :class:`~pyro_cpa.infer.EM`;
            - a finished ``MCMC``;
            - a dictionary of draws, leading dimension the draws, such as ``Predictive`` returns (give
              ``model=``; draws of observed sites become the posterior predictive);
            - a distribution over the latent space, such as :class:`~pyro_cpa.distributions.CPAPosterior`
              (its draws become the variable ``z``).
        args: the model's arguments, i.e. the data (``MCMC`` remembers its own).
        model: the Pyro model; not needed for ``MCMC``, a fit that holds it, or a distribution.
        num_samples: draws from a guide or distribution; the other sources bring their own number.
        prior_samples: draws from the prior, 0 for none; by default as many as posterior draws, at most 500.
        dims: names of a site's event dimensions, ``{"z": ["latent"]}``; plates name their own.
        coords: labels of dimensions, plates included, ``{"data": row_names}``.
        model_kwargs: the model's keyword arguments.

    Returns:
        ``InferenceData`` (ArviZ 0.2x) or ``xarray.DataTree`` (1.x) with groups ``posterior``,
        ``posterior_predictive``, ``log_likelihood``, ``sample_stats`` (``lp``; ``log_weight`` =
        log p(x, z) - log q(z) of a guide; ``diverging`` of an MCMC), ``prior``, ``prior_predictive`` and
        ``observed_data``; a distribution yields ``posterior`` and ``sample_stats`` alone.

    Raises:
        UnsupportedModel: the model is missing, subsamples a plate, or has a latent site without draws.
        InvalidData: draws that do not fit the model's sites.

    Note:
        The model runs twice per posterior draw and once per prior draw, one draw at a time: any model will
        do, whether or not it broadcasts. Draws use Pyro's global seed. A "/" in a site's name becomes ".".
        An exact log-likelihood that is the same in every draw (the decoder is a point estimate) is spread
        over the draws by 1e-12 relative, because ArviZ's tail fit refuses ties; PSIS-LOO is then that value.

    References:
        Kumar, Carroll, Hartikainen, Martin 2019, ArviZ a unified library for exploratory analysis of
        Bayesian models in Python. Vehtari, Gelman, Gabry 2017, Practical Bayesian model evaluation using
        leave-one-out cross-validation and WAIC.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def model(x):
        ...     mean = pyro.sample("mean", dist.Normal(0., 1.))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(mean, 1.), obs=x)
        >>> guide = pyro.infer.autoguide.AutoNormal(model)
        >>> data = to_arviz(guide, torch.zeros(3), model=model, num_samples=10)
        >>> dict(data["log_likelihood"]["x"].sizes)
        {'chain': 1, 'draw': 10, 'data': 3}
    """
    kwargs = dict(model_kwargs or {})
    if isinstance(source, torch.distributions.Distribution):
        return _from_distribution(source, num_samples, dims or {}, coords or {})
    with torch.no_grad(), poutine.block():
        run = _open(source, model, args, kwargs, num_samples)
        layout = read_layout(run.model, run.args, run.kwargs, dims or {}, coords or {})
        groups = _posterior_groups(run, layout)
        count = min(run.chains * run.draws, 500) if prior_samples is None else prior_samples
        if count:
            groups.update(_prior_groups(run, layout, count))
    return assemble(groups, _attributes())


@dataclass
class _Run:
    """A source of posterior draws in one form: traces of the model, draw after draw, chain after chain."""

    model: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    chains: int
    draws: int
    traces: Callable[[Layout], Iterator[tuple[Trace, Trace | None]]]
    predictive: Mapping[str, Tensor] = field(default_factory=dict)
    stats: dict[str, np.ndarray] = field(default_factory=dict)
    log_evidence: Tensor | None = None


def _open(
    source: Any,
    model: Callable[..., Any] | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    num_samples: int,
) -> _Run:
    if isinstance(source, MCMC):
        return _open_mcmc(source, model, args or source._args or (), kwargs or source._kwargs or {})
    model = getattr(source, "model", None) if model is None else model
    source = getattr(source, "guide", source)
    if model is None:
        raise UnsupportedModel(
            f"to_arviz was given a {type(source).__name__} without the model it belongs to: pass model=..."
        )
    if isinstance(source, Mapping):
        return _open_draws(source, model, args, kwargs)
    if callable(source):
        return _open_guide(source, model, args, kwargs, num_samples)
    raise UnsupportedModel(
        f"to_arviz cannot read a {type(source).__name__}: expected a guide, a fit with .model and .guide, "
        "an MCMC, a dictionary of draws or a distribution"
    )


def _open_guide(
    guide: Callable[..., Any],
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    num_samples: int,
) -> _Run:
    def traces(layout: Layout) -> Iterator[tuple[Trace, Trace | None]]:
        for _ in range(num_samples):
            guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
            layout.require_latents(guide_trace.nodes, "the guide")
            yield (
                poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs),
                guide_trace,
            )

    evidence = getattr(guide, "log_evidence", None)
    log_evidence = None if evidence is None else evidence(*args, **kwargs)
    return _Run(model, args, kwargs, 1, num_samples, traces, log_evidence=log_evidence)


def _conditioned(
    run_args: tuple[Any, ...],
    model: Callable[..., Any],
    kwargs: dict[str, Any],
    flat: Mapping[str, Tensor],
    count: int,
) -> Any:
    """Traces of the model at given draws; ``flat`` holds the draws of all chains in one leading dimension."""

    def traces(layout: Layout) -> Iterator[tuple[Trace, Trace | None]]:
        layout.require_latents(flat, "the dictionary of draws")
        latents = {name: layout.shaped(name, flat[name]) for name in layout.latents}
        for s in range(count):
            draw = {name: value[s] for name, value in latents.items()}
            yield poutine.trace(poutine.condition(model, data=draw)).get_trace(*run_args, **kwargs), None

    return traces


def _open_draws(
    draws: Mapping[str, Tensor], model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> _Run:
    counts = {name: len(value) for name, value in draws.items()}
    if len(set(counts.values())) != 1:
        raise InvalidData(
            f"expected draws with one common leading dimension, got {counts or 'no draws at all'}"
        )
    count = next(iter(counts.values()))
    return _Run(
        model, args, kwargs, 1, count, _conditioned(args, model, kwargs, draws, count), predictive=draws
    )


def _open_mcmc(
    mcmc: MCMC, model: Callable[..., Any] | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> _Run:
    grouped = mcmc.get_samples(group_by_chain=True)
    chains, draws = next(iter(grouped.values())).shape[:2]
    flat = {name: value.flatten(0, 1) for name, value in grouped.items()}
    diverging = np.zeros((chains, draws), dtype=bool)
    divergences = mcmc.diagnostics().get("divergences", {})
    for chain in range(chains):
        diverging[chain, list(divergences.get(f"chain {chain}", []))] = True
    model = mcmc.kernel.model if model is None else model
    traces = _conditioned(args, model, kwargs, flat, chains * draws)
    return _Run(model, args, kwargs, chains, draws, traces, stats={"diverging": diverging})


def _value(trace: Trace, name: str) -> Tensor:
    return torch.as_tensor(trace.nodes[name]["value"])


def _posterior_groups(run: _Run, layout: Layout) -> dict[str, Any]:
    posterior: Values = {name: [] for name in layout.latents + layout.deterministic}
    likelihood: Values = {name: [] for name in layout.observed}
    given = {name: layout.shaped(name, v) for name, v in run.predictive.items() if name in layout.observed}
    predictive: Values = {name: list(given.get(name, [])) for name in layout.observed}
    missing = [name for name in layout.observed if name not in given]
    stats: Values = {"lp": []}
    generate = poutine.uncondition(run.model)
    for trace, guide_trace in run.traces(layout):
        for name, values in posterior.items():
            values.append(_value(trace, name))
        for name, values in likelihood.items():
            values.append(layout.log_likelihood(trace.nodes[name]))
        stats["lp"].append(torch.as_tensor(trace.log_prob_sum()))
        if guide_trace is not None:
            stats.setdefault("log_weight", []).append(stats["lp"][-1] - guide_trace.log_prob_sum())
        if missing:
            draw = {name: _value(trace, name) for name in layout.latents}
            replica = poutine.trace(poutine.condition(generate, data=draw)).get_trace(*run.args, **run.kwargs)
            for name in missing:
                predictive[name].append(_value(replica, name))
    if run.log_evidence is not None:
        likelihood = _exact_likelihood(run.log_evidence, layout, run.chains * run.draws)
    shape = (run.chains, run.draws)
    exact = run.log_evidence is not None or not layout.local_latents
    log_likelihood = layout.dataset(likelihood, shape, batch_only=True)
    log_likelihood.attrs["latents"] = "integrated out" if exact else "conditioned on"
    groups = {
        "posterior": layout.dataset(posterior, shape),
        "posterior_predictive": layout.dataset(predictive, shape),
        "log_likelihood": log_likelihood,
        "sample_stats": layout.statistics(stats, run.stats, shape),
        "observed_data": layout.dataset({name: [layout.sites[name].value] for name in layout.observed}, ()),
    }
    return {name: group for name, group in groups.items() if group.data_vars}


def _exact_likelihood(log_evidence: Tensor, layout: Layout, count: int) -> Values:
    """The evidence of every datum in every draw, a few units in the last place apart (ArviZ refuses ties)."""
    steps = (torch.arange(count, dtype=torch.float64) - (count - 1) / 2) / max(count - 1, 1)
    value = log_evidence.detach().to(torch.float64)
    return {layout.observed[0]: [value + 1e-12 * value.abs().clamp(min=1.0) * step for step in steps]}


def _prior_groups(run: _Run, layout: Layout, count: int) -> dict[str, Any]:
    prior: Values = {name: [] for name in layout.latents + layout.deterministic}
    predictive: Values = {name: [] for name in layout.observed}
    generate = poutine.trace(poutine.uncondition(run.model))
    for _ in range(count):
        trace = generate.get_trace(*run.args, **run.kwargs)
        for values in (prior, predictive):
            for name in values:
                values[name].append(_value(trace, name))
    groups = {
        "prior": layout.dataset(prior, (1, count)),
        "prior_predictive": layout.dataset(predictive, (1, count)),
    }
    return {name: group for name, group in groups.items() if group.data_vars}


def _from_distribution(
    posterior: torch.distributions.Distribution,
    num_samples: int,
    dims: Mapping[str, Any],
    coords: Mapping[str, Any],
) -> Any:
    plates = ("data",) if len(posterior.batch_shape) == 1 else None
    site = Site.of_distribution("z", posterior, plates, dims.get("z", ()))
    layout = Layout({"z": site}, dict(coords))
    with torch.no_grad():
        z = posterior.sample(torch.Size((num_samples,)))
        lp = posterior.log_prob(z)
    groups = {
        "posterior": layout.dataset({"z": list(z)}, (1, num_samples)),
        "sample_stats": layout.dataset({"z": list(lp)}, (1, num_samples), batch_only=True).rename(z="lp"),
    }
    return assemble(groups, _attributes())


def _attributes() -> dict[str, str]:
    return {
        "inference_library": "pyro",
        "inference_library_version": pyro.__version__,
        "creation_library": "pyro_cpa",
    }
