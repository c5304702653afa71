# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Maximum likelihood on the exact evidence, by L-BFGS."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..errors import UnsupportedModel
from .autoguide import AutoCPAPosterior
from .em import EM
from .exact_fit import AbstractExactFit, StepRecord
from .parameters import noise_parameter

__all__ = ["ExactML"]


class ExactML(AbstractExactFit):
    r"""Climb the exact :math:`\log p(X)` by L-BFGS with its exact gradient (Fisher's identity).

    L-BFGS alone (``warm_start=0``) can stay on a plateau for hundreds of iterations. By default a few EM sweeps first bring
    the decoder into the reach of its data, and the blocks that have a closed form (last layer, noise) are solved
    between rounds: the alternation of ``EM(..., accelerate="lbfgs")``, for models whose noise may be any function of
    parameters.

    Args:
        model: a Pyro model that :class:`AutoCPAPosterior` accepts; all of its parameters are trained.
        guide: its :class:`AutoCPAPosterior`.
        ridge: precision of a Gaussian prior on the decoder's weights (biases are free).
        iterations_per_step: L-BFGS iterations of one :meth:`step`.
        warm_start: steps at the beginning that are sweeps of :class:`EM`; 0 for L-BFGS alone.
        process_group: a ``torch.distributed`` group (gloo or nccl), each process of which calls every method with
            rows of its own, at least one; None for one process.

    Note:
        Each iteration costs about one E-step with gradients. The evidence never falls between steps. Walls between
        regions make the gradient continuous but not smooth, which L-BFGS takes well in practice. Within a round the model
        is not run again if its noise, as it stands, is the only parameter besides the decoder's.

        With ``process_group`` process 0 runs L-BFGS and the others evaluate with it. Each evaluation sends one broadcast
        and one all-reduce of P numbers and a few more (float64, 8 bytes each; P parameters), whatever the number of
        data; steps of :class:`EM` send what is said there.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_cpa.infer import AutoCPAPosterior
        >>> _ = torch.manual_seed(0)
        >>> decoder = torch.nn.Sequential(torch.nn.Linear(1, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        ...         pyro.sample("x", dist.Normal(decoder(z), 0.3).to_event(1), obs=x)
        >>> x = torch.randn(20, 2)
        >>> fit = ExactML(model, AutoCPAPosterior(model, decoder=decoder))
        >>> before = fit.step(x)
        >>> fit.evaluate_loss(x) < before
        True
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: AutoCPAPosterior,
        *,
        ridge: float = 0.0,
        iterations_per_step: int = 25,
        warm_start: int = 10,
        process_group: Any = None,
    ) -> None:
        super().__init__(
            model, guide, ridge=ridge, lbfgs_iterations=iterations_per_step, process_group=process_group
        )
        self.warm_start = warm_start
        self.iterations_per_step = iterations_per_step
        self._alternation: EM | None = None

    def step(self, *args: Any, **kwargs: Any) -> float:
        """One EM sweep or one round of L-BFGS; returns the exact -log p(x) before it, summed over the data."""
        if self.warm_start:
            if self._alternation is None:
                self._alternation = self._alternate(*args, **kwargs)
                self._alternation.load_state_dict(super().state_dict())
            loss = self._alternation.step(*args, **kwargs)
            self._rows = self._alternation._rows
            self.history.append(self._alternation.history[-1])
            return loss
        start = time.perf_counter()
        self._agree(*args, **kwargs)
        with torch.no_grad():
            penalty = self._penalty().item()
        before, after = self._lbfgs(*args, **kwargs)
        with torch.no_grad():
            log_evidence = after + self._penalty().item()
        self.history.append(StepRecord(log_evidence, after, after - before, time.perf_counter() - start))
        return -(before + penalty)

    @property
    def _prepares(self) -> bool:
        return len(self.history) < self.warm_start

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() if self._alternation is None else self._alternation.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._alternation = None

    def _alternate(self, *args: Any, **kwargs: Any) -> EM:
        try:
            noise_parameter(self._problem(*args, **kwargs), self.model, self.guide.decoder)
            blocks = None
        except UnsupportedModel:
            # Noise that is a function of parameters is beyond an M-step, and left to L-BFGS.
            blocks = ("output", "hidden")
        return EM(
            self.model,
            self.guide,
            blocks=blocks,
            ridge=self.ridge,
            accelerate="lbfgs",
            lbfgs_iterations=self.iterations_per_step,
            warm_up=self.warm_start,
            process_group=self._processes.group,
        )
