# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Data simulated from a model together with their latents: exact posterior samples, one per datum."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from ..errors import UnsupportedModel
from .log_weights import LogWeights
from .sites import sample_sites, unwrapped
from .trace_weights import trace_log_weights

__all__ = ["Dream", "dream"]


class Dream(NamedTuple):
    """A model/guide pair and its arguments with simulated data in the place of the user's.

    Attributes:
        model: conditioned on the simulated data.
        guide: the user's.
        args, kwargs: what both are called with.
        log_weights: of the latents that were simulated with the data, (1, \\*plates).
    """

    model: Callable
    guide: Callable
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    log_weights: LogWeights


@torch.no_grad()
def dream(model: Callable, guide: Callable, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Dream:
    r"""Draw :math:`(x, z) \sim p(x, z)` and weigh z by :math:`\log p(x, z) - \log q(z \mid x)`.

    The guide sees the simulated x wherever an argument *is* (or equals) the tensor that the model observes,
    or else under its keyword ``observations``, a dictionary by site.

    Args:
        model: observes its data with ``obs=``.
        guide: amortised: a function of the data.
        args, kwargs: arguments of both, with data of the shapes to be simulated.

    Raises:
        UnsupportedModel: the guide has no way to see the data of some site, or draws auxiliary variables.
    """
    trace = poutine.trace(poutine.uncondition(model)).get_trace(*args, **kwargs)
    sites = dict(sample_sites(trace))
    factors = {name for name, site in sites.items() if isinstance(unwrapped(site["fn"]), dist.Unit)}
    observed = {
        n: site for n, site in sites.items() if site["infer"].get("was_observed") and n not in factors
    }
    data = {name: site["value"] for name, site in observed.items()}
    shown = {name: site["infer"]["obs"] for name, site in observed.items()}
    parameters = inspect.signature(guide).parameters
    if "observations" in parameters or "observations" in kwargs:
        new_args, new_kwargs = tuple(args), {**kwargs, "observations": data}
    else:
        new_args = tuple(_replaced(arg, shown, data) for arg in args)
        new_kwargs = {key: _replaced(arg, shown, data) for key, arg in kwargs.items()}
        given = [*new_args, *new_kwargs.values()]
        for name, value in data.items():
            if not any(arg is value for arg in given):
                raise UnsupportedModel(
                    f"the guide cannot be shown simulated data of site '{name}': no argument is the tensor "
                    f"that the model observes there, of shape {tuple(shown[name].shape)}. Pass that very "
                    "tensor to model and guide, or give both a keyword argument `observations`"
                )
    conditioned = poutine.condition(poutine.uncondition(model), data=data)
    guide_trace = poutine.trace(poutine.replay(guide, trace=trace)).get_trace(*new_args, **new_kwargs)
    for name, site in sample_sites(guide_trace):
        if name not in sites or site["infer"].get("is_auxiliary"):
            raise UnsupportedModel(
                f"guide site '{name}' is not drawn by the model, so simulated latents say nothing about it: "
                "simulation needs a guide that draws the model's own latents"
            )
    model_trace = poutine.trace(poutine.replay(conditioned, trace=trace)).get_trace(*new_args, **new_kwargs)
    weights = trace_log_weights(model_trace, guide_trace)
    return Dream(conditioned, guide, new_args, new_kwargs, weights)


def _replaced(argument: Any, shown: Mapping[str, Tensor], data: Mapping[str, Tensor]) -> Any:
    """The simulated tensor, where the argument is one that the model observes."""
    if not isinstance(argument, Tensor):
        return argument
    for name, value in shown.items():
        if argument is value or torch.equal(argument, value):
            return data[name]
    return argument
