# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Data simulated from a model together with their latents: exact posterior samples, one per datum."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from pyro import poutine

from ..errors import UnsupportedModel
from .log_weights import LogWeights
from .observations import with_observations
from .sites import is_drawn, sample_sites
from .trace_weights import trace_log_weights

__all__ = ["Dream", "dream"]


class Dream(NamedTuple):
    r"""A model and guide to be called with the user's arguments, simulated data in the place of the user's.

    Attributes:
        model: conditioned on the simulated data.
        guide: shown the simulated data.
        log_weights: (1, \*plates) of the latents that were simulated with the data.
    """

    model: Callable[..., Any]
    guide: Callable[..., Any]
    log_weights: LogWeights


@torch.no_grad()
def dream(
    model: Callable[..., Any], guide: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Dream:
    r"""Draw :math:`(x, z) \sim p(x, z)` and weigh z by :math:`\log p(x, z) - \log q(z \mid x)`.

    Args:
        model: observes its data with ``obs=``.
        guide: a function of the data, see :func:`~pyro_cpa.infer.observations.with_observations`.
        args: positional arguments of both, with data of the shapes to be simulated.
        kwargs: keyword arguments of both.

    Raises:
        UnsupportedModel: the guide cannot be shown some data, or draws other sites than the model.
    """
    trace = poutine.trace(poutine.uncondition(model)).get_trace(*args, **kwargs)
    guide_args, guide_kwargs = with_observations(guide, trace, args, kwargs)

    def shown(*_: Any, **__: Any) -> Any:
        return guide(*guide_args, **guide_kwargs)

    guide_trace = poutine.trace(poutine.replay(shown, trace=trace)).get_trace()
    for name, site in sample_sites(guide_trace):
        if name not in trace.nodes or not is_drawn(site):
            raise UnsupportedModel(
                f"guide site '{name}' ({type(site['fn']).__name__}) is not drawn by the model or is a point: "
                "simulated latents say nothing about it. Give the guide densities of the model's own latents"
            )
    observed = {n: site["value"] for n, site in sample_sites(trace) if site["infer"].get("was_observed")}
    conditioned = poutine.condition(poutine.uncondition(model), data=observed)
    model_trace = poutine.trace(poutine.replay(conditioned, trace=trace)).get_trace(*args, **kwargs)
    return Dream(conditioned, shown, trace_log_weights(model_trace, guide_trace))
