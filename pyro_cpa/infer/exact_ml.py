# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Maximum likelihood on the exact evidence, by L-BFGS."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from .autoguide import AutoCPAPosterior
from .exact_fit import AbstractExactFit, StepRecord, lbfgs_round, leaves

__all__ = ["ExactML"]


class ExactML(AbstractExactFit):
    r"""Climb the exact :math:`\log p(X)` by L-BFGS with its exact gradient (Fisher's identity).

    Args:
        model: a Pyro model that :class:`AutoCPAPosterior` accepts; all of its parameters are trained.
        guide: its :class:`AutoCPAPosterior`.
        ridge: precision of a Gaussian prior on the decoder's weights.
        iterations_per_step: L-BFGS iterations of one :meth:`step`.
        history_size: of L-BFGS.

    Note:
        Each iteration costs about one E-step with gradients. The evidence never falls between steps. Walls between
        regions make the gradient continuous but not smooth, which L-BFGS takes well in practice.

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
        iterations_per_step: int = 10,
        history_size: int = 20,
    ) -> None:
        super().__init__(model, guide, ridge=ridge)
        self.iterations_per_step = iterations_per_step
        self.history_size = history_size
        self._optimizer: torch.optim.LBFGS | None = None

    def step(self, *args: Any, **kwargs: Any) -> float:
        """One round of L-BFGS iterations; returns the exact -log p(x) before it, summed over the data."""
        start = time.perf_counter()
        if self._optimizer is None:
            self._optimizer = torch.optim.LBFGS(
                leaves(self, *args, **kwargs),
                max_iter=self.iterations_per_step,
                history_size=self.history_size,
                tolerance_grad=1e-9,
                tolerance_change=1e-12,
                line_search_fn="strong_wolfe",
            )
        with torch.no_grad():
            penalty = self._penalty().item()
        before, objective = lbfgs_round(self, self._optimizer, *args, **kwargs)
        with torch.no_grad():
            log_evidence = objective + self._penalty().item()
        gain = objective - (before - penalty)
        self.history.append(StepRecord(log_evidence, objective, gain, time.perf_counter() - start))
        return -before
