# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Reads an exactly solvable model off its trace: latent, prior, decoder, noise and data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ..errors import UnsupportedModel

__all__ = ["ExactProblem", "identical", "read_problem"]

NEEDS = (
    "The exact posterior needs z ~ Normal(...).to_event(1) or MultivariateNormal, and "
    "x ~ Normal(decoder(z), scale).to_event(1) or MultivariateNormal(decoder(z), ...)."
)


@dataclass(frozen=True)
class ExactProblem:
    """One call of a model, as the exact machinery sees it. Tensors carry the graph to the model's parameters.

    Attributes:
        latent: name of the latent site.
        observed: name of the observed site.
        unobserved: name of the latent twin that ``obs_mask`` makes of the observed site, if any.
        x: batch_shape + (D,) data; NaN marks missing entries.
        prior_loc: (L,).
        prior_tril: (L, L) lower Cholesky factor of the prior covariance.
        noise_scale: (D,) standard deviations, or (D, D) lower Cholesky factor.
        trace: the model's trace.
    """

    latent: str
    observed: str
    unobserved: str | None
    x: Tensor
    prior_loc: Tensor
    prior_tril: Tensor
    noise_scale: Tensor
    trace: Trace


def read_problem(trace: Trace, decoder: Callable[[Tensor], Tensor], check_mean: bool) -> ExactProblem:
    """Find the Gaussian latent and observed sites of a model's trace.

    Args:
        trace: of the model.
        decoder: whose output must be the observed mean.
        check_mean: compare the observed mean with ``decoder(z)`` (one more evaluation of the decoder).

    Raises:
        UnsupportedModel: names the site that does not fit.
    """
    nodes: dict[str, Any] = trace.nodes
    sites = [
        (name, site)
        for name, site in nodes.items()
        if site["type"] == "sample"
        and not site_is_subsample(site)
        and not site["infer"].get("_deterministic")
    ]
    observed = [(n, s) for n, s in sites if s["is_observed"]]
    names = {n for n, _ in sites}
    twins = {
        n for n in names if n.endswith("_unobserved") and n.removesuffix("_unobserved") + "_observed" in names
    }
    latents = [(n, s) for n, s in sites if not s["is_observed"] and n not in twins]
    latent, prior = _only(latents, "latent")
    name, likelihood = _only(observed, "observed")
    base, _ = _gaussian(latent, prior["fn"], "prior")
    if prior["fn"].event_dim != 1:
        raise UnsupportedModel(
            f"site '{latent}' has event shape {tuple(prior['fn'].event_shape)}: expected a vector (L,). "
            f"Declare it with .to_event(1). {NEEDS}"
        )
    prior_loc = _common(latent, "mean", base.loc, 1)
    prior_tril = _factor(latent, base)
    if prior_tril.dim() == 1:
        prior_tril = torch.diag(prior_tril)
    base, masks = _gaussian(name, likelihood["fn"], "likelihood")
    if likelihood["fn"].event_dim != 1:
        raise UnsupportedModel(
            f"site '{name}' has event shape {tuple(likelihood['fn'].event_shape)}: expected a vector (D,). "
            f"Declare it with .to_event(1). {NEEDS}"
        )
    if check_mean:
        _check_decoder(name, latent, base.loc, decoder, prior["value"])
    return ExactProblem(
        latent=latent,
        observed=name,
        unobserved=next(iter(twins), None),
        x=_masked(likelihood, masks),
        prior_loc=prior_loc,
        prior_tril=prior_tril,
        noise_scale=_factor(name, base),
        trace=trace,
    )


def _only(sites: list[tuple[str, Any]], kind: str) -> tuple[str, Any]:
    if len(sites) != 1:
        found = ", ".join(f"'{n}'" for n, _ in sites) or "none"
        raise UnsupportedModel(
            f"the model has {len(sites)} {kind} sites ({found}): expected exactly one. {NEEDS}"
        )
    return sites[0]


def _gaussian(name: str, fn: Any, role: str) -> tuple[Any, list[Tensor]]:
    """The Gaussian under wrappers of events and masks, and the masks, shaped to broadcast against the data."""
    masks: list[Tensor] = []
    while isinstance(fn, (dist.Independent, dist.MaskedDistribution, dist.ExpandedDistribution)):
        if isinstance(fn, dist.MaskedDistribution):
            keep = torch.as_tensor(fn._mask)
            masks.append(keep.reshape(keep.shape + (1,) * fn.event_dim))
        fn = fn.base_dist
    if not isinstance(fn, (torch.distributions.Normal, torch.distributions.MultivariateNormal)):
        raise UnsupportedModel(f"the {role} at site '{name}' is {type(fn).__name__}, not Gaussian. {NEEDS}")
    return fn, masks


def _common(name: str, what: str, value: Tensor, event_dim: int) -> Tensor:
    """The one parameter that all rows share, with its graph."""
    rows = value.reshape((-1,) + value.shape[value.dim() - event_dim :])
    # A stride of 0 says that the rows are one and the same.
    if rows.shape[0] > 1 and rows.stride(0) and not bool((rows.detach() == rows[:1].detach()).all()):
        raise UnsupportedModel(
            f"the {what} of site '{name}' differs from row to row: the exact posterior needs one {what} for all data"
        )
    return rows[0]


def _factor(name: str, base: Any) -> Tensor:
    """(D,) standard deviations or (D, D) Cholesky factor of a Gaussian site."""
    if isinstance(base, torch.distributions.Normal):
        return _common(name, "scale", base.scale, 1)
    return _common(name, "covariance", base.scale_tril, 2)


def _check_decoder(
    name: str, latent: str, mean: Tensor, decoder: Callable[[Tensor], Tensor], z: Tensor
) -> None:
    with torch.no_grad(), poutine.block():
        expected = decoder(z)
    if not bool(expected.isfinite().all()):
        # Parameters that are not finite are refused, by name, where regions are enumerated.
        return
    tolerance = 100 * torch.finfo(mean.dtype).eps
    scale = expected.abs().amax()
    if expected.shape[-1] != mean.shape[-1] or not bool(((mean - expected).abs() <= tolerance * scale).all()):
        raise UnsupportedModel(
            f"the mean of site '{name}' is not decoder({latent}): pass the module whose output is that mean as "
            f"decoder=, without anything applied before or after it. {NEEDS}"
        )


def _masked(site: Any, masks: list[Tensor]) -> Tensor:
    """Observed data with NaN wherever the likelihood is masked out."""
    x = site["value"]
    x = x.expand(torch.broadcast_shapes(x.shape, site["fn"].batch_shape + site["fn"].event_shape))
    if site["mask"] is not None:
        masks = [*masks, torch.as_tensor(site["mask"], device=x.device)[..., None]]
    for keep in masks:
        x = torch.where(keep.to(x.device), x, torch.nan)
    return x


def identical(a: Any, b: Any) -> bool:
    """Whether two tensors hold the same values, or two other objects are one."""
    if not isinstance(a, Tensor):
        return a is b
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    # NaN, which marks missing data, equals itself here.
    return torch.equal(a, b) or torch.allclose(a, b, rtol=0.0, atol=0.0, equal_nan=True)
