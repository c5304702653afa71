# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Pairs whose evidence, bounds of few particles and gradients are known exactly."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor


class LinearGaussianPlate:
    r"""z_n ~ N(0, 1), x_n | z_n ~ N(z_n 1, s^2 I): evidence and posterior in closed form.

    Args:
        data: (N, D).
        noise: s.
    """

    def __init__(self, data: Tensor, noise: float = 0.6) -> None:
        self.data, self.noise = data, noise
        self.precision = 1.0 + data.shape[-1] / noise**2

    def log_evidence(self) -> Tensor:
        """(N,) exact log p(x_n)."""
        D = self.data.shape[-1]
        covariance = self.noise**2 * torch.eye(D) + torch.ones(D, D)
        return dist.MultivariateNormal(torch.zeros(D), covariance).log_prob(self.data)

    def model(self, index: Tensor | None = None) -> None:
        with pyro.plate("data", len(self.data), subsample=index, dim=-1) as i:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            x = self.data[i]
            pyro.sample(
                "x", dist.Normal(z[..., None].expand(*z.shape, x.shape[-1]), self.noise).to_event(1), obs=x
            )

    def guide(self, index: Tensor | None = None, *, off: float = 0.0, widen: float = 1.0) -> None:
        """The posterior, its mean moved by ``off`` and its width multiplied by ``widen``."""
        off_param = pyro.param("off", torch.tensor(off))
        widen_param = pyro.param("widen", torch.tensor(widen))
        with pyro.plate("data", len(self.data), subsample=index, dim=-1) as i:
            mean = self.data[i].sum(-1) / self.noise**2 / self.precision
            pyro.sample("z", dist.Normal(mean + off_param, widen_param / math.sqrt(self.precision)))


class TwoLatents:
    """A normal latent and then a normal or Bernoulli one, observed twice; the same datum ``copies`` times.

    Expected bounds of two particles come from Gauss-Hermite quadrature over the standard normals behind the
    draws and enumeration of the Bernoulli ones, and so do their gradients.

    Args:
        second: "normal" or "bernoulli".
        masked: whether the second observation is masked.
        copies: elements of the plate.
    """

    def __init__(self, second: str = "normal", masked: bool = False, copies: int = 1) -> None:
        self.second, self.masked, self.copies = second, masked, copies
        values = {"slope": 0.8, "bias": 0.4, "loc": 0.2, "log_width": -0.3, "link": 0.5, "shift": -0.4}
        self.parameters = {name: torch.tensor(v, requires_grad=True) for name, v in values.items()}
        self.x = torch.tensor([0.9, -1.4])

    def second_prior(self, z: Tensor) -> Any:
        slope = self.parameters["slope"]
        return dist.Normal(slope * z, 1.0) if self.second == "normal" else dist.Bernoulli(logits=slope * z)

    def second_guide(self, z: Tensor) -> Any:
        loc = self.parameters["link"] * z + self.parameters["shift"]
        return dist.Normal(loc, 0.9) if self.second == "normal" else dist.Bernoulli(logits=loc)

    def first_guide(self) -> Any:
        return dist.Normal(self.parameters["loc"], self.parameters["log_width"].exp())

    def model(self) -> None:
        with pyro.plate("data", self.copies):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            y = pyro.sample("y", self.second_prior(z))
            mean = z + self.parameters["bias"] * y
            pyro.sample("x0", dist.Normal(mean, 1.0), obs=self.x[0].expand(self.copies))
            with poutine.mask(mask=not self.masked):
                pyro.sample("x1", dist.Normal(mean, 0.7), obs=self.x[1].expand(self.copies))

    def guide(self) -> None:
        with pyro.plate("data", self.copies):
            z = pyro.sample("z", self.first_guide())
            pyro.sample("y", self.second_guide(z))

    def log_joint(self, z: Tensor, y: Tensor) -> Tensor:
        mean = z + self.parameters["bias"] * y
        total = dist.Normal(0.0, 1.0).log_prob(z) + self.second_prior(z).log_prob(y)
        total = total + dist.Normal(mean, 1.0).log_prob(self.x[0])
        return total if self.masked else total + dist.Normal(mean, 0.7).log_prob(self.x[1])

    def states(self, nodes: int, detached: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """log p, log q and log probability of one particle at all S nodes, (S,) each.

        ``detached`` cuts the latents and their probabilities from the graph.
        """
        eps, mass = np.polynomial.hermite_e.hermegauss(nodes)
        eps, log_mass = torch.tensor(eps), torch.tensor(mass / mass.sum()).log()
        z = self.parameters["loc"] + self.parameters["log_width"].exp() * eps
        if self.second == "normal":
            z, y_eps = torch.meshgrid(z, eps, indexing="ij")
            fn = self.second_guide(z)
            y, log_prob = fn.loc + fn.scale * y_eps, log_mass[:, None] + log_mass
        else:
            z, y = torch.meshgrid(z, torch.tensor([0.0, 1.0]), indexing="ij")
            log_prob = log_mass[:, None] + self.second_guide(z).log_prob(y)
        if detached:
            z, y, log_prob = z.detach(), y.detach(), log_prob.detach()
        log_q = self.first_guide().log_prob(z) + self.second_guide(z).log_prob(y)
        return self.log_joint(z, y).flatten(), log_q.flatten(), log_prob.flatten()

    def expected(
        self, bound: Callable[[Tensor, Tensor], Tensor], K: int, nodes: int = 16, detached: bool = False
    ) -> Tensor:
        """E[bound(log p, log q)] for K = 1 or 2 particles, differentiable in the parameters."""
        log_p, log_q, log_prob = self.states(nodes, detached)
        index = torch.tensor(list(itertools.product(range(len(log_p)), repeat=K))).T
        return (log_prob[index].sum(0).exp() * bound(log_p[index], log_q[index])).sum()

    def gradient(self, value: Tensor) -> Tensor:
        """(6,) derivatives by the parameters, zero for those that do not count."""
        grads = torch.autograd.grad(value, list(self.parameters.values()), allow_unused=True)
        return torch.stack([torch.zeros(()) if g is None else g for g in grads])
