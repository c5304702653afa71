# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Exactly solvable models in the forms in which users write them."""

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroParam
from torch import nn
from torch.distributions import constraints

from pyro_cpa.distributions import CPAMarginal


def net(*sizes, seed=0, activation=lambda: nn.LeakyReLU(0.1)):
    torch.manual_seed(seed)
    layers = []
    for a, b in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(a, b), activation()]
    for layer in layers:
        for p in layer.parameters():
            p.data = torch.randn_like(p)
    return nn.Sequential(*layers[:-1])


class Exact(PyroModule):
    """Decoder and learned noise; ``noise`` is a scale (), (D,) or a Cholesky factor (D, D)."""

    def __init__(self, *sizes, noise=0.5, seed=0, subsample_size=None, **kwargs):
        super().__init__()
        self.decoder = net(*sizes, seed=seed, **kwargs)
        noise = torch.as_tensor(noise)
        kind = constraints.lower_cholesky if noise.dim() == 2 else constraints.positive
        self.noise = PyroParam(noise.clone(), constraint=kind)
        self.latent_dim = sizes[0]
        self.subsample_size = subsample_size

    def likelihood(self, mean):
        if self.noise.dim() == 2:
            return dist.NanMaskedMultivariateNormal(mean, scale_tril=self.noise)
        return dist.NanMaskedNormal(mean, self.noise).to_event(1)

    def forward(self, x):
        zero = torch.zeros(self.latent_dim, dtype=x.dtype)
        with pyro.plate("data", len(x), subsample_size=self.subsample_size) as index:
            z = pyro.sample("z", dist.Normal(zero, 1.0).to_event(1))
            pyro.sample("x", self.likelihood(self.decoder(z)), obs=x[index])


def circle(n=200, noise=0.15, seed=0):
    torch.manual_seed(seed)
    angle = 2 * torch.pi * torch.rand(n)
    return torch.stack([angle.cos(), angle.sin()], -1) + noise * torch.randn(n, 2)


def exact_nll(model, x):
    noise = (
        {"scale": model.noise}
        if model.noise.dim() < 2
        else {"covariance_matrix": model.noise @ model.noise.mT}
    )
    return -CPAMarginal(model.decoder, **noise).log_prob(x)
