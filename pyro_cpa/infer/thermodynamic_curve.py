# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""What the thermodynamic objective reports: bounds at nodes, the whole integrand, a sandwich."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..errors import InvalidData
from .log_weights import LogWeights
from .thermodynamic_path import PathStatistics, Rule, path_statistics, riemann_weights

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["SimulatedSandwich", "Summary", "TVOBounds", "TVOCurve"]


class Summary(NamedTuple):
    r"""What one set of particles says at the nodes, cut from the graph; sums over data are taken on demand.

    Attributes:
        log_w: (S, \*plates) log-weights.
        betas: (K+1,) nodes.
        path: statistics at the nodes.
        scale: (\*plates) factor of each datum.
        outer: () what particles share.
    """

    log_w: Tensor
    betas: Tensor
    path: PathStatistics
    scale: Tensor
    outer: Tensor

    @classmethod
    def at(cls, weights: LogWeights, betas: Tensor, path: PathStatistics | None = None) -> Summary:
        """Summary of ``weights`` at ``betas`` (B,), computed here unless ``path`` is given."""
        log_w = weights.log_w.detach()
        betas = betas.to(log_w)
        path = path or path_statistics(log_w, betas)
        return cls(log_w, betas, path, weights.scale.detach(), weights.outer.detach())

    def total(self, per_datum: Tensor) -> Tensor:
        r"""(B,) scaled sum over data of (B, \*plates)."""
        return (self.scale * per_datum).reshape(len(per_datum), -1).sum(1)

    @property
    def eta(self) -> Tensor:
        """(B,) integrand of all data."""
        return self.outer + self.total(self.path.mean)

    @property
    def ess(self) -> Tensor:
        """(B,) effective sample size, a mean over data."""
        return self.path.ess.reshape(len(self.betas), -1).mean(1)

    def bounds(self, rule: Rule) -> TVOBounds:
        """All bounds at the nodes."""
        eta = self.eta
        sums = {r: float(riemann_weights(self.betas, r) @ eta) for r in ("left", "right", "trapezoid")}
        iwae = self.log_w.logsumexp(0) - math.log(len(self.log_w))
        return TVOBounds(
            bound=sums[rule],
            elbo=float(eta[0]),
            lower=sums["left"],
            trapezoid=sums["trapezoid"],
            upper_snis=sums["right"],
            iwae=float(self.outer + self.total(iwae[None])[0]),
            betas=self.betas,
            eta=eta,
            variance=self.total(self.path.variance),
            ess=self.ess,
        )


class TVOBounds(NamedTuple):
    r"""Bounds of one set of particles, summed over data as the objective sums them (subsampling scale included).

    On every sample set :math:`\mathrm{elbo} \le \mathrm{lower} \le \mathrm{iwae} \le \mathrm{upper\_snis}`.
    In expectation the first three stay below the evidence. ``upper_snis`` is the right sum of an importance-sampled
    integrand: it is **not** an upper bound of the evidence, and where the guide is poor it lies far below it. A true
    upper bound needs exact posterior samples: see :meth:`~pyro_cpa.infer.TVO.simulated_sandwich`.

    Attributes:
        bound: value of the rule in use, minus the loss.
        elbo: mean log-weight.
        lower: left rule.
        trapezoid: mean of left and right rule.
        upper_snis: right rule.
        iwae: importance-weighted value of the same particles, the limit of all rules for many nodes.
        betas: (K+1,) nodes.
        eta: (K+1,) integrand.
        variance: (K+1,) its slope, the variance of the log-weights at the node.
        ess: (K+1,) effective sample size, a mean over data; below 2 the node is one particle's opinion.
    """

    bound: float
    elbo: float
    lower: float
    trapezoid: float
    upper_snis: float
    iwae: float
    betas: Tensor
    eta: Tensor
    variance: Tensor
    ess: Tensor


