# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Three latents: decoders whose evidence is a product of exact ones on the line, or that of fewer latents."""

import pytest
import torch
from latent_products import hidden_latent, product
from torch import nn

from pyro_cpa.distributions import CPAMarginal
from pyro_cpa.partition import Polytopes

EXACT = {"rtol": 1e-8, "atol": 1e-8}


@pytest.fixture
def case():
    """A product of three decoders of one latent each, seen through an affine map of the latents."""
    return product(3)


def data(case, far=False):
    x = case.joint.sample((6,)).detach()
    if far:
        x = x + 8 * torch.randn_like(x)
    x[0, 1], x[1, :3], x[2] = torch.nan, torch.nan, torch.nan
    return x


@pytest.mark.parametrize("far", [False, True])
def test_evidence_posterior_and_entropy_factorise(case, far):
    assert isinstance(case.joint.partition.cells, Polytopes)
    x = data(case, far)
    expected = case.sum(lambda px, block: px.log_prob(block), x)
    if far:
        assert expected.min() < -300
    torch.testing.assert_close(case.joint.log_prob(x).detach(), expected.detach(), **EXACT)
    posterior = case.joint.posterior(x)
    parts = case.each(lambda px, block: px.posterior(block), x)
    mean = case.from_parts(torch.cat([p.mean for p in parts], dim=1))
    covariance = case.turn @ torch.diag_embed(torch.cat([p.variance for p in parts], dim=1)) @ case.turn.mT
    torch.testing.assert_close(posterior.mean, mean, **EXACT)
    torch.testing.assert_close(posterior.covariance_matrix, covariance, **EXACT)
    # The map of the latents stretches the density.
    entropy = sum(p.entropy() for p in parts) + case.turn.det().abs().log()
    torch.testing.assert_close(posterior.entropy(), entropy, **EXACT)
    z = case.to_parts(posterior.sample((3,)))
    density = sum(p.log_prob(z[..., k : k + 1]) for k, p in enumerate(parts)) - case.turn.det().abs().log()
    torch.testing.assert_close(posterior.log_prob(case.from_parts(z)), density, **EXACT)
    torch.testing.assert_close(posterior.region_probs.sum(-1), torch.ones(len(x)), **EXACT)
    mode = case.from_parts(torch.cat([p.mode for p in parts], dim=1))
    torch.testing.assert_close(posterior.mode, mode, rtol=1e-7, atol=1e-7)


def test_moments_and_conditional_factorise(case):
    parts = [px.mean for px in case.parts]
    torch.testing.assert_close(case.joint.mean, torch.cat(parts), **EXACT)
    blocks = torch.block_diag(*(px.covariance_matrix for px in case.parts))
    torch.testing.assert_close(case.joint.covariance_matrix, blocks, **EXACT)
    x = data(case)
    found = case.joint.conditional(x)
    mean = torch.cat(case.each(lambda px, block: px.conditional(block).mean, x), dim=1)
    torch.testing.assert_close(found.mean, mean, **EXACT)
    variance = torch.cat(case.each(lambda px, block: px.conditional(block).variance, x), dim=1)
    torch.testing.assert_close(found.variance, variance, **EXACT)
    assert found.sample((2,)).shape == (2, 6, 6)


def test_quantiles_of_a_product(case):
    straight = product(3, turned=False)
    x = straight.joint.sample((2,)).detach()
    found = straight.joint.posterior(x).quantiles([0.1, 0.5])
    parts = straight.each(lambda px, block: px.posterior(block).quantiles([0.1, 0.5]), x)
    torch.testing.assert_close(found, torch.cat(parts, dim=-1), rtol=1e-7, atol=1e-7)


def test_draws_have_the_posterior_moments(case):
    x = case.joint.sample((3,)).detach()
    posterior = case.joint.posterior(x)
    count = 3000
    draws = posterior.sample((count,))
    mean, covariance = posterior.mean, posterior.covariance_matrix
    axes = torch.linalg.cholesky(covariance)
    white = torch.linalg.solve_triangular(axes, (draws - mean)[..., None], upper=False)[..., 0]
    assert (white.mean(0).abs() * count**0.5).max() < 5
    products = white[..., :, None] * white[..., None, :]
    error = (products.mean(0) - torch.eye(3)) / (products.std(0) / count**0.5)
    assert error.abs().max() < 5


def test_a_latent_that_the_decoder_ignores_changes_nothing():
    fewer, more, turn = hidden_latent(2)
    x = fewer.sample((5,)).detach()
    x[0, 0] = torch.nan
    torch.testing.assert_close(more.log_prob(x), fewer.log_prob(x), **EXACT)
    mean = fewer.posterior(x).mean
    expected = torch.cat([mean, torch.zeros_like(mean[:, :1])], dim=1) @ turn.mT
    torch.testing.assert_close(more.posterior(x).mean, expected, **EXACT)
    torch.testing.assert_close(more.covariance_matrix, fewer.covariance_matrix, **EXACT)


def test_gradients_are_finite_differences():
    """In the decoder, the noise, the prior and the data, along one random direction each."""
    torch.manual_seed(1)
    decoder = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4))
    noise, loc = torch.rand(4) + 0.4, 0.3 * torch.randn(3)
    factor = torch.eye(3) + 0.2 * torch.randn(3, 3).tril()
    leaves = [*(p.detach() for p in decoder.parameters()), noise, loc, factor]
    x = CPAMarginal(decoder, noise).sample((4,)).detach()
    x[0, 2] = torch.nan
    names = [name for name, _ in decoder.named_parameters()]
    steps = [torch.randn_like(leaf) for leaf in leaves]
    steps[-1] = steps[-1].tril()

    def total(shift, k):
        values = [
            leaf + shift * step * (i == k) for i, (leaf, step) in enumerate(zip(leaves, steps, strict=True))
        ]
        *weights, scale, mean, root = values
        for name, value in zip(names, weights, strict=True):
            decoder.get_parameter(name).data = value.detach()
        px = CPAMarginal(decoder, scale, loc=mean, prior_covariance=root @ root.mT)
        return px.log_prob(x).sum()

    at = torch.zeros((), requires_grad=True)
    for k in range(len(leaves)):
        found = total(at, k)
        if k < len(names):
            gradients = torch.autograd.grad(found, decoder.get_parameter(names[k]))[0]
            slope = (gradients * steps[k]).sum()
        else:
            (slope,) = torch.autograd.grad(found, at)
        with torch.no_grad():
            h = 1e-5
            difference = (total(h, k) - total(-h, k)) / (2 * h)
        torch.testing.assert_close(slope, difference, rtol=1e-5, atol=1e-5)


def test_memory_budget_changes_nothing(case):
    x = data(case)
    small = CPAMarginal(
        case.joint.partition,
        case.noise,
        loc=case.shift,
        prior_covariance=case.turn @ case.turn.mT,
        memory_budget=1,
    )
    torch.testing.assert_close(small.log_prob(x), case.joint.log_prob(x), rtol=1e-12, atol=1e-11)
