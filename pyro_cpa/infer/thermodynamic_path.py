# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
r"""The geometric path between guide and posterior, estimated from one set of log-weights.

With :math:`f_s = \log p(x, z_s) - \log q(z_s)` for S particles drawn from the guide, the path
:math:`\pi_\beta \propto q^{1-\beta} p^\beta` is reached by self-normalised importance sampling,

.. math:: w_{ks} = \mathrm{softmax}_s(\beta_k f_s), \qquad \hat\eta_k = \sum_s w_{ks} f_s ,

and every gradient of a Riemann sum :math:`\sum_k m_k \hat\eta_k` collapses to one constant per particle,

.. math:: c_s = \sum_k \bigl[u_k\, w_{ks} + v_k\, d_{ks}\bigr], \qquad d_{ks} = c\, w_{ks} (f_s - \hat\eta_k),

where only the rows (u, v) differ between the model's, the guide's and the pathwise gradient. Nothing here is
seen by autograd, and nodes are visited in blocks, so memory does not grow with their number.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "PathStatistics",
    "Rule",
    "Terms",
    "guide_terms",
    "model_terms",
    "path_statistics",
    "pathwise_terms",
    "riemann_weights",
]

Rule = Literal["left", "right", "trapezoid"]

# Elements of one block of [nodes, particles, data]: few enough for the cache, enough to amortise the calls.
_BLOCK = 2**20


class Terms(NamedTuple):
    """How much of each node's weight (u) and covariance (v) enters a particle's coefficient; both (K+1,)."""

    weight: Tensor
    covariance: Tensor


class PathStatistics(NamedTuple):
    r"""Moments of the log-weight under :math:`\pi_\beta` and their quality, each (K+1, \*plates).

    ``ess`` is the effective sample size, ``squared_error`` the delta-method variance of ``mean``;
    ``coefficients`` holds one tensor (S, \*plates) per requested pair of terms.
    """

    mean: Tensor
    variance: Tensor
    ess: Tensor
    squared_error: Tensor
    coefficients: tuple[Tensor, ...]


def riemann_weights(betas: Tensor, rule: Rule) -> Tensor:
    r"""Weights :math:`m_k` (K+1,) with which a rule integrates over nodes ``betas`` (K+1,); they sum to 1."""
    widths = betas.diff()
    none = widths.new_zeros(1)
    left, right = torch.cat([widths, none]), torch.cat([none, widths])
    return {"left": left, "right": right, "trapezoid": (left + right) / 2}[rule]


def model_terms(betas: Tensor, weights: Tensor) -> Terms:
    r"""Coefficients of :math:`\nabla \log p`: :math:`A_s = \sum_k m_k (w_{ks} + \beta_k d_{ks})`."""
    return Terms(weights, weights * betas)


def guide_terms(betas: Tensor, weights: Tensor) -> Terms:
    r"""Coefficients of :math:`\nabla \log q`: :math:`B_s = \sum_k m_k (-w_{ks} + (1-\beta_k) d_{ks})`."""
    return Terms(-weights, weights * (1 - betas))


def pathwise_terms(betas: Tensor, weights: Tensor) -> Terms:
    r"""Coefficients of the pathwise gradient of the guide (doubly reparameterised):

    .. math:: C_s = \sum_k m_k \bigl[(1-2\beta_k)\, w_{ks} + \beta_k (1-\beta_k)\, d_{ks}\bigr]
    """
    return Terms(weights * (1 - 2 * betas), weights * betas * (1 - betas))


@torch.no_grad()
def path_statistics(
    log_weights: Tensor, betas: Tensor, *terms: Terms, correction: float = 1.0
) -> PathStatistics:
    """Everything that the objectives and their diagnostics need from one set of particles, in one pass.

    Args:
        log_weights: (S, \\*plates) log p - log q of particles drawn from the guide.
        betas: (K+1,) temperatures.
        terms: rows of the coefficients wanted, see :class:`Terms`.
        correction: factor c of the covariance.

    Returns:
        :class:`PathStatistics`, detached. Cost O(S K) per datum.
    """
    shape = log_weights.shape
    f = log_weights.reshape(shape[0], -1)
    moments: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    coefficients = [torch.zeros_like(f) for _ in terms]
    block = max(1, _BLOCK // max(1, f.numel()))
    for start in range(0, len(betas), block):
        nodes = slice(start, start + block)
        w = torch.softmax(betas[nodes, None, None] * f, dim=1)
        mean = (w * f).sum(1)
        residual = f - mean[:, None]
        d = w * residual
        moments.append((mean, (d * residual).sum(1), w.square().sum(1).reciprocal(), d.square().sum(1)))
        for coefficient, (u, v) in zip(coefficients, terms, strict=True):
            coefficient += torch.tensordot(u[nodes], w, 1) + torch.tensordot(correction * v[nodes], d, 1)
    mean, variance, ess, error = (torch.cat(m).reshape(-1, *shape[1:]) for m in zip(*moments, strict=True))
    return PathStatistics(mean, variance, ess, error, tuple(c.reshape(shape) for c in coefficients))
