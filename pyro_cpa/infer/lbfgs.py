# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""L-BFGS on an exact objective that may have places where there is no model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import InvalidData, RegionBudgetExceeded
from .process_group import ProcessFailure

__all__ = ["climb", "forget_last_step", "optimizer_of"]

# Pairs of steps and gradient changes that L-BFGS keeps, and the bytes that they may take: on kinked objectives, more pay.
_HISTORY, _HISTORY_BYTES = 100, 2**28


def optimizer_of(
    parameters: Sequence[Tensor], iterations: int, evaluations: int | None = None
) -> torch.optim.LBFGS:
    """L-BFGS as :func:`climb` wants it, of so many iterations a step, and evaluations: by default a quarter more."""
    pair = 2 * sum(p.numel() * p.element_size() for p in parameters)
    return torch.optim.LBFGS(
        list(parameters),
        max_iter=iterations,
        max_eval=evaluations,
        history_size=min(_HISTORY, max(10, _HISTORY_BYTES // pair)),
        tolerance_grad=1e-9,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )


def climb(optimizer: torch.optim.LBFGS, objective: Callable[[], Tensor], rows: int) -> list[float]:
    """Raise a summed log-probability by one ``optimizer.step``.

    The parameters of the best evaluation are kept: a line search that ends on a worse point cannot undo progress.

    Args:
        optimizer: with strong Wolfe line search; its parameters are moved.
        objective: evaluates the sum to be raised, differentiably.
        rows: number of data; L-BFGS sees the negative mean.

    Returns:
        The objective before, and after each evaluation that improved on it.

    Raises:
        ValueError: whatever the first evaluation raises; InvalidData if it is not finite.
    """
    parameters = optimizer.param_groups[0]["params"]
    best = [p.detach().clone() for p in parameters]
    history: list[float] = []
    beyond: list[RegionBudgetExceeded] = []

    def closure() -> Tensor:
        nonlocal best
        optimizer.zero_grad()
        try:
            total = objective()
        except ProcessFailure:
            raise
        except ValueError as error:
            if not history:
                raise
            if isinstance(error, RegionBudgetExceeded):
                beyond.append(error)
            # A probe of the line search went where there is no model (noise of 0 or inf, too many regions); ValueError,
            # of which a CPAError is one, is also what distributions raise that check their arguments.
            return _wall(-history[-1] / max(1, rows), parameters)
        if not bool(total.isfinite()):
            if not history:
                raise InvalidData(
                    f"the objective is {total.item()} at the start: expected parameters of finite evidence"
                )
            return _wall(-history[-1] / max(1, rows), parameters)
        loss = -total / max(1, rows)
        loss.backward()
        if not history or total.item() > history[-1]:
            history.append(total.item())
            best = [p.detach().clone() for p in parameters]
        return loss.detach()

    try:
        optimizer.step(closure)
    finally:
        optimizer.zero_grad()
        if not all(map(torch.equal, parameters, best)):
            forget_last_step(optimizer)
            with torch.no_grad():
                for parameter, value in zip(parameters, best, strict=True):
                    parameter.copy_(value)
    if beyond:
        warnings.warn(
            f"the line search of L-BFGS turned back {len(beyond)} times: {beyond[0]} The parameters kept are the best "
            "ones within the budget",
            UserWarning,
            stacklevel=5,
        )
    return history


def forget_last_step(optimizer: torch.optim.LBFGS) -> None:
    """To be called when the parameters are moved between two calls of ``optimizer.step``.

    The next call takes the change of the gradient since the last step for the curvature along that step, which it then is
    not. From a step of length 0 it learns nothing. Where nothing was learned before, the next step is scaled as the first.
    """
    for state in optimizer.state.values():
        if state.get("old_dirs"):
            state["t"] = 0.0
        else:
            state.clear()


def _wall(best_loss: float, parameters: list[Tensor]) -> Tensor:
    """A loss so high and flat that the line search turns back; finite, for it interpolates between losses."""
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    return torch.tensor(best_loss + 1e4 * (1 + abs(best_loss)), dtype=torch.float64)
