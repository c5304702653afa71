# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""The thermodynamic variational objective: the evidence as the area under a curve."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from copy import copy
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..errors import CPAError, UnsupportedModel
from .draws import Draws
from .dreams import dream
from .log_weights import LogWeights
from .multi_sample import AbstractMultiSampleELBO
from .schedules import Fixed, Linear, LogUniform, Schedule
from .thermodynamic_curve import SimulatedSandwich, Summary, TVOBounds, TVOCurve
from .thermodynamic_path import (
    Rule,
    guide_terms,
    model_terms,
    path_statistics,
    pathwise_terms,
    riemann_weights,
)

__all__ = ["TVO"]

logger = logging.getLogger(__name__)

GuideObjective = Literal["lower", "wake", "upper"]
Estimator = Literal["covariance", "dreg"]
Correction = Literal["bessel"]


class TVO(AbstractMultiSampleELBO):
    r"""Thermodynamic variational objective.

    Along the path :math:`\pi_\beta \propto q(z \mid x)^{1-\beta} p(x, z)^\beta` from the guide to the
    posterior, the integrand :math:`\eta(\beta) = \mathrm E_{\pi_\beta}[\log p(x, z) - \log q(z \mid x)]`
    increases and its area is the evidence. A partition :math:`0 = \beta_0 < \dots < \beta_K = 1` bounds it
    from below,

    .. math:: \sum_{k=1}^K (\beta_k - \beta_{k-1})\, \eta(\beta_{k-1}) \;\le\; \log p(x)
              = \int_0^1 \eta(\beta)\, d\beta ,

    with a gap that is the sum of the divergences of neighbours on the path. S particles of the guide,
    weighted anew at every node, estimate all of :math:`\eta`: one evaluation of model and guide per particle
    whatever K is. The gradient is a covariance and needs no reparameterisation: discrete guides are trained
    like any other.

    Args:
        num_particles: S >= 2.
        schedule: the nodes: a :class:`~pyro_cpa.infer.schedules.Schedule` or (K+1,) numbers from 0 to 1; by
            default ``LogUniform(5, beta_1=0.025)``. Adaptive schedules learn at training steps.
        rule: ``"left"`` (a lower bound), ``"right"``, or ``"trapezoid"`` (more accurate, no bound): the
            reported value and the model's objective.
        guide_objective: what the guide follows. ``"lower"`` maximises the left sum; ``"upper"`` minimises the
            right sum; ``"wake"`` minimises :math:`\eta(1)`, that is KL(posterior || guide). Default:
            ``"upper"`` with the right rule, else ``"lower"``. All move the guide towards the posterior.
        estimator: ``"covariance"``, or ``"dreg"``, the doubly reparameterised gradient of the guide, of lower
            variance where every guide site is reparameterised.
        center: subtract the mean of the guide's score. It changes no expectation and makes the guide's
            gradient vanish exactly at the posterior; False is the published estimator.
        correction: ``"bessel"`` multiplies covariances by S / (S-1); None leaves them.
        plates, ...: as for every :class:`~pyro_cpa.infer.multi_sample.AbstractMultiSampleELBO`.

    Raises:
        CPAError: fewer than two particles, nodes that are no partition, an unknown option.

    Note:
        The loss is minus the bound, comparable with ``Trace_ELBO``, never the surrogate whose gradient is
        taken. For finite S the left sum stays a stochastic lower bound, E[left] <= E[IWAE_S] <= log p(x),
        while the right sum is **not** an upper bound; ``simulated_sandwich`` gives a true one. With K = 1 the
        left rule is the ELBO with a leave-one-out baseline; with many nodes the model's gradient is that of
        IWAE and the guide's signal fades like 1/S. For reparameterised guides ``"dreg"`` and
        ``ImportanceWeightedELBO`` are often better. Cost: O(S K) numbers per datum beside the networks;
        autograd keeps no tensor with an axis for K.

    References:
        V. Masrani, T. A. Le, F. Wood (2019), The Thermodynamic Variational Objective.
        R. Brekelmans et al. (2020), All in the Exponential Family: Bregman Duality in Thermodynamic
        Variational Inference (moment schedule, doubly reparameterised gradient).

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro.infer import SVI
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         on = pyro.sample("on", dist.Bernoulli(0.5))
        ...         pyro.sample("x", dist.Normal(3 * on, 1.0), obs=x)
        >>> def guide(x):
        ...     weight = pyro.param("weight", torch.tensor(0.1))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("on", dist.Bernoulli(logits=weight * x))
        >>> tvo = TVO(num_particles=10, schedule=LogUniform(3, beta_1=0.1))
        >>> svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), loss=tvo)
        >>> loss = svi.step(torch.tensor([0.1, 2.9]))
        >>> tvo.diagnostics.elbo <= tvo.diagnostics.bound <= tvo.diagnostics.iwae
        True
    """

    min_particles = 2  # a covariance needs two

    def __init__(
        self,
        num_particles: int = 10,
        schedule: Schedule | Tensor | Sequence[float] | None = None,
        rule: Rule = "left",
        guide_objective: GuideObjective | None = None,
        *,
        estimator: Estimator = "covariance",
        center: bool = True,
        correction: Correction | None = "bessel",
        **kwargs: Any,
    ) -> None:
        _check("rule", rule, get_args(Rule))
        _check("guide_objective", guide_objective, (None, *get_args(GuideObjective)))
        _check("estimator", estimator, get_args(Estimator))
        _check("correction", correction, (None, *get_args(Correction)))
        super().__init__(num_particles=num_particles, **kwargs)
        if not isinstance(schedule, Schedule):
            schedule = LogUniform() if schedule is None else Fixed(schedule)
        self.schedule = schedule
        self.rule: Rule = rule
        self.guide_objective = guide_objective or ("upper" if rule == "right" else "lower")
        self.estimator = estimator
        self.draws = Draws.LEAVES if estimator == "dreg" else Draws.DETACHED
        self.center = center
        self.correction = correction
        self._last: Summary | None = None
        self._warned = False

    @classmethod
    def elbo(cls, num_particles: int = 10, **kwargs: Any) -> TVO:
        """The evidence lower bound, its guide trained by REINFORCE with a leave-one-out baseline."""
        return cls(num_particles, Linear(1), **kwargs)

    def objective(self, weights: LogWeights) -> tuple[Tensor, Tensor]:
        f = weights.log_w.detach()
        betas = self.schedule.betas.to(f)
        nodes = riemann_weights(betas, self.rule)
        sign, guide_nodes = self._guide_nodes(betas)
        guide_gradient = pathwise_terms if self.estimator == "dreg" else guide_terms
        path = path_statistics(
            f,
            betas,
            model_terms(betas, nodes),
            guide_gradient(betas, sign * guide_nodes),
            correction=len(f) / (len(f) - 1) if self.correction else 1.0,
        )
        value = torch.tensordot(nodes, path.mean, 1)
        of_model, of_guide = path.coefficients
        log_p = weights.log_p if weights.direct is None else weights.direct
        guide = weights.path
        if guide is None:
            guide = log_p - weights.log_w
            if self.center:
                of_guide = of_guide + sign / len(f)
        self._last = Summary.at(weights, betas, path)
        self._warn_of_degeneracy(nodes + guide_nodes)
        if torch.is_grad_enabled():
            self.schedule.update(f)
        return value, (of_model * log_p + of_guide * guide).sum(0)

    @property
    def diagnostics(self) -> TVOBounds:
        """Bounds, integrand, variance and effective sample size at the nodes of the last evaluation.

        Raises:
            CPAError: nothing has been evaluated yet.
        """
        if self._last is None:
            raise CPAError("no diagnostics yet: they describe the last step; take one, or call bounds().")
        return self._last.bounds(self.rule)

    def bounds(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        *args: Any,
        num_particles: int | None = None,
        **kwargs: Any,
    ) -> TVOBounds:
        """Bounds at the nodes, without derivatives, from ``num_particles`` (by default S) fresh particles."""
        return Summary.at(self._draw(num_particles, model, guide, args, kwargs), self.schedule.betas).bounds(
            self.rule
        )

    def integrand(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        *args: Any,
        betas: int | Tensor = 101,
        num_particles: int | None = None,
        **kwargs: Any,
    ) -> TVOCurve:
        """The whole integrand, to look at and to choose nodes by.

        Args:
            model, guide: the pair; called with ``args`` and ``kwargs``.
            betas: number of equidistant temperatures, or (B,) temperatures.
            num_particles: fresh particles of the guide, by default S; all temperatures share them.
        """
        return TVOCurve.of(self._draw(num_particles, model, guide, args, kwargs), betas, self.schedule.betas)

    def simulated_sandwich(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        *args: Any,
        num_particles: int | None = None,
        **kwargs: Any,
    ) -> SimulatedSandwich:
        r"""Bounds from both sides on the evidence of data drawn from the model.

        Simulation draws the latents with the data: one exact posterior sample a datum, which makes

        .. math:: \mathrm{iwae\_upper} = \log \tfrac{1}{S+1} \Bigl(w(z^*) + \sum_s w(z_s)\Bigr), \qquad
                  \mathrm{eubo} = \log w(z^*), \qquad z^* \sim p(z \mid x),\ z_s \sim q(z \mid x),

        and the right sum of these S+1 samples true stochastic upper bounds.

        Args:
            model: observes its data with ``obs=``.
            guide: a function of the data, draws the model's latents.
            args, kwargs: arguments of both; data give the shapes to simulate.
            num_particles: particles of the guide, by default S.

        Raises:
            UnsupportedModel: the guide cannot be shown simulated data, or the objective names ``plates``.
        """
        if self.plates is not None:
            raise UnsupportedModel(
                f"simulated_sandwich needs one weight per datum, but plates={self.plates} lets particles "
                "share latents: use an objective without plates=."
            )
        simulated = dream(model, guide, args, kwargs)
        weights = self._draw(num_particles, simulated.model, simulated.guide, args, kwargs)
        return SimulatedSandwich.of(weights, simulated.log_weights, self.schedule.betas)

    @torch.no_grad()
    def _draw(
        self,
        num_particles: int | None,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> LogWeights:
        sampler = copy(self)
        sampler.num_particles = self.num_particles if num_particles is None else num_particles
        return sampler.log_weights(model, guide, *args, **kwargs)

    def _warn_of_degeneracy(self, nodes: Tensor) -> None:
        if self._warned or self._last is None:
            return
        last = int(nodes.nonzero()[-1])
        ess = float(self._last.ess[last])
        if ess < 2:
            self._warned = True
            logger.warning(
                "effective sample size %.2f of %d particles at beta = %.3g: the gradient there rests on one "
                "particle and is biased; use more particles or smaller nodes (said once)",
                ess,
                self.num_particles,
                float(self._last.betas[last]),
            )

    def _guide_nodes(self, betas: Tensor) -> tuple[float, Tensor]:
        """Sign and node weights of what the guide maximises."""
        if self.guide_objective == "lower":
            return 1.0, riemann_weights(betas, "left")
        # Above the evidence the guide must descend, or it would leave the posterior.
        if self.guide_objective == "upper":
            return -1.0, riemann_weights(betas, "right")
        return -1.0, torch.eye(len(betas)).to(betas)[-1]


def _check(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        raise CPAError(f"{name}={value!r}: expected one of {', '.join(map(repr, allowed))}.")
