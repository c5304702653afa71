# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Decoders with branches, images and maxima: on every region the affine map is the decoder."""

from __future__ import annotations

import copy

import pytest
import torch
from architectures import ARCHITECTURES, build_architecture
from decoders import mlp
from torch import nn

from pyro_cpa import integrals
from pyro_cpa.distributions import CPAMarginal
from pyro_cpa.partition import Maxout, Network, enumerate_regions, regions


def everywhere(part, count=3):
    """Points in every region, drawn from the standard normal restricted to it, and anywhere near and far."""
    R, L = part.num_regions, part.latent_dim
    inside = integrals.sample(part.cells, torch.zeros(R, L), torch.eye(L).expand(R, L, L), (count,))
    anywhere = [scale * torch.randn(200, L) for scale in (1e-3, 1.0, 10.0, 1e3)]
    return torch.cat([inside.reshape(-1, L), part.cells.interior_points(), *anywhere])


def apply(slopes, offsets, z):
    return (slopes @ z[..., None])[..., 0] + offsets


def assert_is_the_decoder(decoder, part, z):
    region = part.locate(z)
    assert len(region.unique()) == part.num_regions
    with torch.no_grad():
        x = decoder(z).flatten(1)
    error = (apply(part.slopes[region], part.offsets[region], z) - x).abs()
    assert float((error / (1 + x.abs().amax(1, keepdim=True))).max()) < 1e-12


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_region_has_the_decoders_own_map(name):
    decoder = build_architecture(name)
    part = enumerate_regions(decoder)
    L = int(name[-1])
    assert part.latent_dim == L and part.num_regions > 3
    assert_is_the_decoder(decoder, part, everywhere(part))
    mass = integrals.log_mass(
        part.cells, torch.zeros(part.num_regions, L), torch.eye(L).expand(part.num_regions, L, L)
    )
    assert float(mass.exp().sum()) == pytest.approx(1.0, abs=1e-12)
    # Two regions with the same pattern would be one.
    patterns = torch.cat(part.patterns, 1)
    assert len(torch.unique(patterns, dim=0)) == part.num_regions


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradients_of_the_maps_are_those_of_the_decoder(name):
    decoder = build_architecture(name)
    part = enumerate_regions(decoder)
    z = everywhere(part, count=1)
    parameters = dict(decoder.named_parameters())
    x = decoder(z).flatten(1)
    probe = torch.randn_like(x)
    wanted = torch.autograd.grad((x * probe).sum(), list(parameters.values()), allow_unused=True)
    region = part.locate(z)
    slopes, offsets = part.affine_maps()
    assert torch.allclose(slopes, part.slopes, rtol=1e-12, atol=1e-13)
    value = (apply(slopes[region], offsets[region], z) * probe).sum()
    found = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
    for key, a, b in zip(parameters, found, wanted, strict=True):
        a, b = (torch.zeros_like(parameters[key]) if g is None else g for g in (a, b))
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-10 * float(b.abs().max() + 1)), key


@pytest.mark.parametrize("name", ["residual-2", "dense-2", "images-1", "signals-2", "max-pool-2", "maxout-2"])
def test_inputs_and_derivatives_of_every_linear_layer(name):
    decoder = build_architecture(name)
    part = enumerate_regions(decoder)
    z = part.cells.interior_points()
    captured, handles = {}, []
    for i, layer in enumerate(part.network.linears):
        hook = lambda module, args, out, i=i: captured.update({i: (args[0], out)})  # noqa: E731
        handles.append(layer.register_forward_hook(hook))
    x = decoder(z).flatten(1)
    for handle in handles:
        handle.remove()
    assert captured
    for i, (given, returned) in captured.items():
        assert torch.allclose(apply(*part.linear_inputs(i), z), given, rtol=1e-12, atol=1e-12)
        downstream = part.downstream(i)
        for d in range(part.data_dim):
            (row,) = torch.autograd.grad(x[:, d].sum(), returned, retain_graph=True)
            assert torch.allclose(downstream[:, d], row, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["images-2", "residual-2", "max-pool-2"])
