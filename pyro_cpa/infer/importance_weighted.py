# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""The importance-weighted bound and its Renyi relatives, with an estimator for every kind of guide."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_cpa.errors import InvalidData, UnsupportedModel
from pyro_cpa.infer.draws import Draws
from pyro_cpa.infer.log_weights import LogWeights
from pyro_cpa.infer.multi_sample import AbstractMultiSampleELBO

__all__ = ["ImportanceWeightedELBO", "leave_one_out", "renyi_bound"]

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
    r"""The bound :math:`L_\alpha` of K particles on log p(x), for each element of the plates all sites share.

    .. math:: L_\alpha = \frac{1}{1 - \alpha} \log \frac{1}{K} \sum_k w_k^{1 - \alpha}, \qquad
              \log w_k = \log p(x, z_k) - \log q(z_k \mid x),

    where :math:`\alpha = 0` is the importance-weighted bound, which tightens to log p(x) as K grows,
    :math:`\alpha = 1/2` is :math:`2 \log \frac1K \sum_k \sqrt{w_k}`, and :math:`\alpha = 1` the ELBO.

    The gradient, with :math:`v_k = \operatorname{softmax}_k((1 - \alpha) \log w_k)`, is one of

    ========= ========================================================================== =====================
    estimator gradient                                                                   guides
    ========= ========================================================================== =====================
    reparam   :math:`\sum_k v_k \nabla \log w_k`                                         all sites rsample
    dreg      :math:`\sum_k v_k \partial_\theta \log p_k + (\alpha v_k                   draws inside the
              + (1 - \alpha) v_k^2) \, \partial_z \log w_k \nabla_\phi z_k`              weight rsample
    stl       :math:`\sum_k v_k \partial_\theta \log p_k + v_k \,                        draws inside the
              \partial_z \log w_k \nabla_\phi z_k`                                       weight rsample
    score     reparam :math:`+ \sum_k L \, \nabla \log q_k`, q over sites not rsample    any
    vimco     reparam :math:`+ \sum_k (L - L_{-k}) \, \nabla \log q_k`,                  any, K >= 2
              :math:`L_{-k}` with the geometric mean of the others in the place of w_k
    auto      dreg where every draw inside the weight is reparameterised, else vimco     any
              (score if K = 1)
    ========= ========================================================================== =====================

    Args:
        num_particles: K.
        estimator: name from the table.
        alpha: order of the bound; 0 importance-weighted, 1 ELBO.
        **options: see :class:`~pyro_cpa.infer.multi_sample.AbstractMultiSampleELBO`.

    Attributes:
        estimator_used: the estimator of the last gradient, which tells what "auto" chose; None before.

    Raises:
        InvalidData: unknown estimator, or vimco with one particle.
        UnsupportedModel: at the first step, for a guide that the estimator cannot serve, naming its site.

    Note:
        All are unbiased for the gradient of the expected value but stl, whose guide gradient is biased unless
        K = 1 or alpha = 1. dreg and stl run the guide once more; a guide with dropout would run with other
        masks. Both need draws that have a density: point estimates (Delta) and deterministic transforms are
        recognised and get their full derivative. With alpha outside [0, 1] the value is no lower bound in
        general. Partly reparameterised samplers (rejection) are refused.

    References:
        Burda, Grosse, Salakhutdinov (2016), Importance weighted autoencoders.
        Li, Turner (2016), Renyi divergence variational inference.
        Mnih, Rezende (2016), Variational inference for Monte Carlo objectives (vimco).
        Roeder, Wu, Duvenaud (2017), Sticking the landing (stl).
        Tucker, Lawson, Gu, Maddison (2019), Doubly reparameterized gradient estimators for Monte Carlo
        objectives (dreg).

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> from pyro.infer.autoguide import AutoNormal
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> elbo = ImportanceWeightedELBO(num_particles=8)
        >>> svi = pyro.infer.SVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.01}), elbo)
        >>> loss = svi.step(torch.tensor([0.3, -1.2]))
        >>> elbo.estimator_used
        'dreg'
    """

    def __init__(
        self, num_particles: int = 10, estimator: str = "auto", alpha: float = 0.0, **options: Any
    ) -> None:
        if estimator not in _DRAWS:
            raise InvalidData(f"estimator={estimator!r}: expected one of {', '.join(map(repr, _DRAWS))}")
        if estimator == "vimco" and num_particles < 2:
            raise InvalidData(
                f"estimator='vimco' got num_particles={num_particles}: its baseline is made of the other "
                "particles, so it needs at least 2; use estimator='score' for one"
            )
        super().__init__(num_particles, **options)
        self.estimator = estimator
        self.alpha = alpha
        self.draws = _DRAWS[estimator]
        self.estimator_used: str | None = None

    @property
    def linear(self) -> bool:
        """The ELBO is."""
        return self.alpha == 1.0

    def objective(self, weights: LogWeights) -> tuple[Tensor, Tensor]:
        """The bound of each element, and the surrogate of the chosen estimator."""
        log_w = weights.log_w
        value = renyi_bound(log_w, self.alpha)
        if not torch.is_grad_enabled():
            return value, value
        estimator = self._choose(weights)
        if estimator in ("dreg", "stl"):
            assert weights.path is not None and weights.direct is not None
            v = torch.softmax((1.0 - self.alpha) * log_w.detach(), dim=0)
            through = v if estimator == "stl" else self.alpha * v + (1.0 - self.alpha) * v.square()
            return value, (v * weights.direct + through * weights.path).sum(0)
        if weights.score is None:
            return value, value
        signal = value.detach().expand_as(log_w)
        if estimator == "vimco":
            signal = signal - leave_one_out(log_w.detach(), self.alpha)
        # The scores in log w enter with v_k; less their mean-zero share 1 / K, they vanish at the posterior.
        assert weights.score_log_q is not None
        return value, value + (signal * weights.score).sum(0) + weights.score_log_q.mean(0)

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
                f"estimator='reparam' has no derivative for the guide sites {list(weights.score_sites)}, "
                "which are not reparameterised: use estimator='vimco' or 'score'"
            )
        if estimator != self.estimator_used:
            self.estimator_used = estimator
            logger.info("%s(estimator=%r) uses %r", type(self).__name__, self.estimator, estimator)
        return estimator


