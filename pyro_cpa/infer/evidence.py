# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""log p(x) of every datum, for any model and guide: exact where the guide is, else with a standard error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from ..errors import InvalidData
from .autoguide import AutoCPAPosterior
from .particles import sample_log_weights

__all__ = ["Evidence", "integrated_evidence", "log_evidence", "pointwise_log_likelihood"]


class Evidence(NamedTuple):
    r"""log p(x) of each datum.

    Attributes:
        log_prob: (\*plates) exact, or estimated from K particles.
        standard_error: (\*plates) of ``log_prob``, zero where it is exact.
        ess: (\*plates) effective sample size, between 1 and K; K where exact.
        exact: whether no sampling was involved.
    """

    log_prob: Tensor
    standard_error: Tensor
    ess: Tensor
    exact: bool


def log_evidence(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_particles: int = 1000,
    chunk_size: int | None = None,
    vectorize_particles: bool = True,
    **kwargs: Any,
) -> Evidence:
    r"""Evidence of each element of the plates that all sites share.

    .. math::

        \log \hat p(x_n) = \log \frac1K \sum_{k} w_{kn}, \qquad w = p(x, z) / q(z | x), \qquad
        \text{s.e.} = \sqrt{\tfrac{K}{K - 1} \big(\tfrac{1}{\text{ESS}} - \tfrac1K\big)}, \qquad
        \text{ESS} = \frac{(\sum_k w_{kn})^2}{\sum_k w_{kn}^2} .

    Args:
        model: a Pyro model.
        guide: its guide; with :class:`AutoCPAPosterior` the evidence is integrated and nothing is drawn: it is exact
            up to three latent dimensions.
        args: of both.
        num_particles: K.
        chunk_size: particles in memory at a time; by default all.
        vectorize_particles: draw the particles in a plate; model and guide must then broadcast on the left.
        kwargs: of both.

    Returns:
        :class:`Evidence`, without gradients. Subsampling does not scale it: it speaks of the rows that are seen.

    Raises:
        InvalidData: fewer than two particles.
        UnsupportedModel: for a pair without log-weights, naming the site, as at a step of the objectives.

    Note:
        The estimate is unbiased for p(x), hence below log p(x) on average. The standard error is the delta method's: do
        not trust it where the ESS is small, for then the guide misses mass that no draw has shown.

    References:
        Y. Burda, R. Grosse, R. Salakhutdinov (2016), "Importance Weighted Autoencoders".

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> _ = pyro.set_rng_seed(0)
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.8))
        >>> x = torch.tensor([0.0, 2.0])
        >>> found = log_evidence(model, guide, x, num_particles=10_000)
        >>> error = found.log_prob - dist.Normal(0.0, 2.0**0.5).log_prob(x)
        >>> bool((error.abs() < 5 * found.standard_error).all())
        True
    """
    if isinstance(guide, AutoCPAPosterior):
        return integrated_evidence(*guide.log_evidence_with_error(*args, **kwargs), num_particles)
    if num_particles < 2:
        raise InvalidData(
            f"num_particles is {num_particles}: an estimate with a standard error needs at least 2"
        )
    with torch.no_grad():
        weights = sample_log_weights(
            model,
            guide,
            args,
            kwargs,
            num_particles=num_particles,
            vectorize=vectorize_particles,
            chunk_size=chunk_size,
        )
        log_w = weights.log_w
        total = log_w.logsumexp(0)
        ess = (2 * total - (2 * log_w).logsumexp(0)).exp()
        count = torch.as_tensor(float(num_particles), dtype=log_w.dtype, device=log_w.device)
        # Rounding may bring the ESS of equal weights a hair above K.
        variance = (count / (count - 1) * (1 / ess - 1 / count)).clamp(min=0)
        return Evidence(total - count.log(), variance.sqrt(), ess, False)


def integrated_evidence(log_prob: Tensor, error: Tensor, num_particles: int) -> Evidence:
    """An evidence by integration over cells; where that is an estimate, its ESS is that of draws with the same error."""
    ess = num_particles / (1 + num_particles * error.square())
    return Evidence(log_prob, error, ess, not bool((error > 0).any()))


def pointwise_log_likelihood(
    model: Callable[..., Any], guide: Callable[..., Any], *args: Any, num_samples: int = 100, **kwargs: Any
) -> dict[str, Tensor]:
    r""":math:`\log p(x_n | z^{(s)})` of every observed site under draws of the guide, in ArviZ's shape.

    Args:
        model: a Pyro model.
        guide: its guide.
        args: of both.
        num_samples: S.
        kwargs: of both.

    Returns:
        For each observed site (1, S, \*plates): one chain, S draws; masked entries are 0, subsampling does not scale.

    Note:
        Costs S runs of guide and model. For PSIS-LOO over local latents prefer the exact evidence.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> guide = lambda x: pyro.sample("z", dist.Normal(0.0, 0.5))
        >>> pointwise_log_likelihood(model, guide, torch.zeros(3), num_samples=5)["x"].shape
        torch.Size([1, 5, 3])
    """
    if num_samples < 1:
        raise InvalidData(f"num_samples is {num_samples}: expected at least 1")
    found: dict[str, list[Tensor]] = {}
    with torch.no_grad():
        for _ in range(num_samples):
            drawn = poutine.trace(guide).get_trace(*args, **kwargs)
            trace = prune_subsample_sites(
                poutine.trace(poutine.replay(model, trace=drawn)).get_trace(*args, **kwargs)
            )
            for name in trace.observation_nodes:
                site: Any = trace.nodes[name]
                if site["infer"].get("_deterministic"):
                    continue
                log_prob = site["fn"].log_prob(site["value"])
                if site["mask"] is not None:
                    keep = torch.as_tensor(site["mask"], device=log_prob.device)
                    log_prob = torch.where(keep, log_prob, torch.zeros_like(log_prob))
                found.setdefault(name, []).append(log_prob)
    return {name: torch.stack(draws)[None] for name, draws in found.items()}
