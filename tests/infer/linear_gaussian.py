# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""The thermodynamic path of a linear-Gaussian model in closed form: the oracle of the objectives' tests."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

LOG_2PI = math.log(2 * math.pi)


@dataclass(frozen=True)
class Quadratic:
    """The function -1/2 a z^2 + b z + c."""

    a: Tensor
    b: Tensor
    c: Tensor

    def __add__(self, other: Quadratic) -> Quadratic:
        return Quadratic(self.a + other.a, self.b + other.b, self.c + other.c)

    def __rmul__(self, factor: Tensor | float) -> Quadratic:
        return Quadratic(factor * self.a, factor * self.b, factor * self.c)

    def __call__(self, z: Tensor) -> Tensor:
        return -0.5 * self.a * z.square() + self.b * z + self.c

    @property
    def log_integral(self) -> Tensor:
        """Of its exponential over the line."""
        return self.c + 0.5 * self.b.square() / self.a + 0.5 * (LOG_2PI - self.a.log())


def normal(mean: Tensor, log_scale: Tensor) -> Quadratic:
    precision = (-2 * log_scale).exp()
    return Quadratic(precision, precision * mean, -0.5 * precision * mean**2 - log_scale - 0.5 * LOG_2PI)


class LinearGaussian:
    """z ~ N(m, 1), x | z ~ N(a z, sigma^2); guide N(mu, s^2). Five parameters: m, a, log sigma; mu, log s."""

    def __init__(self, parameters: Tensor, x: float = 1.3) -> None:
        m, a, log_sigma, mu, log_s = parameters.unbind()
        self.parameters, self.x = parameters, torch.tensor(x)
        noise = (-2 * log_sigma).exp()
        likelihood = Quadratic(
            noise * a**2, noise * a * self.x, -0.5 * noise * self.x**2 - log_sigma - 0.5 * LOG_2PI
        )
        self.log_p = normal(m, torch.zeros(())) + likelihood
        self.log_q = normal(mu, log_s)
        self.f = self.log_p + (-1.0) * self.log_q
        variance = a**2 + (2 * log_sigma).exp()
        self.evidence = -0.5 * ((self.x - a * m) ** 2 / variance + variance.log() + LOG_2PI)

    def path(self, beta: Tensor | float) -> Quadratic:
        return (1 - beta) * self.log_q + beta * self.log_p

    def log_z(self, beta: Tensor | float) -> Tensor:
        return self.path(beta).log_integral

    def moments(self, beta: Tensor | float) -> tuple[Tensor, Tensor]:
        """Mean and variance of z under pi_beta."""
        path = self.path(beta)
        return path.b / path.a, 1 / path.a

    def eta(self, beta: Tensor | float) -> Tensor:
        mean, variance = self.moments(beta)
        return self.f(mean) - 0.5 * self.f.a * variance

    def var(self, beta: Tensor | float) -> Tensor:
        mean, variance = self.moments(beta)
        return (self.f.b - self.f.a * mean) ** 2 * variance + 0.5 * (self.f.a * variance) ** 2

    def left(self, betas: Tensor) -> Tensor:
        return sum(d * self.eta(b) for d, b in zip(betas.diff(), betas[:-1], strict=True))

    def right(self, betas: Tensor) -> Tensor:
        return sum(d * self.eta(b) for d, b in zip(betas.diff(), betas[1:], strict=True))

    def kl(self, beta: Tensor | float, other: Tensor | float) -> Tensor:
        """KL(pi_beta || pi_other)."""
        (m0, v0), (m1, v1) = self.moments(beta), self.moments(other)
        return 0.5 * ((v0 + (m0 - m1) ** 2) / v1 - 1 + (v1 / v0).log())

    def exact_guide(self) -> LinearGaussian:
        """The same model with the posterior as guide."""
        mean, variance = self.moments(1.0)
        return LinearGaussian(
            torch.cat([self.parameters[:3], torch.stack([mean, 0.5 * variance.log()])]), float(self.x)
        )


class GaussianPair(nn.Module):
    """The same for Pyro."""

    def __init__(self, parameters: Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(parameters.clone())

    def model(self, x):
        pyro.module("pair", self)
        m, a, log_sigma, _, _ = self.values
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(m, 1.0))
            pyro.sample("x", dist.Normal(a * z, log_sigma.exp()), obs=x)

    def guide(self, x):
        pyro.module("pair", self)
        _, _, _, mu, log_s = self.values
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(mu, log_s.exp()))
