# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Weights that mix several predictive densities best."""

from __future__ import annotations

import numpy as np

from ..errors import InvalidData

__all__ = ["stacking_weights"]


def stacking_weights(log_prob: np.ndarray, *, tol: float = 1e-6, max_iter: int = 100_000) -> np.ndarray:
    r"""Mixture weights that maximise the log score of the mixture of M densities on N data.

    .. math:: \hat w = \arg\max_{w \in \Delta} \frac1N \sum_n \log \sum_m w_m \, p_m(x_n)

    Args:
        log_prob: (M, N) held-out log-densities; ``-inf`` allowed, but not for all models at one datum.
        tol: how far, in nats per datum, the mixture may be from the optimum.
        max_iter: of the fixed point.

    Returns:
        (M,) weights that sum to one.

    Raises:
        InvalidData: NaN, or a datum that no model allows, or no convergence.

    Note:
        The problem is concave. Each step of the EM fixed point raises the score, and the largest entry of its
        gradient bounds the distance to the optimum: that bound is the stopping rule.

    References:
        Yao, Vehtari, Simpson, Gelman 2018, Using stacking to average Bayesian predictive distributions.

    Example:
        >>> stacking_weights(np.log([[0.9, 0.9, 0.1], [0.1, 0.1, 0.1]])).round(3).tolist()
        [1.0, 0.0]
    """
    log_prob = np.asarray(log_prob, dtype=float)
    best = log_prob.max(axis=0)
    if np.isnan(log_prob).any() or not np.isfinite(best).all():
        raise InvalidData(
            "stacking needs a finite log-density from at least one model at every datum, and no NaN"
        )
    ratio = np.exp(log_prob - best)
    weights = np.full(len(ratio), 1.0 / len(ratio))
    for _ in range(max_iter):
        gradient = (ratio / (weights @ ratio)).mean(axis=1)
        # Concavity: score(optimum) - score(weights) <= max gradient - 1.
        if gradient.max() - 1.0 <= tol:
            return weights / weights.sum()
        weights = weights * gradient
    raise InvalidData(
        f"stacking did not come within {tol} nats of the optimum in {max_iter} steps: raise tol"
    )
