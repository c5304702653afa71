# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Reweighted wake-sleep: model and guide each follow their own objective, without any reparameterisation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_cpa.errors import InvalidData, UnsupportedModel
from pyro_cpa.infer.draws import Draws, ParticlePlate, ReuseValues
from pyro_cpa.infer.importance_weighted import renyi_bound
from pyro_cpa.infer.log_weights import LogWeights
from pyro_cpa.infer.multi_sample import AbstractMultiSampleELBO
from pyro_cpa.infer.observations import with_observations
from pyro_cpa.infer.sites import is_drawn, sample_sites

__all__ = ["ReweightedWakeSleepELBO"]


class ReweightedWakeSleepELBO(AbstractMultiSampleELBO):
    r"""Wake-sleep with K importance-weighted particles per element of the plates shared by all sites.

    The model climbs the importance-weighted bound (wake-theta); the guide is fitted to the posterior as the
    particles show it (wake-phi) and to latents that the model dreams together with their data (sleep-phi):

    .. math:: \nabla_\theta = \sum_k v_k \nabla \log p(x, z_k), \quad
              \nabla_\phi = \lambda \sum_k \Big(v_k - \frac1K\Big) \nabla \log q(z_k \mid x)
              + (1 - \lambda) \, \mathbb{E}_{p(x', z')} \nabla \log q(z' \mid x'),

    with :math:`v = \operatorname{softmax}(\log w)` and insomnia :math:`\lambda`. The :math:`-1/K` has mean
    zero and makes wake-phi vanish, draw by draw, where the guide is the posterior. Draws are cut from the
    graph as they are made: hierarchical guides get no pathwise term.

    Args:
        num_particles: K; at least 2 unless ``insomnia`` is 0.
        insomnia: weight of wake-phi against sleep-phi, in [0, 1].
        model_has_params: whether the model is trained; if not, it gets no gradient.
        num_sleep_particles: dreams per step; None for K.
        **options: see :class:`~pyro_cpa.infer.multi_sample.AbstractMultiSampleELBO`.

    Attributes:
        theta_loss: minus the importance-weighted bound of the last step, which is also the loss returned;
            None if neither the model is trained nor insomnia positive (then the loss is ``sleep_phi_loss``).
        wake_phi_loss: :math:`-\sum_k v_k \log q_k` of the last step, or None.
        sleep_phi_loss: minus the mean log density of the dreamt latents of the last step, or None.

    Raises:
        InvalidData: for an insomnia outside [0, 1] or too few particles.
        UnsupportedModel: for latents outside named plates, which have no weights; and, in the sleep phase,
            for a guide that cannot see dreamt data or draws other sites than the model.

    Note:
        The value is a lower bound on log p(x) in expectation, and wake-theta its exact gradient; wake-phi is
        self-normalised importance sampling, biased by O(1/K). K = 1 with insomnia 0 is the classical
        wake-sleep algorithm. A point estimate (Delta) in the guide is trained like a parameter of the model.
        For sleep, the guide takes its data from the very tensors that the model observes, or from a keyword
        ``observations``, a dictionary by site, as in ``pyro.infer.ReweightedWakeSleep``.

    References:
        Hinton, Dayan, Frey, Neal (1995), The wake-sleep algorithm for unsupervised neural networks.
        Bornschein, Bengio (2015), Reweighted wake-sleep.
        Le, Kosiorek, Siddharth, Teh, Wood (2019), Revisiting reweighted wake-sleep for models with stochastic
        control flow.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> def model(x):
        ...     p = pyro.param("p", torch.tensor(0.5), constraint=dist.constraints.unit_interval)
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Bernoulli(p))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     slope = pyro.param("slope", torch.tensor(1.0))
        ...     with pyro.plate("data", x.shape[-1]):
        ...         pyro.sample("z", dist.Bernoulli(logits=slope * x))
        >>> elbo = ReweightedWakeSleepELBO(num_particles=8, insomnia=0.5)
        >>> svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), elbo)
        >>> loss = svi.step(torch.tensor([0.3, 1.2]))
        >>> loss == elbo.theta_loss
        True
    """

    draws = Draws.DETACHED

    def __init__(
        self,
        num_particles: int = 2,
        insomnia: float = 1.0,
        model_has_params: bool = True,
        num_sleep_particles: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(num_particles, **options)
        if not 0.0 <= insomnia <= 1.0:
            raise InvalidData(f"insomnia={insomnia}: it is the share of wake-phi, between 0 and 1")
        if insomnia > 0.0 and num_particles < 2:
            raise InvalidData(
                f"wake-phi got num_particles={num_particles}: it compares particles, so it needs at least 2; "
                "with insomnia=0 (classical wake-sleep) one is enough"
            )
        self.insomnia = insomnia
        self.model_has_params = model_has_params
        self.num_sleep_particles = num_particles if num_sleep_particles is None else num_sleep_particles
        if self.num_sleep_particles < 1:
            raise InvalidData(f"num_sleep_particles={num_sleep_particles}: give a positive number of dreams")
        self.theta_loss: float | None = None
        self.wake_phi_loss: float | None = None
        self.sleep_phi_loss: float | None = None

    def objective(self, weights: LogWeights) -> tuple[Tensor, Tensor]:
        """The importance-weighted bound, and the surrogate of wake-theta and wake-phi."""
        if weights.outer_score is not None:
            raise UnsupportedModel(
                f"the guide has latents outside plates={weights.plates}: they are drawn once for all, and so "
                "have no weights to be trained by. Leave plates=None, or use ImportanceWeightedELBO"
            )
        log_w = weights.log_w.detach()
        v = torch.softmax(log_w, dim=0)
        self.wake_phi_loss = -weights.total((v * weights.log_q).sum(0)).item()
        surrogate = self.insomnia * ((v - 1.0 / weights.num_particles) * weights.log_q).sum(0)
        if self.model_has_params:
            surrogate = surrogate + (v * weights.log_p).sum(0)
        return renyi_bound(log_w, 0.0), surrogate

    def _loss_and_surrogate(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        self.theta_loss = self.wake_phi_loss = self.sleep_phi_loss = None
        losses: list[tuple[Tensor, Tensor]] = []
        if self.model_has_params or self.insomnia > 0.0:
            losses.append(super()._loss_and_surrogate(model, guide, args, kwargs))
            self.theta_loss = losses[0][0].item()
        if self.insomnia < 1.0:
            sleep = self._sleep_phi_loss(model, guide, args, kwargs)
            self.sleep_phi_loss = sleep.item()
            losses.append((sleep.detach(), (1.0 - self.insomnia) * sleep))
        # Dreams have no bearing on the evidence: they are the loss only where nothing else is.
        return losses[0][0], torch.stack([surrogate for _, surrogate in losses]).sum()

    def _sleep_phi_loss(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        if isinstance(poutine.unwrap(guide), Messenger):
            raise UnsupportedModel(
                f"{type(poutine.unwrap(guide)).__name__} runs model and guide in one, so it cannot be shown "
                "dreams: use insomnia=1"
            )
        size = self.num_sleep_particles
        if not self.vectorize_particles or size == 1:
            return torch.stack([self._dream(model, guide, args, kwargs) for _ in range(size)]).mean()
        dim = -int(self._nesting(model, guide, args, kwargs)) - 1
        with ParticlePlate(size, dim, ()):
            return self._dream(model, guide, args, kwargs) / size

    @staticmethod
    def _dream(
        model: Callable[..., Any],
        guide: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        """Minus the log density of the guide at latents that the model draws with their data, summed."""
        with torch.no_grad():
            dream = poutine.trace(poutine.uncondition(model)).get_trace(*args, **kwargs)
        values = {name: site["value"] for name, site in dream.nodes.items() if site["type"] == "sample"}
        guide_args, guide_kwargs = with_observations(guide, dream, args, kwargs)
        with ReuseValues(values):
            trace = poutine.trace(guide).get_trace(*guide_args, **guide_kwargs)
        for name, site in sample_sites(trace):
            if name not in dream.nodes or not is_drawn(site):
                raise UnsupportedModel(
                    f"guide site '{name}' ({type(site['fn']).__name__}) is not drawn by the model, or is a "
                    "point: dreamt latents say nothing about it. Use insomnia=1, or a guide that draws the "
                    "latents of the model from densities"
                )
        trace.compute_log_prob()
        return -torch.stack([site["log_prob_sum"] for _, site in sample_sites(trace)]).sum()
