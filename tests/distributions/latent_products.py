# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Decoders of several latents whose evidence follows from that of decoders of fewer."""

from dataclasses import dataclass

import torch
from torch import nn

from pyro_cpa.distributions import CPAMarginal

__all__ = ["Product", "hidden_latent", "product"]

WIDTH, OUTPUTS = 2, 2


@dataclass
class Product:
    """Decoders of few latents, and the decoder of L latents ``z = turn u + shift`` that joins them."""

    joint: CPAMarginal
    parts: list[CPAMarginal]
    turn: torch.Tensor
    shift: torch.Tensor
    noise: torch.Tensor
    outputs: list[int]

    def each(self, function, x):
        blocks = x.split(self.outputs, dim=-1)
        return [function(px, block) for px, block in zip(self.parts, blocks, strict=True)]

    def sum(self, function, x):
        return sum(self.each(function, x))

    def from_parts(self, u):
        return u @ self.turn.mT + self.shift

    def to_parts(self, z):
        return torch.linalg.solve(self.turn, (z - self.shift)[..., None])[..., 0]


def net(*sizes):
    decoder = nn.Sequential(nn.Linear(*sizes[:2]), nn.ReLU(), nn.Linear(*sizes[1:]))
    for p in decoder.parameters():
        p.data = torch.randn_like(p)
    return decoder


def product(latents, turned=True, seed=0):
    """``latents`` decoders of one latent each, or a tuple of the latents of each decoder."""
    sizes = (1,) * latents if isinstance(latents, int) else latents
    torch.manual_seed(seed)
    nets = [net(size, WIDTH + 2 * (size > 1), OUTPUTS + (size > 1)) for size in sizes]
    outputs = [n[2].out_features for n in nets]
    noise = 0.3 + 0.5 * torch.rand(sum(outputs))
    eye = torch.eye(sum(sizes))
    turn = eye + 0.4 * torch.randn(len(eye), len(eye)) if turned else eye
    shift = 0.5 * torch.randn(len(eye)) if turned else torch.zeros(len(eye))
    hidden = sum(n[0].out_features for n in nets)
    joined = nn.Sequential(nn.Linear(len(eye), hidden), nn.ReLU(), nn.Linear(hidden, len(noise)))
    inverse = torch.linalg.inv(turn)
    weight = torch.block_diag(*(n[0].weight.data for n in nets)) @ inverse
    joined[0].weight.data = weight
    joined[0].bias.data = torch.cat([n[0].bias.data for n in nets]) - weight @ shift
    joined[2].weight.data = torch.block_diag(*(n[2].weight.data for n in nets))
    joined[2].bias.data = torch.cat([n[2].bias.data for n in nets])
    parts = [CPAMarginal(n, s) for n, s in zip(nets, noise.split(outputs), strict=True)]
    joint = CPAMarginal(joined, noise, loc=shift, prior_covariance=turn @ turn.mT)
    return Product(joint, parts, turn, shift, noise, outputs)


def hidden_latent(latents, seed=0):
    """A decoder of ``latents`` and one of one more that ignores a direction; the turn takes (z, free) to its latents."""
    torch.manual_seed(seed)
    decoder = net(latents, 4, 3)
    turn = torch.linalg.qr(torch.randn(latents + 1, latents + 1)).Q
    wider = nn.Sequential(nn.Linear(latents + 1, 4), nn.ReLU(), nn.Linear(4, 3))
    wider[0].weight.data = torch.nn.functional.pad(decoder[0].weight.data, (0, 1)) @ turn.mT
    wider[0].bias.data = decoder[0].bias.data
    wider[2].load_state_dict(decoder[2].state_dict())
    return CPAMarginal(decoder, 0.4), CPAMarginal(wider, 0.4), turn
