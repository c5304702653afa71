# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""What guides for decoder models share: they read the model in its trace, and draw its latent in its plates."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn

from .structure import ExactProblem, read_problem

__all__ = ["AbstractDecoderGuide"]


class AbstractDecoderGuide(AutoGuide):
    """A guide without parameters for a model with Gaussian latent, decoder and Gaussian noise.

    Args:
        model: a Pyro model of the form that :class:`AutoCPAPosterior` describes.
        decoder: the piecewise-affine module.
        create_plates: as for every Pyro AutoGuide.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        decoder: nn.Module,
        *,
        create_plates: Callable[..., pyro.plate | Iterable[pyro.plate]] | None = None,
    ) -> None:
        super().__init__(model, create_plates=create_plates)
        # In a tuple, as AutoGuide keeps the model: the decoder's parameters are the model's, not the guide's.
        self._decoder = (decoder,)
        self._checked = False
        self._latent_dim: int | None = None

    @abstractmethod
    def _law(self, problem: ExactProblem) -> TorchDistribution:
        """The law of the latent that the guide draws from, of the batch shape of the data; called without gradients."""

    def __getstate__(self) -> dict[str, Any]:
        # Unlike its base, which drops the model from the very guide that is copied. What can be computed again is left out.
        return self.__dict__ | {"master": None} | dict.fromkeys(self._recomputed)

    _recomputed: tuple[str, ...] = ()

    @property
    def decoder(self) -> nn.Module:
        return self._decoder[0]

    def problem(self, *args: Any, **kwargs: Any) -> ExactProblem:
        """The model's call as prior, noise and data, with the graph to the model's parameters."""
        with poutine.block():
            trace = poutine.trace(self.model).get_trace(*args, **kwargs)
        return self._read(trace)

    def _read(self, trace: poutine.Trace) -> ExactProblem:
        problem = read_problem(trace, self.decoder, check_mean=not self._checked)
        self._checked = True
        # Not every decoder tells it.
        self._latent_dim = problem.prior_loc.shape[-1]
        return problem

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw the latent, in the plates of the model."""
        with torch.no_grad(), poutine.block():
            trace = poutine.trace(self.model).get_trace(*args, **kwargs)
        plates, subsamples = self._enter_plates(trace, *args, **kwargs)
        if subsamples is not None:
            # The guide's plates draw the minibatch; the data are read again on it.
            with torch.no_grad(), poutine.block():
                replayed = poutine.replay(self.model, trace=subsamples)
                trace = poutine.trace(replayed).get_trace(*args, **kwargs)
        with torch.no_grad(), poutine.block():
            problem = self._read(trace)
            law = self._law(problem)
        with ExitStack() as stack:
            for frame in trace.nodes[problem.latent]["cond_indep_stack"]:
                stack.enter_context(plates[frame.name])
            mask = trace.nodes[problem.latent]["mask"]
            if mask is not None:
                stack.enter_context(poutine.mask(mask=mask))
            values = {problem.latent: pyro.sample(problem.latent, law)}
        if problem.unobserved is not None:
            values |= self._sample_unobserved(problem, plates, values, *args, **kwargs)
        return values

    def _enter_plates(
        self, trace: poutine.Trace, *args: Any, **kwargs: Any
    ) -> tuple[dict[str, pyro.plate], poutine.Trace | None]:
        """The guide's plates by name, and a trace of their minibatches where some plate is subsampled."""
        self._prototype_frames = {
            frame.name: frame
            for _, site in trace.iter_stochastic_nodes()
            for frame in site["cond_indep_stack"]
        }
        for frame in self._prototype_frames.values():
            if not frame.vectorized:
                raise NotImplementedError(
                    f"plate '{frame.name}' is sequential: {type(self).__name__} needs vectorised plates (with pyro.plate)"
                )
        with poutine.trace() as drawn:
            plates = self._create_plates(*args, **kwargs)
        subsampled = (
            any(p.subsample_size != p.size for p in plates.values()) or self.create_plates is not None
        )
        return plates, (drawn.trace if subsampled else None)

    def _sample_unobserved(
        self,
        problem: ExactProblem,
        plates: dict[str, pyro.plate],
        values: dict[str, Tensor],
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Draw the masked-out data that ``obs_mask`` turns into a latent, given z: the model's own conditional."""
        name = problem.unobserved
        assert name is not None
        with torch.no_grad(), poutine.block():
            given = poutine.condition(self.model, data={k: v.detach() for k, v in values.items()})
            site: Any = poutine.trace(given).get_trace(*args, **kwargs).nodes[name]
        with ExitStack() as stack:
            for frame in site["cond_indep_stack"]:
                stack.enter_context(plates[frame.name])
            if site["mask"] is not None:
                stack.enter_context(poutine.mask(mask=site["mask"]))
            return {name: pyro.sample(name, site["fn"])}