class SimulatedSandwich(NamedTuple):
    r"""Bounds on the evidence of data simulated from the model, where one exact posterior sample is known.

    In expectation :math:`\mathrm{elbo} \le \mathrm{lower} \le \mathrm{iwae} \le \log p(x) \le
    \mathrm{iwae\_upper} \le \mathrm{upper} \le \mathrm{eubo}`; the upper values let the exact sample join the
    guide's particles. ``*_error`` are standard errors over data, valid where data are independent.

    Note:
        About data drawn from the model, not about the user's data.
    """

    elbo: float
    lower: float
    iwae: float
    iwae_upper: float
    upper: float
    eubo: float
    lower_error: float
    upper_error: float

    @classmethod
    def of(cls, particles: LogWeights, exact: LogWeights, betas: Tensor) -> SimulatedSandwich:
        r"""From (S, \*plates) particles of the guide and the one exact sample (1, \*plates) of each datum."""
        scale, mine, true = particles.scale, particles.log_w, exact.log_w
        both = torch.cat([true, mine])
        betas = betas.to(mine)
        lower = torch.tensordot(riemann_weights(betas, "left"), path_statistics(mine, betas).mean, 1)
        upper = torch.tensordot(riemann_weights(betas, "right"), path_statistics(both, betas).mean, 1)

        def total(per_datum: Tensor) -> float:
            return float((scale * per_datum).sum())

        def error(per_datum: Tensor) -> float:
            values = (scale * per_datum).flatten()
            return float(values.std() * math.sqrt(len(values))) if len(values) > 1 else math.nan

        return cls(
            elbo=total(mine.mean(0)),
            lower=total(lower),
            iwae=total(mine.logsumexp(0) - math.log(len(mine))),
            iwae_upper=total(both.logsumexp(0) - math.log(len(both))),
            upper=total(upper),
            eubo=total(true[0]),
            lower_error=error(lower),
            upper_error=error(upper),
        )


@dataclass(frozen=True)
class TVOCurve:
    r"""The integrand :math:`\eta(\beta) = \mathrm E_{\pi_\beta}[\log p(x,z) - \log q(z)]`; its area is log
    p(x).

    Attributes:
        betas: (B,) temperatures.
        eta: (B,) integrand, summed over data.
        variance: (B,) its slope.
        ess: (B,) effective sample size, a mean over data.
        standard_error: (B,) of ``eta`` (delta method; the bias of importance sampling is not in it).
        nodes: (K+1,) schedule of the objective.
        node_eta: (K+1,) integrand there.
    """

    betas: Tensor
    eta: Tensor
    variance: Tensor
    ess: Tensor
    standard_error: Tensor
    nodes: Tensor
    node_eta: Tensor

    @classmethod
    def of(cls, weights: LogWeights, betas: int | Tensor, nodes: Tensor) -> TVOCurve:
        """Curve of ``weights`` at ``betas`` (that many equidistant ones, or (B,)), and at the nodes.

        Raises:
            InvalidData: temperatures outside [0, 1], or fewer than two.
        """
        grid = torch.linspace(0, 1, betas, dtype=nodes.dtype) if isinstance(betas, int) else betas.to(nodes)
        if grid.ndim != 1 or len(grid) < 2 or not ((grid >= 0) & (grid <= 1)).all():
            raise InvalidData(
                f"betas={betas}: give a number of at least 2, or increasing temperatures in [0, 1]"
            )
        curve, at_nodes = Summary.at(weights, grid), Summary.at(weights, nodes)
        error = (curve.scale.square() * curve.path.squared_error).reshape(len(grid), -1).sum(1).sqrt()
        variance = curve.total(curve.path.variance)
        return cls(curve.betas, curve.eta, variance, curve.ess, error, at_nodes.betas, at_nodes.eta)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Curve with a band of two standard errors over the rectangles of the schedule's left sum.

        Args:
            ax: axes to draw on; a new figure by default. Needs matplotlib (``pip install pyro-cpa[plot]``).
        """
        if ax is None:
            import matplotlib.pyplot as plt

            ax = plt.figure().add_subplot()
        beta, eta, error = (t.cpu().numpy() for t in (self.betas, self.eta, self.standard_error))
        nodes, heights = self.nodes.cpu().numpy(), self.node_eta.cpu().numpy()[:-1]
        ax.bar(
            nodes[:-1], heights - eta[0], nodes[1:] - nodes[:-1], eta[0], align="edge", color="0.85", ec="0.6"
        )
        ax.fill_between(beta, eta - 2 * error, eta + 2 * error, alpha=0.3, lw=0)
        ax.plot(beta, eta)
        ax.set(xlabel=r"$\beta$", ylabel=r"$\eta(\beta)$", xlim=(0, 1))
        return ax