def test_maps_chunk_by_chunk_are_the_same(name, monkeypatch):
    decoder = build_architecture(name)
    part, again = enumerate_regions(decoder), enumerate_regions(decoder)
    whole = part.affine_maps()
    monkeypatch.setattr(regions, "MAP_BYTES", 2**12)
    assert len(again._chunks(3 * again.network.graph.numbers(again.network.graph.last))) > 3
    parts = again.affine_maps()
    parameters = list(decoder.parameters())
    for a, b in zip(whole, parts, strict=True):
        assert torch.allclose(a, b, rtol=1e-14, atol=1e-15)
        probe = torch.randn_like(a)
        wanted = torch.autograd.grad((a * probe).sum(), parameters, allow_unused=True, retain_graph=True)
        found = torch.autograd.grad((b * probe).sum(), parameters, allow_unused=True, retain_graph=True)
        for x, y in zip(wanted, found, strict=True):
            assert (x is None and y is None) or torch.allclose(x, y, rtol=1e-12, atol=1e-12)
    assert torch.allclose(again.slopes, part.slopes, rtol=1e-14)
    for i in range(len(part.network.linears)):
        assert torch.allclose(again.downstream(i), part.downstream(i), rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("name", ["images-1", "images-2", "residual-images-1"])
def test_gradient_of_the_evidence_by_finite_differences(name):
    decoder = build_architecture(name)
    with torch.no_grad():
        x = decoder(torch.randn(4, int(name[-1]))).flatten(1)
    x = x + 0.3 * torch.randn_like(x)
    x[0, ::3] = torch.nan

    def evidence():
        return CPAMarginal(decoder, 0.3).log_prob(x).sum()

    parameters = list(decoder.parameters())
    gradients = torch.autograd.grad(evidence(), parameters)
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            direction, step = torch.randn_like(parameter), 1e-5
            parameter.add_(step * direction)
            above = evidence()
            parameter.sub_(2 * step * direction)
            below = evidence()
            parameter.add_(step * direction)
            slope = (gradient * direction).sum()
            assert float((above - below) / (2 * step)) == pytest.approx(float(slope), rel=1e-6, abs=1e-6)


def test_a_maxout_of_lines_is_their_upper_envelope():
    # max(-1 - 2z, 0, z - 1): knots at -1/2 and 1.
    decoder = nn.Sequential(nn.Linear(1, 3), Maxout(3))
    with torch.no_grad():
        decoder[0].weight[:, 0] = torch.tensor([-2.0, 0.0, 1.0])
        decoder[0].bias.copy_(torch.tensor([-1.0, 0.0, -1.0]))
    part = enumerate_regions(decoder)
    z = torch.tensor([[-3.0], [-0.5], [0.3], [1.0], [4.0]])
    assert_values = apply(part.slopes[part.locate(z)], part.offsets[part.locate(z)], z)[:, 0]
    assert torch.equal(assert_values, torch.tensor([5.0, 0.0, 0.0, 0.0, 3.0]))
    assert {-0.5, 1.0} <= set(part.cells.upper.tolist())


def test_a_residual_sum_of_nothing_adds_no_region():
    class Skip(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, z):
            return z - 2.0 * self.net(z)

    net = mlp(2, 7, 2)
    plain, skip = enumerate_regions(net), enumerate_regions(Skip(net))
    assert skip.num_regions == plain.num_regions
    assert torch.allclose(skip.slopes, torch.eye(2) - 2 * plain.slopes, atol=1e-14)
    assert not skip.network.ends_linear and plain.network.ends_linear


def test_what_follows_the_last_units_is_shared():
    class Skip(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.up, self.direct = nn.Linear(2, 3), nn.Linear(3, 5), nn.Linear(2, 20)

        def forward(self, z):
            h = torch.relu(self.first(z)) - 1
            return self.direct(z) + torch.cat([self.up(h), -self.up(h)], 1).repeat(1, 2)

    images, skip = build_architecture("images-2"), Skip()
    for decoder, width in ((images, 3 * 4 * 4), (skip, 2 + 3)):
        part = enumerate_regions(decoder)
        assert part.output_weight.shape == (part.data_dim, width)
        assert part.feature_slopes.shape == (part.num_regions, width, 2)
        assert_is_the_decoder(decoder, part, everywhere(part))
    # The features of the second are z itself and the units.
    assert enumerate_regions(skip).network.graph.frontier[0] == 0
    few = nn.Sequential(nn.Linear(2, 9), nn.ReLU(), nn.Unflatten(1, (1, 3, 3)), nn.Conv2d(1, 1, 2))
    assert torch.equal(enumerate_regions(few).output_weight, torch.eye(4))


def test_networks_are_copied_with_their_decoder():
    decoder = build_architecture("residual-2")
    network = Network(decoder)
    twin = copy.deepcopy(network)
    with torch.no_grad():
        decoder.shift.add_(1.0)
        decoder.first.weight.zero_()
    moved, kept = enumerate_regions(network), enumerate_regions(twin)
    assert moved.num_regions == 1 < kept.num_regions
    z = torch.randn(50, 2)
    assert torch.allclose(
        apply(kept.slopes[kept.locate(z)], kept.offsets[kept.locate(z)], z), twin.decoder(z)
    )
