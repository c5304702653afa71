# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Pairs of model and guide whose evidence is known, in many copies at a time."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_cpa.distributions import CPAMarginal

__all__ = ["BeliefNet", "Decoder", "Pair", "Weights"]

DATA, NOISE = 10, 0.3
Weights = dict[str, Tensor]


def linear(z: Tensor, weights: Weights, name: str) -> Tensor:
    """A linear map for each copy: z (..., R, N, in), weight (R, out, in), bias (R, out)."""
    return z @ weights[f"{name}.weight"].mT + weights[f"{name}.bias"][:, None, :]


def normal_weights(**sizes: tuple[int, int]) -> Weights:
    """One copy of linear maps name=(in, out) with standard normal entries."""
    found = {}
    for name, (inputs, outputs) in sizes.items():
        found[f"{name}.weight"], found[f"{name}.bias"] = (
            torch.randn(1, outputs, inputs),
            torch.randn(1, outputs),
        )
    return found


class Pair(ABC):
    """Model and guide whose weights exist in R copies, each with a gradient of its own, over the same N rows.

    Args:
        theta: (R, ...) weights of the model.
        phi: (R, ...) weights of the guide.
        x: (N, D), or (R, N, D) with data of each copy.
    """

    def __init__(self, theta: Weights, phi: Weights, x: Tensor) -> None:
        self.theta = {name: value.detach().clone().requires_grad_() for name, value in theta.items()}
        self.phi = {name: value.detach().clone().requires_grad_() for name, value in phi.items()}
        self.x = x

    def copies(self, count: int) -> Pair:
        def repeated(weights: Weights) -> Weights:
            return {name: value.expand(count, *value.shape[1:]) for name, value in weights.items()}

        return type(self)(repeated(self.theta), repeated(self.phi), self.x)

    @contextmanager
    def plates(self) -> Iterator[None]:
        count = len(next(iter(self.theta.values())))
        with pyro.plate("copies", count, dim=-2), pyro.plate("data", self.x.shape[-2], dim=-1):
            yield

    def observed(self) -> Tensor:
        """(R, N, D)."""
        return self.x.expand(len(next(iter(self.theta.values()))), *self.x.shape[-2:])

    @classmethod
    @abstractmethod
    def draw(cls, seed: int, rows: int = DATA) -> Pair:
        """One copy with random weights, and data from its model."""

    @abstractmethod
    def model(self) -> None: ...

    @abstractmethod
    def guide(self) -> None: ...

    @abstractmethod
    def evidence(self) -> Tensor:
        """(R, N) log p(x)."""

    @abstractmethod
    def divergence(self) -> Tensor:
        """(R, N) KL(guide || posterior)."""

    @abstractmethod
    def led_away(self, mismatch: float) -> Pair:
        """The same with a guide that is worse."""


class BeliefNet(Pair):
    """Two layers of 4 and 3 binary latents over 8 binary entries."""

    @classmethod
    def draw(cls, seed: int, rows: int = DATA) -> Pair:
        torch.manual_seed(seed)
        theta = normal_weights(z1=(3, 4), x=(4, 8)) | {"prior": torch.randn(1, 3)}
        phi = {name: 0.1 * value for name, value in normal_weights(q1=(8, 4), q2=(4, 3)).items()}
        z2 = dist.Bernoulli(logits=theta["prior"]).sample((rows,)).transpose(0, 1)
        z1 = dist.Bernoulli(logits=linear(z2, theta, "z1")).sample()
        return cls(theta, phi, dist.Bernoulli(logits=linear(z1, theta, "x")).sample()[0])

    def model(self) -> None:
        theta = self.theta
        with self.plates():
            shape = self.observed().shape[:2]
            prior = theta["prior"][:, None].expand(*shape, 3)
            z2 = pyro.sample("z2", dist.Bernoulli(logits=prior).to_event(1))
            z1 = pyro.sample("z1", dist.Bernoulli(logits=linear(z2, theta, "z1")).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=linear(z1, theta, "x")).to_event(1), obs=self.observed())

    def guide(self) -> None:
        with self.plates():
            logits = linear(self.observed(), self.phi, "q1")
            z1 = pyro.sample("z1", dist.Bernoulli(logits=logits).to_event(1))
            pyro.sample("z2", dist.Bernoulli(logits=linear(z1, self.phi, "q2")).to_event(1))

    def joint(self) -> tuple[Tensor, Tensor]:
        """log p(x, z) and log q(z | x), (128, R, N)."""
        bits = torch.tensor(list(itertools.product([0.0, 1.0], repeat=7)))[:, None, None]
        x = self.observed()
        z1, z2 = (z.expand(-1, *x.shape[:2], -1) for z in (bits[..., :4], bits[..., 4:]))

        def term(logits: Tensor, value: Tensor) -> Tensor:
            return (value * logits - nn.functional.softplus(logits)).sum(-1)

        log_p = term(self.theta["prior"][:, None], z2) + term(linear(z2, self.theta, "z1"), z1)
        log_q = term(linear(x, self.phi, "q1"), z1) + term(linear(z1, self.phi, "q2"), z2)
        return log_p + term(linear(z1, self.theta, "x"), x), log_q

    def evidence(self) -> Tensor:
        return self.joint()[0].logsumexp(0)

    def divergence(self) -> Tensor:
        log_p, log_q = self.joint()
        return (log_q.exp() * (log_q - log_p + log_p.logsumexp(0))).sum(0)

    def led_away(self, mismatch: float) -> Pair:
        return BeliefNet(self.theta, {k: (1 - mismatch) * v for k, v in self.phi.items()}, self.x)


