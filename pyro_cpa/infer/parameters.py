# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Where an exactly solvable model keeps its numbers: what an M-step may write, and how."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pyro
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import constraints, transform_to

from ..errors import UnsupportedModel
from .structure import ExactProblem

__all__ = ["GaussianParameter", "Weight", "followed", "noise_parameter", "prior_parameters", "trainable"]


class Weight:
    """A tensor of the decoder that a block writes; ``get`` and ``set`` speak float64."""

    def __init__(self, parameter: Tensor) -> None:
        self.parameter = parameter

    def get(self) -> Tensor:
        return self.parameter.detach().double().clone()

    def set(self, value: Tensor) -> None:
        with torch.no_grad():
            self.parameter.copy_(value)


class GaussianParameter:
    """A ``pyro.param`` or ``PyroParam`` that is a Gaussian's mean, scale, variance or covariance.

    Args:
        name: of the parameter site.
        unconstrained: the leaf tensor behind it.
        transform: from the leaf to the value.
        write: from a mean, variances (D,) or a covariance (D, D) to the value.
        shape: of the value.
    """

    def __init__(
        self,
        name: str,
        unconstrained: Tensor,
        transform: Callable[[Tensor], Tensor],
        write: Callable[[Tensor], Tensor],
        shape: torch.Size,
    ) -> None:
        self.name, self.unconstrained, self.shape = name, unconstrained, shape
        self._transform, self._write = transform, write

    def get(self) -> Tensor:
        return self.unconstrained.detach().clone()

    def set(self, value: Tensor) -> None:
        with torch.no_grad():
            self.unconstrained.copy_(value)

    def encode(self, moment: Tensor) -> Tensor:
        """The leaf's value for a mean, variances (D,) or a covariance (D, D)."""
        value = self._write(moment).to(self.unconstrained.dtype).reshape(self.shape)
        return self._transform.inv(value)  # type: ignore[attr-defined]


def trainable(problem: ExactProblem, decoder: nn.Module) -> list[Tensor]:
    """The leaf tensors that the exact evidence depends on: the decoder's and those of the model's parameter sites."""
    leaves: dict[int, Tensor] = {id(p): p for p in decoder.parameters() if p.requires_grad}
    for _, site in _parameter_sites(problem):
        leaf = _leaf(site)
        if leaf.requires_grad:
            leaves.setdefault(id(leaf), leaf)
    return list(leaves.values())


def followed(
    problem: ExactProblem, model: Any, decoder: nn.Module, run: Callable[[], ExactProblem]
) -> Callable[[], ExactProblem]:
    """How to read a call again while an optimiser moves the parameters, its arguments being what they were.

    The model need not run again where the noise, as it stands, is the only parameter besides the decoder's.

    Args:
        problem: the call as it was read, with its graph.
        model: whose call it is.
        decoder: of the model.
        run: reads it by running the model, which always works.
    """
    own, scale = {id(p) for p in decoder.parameters()}, problem.noise_scale
    sites = [(name, site) for name, site in _parameter_sites(problem) if id(_leaf(site)) not in own]
    others = [(name, site) for name, site in sites if _leaf(site).requires_grad]
    if problem.prior_loc.requires_grad or problem.prior_tril.requires_grad or len(others) > 1:
        return run
    if not others:
        return run if scale.requires_grad else lambda: problem
    ((name, site),) = others
    value, leaf = site["value"], _leaf(site)
    # A view of the parameter's own memory, rather than equal numbers, which may be so by chance.
    memory = scale if scale._base is None else scale._base
    if value is not memory or not _is_expanded(scale, value):
        return run
    transform = transform_to(_constraint(name, site, model))
    return lambda: replace(problem, noise_scale=transform(leaf).expand(scale.shape))


def _is_expanded(view: Tensor, value: Tensor) -> bool:
    try:
        expanded = value.expand(view.shape)
    except RuntimeError:
        return False
    return expanded.stride() == view.stride() and expanded.storage_offset() == view.storage_offset()


def noise_parameter(problem: ExactProblem, model: Any, decoder: nn.Module) -> GaussianParameter | None:
    """The parameter behind the noise, None where the noise is a constant.

    Raises:
        UnsupportedModel: the noise is some function of a parameter that an M-step cannot invert.
    """
    return _find(problem, model, decoder, problem.noise_scale, "noise")


