# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Handlers for particles: cut, reuse or replicate draws, or see the derivative that runs through them."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any

import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from pyro_cpa.infer.sites import is_drawn
from pyro_cpa.infer.weight_plates import PARTICLE_PLATE

__all__ = ["DetachDraws", "Draws", "ParticlePlate", "ReuseValues", "ThroughDraws"]


class Draws(Enum):
    """How derivatives pass through the guide's draws.

    ``ATTACHED``: pathwise, wherever the site is reparameterised. ``DETACHED``: not at all; draws are cut when
    made, so that later guide sites see constants. ``LEAVES``: guide and model are run again on leaf copies of
    the draws, which tells the derivative through the draws from all others. ``AUTO``: leaves where every draw
    inside the weight is reparameterised, attached otherwise.
    """

    ATTACHED = "attached"
    DETACHED = "detached"
    LEAVES = "leaves"
    AUTO = "auto"


class DetachDraws(Messenger):
    """Cuts every draw from the graph. Enter it before the trace, which otherwise keeps the attached value."""

    def _pyro_post_sample(self, msg: Any) -> None:
        # Points and transforms are no draws: a point estimate is trained like a parameter of the model.
        if is_drawn(msg) and isinstance(msg["value"], Tensor):
            msg["value"] = msg["value"].detach()


class ReuseValues(Messenger):
    """Gives the sites named in ``values`` these values, subsample statements included."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.values and not msg["is_observed"]:
            msg["value"] = self.values[msg["name"]]
            msg["done"] = True


class ParticlePlate(pyro.plate):
    """Adds the particle axis to the sites that lie in all of ``inside``; the others are drawn once.

    Args:
        size: number of particles.
        dim: negative dim left of all other plates.
        inside: names of the weight plates.
    """

    def __init__(self, size: int, dim: int, inside: tuple[str, ...]) -> None:
        super().__init__(PARTICLE_PLATE, size, dim=dim)
        self.inside = set(inside)

    def _process_message(self, msg: Any) -> None:
        if self.inside <= {frame.name for frame in msg["cond_indep_stack"]}:
            super()._process_message(msg)


class ThroughDraws(Function):
    """Splits log w on leaf copies into two views: one differentiable through the draws alone, one otherwise.

    All views pass through this one node, so that its backward runs before the graph beneath them is freed.
    """

    @staticmethod
    def forward(ctx: Any, graph: tuple[Tensor, list[Tensor]], *tensors: Tensor) -> tuple[Tensor, ...]:
        log_w, leaves = ctx.graph = graph
        ctx.set_materialize_grads(False)
        views = tensors[: len(tensors) - len(leaves)]
        return log_w.detach().clone(), *(view.clone() for view in views)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_path: Tensor | None, *grad_views: Tensor | None) -> tuple[Tensor | None, ...]:
        log_w, leaves = ctx.graph
        through: tuple[Tensor | None, ...] = (None,) * len(leaves)
        if grad_path is not None and leaves:
            through = torch.autograd.grad(log_w, leaves, grad_path, retain_graph=True, allow_unused=True)
        return None, *grad_views, *through
