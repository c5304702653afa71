# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Quantiles of a missing cell given the observed ones, from the exact density."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InvalidData
from ._evidence import as_rows

__all__ = ["conditional_quantiles"]

_NODES = 8
_FIRST_PANELS, _LAST_PANELS = 16, 2048
_ROWS_AT_ONCE = 65_536


def conditional_quantiles(marginal: Any, x: Any, probs: Sequence[float], *, tol: float = 1e-6) -> Tensor:
    r"""Quantiles of every missing cell given the observed cells of its row.

    .. math:: q_d(\tau) = F_d^{-1}(\tau), \qquad
              F_d(t) = \int_{-\infty}^t \frac{p(x_{obs}, x_d = u)}{p(x_{obs})} \, du

    Args:
        marginal: a :class:`~pyro_cpa.distributions.CPAMarginal`, or anything with ``log_prob`` that takes NaN
            and ``conditional``.
        x: (N, D); NaN marks missing cells.
        probs: Q probabilities tau, strictly between 0 and 1.
        tol: accuracy in probability: :math:`|F_d(q_d(\tau)) - \tau| \le` ``tol``.

    Returns:
        (Q, N, D) float64; observed cells hold their value.

    Raises:
        InvalidData: a probability outside (0, 1), or a density too narrow to integrate within ``tol``.

    Note:
        Exact up to ``tol``: the density is exact, its integral Gauss-Legendre on panels that are halved until
        mass and probabilities settle. A missing cell takes some hundreds of evaluations of log p(x); for many
        cells, quantiles of draws from ``marginal.conditional(x)`` are cheaper.

    Example:
        >>> from pyro_cpa.distributions import CPAMarginal
        >>> px = CPAMarginal(torch.nn.Linear(1, 2), scale=0.5)
        >>> x = torch.tensor([[1.0, torch.nan]])
        >>> low, middle, high = conditional_quantiles(px, x, [0.05, 0.5, 0.95])[:, 0, 1]
        >>> bool(low < middle < high)
        True
    """
    tau = torch.as_tensor(list(probs), dtype=torch.float64)
    if tau.numel() == 0 or not bool(((tau > 0) & (tau < 1)).all()):
        raise InvalidData(f"expected probabilities strictly between 0 and 1, got {list(probs)}")
    rows = as_rows(x).to(torch.float64)
    found = rows.expand(len(tau), *rows.shape).clone()
    cells = rows.isnan().nonzero()
    if not len(cells):
        return found
    with torch.no_grad():
        conditional = marginal.conditional(rows)
        index = (cells[:, 0], cells[:, 1])
        centre, spread = conditional.mean[index], conditional.variance[index].sqrt()
        log_evidence = marginal.log_prob(rows)[cells[:, 0]]
        panels, reach = _FIRST_PANELS, 8.0
        pending = torch.arange(len(cells))
        quantiles = torch.full((len(cells), len(tau)), torch.nan, dtype=torch.float64)
        while len(pending):
            if panels > _LAST_PANELS:
                raise InvalidData(
                    f"the conditional density of {len(pending)} cells, first {cells[pending[0]].tolist()}, "
                    f"is narrower than 1/{_LAST_PANELS} of its range: raise tol, or use quantiles of draws"
                )
            start = centre[pending] - reach * spread[pending]
            width = 2 * reach * spread[pending] / panels
            density = _densities(marginal, rows, cells[pending], log_evidence[pending], start, width, panels)
            law = _GridLaw(density, start, width)
            # What lies out of reach is missing mass; what the panels cannot resolve moves with their number.
            moved = (law.cdf(quantiles[pending]) - tau).abs().amax(1)
            quantiles[pending] = law.quantile(tau)
            done = ((law.mass - 1).abs() <= tol) & (moved <= tol)
            pending = pending[~done]
            panels, reach = 2 * panels, reach * 1.25
    found[:, index[0], index[1]] = quantiles.T
    return found


def _densities(
    marginal: Any,
    rows: Tensor,
    cells: Tensor,
    log_evidence: Tensor,
    start: Tensor,
    width: Tensor,
    panels: int,
) -> Tensor:
    """(C, panels, nodes) conditional density at the nodes of every panel."""
    nodes = torch.as_tensor(np.polynomial.legendre.leggauss(_NODES)[0])
    offsets = (torch.arange(panels, dtype=torch.float64)[:, None] + (nodes + 1) / 2).reshape(-1)
    per_cell = len(offsets)
    found = []
    for chunk in torch.arange(len(cells)).split(max(1, _ROWS_AT_ONCE // per_cell)):
        t = start[chunk, None] + width[chunk, None] * offsets
        filled = rows[cells[chunk, 0]].repeat_interleave(per_cell, 0)
        columns = cells[chunk, 1].repeat_interleave(per_cell)
        filled[torch.arange(len(filled)), columns] = t.reshape(-1)
        found.append((marginal.log_prob(filled).reshape(t.shape) - log_evidence[chunk, None]).exp())
    return torch.cat(found).reshape(len(cells), panels, _NODES)


class _GridLaw:
    """Distribution functions (C of them) from densities at Gauss-Legendre nodes of adjacent panels.

    Args:
        density: (C, panels, nodes).
        start: (C,) left end of the first panel.
        width: (C,) of every panel.
    """

    def __init__(self, density: Tensor, start: Tensor, width: Tensor) -> None:
        nodes, weights = (torch.as_tensor(a) for a in np.polynomial.legendre.leggauss(_NODES))
        self.start, self.width = start[:, None], width[:, None]
        mass = density @ weights * self.width / 2
        self.cumulative = torch.nn.functional.pad(mass.cumsum(dim=1), (1, 0))
        self.mass = self.cumulative[:, -1]
        # The polynomial through one panel's nodes, by powers of s in [-1, 1].
        self.powers = torch.arange(1, _NODES + 1, dtype=torch.float64)
        to_powers = torch.linalg.inv(nodes[:, None] ** (self.powers - 1))
        self.coefficients = density @ to_powers.T / self.powers * self.width[..., None] / 2

    def _within(self, panel: Tensor, s: Tensor) -> Tensor:
        """(C, Q) probability below the point s of the panel."""
        coefficients = self.coefficients.gather(1, panel[..., None].expand(-1, -1, _NODES))
        inside = (coefficients * (s[..., None] ** self.powers - (-1.0) ** self.powers)).sum(-1)
        return self.cumulative.gather(1, panel) + inside

    def cdf(self, t: Tensor) -> Tensor:
        """(C, Q) probability below t (C, Q); NaN where t is."""
        panels = self.coefficients.shape[1]
        position = (t - self.start) / self.width
        panel = position.nan_to_num().floor().clamp(0, panels - 1)
        return self._within(panel.long(), (2 * (position - panel) - 1).clamp(-1, 1))

    def quantile(self, tau: Tensor) -> Tensor:
        """(C, Q) points below which lies the share tau (Q,) of the mass; bisection to the last bit."""
        target = tau * self.mass[:, None]
        panel = torch.searchsorted(self.cumulative[:, 1:].contiguous(), target)
        panel = panel.clamp(max=self.coefficients.shape[1] - 1)
        low, high = torch.full_like(target, -1.0), torch.full_like(target, 1.0)
        for _ in range(60):
            s = (low + high) / 2
            too_low = self._within(panel, s) < target
            low, high = torch.where(too_low, s, low), torch.where(too_low, high, s)
        return self.start + self.width * (panel + (low + high) / 4 + 0.5)