class Decoder(Pair):
    """A piecewise-affine decoder 2-8-4 with Gaussian noise; the guide has a mean and a scale for each datum."""

    @classmethod
    def draw(cls, seed: int, rows: int = DATA) -> Pair:
        torch.manual_seed(seed)
        theta = normal_weights(hidden=(2, 8), x=(8, 4))
        phi = {"loc": torch.zeros(1, rows, 2), "log_scale": torch.full((1, rows, 2), -1.0)}
        pair = cls(theta, phi, torch.zeros(rows, 4))
        with torch.no_grad():
            pair.x = pair.mean(torch.randn(rows, 2))[0] + NOISE * torch.randn(rows, 4)
        return pair

    def mean(self, z: Tensor) -> Tensor:
        return linear(linear(z, self.theta, "hidden").relu(), self.theta, "x")

    def model(self) -> None:
        with self.plates():
            z = pyro.sample(
                "z", dist.Normal(torch.zeros(2), 1.0).expand([*self.observed().shape[:2], 2]).to_event(1)
            )
            pyro.sample("x", dist.Normal(self.mean(z), NOISE).to_event(1), obs=self.observed())

    def guide(self) -> None:
        with self.plates():
            pyro.sample("z", dist.Normal(self.phi["loc"], self.phi["log_scale"].exp()).to_event(1))

    def evidence(self) -> Tensor:
        found = []
        for copy, x in enumerate(self.observed()):
            net = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 4))
            own = [value[copy] for value in self.theta.values()]  # weight and bias, layer by layer
            nn.utils.vector_to_parameters(
                torch.cat([value.detach().flatten() for value in own]), net.parameters()
            )
            log_p = CPAMarginal(net, NOISE).log_prob(x)
            # The gradient is the net's; it is carried over to the weights it was made of.
            slopes = torch.autograd.grad(log_p.sum(), list(net.parameters()))
            carrier = sum(
                ((value * slope).sum() for value, slope in zip(own, slopes, strict=True)), torch.zeros(())
            )
            found.append(log_p.detach() + (carrier - carrier.detach()) / len(x))
        return torch.stack(found)

    def divergence(self) -> Tensor:
        """Analytic against the prior, by 4096 antithetic draws otherwise."""
        loc, log_scale = self.phi["loc"], self.phi["log_scale"]
        half = torch.randn(2048, 1, *loc.shape[1:], generator=torch.Generator().manual_seed(0))
        z = loc + log_scale.exp() * torch.cat([half, -half])
        likelihood = dist.Normal(self.mean(z), NOISE).log_prob(self.observed()).sum(-1).mean(0)
        prior = 0.5 * (loc**2 + (2 * log_scale).exp() - 1) - log_scale
        return self.evidence().detach() - likelihood + prior.sum(-1)

    def led_away(self, mismatch: float) -> Pair:
        moved = self.phi | {"loc": self.phi["loc"] + mismatch * self.phi["log_scale"].exp()}
        return Decoder(self.theta, moved, self.x)
