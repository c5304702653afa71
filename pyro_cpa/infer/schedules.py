# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
r"""Where the thermodynamic objective evaluates its integrand: partitions of [0, 1].

Fixed schedules: :class:`Linear`, :class:`LogUniform`, :class:`Fixed`. Adaptive ones follow the integrand
:math:`\eta(\beta)` seen in training, from the step's own log-weights and without drawing random numbers:
:class:`Moments`, :class:`CoarseGrained`, :class:`OptimalLeft`. All save and restore with ``state_dict``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import CPAError
from .thermodynamic_path import path_statistics

__all__ = ["CoarseGrained", "Fixed", "Linear", "LogUniform", "Moments", "OptimalLeft", "Schedule"]


class Schedule:
    r"""A partition :math:`0 = \beta_0 < \dots < \beta_K = 1` into K intervals; the base of all schedules.

    Args:
        betas: (K+1,) increasing nodes, 0 first and 1 last.
    """

    def __init__(self, betas: Tensor) -> None:
        self._betas = _validated(betas)

    @property
    def betas(self) -> Tensor:
        """(K+1,) float64 nodes."""
        return self._betas

    @property
    def num_intervals(self) -> int:
        """K."""
        return len(self._betas) - 1

    def update(self, log_weights: Tensor) -> None:
        r"""Learn from the (S, \*plates) log-weights of a training step; fixed schedules do not."""

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` restores: tensors and numbers, safe for ``weights_only`` loading."""
        return {"betas": self._betas.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` of a schedule of the same class and size returned.

        Raises:
            CPAError: the state belongs to another class or size of schedule.
        """
        expected = {name: _shape(value) for name, value in self.state_dict().items()}
        given = {name: _shape(value) for name, value in state.items()}
        if given != expected:
            raise CPAError(
                f"a {type(self).__name__} schedule of this size restores the shapes {expected}, got {given}; "
                "load the state into a schedule built with the arguments of the saved one."
            )
        self._betas = _validated(state["betas"])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{b:.4g}' for b in self._betas.tolist())})"


class Fixed(Schedule):
    """Nodes given by hand.

    Args:
        betas: (K+1,) increasing, 0 first and 1 last.

    Raises:
        CPAError: nodes that do not increase from 0 to 1.

    Example:
        >>> Fixed([0.0, 0.2, 1.0]).num_intervals
        2
    """

    def __init__(self, betas: Tensor | Sequence[float]) -> None:
        super().__init__(torch.as_tensor(betas, dtype=torch.float64))


class Linear(Schedule):
    r"""Equal intervals, :math:`\beta_k = k/K`.

    Args:
        num_intervals: K >= 1.

    Example:
        >>> Linear(4).betas.tolist()
        [0.0, 0.25, 0.5, 0.75, 1.0]
    """

    def __init__(self, num_intervals: int) -> None:
        super().__init__(torch.linspace(0, 1, _count(num_intervals) + 1, dtype=torch.float64))


class LogUniform(Schedule):
    r"""Equal ratios from :math:`\beta_1` to 1, with 0 in front: dense where the integrand is steep.

    .. math:: \beta_0 = 0, \qquad \beta_k = \beta_1^{(K-k)/(K-1)}, \quad k = 1, \dots, K

    Args:
        num_intervals: K >= 1; with K = 1 the nodes are 0 and 1 whatever ``beta_1``.
        beta_1: first positive node, inside (0, 1). Choose it on validation data, never on test data.

    References:
        Masrani, Le, Wood (2019), The Thermodynamic Variational Objective.

    Example:
        >>> LogUniform(3, beta_1=0.01).betas
        tensor([0.0000, 0.0100, 0.1000, 1.0000], dtype=torch.float64)
    """

    def __init__(self, num_intervals: int = 5, beta_1: float = 0.025) -> None:
        count = _count(num_intervals)
        if not 0 < beta_1 < 1:
            raise CPAError(
                f"beta_1={beta_1} is outside (0, 1); give a first positive temperature like 0.025."
            )
        tail = (
            torch.logspace(math.log10(beta_1), 0, count, dtype=torch.float64) if count > 1 else torch.ones(1)
        )
        super().__init__(torch.cat([torch.zeros(1, dtype=torch.float64), tail.double()]))


class _Adaptive(Schedule, ABC):
    """A schedule read off a running average of the integrand on a grid; log-uniform before the first step.

    Each ``every``-th training step, the first included, adds its estimate of eta, a mean over data.
    """

    def __init__(self, num_intervals: int, grid: int, every: int, ema: float) -> None:
        super().__init__(LogUniform(num_intervals).betas)
        if _count(grid, "grid") < num_intervals:
            raise CPAError(
                f"grid={grid} has fewer cells than the {num_intervals} intervals asked for; enlarge it."
            )
        if not 0 <= ema < 1:
            raise CPAError(f"ema={ema} is outside [0, 1); give the share of the average that is kept.")
        # Squares: the integrand rises fastest near 0, where an even grid would see a single step.
        self._grid = torch.linspace(0, 1, grid + 1, dtype=torch.float64).square()
        self._every, self._ema = _count(every, "every"), ema
        self._eta = torch.zeros_like(self._grid)
        self._steps = 0

    def update(self, log_weights: Tensor) -> None:
        if self._steps % self._every == 0:
            f = log_weights.detach().double()
            eta = path_statistics(f, self._grid.to(f.device)).mean.reshape(len(self._grid), -1).mean(1).cpu()
            if not torch.isfinite(eta).all():
                return  # a particle of zero density hides the shape of the curve: the next step tries again
            self._eta = eta if self._steps == 0 else self._ema * self._eta + (1 - self._ema) * eta
            # A flat curve (guide equal to posterior) makes all partitions equally good: keep the one in use.
            if self._eta[-1] > self._eta[0]:
                self._betas = _validated(self._partition(self._grid, self._eta))
        self._steps += 1

    @abstractmethod
    def _partition(self, grid: Tensor, eta: Tensor) -> Tensor:
        """(K+1,) nodes for an increasing integrand ``eta`` on ``grid``."""

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "eta": self._eta.clone(), "steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._eta, self._steps = torch.as_tensor(state["eta"]).clone(), int(state["steps"])


class Moments(_Adaptive):
    r"""Equal steps of the integrand: :math:`\eta(\beta_k) = \eta_0 + \tfrac{k}{K} (\eta_1 - \eta_0)`.

    Args:
        num_intervals: K >= 1.
        grid: cells on which the integrand is averaged and interpolated.
        every: training steps between two updates.
        ema: share of the running average kept at an update.

    Note:
        Not the partition with the smallest gap; :class:`OptimalLeft` is.

    References:
        Brekelmans et al. (2020), All in the Exponential Family: Bregman Duality in
        Thermodynamic Variational Inference.

    Example:
        >>> schedule = Moments(2)
        >>> schedule.update(torch.tensor([[-1.0], [1.0]]))  # eta(beta) = tanh(beta)
        >>> round(float(schedule.betas[1]), 3)
        0.401
    """

    def __init__(self, num_intervals: int, grid: int = 256, every: int = 100, ema: float = 0.9) -> None:
        super().__init__(num_intervals, grid, every, ema)

    def _partition(self, grid: Tensor, eta: Tensor) -> Tensor:
        return _equal_parts(grid, eta, self.num_intervals)


class CoarseGrained(_Adaptive):
    r"""Node density that minimises the gap to first order, from a coarse picture of the integrand.

    Between knots :math:`t_j` the density of nodes is proportional to
    :math:`\sqrt{(\eta(t_{j+1}) - \eta(t_j)) / (t_{j+1} - t_j)}`, so each knot interval receives a share of
    nodes proportional to :math:`\sqrt{\Delta\eta\,\Delta t}`, without rounding to whole nodes.

    Args:
        num_intervals: K >= 1.
        knots: knot intervals, at least K.
        every: training steps between two updates.
        ema: share of the running average kept at an update.

    References:
        Grosse, Maddison, Salakhutdinov (2013), Annealing between distributions by averaging moments;
        Brekelmans et al. (2020), All in the Exponential Family: Bregman Duality in
        Thermodynamic Variational Inference.

    Example:
        >>> CoarseGrained(5).num_intervals
        5
    """

    def __init__(self, num_intervals: int, knots: int = 20, every: int = 100, ema: float = 0.9) -> None:
        super().__init__(num_intervals, knots, every, ema)

    def _partition(self, grid: Tensor, eta: Tensor) -> Tensor:
        # Rounding can make a saturated integrand fall by an ulp.
        cost = (eta.diff().clamp(min=0) * grid.diff()).sqrt()
        return _equal_parts(grid, torch.cat([cost.new_zeros(1), cost.cumsum(0)]), self.num_intervals)


class OptimalLeft(_Adaptive):
    r"""The partition of a grid with the largest left sum, that is, the tightest lower bound.

    .. math:: \max_{0 = \beta_0 < \dots < \beta_K = 1} \sum_k (\beta_k - \beta_{k-1})\, \eta(\beta_{k-1})

    Args:
        num_intervals: K >= 1.
        grid: cells whose corners are the candidates.
        every: training steps between two updates.
        ema: share of the running average kept at an update.

    Note:
        Exact on the grid, by dynamic programming in O(K grid^2).

    Example:
        >>> schedule = OptimalLeft(2)
        >>> schedule.update(torch.tensor([[-1.0], [1.0]]))  # maximises (1 - beta) tanh(beta)
        >>> round(float(schedule.betas[1]), 2)
        0.47
    """

    def __init__(self, num_intervals: int, grid: int = 256, every: int = 100, ema: float = 0.9) -> None:
        super().__init__(num_intervals, grid, every, ema)

    def _partition(self, grid: Tensor, eta: Tensor) -> Tensor:
        gain = (grid[None, :] - grid[:, None]) * eta[:, None]  # of the interval from row to column
        gain.masked_fill_(torch.ones_like(gain, dtype=torch.bool).tril(), -math.inf)
        best, origins = gain[0], []
        for _ in range(self.num_intervals - 1):
            best, origin = (best[:, None] + gain).max(0)
            origins.append(origin)
        nodes = [len(grid) - 1]
        for origin in reversed(origins):
            nodes.append(int(origin[nodes[-1]]))
        return grid[[0, *reversed(nodes)]]


def _equal_parts(grid: Tensor, height: Tensor, parts: int) -> Tensor:
    """Abscissae that cut a piecewise linear, increasing curve into parts of equal rise."""
    height = height.cummax(0).values
    targets = (
        height[0] + (height[-1] - height[0]) * torch.linspace(0, 1, parts + 1, dtype=torch.float64)[1:-1]
    )
    upper = torch.searchsorted(height, targets).clamp(1, len(grid) - 1)
    share = (targets - height[upper - 1]) / (height[upper] - height[upper - 1])
    inner = grid[upper - 1] + share * (grid[upper] - grid[upper - 1])
    return torch.cat([grid[:1], inner, grid[-1:]])


def _count(value: int, name: str = "num_intervals") -> int:
    if not isinstance(value, int) or value < 1:
        raise CPAError(f"{name}={value!r}: expected a whole number of at least 1.")
    return value


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(getattr(value, "shape", ()))


def _validated(betas: Tensor) -> Tensor:
    nodes = torch.as_tensor(betas).detach().to("cpu", torch.float64)
    if nodes.ndim != 1 or len(nodes) < 2 or nodes[0] != 0 or nodes[-1] != 1 or not (nodes.diff() > 0).all():
        raise CPAError(
            f"betas {nodes.tolist()} are no partition of [0, 1]: "
            "give increasing numbers, 0 first and 1 last, such as [0.0, 0.1, 1.0]."
        )
    return nodes.clone()
