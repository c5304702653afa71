# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Showing a guide other data than the user's: simulated observations in the place of the real ones."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine import Trace
from torch import Tensor

from pyro_cpa.errors import UnsupportedModel
from pyro_cpa.infer.sites import sample_sites, unwrapped

__all__ = ["with_observations"]


def with_observations(
    guide: Callable[..., Any], dream: Trace, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments that show ``guide`` the observations of ``dream``.

    A guide with the keyword ``observations`` gets a dictionary by site, as in Pyro's ``ReweightedWakeSleep``.
    Otherwise the simulated values replace those arguments that *are* the tensors observed by the model.

    Args:
        guide: the guide.
        dream: trace of ``poutine.uncondition(model)``.
        args: positional arguments of model and guide.
        kwargs: their keyword arguments.

    Returns:
        The new positional and keyword arguments.

    Raises:
        UnsupportedModel: if the guide has no way to see the data of a site.
    """
    observed = {
        name: site
        for name, site in sample_sites(dream)
        if site["infer"].get("was_observed") and not isinstance(unwrapped(site["fn"]), dist.Unit)
    }
    values = {name: site["value"] for name, site in observed.items()}
    if "observations" in kwargs or "observations" in _parameters(guide):
        return tuple(args), {**kwargs, "observations": values}

    def shown(argument: Any) -> Any:
        for name, site in observed.items():
            if argument is site["infer"]["obs"]:
                return values[name]
        return argument

    new_args, new_kwargs = tuple(map(shown, args)), {key: shown(value) for key, value in kwargs.items()}
    reached = [value for value in (*new_args, *new_kwargs.values()) if isinstance(value, Tensor)]
    for name, value in values.items():
        if not any(value is argument for argument in reached):
            raise UnsupportedModel(
                f"the guide cannot be shown dreamt data of site '{name}': no argument is the tensor the "
                f"model observes there, of shape {tuple(observed[name]['infer']['obs'].shape)}. Pass that "
                "very tensor to both, or give both a keyword `observations`, a dictionary by site"
            )
    return new_args, new_kwargs


def _parameters(fn: Callable[..., Any]) -> Mapping[str, Any]:
    inner = poutine.unwrap(fn)
    return inspect.signature(inner.forward if isinstance(inner, torch.nn.Module) else inner).parameters
