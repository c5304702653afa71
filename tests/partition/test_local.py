# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Pieces read at points are those of the enumeration, and the derivatives of the network."""

import pytest
import torch
from torch import nn

from pyro_cpa.partition import Abs, Maxout, Network, enumerate_regions
from pyro_cpa.partition.local import LocalPieces


def leaky(*sizes):
    layers = []
    for a, b in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(a, b), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers[:-1])


DECODERS = {
    "relu": lambda: nn.Sequential(nn.Linear(7, 9), nn.ReLU(), nn.Linear(9, 5), nn.ReLU(), nn.Linear(5, 4)),
    "leaky": lambda: leaky(3, 6, 6, 4),
    "several knots": lambda: nn.Sequential(nn.Linear(2, 5), nn.Hardtanh(), nn.Linear(5, 3), Abs()),
    "maxout": lambda: nn.Sequential(nn.Linear(4, 9), Maxout(3), nn.Linear(3, 2)),
    "convolution": lambda: nn.Sequential(
        nn.Linear(5, 8), nn.ReLU(), nn.Unflatten(1, (2, 2, 2)), nn.ConvTranspose2d(2, 1, 2), nn.Flatten()
    ),
    "affine": lambda: nn.Linear(6, 3),
}


@pytest.mark.parametrize("name", DECODERS)
def test_pieces_are_value_and_derivative_within_their_bounds(name):
    torch.manual_seed(1)
    network = Network(DECODERS[name]())
    local = LocalPieces(network)
    z = 2 * torch.randn(30, network.latent_dim)
    pattern, value = local.locate(z)
    expected = network.decoder(z).flatten(1)
    torch.testing.assert_close(value, expected.detach(), rtol=1e-12, atol=1e-12)
    piece = local.pieces(pattern)
    assert pattern.shape == piece.lower.shape == (30, local.num_units)
    image = (piece.slopes @ z[..., None])[..., 0] + piece.offsets
    torch.testing.assert_close(image, value, rtol=1e-12, atol=1e-12)
    jacobian = torch.vmap(torch.func.jacrev(lambda p: network.decoder(p[None])[0].flatten()))(z)
    torch.testing.assert_close(piece.slopes, jacobian.detach(), rtol=1e-12, atol=1e-12)
    units = (piece.unit_slopes @ z[..., None])[..., 0] + piece.unit_offsets
    assert bool(((piece.lower <= units) & (units <= piece.upper)).all())
    # A pattern holds until a unit's input leaves its bounds.
    other, _ = local.locate(z + 1e-3 * torch.randn_like(z))
    units = (piece.unit_slopes @ z[..., None])[..., 0] + piece.unit_offsets
    gap = torch.minimum(units - piece.lower, piece.upper - units)
    assert bool((other == pattern)[gap > 0.1].all())


def test_pieces_are_those_of_the_enumeration():
    torch.manual_seed(0)
    decoder = leaky(2, 6, 5, 3)
    partition = enumerate_regions(decoder)
    local = LocalPieces(partition.network)
    z = 2 * torch.randn(200, 2)
    regions, pattern = partition.locate(z), local.locate(z)[0]
    piece = local.pieces(pattern)
    torch.testing.assert_close(piece.slopes, partition.slopes[regions], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(piece.offsets, partition.offsets[regions], rtol=1e-12, atol=1e-12)
    assert len(pattern.unique(dim=0)) == len(regions.unique())
