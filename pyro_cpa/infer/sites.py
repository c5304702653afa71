# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""What kind of site a trace holds, and whether a model and a guide fit together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine import Trace
from pyro.poutine.util import site_is_factor, site_is_subsample

from pyro_cpa.errors import UnsupportedModel

__all__ = ["Site", "check_pair", "has_no_own_density", "is_density", "is_drawn", "sample_sites", "unwrapped"]

Site = Any  # a node of a trace

_WRAPPERS = (
    torch.distributions.Independent,
    dist.ExpandedDistribution,
    dist.MaskedDistribution,
)


def unwrapped(fn: Any) -> Any:
    """The distribution beneath ``to_event``, ``expand`` and ``mask``."""
    while isinstance(fn, _WRAPPERS):
        fn = fn.base_dist
    return fn


def is_density(site: Site) -> bool:
    """True where the site adds to log p or log q: no subsample statement, no ``pyro.deterministic``."""
    return (
        site["type"] == "sample"
        and not site_is_subsample(site)
        and not site["infer"].get("_deterministic", False)
    )


def has_no_own_density(site: Site) -> bool:
    """True for a guide site that transforms earlier draws or holds a point: Delta or ``pyro.factor``."""
    return isinstance(unwrapped(site["fn"]), dist.Delta | dist.Unit)


def is_drawn(site: Site) -> bool:
    """True for a guide site whose value is random given the sites before it."""
    return is_density(site) and not site["is_observed"] and not has_no_own_density(site)


def sample_sites(trace: Trace) -> Iterator[tuple[str, Site]]:
    """The sites of ``trace`` that add to its log density."""
    return ((name, site) for name, site in trace.nodes.items() if is_density(site))


def check_pair(model_trace: Trace, guide_trace: Trace) -> None:
    """Refuse a pair whose weights would not be those of importance sampling.

    Raises:
        UnsupportedModel: naming the site and the cure.
    """
    guide_sites = dict(sample_sites(guide_trace))
    for name, site in guide_sites.items():
        if site["is_observed"] and not site_is_factor(site):
            raise UnsupportedModel(
                f"site '{name}' is observed in the guide. A guide draws the latents and holds no data sites: "
                "remove obs= there (was the model passed as the guide?)"
            )
        if site["infer"].get("enumerate"):
            raise UnsupportedModel(
                f"guide site '{name}' is marked for enumeration, but this objective draws its latents: "
                'remove infer={"enumerate": ...} (config_enumerate) or use pyro.infer.TraceEnum_ELBO'
            )
        if not site["infer"].get("is_auxiliary") and name not in model_trace.nodes:
            raise UnsupportedModel(
                f"guide site '{name}' does not exist in the model, so its density has nothing to be weighed "
                "against: add it to the model, or, if it feeds other guide sites whose densities make up for "
                'it, mark it infer={"is_auxiliary": True}'
            )
    for name, site in sample_sites(model_trace):
        if not site["is_observed"] and name not in guide_sites:
            hint = (
                " (this objective draws its latents: to sum one out, use pyro.infer.TraceEnum_ELBO)"
                if site["infer"].get("enumerate")
                else ""
            )
            raise UnsupportedModel(
                f"model latent '{name}' is missing from the guide, which samples "
                f"{sorted(guide_sites) or 'nothing'}: add pyro.sample('{name}', ...) to the guide or observe "
                f"it in the model{hint}"
            )
