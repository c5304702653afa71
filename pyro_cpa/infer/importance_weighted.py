# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""The importance-weighted bound and its Renyi relatives, with an estimator for every kind of guide."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import Tensor

from pyro_cpa.errors import InvalidData, UnsupportedModel
from pyro_cpa.infer.draws import Draws
from pyro_cpa.infer.log_weights import LogWeights
from pyro_cpa.infer.multi_sample import AbstractMultiSampleELBO

__all__ = ["ImportanceWeightedELBO"]

logger = logging.getLogger(__name__)

_DRAWS = {
    "auto": Draws.AUTO,
    "reparam": Draws.ATTACHED,
    "stl": Draws.LEAVES,
    "dreg": Draws.LEAVES,
    "vimco": Draws.ATTACHED,
    "score": Draws.ATTACHED,
}


class ImportanceWeightedELBO(AbstractMultiSampleELBO):
    def __init__(
        self, num_particles: int = 10, estimator: str = "auto", alpha: float = 0.0, **kwargs: Any
    ) -> None:
        if estimator not in _DRAWS:
            raise InvalidData(f"estimator={estimator!r}: expected one of {', '.join(map(repr, _DRAWS))}")
        if estimator == "vimco" and num_particles < 2:
            raise InvalidData(
                f"estimator='vimco' got num_particles={num_particles}: its baseline is made of the other particles, "
                "so it needs at least 2; use estimator='score' for one"
            )
        super().__init__(num_particles, **kwargs)
        self.estimator = estimator
        self.alpha = alpha
        self.draws = _DRAWS[estimator]
        self.estimator_used: str | None = None

    @property
    def linear(self) -> bool:
        return self.alpha == 1.0

    def objective(self, weights: LogWeights) -> tuple[Tensor, Tensor]:
        log_w = weights.log_w
        value = renyi_bound(log_w, self.alpha)
        if not torch.is_grad_enabled():
            return value, value
        estimator = self._choose(weights)
        if estimator in ("dreg", "stl"):
            assert weights.path is not None and weights.direct is not None
            w = torch.softmax((1.0 - self.alpha) * log_w.detach(), dim=0)
            through = w if estimator == "stl" else self.alpha * w + (1.0 - self.alpha) * w.square()
            return value, (w * weights.direct + through * weights.path).sum(0)
        if weights.score is None:
            return value, value
        baseline = leave_one_out(log_w.detach(), self.alpha) if estimator == "vimco" else 0.0
        return value, value + ((value.detach() - baseline) * weights.score).sum(0)

    def _choose(self, weights: LogWeights) -> str:
        estimator = self.estimator
        if estimator == "auto":
            if weights.path is not None:
                estimator = "dreg"
            elif weights.score is None:
                estimator = "reparam"
            else:
                estimator = "vimco" if weights.num_particles > 1 else "score"
        if estimator == "reparam" and weights.score is not None:
            raise UnsupportedModel(
                f"estimator='reparam' has no derivative for the guide sites {list(weights.score_sites)}, which are not "
                "reparameterised: use estimator='vimco' or 'score'"
            )
        if estimator != self.estimator_used:
            self.estimator_used = estimator
            logger.info("%s uses the estimator '%s'", type(self).__name__, estimator)
        return estimator


def renyi_bound(log_w: Tensor, alpha: float) -> Tensor:
    if alpha == 1.0:
        return log_w.mean(0)
    return (torch.logsumexp((1.0 - alpha) * log_w, dim=0) - math.log(log_w.shape[0])) / (1.0 - alpha)


def leave_one_out(log_w: Tensor, alpha: float) -> Tensor:
    """(K, ...) the bound with particle k's weight replaced by the geometric mean of the others'."""
    K = log_w.shape[0]
    mean = _others(torch.cumsum, torch.add, log_w, 0.0) / (K - 1)
    if alpha == 1.0:
        return mean
    power = 1.0 - alpha
    others = _others(torch.logcumsumexp, torch.logaddexp, power * log_w, -math.inf)
    return (torch.logaddexp(others, power * mean) - math.log(K)) / power


def _others(accumulate: Any, combine: Any, x: Tensor, empty: float) -> Tensor:
    """Combine all entries of dim 0 but the k-th, from running totals from both ends: O(K), no subtraction."""
    end = torch.full_like(x[:1], empty)
    before = torch.cat([end, accumulate(x, dim=0)[:-1]])
    after = torch.cat([accumulate(x.flip(0), dim=0).flip(0)[1:], end])
    return combine(before, after)
