# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""The one model that the demonstration fits in four ways."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroParam
from pyro.nn.module import pyro_method
from torch import Tensor, nn
from torch.distributions import constraints

from ..models.networks import GaussianNetwork, mlp

__all__ = ["DemoModel", "start_near"]


class DemoModel(PyroModule):
    r"""Small ReLU decoder with Gaussian prior and noise, and the amortised Gaussian guide of a VAE.

    .. math:: z \sim N(0, I), \qquad x \mid z \sim N(\text{decoder}(z), \sigma^2 I)

    Missing cells (NaN) leave the likelihood; the encoder sees them as zeros next to a mask.

    Args:
        name: in Pyro's parameter store, where models of one name would share their parameters.
        train: (N, D) data, to start the decoder at its mean.
        latent_dim: L.
        hidden_dim: width of the decoder's hidden layer.
        encoder_dim: width of the encoder's hidden layer.
    """

    def __init__(
        self, name: str, train: Tensor, latent_dim: int, hidden_dim: int, encoder_dim: int = 64
    ) -> None:
        super().__init__(name)
        D = train.shape[1]
        self.decoder = mlp(latent_dim, (hidden_dim,), D)
        self.encoder = GaussianNetwork(2 * D, (encoder_dim,), latent_dim)
        spread = (train - train.nanmean(0)).square().nanmean().sqrt()
        self.sigma: Any = PyroParam(spread, constraints.positive)
        self.register_buffer("origin", torch.zeros(latent_dim))
        self.to(train.dtype)
        start_near(self.decoder, train)

    @pyro_method
    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(self.origin, torch.ones_like(self.origin)).to_event(1))
            pyro.sample("x", dist.NanMaskedNormal(self.decoder(z), self.sigma).to_event(1), obs=x)

    @pyro_method
    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.encode(x))

    def encode(self, x: Tensor) -> dist.TorchDistribution:
        """q(z | x) of every row."""
        return self.encoder(x.nan_to_num(), x.isnan().to(x.dtype))


@torch.no_grad()
def start_near(decoder: nn.Sequential, train: Tensor) -> None:
    """Put the decoder's walls where the prior has its mass, and its output around the data's mean."""
    weight, bias = decoder[0].parameters()
    weight.copy_(nn.functional.normalize(torch.randn_like(weight), dim=1))
    bias.uniform_(-1.5, 1.5)
    decoder[-1].get_parameter("bias").copy_(train.nanmean(0))