def renyi_bound(log_w: Tensor, alpha: float) -> Tensor:
    r"""The bound of order alpha, :math:`(1 - \alpha)^{-1} \log \frac1K \sum_k w_k^{1 - \alpha}`.

    Args:
        log_w: (K, \*plates) log-weights.
        alpha: order; 1 gives the mean of ``log_w``.

    Returns:
        (\*plates).
    """
    if alpha == 1.0:
        return log_w.mean(0)
    return (torch.logsumexp((1.0 - alpha) * log_w, dim=0) - math.log(log_w.shape[0])) / (1.0 - alpha)


def leave_one_out(log_w: Tensor, alpha: float) -> Tensor:
    r"""The bounds that do without particle k: its weight replaced by the geometric mean of the others'.

    Costs O(K) and cancels nothing: sums over the others are put together from both ends.

    Args:
        log_w: (K, \*plates) log-weights, K >= 2.
        alpha: order of the bound.

    Returns:
        (K, \*plates).
    """
    K = log_w.shape[0]
    mean = _over_the_others(torch.cumsum, torch.add, log_w, 0.0) / (K - 1)
    if alpha == 1.0:
        return mean
    power = 1.0 - alpha
    others = _over_the_others(torch.logcumsumexp, torch.logaddexp, power * log_w, -math.inf)
    return (torch.logaddexp(others, power * mean) - math.log(K)) / power


def _over_the_others(
    accumulate: Callable[..., Tensor], combine: Callable[..., Tensor], x: Tensor, empty: float
) -> Tensor:
    end = torch.full_like(x[:1], empty)
    before = torch.cat([end, accumulate(x, dim=0)[:-1]])
    after = torch.cat([accumulate(x.flip(0), dim=0).flip(0)[1:], end])
    return combine(before, after)