def prior_parameters(
    problem: ExactProblem, model: Any, decoder: nn.Module
) -> tuple[GaussianParameter | None, GaussianParameter | None]:
    """The parameters behind the prior's mean and covariance, None for constants."""
    loc = None
    for name, site in _parameter_sites(problem):
        if _depends(problem.prior_loc, site) and _equal(site["value"], problem.prior_loc):
            loc = _parameter(name, site, model, lambda mean: mean)
    if loc is None and problem.prior_loc.requires_grad:
        raise _not_direct("prior mean", "loc", problem.latent)
    return loc, _find(problem, model, decoder, problem.prior_tril, "prior covariance")


def _find(
    problem: ExactProblem, model: Any, decoder: nn.Module, scale: Tensor, what: str
) -> GaussianParameter | None:
    if not scale.requires_grad:
        return None
    decoder_leaves = {id(p) for p in decoder.parameters()}
    for name, site in _parameter_sites(problem):
        if id(_leaf(site)) in decoder_leaves or not _depends(scale, site):
            continue
        write = _write_form(site["value"], scale.detach())
        if write is not None:
            return _parameter(name, site, model, write)
    site_name = problem.observed if what == "noise" else problem.latent
    raise _not_direct(what, "scale", site_name)


def _write_form(value: Tensor, scale: Tensor) -> Callable[[Tensor], Tensor] | None:
    """How to turn variances or a covariance into ``value``, which plays some part in ``scale``; None if it is none."""
    if scale.dim() == 2 and bool((scale == torch.diag(scale.diagonal())).all()) and value.dim() < 2:
        scale = scale.diagonal()
    if scale.dim() == 1:
        mean = (lambda v: _variances(v).mean()) if value.numel() == 1 else _variances
        if value.numel() not in (1, len(scale)):
            return None
        if _equal(value, scale):
            return lambda v: mean(v).sqrt()
        return mean if _equal(value, scale**2) else None
    if _equal(value, scale):
        return torch.linalg.cholesky
    return (lambda v: v) if _equal(value, scale @ scale.mT) else None


def _variances(moment: Tensor) -> Tensor:
    return moment if moment.dim() == 1 else moment.diagonal()


def _equal(value: Tensor, target: Tensor) -> bool:
    value = value.detach().to(target.dtype)
    if value.dim() > target.dim() and value.numel() != target.numel():
        return False
    try:
        value = value.reshape(target.shape) if value.numel() == target.numel() else value.expand(target.shape)
    except RuntimeError:
        return False
    return torch.allclose(value, target.detach(), rtol=16 * torch.finfo(target.dtype).eps, atol=0.0)


def _depends(quantity: Tensor, site: Any) -> bool:
    leaf = _leaf(site)
    if not quantity.requires_grad or not leaf.requires_grad:
        return False
    return torch.autograd.grad(quantity.sum(), leaf, allow_unused=True, retain_graph=True)[0] is not None


def _parameter_sites(problem: ExactProblem) -> Iterator[tuple[str, Any]]:
    for name, site in problem.trace.nodes.items():
        if site["type"] == "param":
            yield name, site


def _leaf(site: Any) -> Tensor:
    """The tensor behind a parameter; a module's own parameter may stand for itself."""
    value = site["value"]
    return value.unconstrained() if hasattr(value, "unconstrained") else value


def _parameter(name: str, site: Any, model: Any, write: Callable[[Tensor], Tensor]) -> GaussianParameter:
    transform = transform_to(_constraint(name, site, model))
    return GaussianParameter(name, _leaf(site), transform, write, site["value"].shape)


def _constraint(name: str, site: Any, model: Any) -> constraints.Constraint:
    """The constraint of a parameter: kept by the store, by its PyroModule, or in the site itself."""
    # get_state() would do, but it strips the store's parameters of their links to the leaves.
    kept = pyro.get_param_store()._constraints.get(name)
    if kept is not None:
        return kept
    model = getattr(model, "__self__", model)
    if isinstance(model, nn.Module):
        for prefix, module in model.named_modules():
            if isinstance(module, PyroModule):
                for short, declared in module._pyro_params.items():
                    if name == (f"{prefix}.{short}" if prefix else short):
                        return declared[0]
    return site["kwargs"].get("constraint", constraints.real)


def _not_direct(what: str, role: str, site: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"the {what} of site '{site}' is computed from a parameter rather than being one, so that the M-step cannot write "
        f"it: use the value of pyro.param('{role}', ..., constraint=...) or a PyroParam directly, leave its block out "
        "(blocks=), or train with ExactML"
    )
