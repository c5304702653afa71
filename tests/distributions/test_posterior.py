# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
import pyro
import pyro.distributions as dist
import pytest
import torch
from brute_force import posterior_1d
from pyro.distributions.testing.gof import auto_goodness_of_fit
from scipy.stats import chisquare, kstest
from torch import nn

from pyro_cpa.distributions import CPAMarginal


def net(*sizes, seed=0):
    torch.manual_seed(seed)
    layers = []
    for a, b in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(a, b), nn.LeakyReLU(0.1)]
    for layer in layers:
        for p in layer.parameters():
            p.data = torch.randn_like(p)
    return nn.Sequential(*layers[:-1])


@pytest.mark.parametrize("scale", [0.5, 0.03])
def test_moments_and_entropy_on_a_line(scale):
    decoder = net(1, 8, 2)
    px = CPAMarginal(decoder, scale)
    x = torch.cat([px.sample((6,)).detach(), 3 * torch.randn(6, 2)])
    x[3, 0] = torch.nan
    log_p, z, weights = posterior_1d(decoder, x, torch.tensor(scale), width=0.01)
    post = px.posterior(x)
    mean = weights @ z
    variance = weights @ z**2 - mean**2
    torch.testing.assert_close(post.log_evidence, log_p, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(post.mean[:, 0], mean, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(post.variance[:, 0], variance, rtol=1e-6, atol=1e-8)
    log_q = post.log_prob(z[:, None, None])
    expected = -torch.where(weights > 0, weights * log_q.T, 0.0).sum(-1)
    torch.testing.assert_close(post.entropy(), expected, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(post.region_probs.sum(-1), torch.ones(12), rtol=1e-12, atol=0)


def test_density_integrates_to_one_over_the_plane():
    px = CPAMarginal(net(2, 6, 3), 0.4)
    post = px.posterior(px.sample((3,)).detach())
    grid = torch.arange(-7, 7, 0.02) + 0.01
    z = torch.cartesian_prod(grid, grid)
    density = post.log_prob(z[:, None]).exp()
    torch.testing.assert_close(density.sum(0) * 4e-4, torch.ones(3), rtol=2e-4, atol=0)
    mean = (density[..., None] * z[:, None]).sum(0) * 4e-4
    torch.testing.assert_close(post.mean, mean, rtol=0, atol=1e-3)
    best = z[density.argmax(0)]
    assert (post.log_prob(post.mode) >= density.amax(0).log()).all()
    assert (post.mode - best).abs().max() < 0.02


@pytest.mark.parametrize("holes", [False, True])
def test_region_probabilities_are_those_of_located_draws(holes):
    px = CPAMarginal(net(2, 6, 3), 0.6)
    x = px.sample((2,)).detach()
    if holes:
        x[0, 1] = torch.nan
    post = px.posterior(x)
    region = px.partition.locate(post.sample((20_000,)))
    for n in range(2):
        counts = torch.bincount(region[:, n], minlength=px.partition.num_regions)
        expected = 20_000 * post.region_probs[n]
        often = expected > 5
        seen = torch.cat([counts[often], counts[~often].sum()[None]]).numpy()
        theory = torch.cat([expected[often], expected[~often].sum()[None]]).numpy()
        keep = theory > 0
        assert chisquare(seen[keep], theory[keep] * seen[keep].sum() / theory[keep].sum()).pvalue > 2e-5


def test_draws_on_a_line_fit_the_density():
    px = CPAMarginal(net(1, 8, 2), 0.3)
    post = px.posterior(px.sample().detach())
    draws = post.sample((20_000,))
    assert auto_goodness_of_fit(draws[:, 0], post.log_prob(draws).exp()) > 2e-5
    grid = torch.linspace(-8, 8, 160_001)
    cdf = (post.log_prob(grid[:, None]).exp() * 1e-4).cumsum(0).numpy()
    assert kstest(draws[:, 0].numpy(), lambda v: cdf[((v + 8) / 1e-4).astype(int)]).pvalue > 2e-5


def test_draws_on_the_plane_fit_the_density():
    px = CPAMarginal(net(2, 6, 3), 0.3)
    post = px.posterior(px.sample().detach())
    draws = post.sample((20_000,))
    assert auto_goodness_of_fit(draws, post.log_prob(draws).exp()) > 2e-5


@pytest.mark.parametrize("L", [1, 2, 3])
def test_linear_decoder_has_a_gaussian_posterior(L):
    torch.manual_seed(1)
    decoder, covariance = nn.Linear(L, 4), torch.diag(torch.rand(4) + 0.1) + 0.1
    px = CPAMarginal(decoder, covariance_matrix=covariance)
    x = px.sample((7,)).detach()
    post = px.posterior(x)
    W = decoder.weight.detach()
    precision = torch.eye(L) + W.mT @ torch.linalg.solve(covariance, W)
    exact = dist.MultivariateNormal(
        torch.linalg.solve(
            precision, (W.mT @ torch.linalg.solve(covariance, (x - decoder.bias.detach()).mT))
        ).mT,
        precision_matrix=precision,
    )
    z = exact.sample()
    for name in ("mean", "covariance_matrix", "variance", "mode"):
        torch.testing.assert_close(
            getattr(post, name), getattr(exact, name).expand_as(getattr(post, name)), rtol=1e-12, atol=1e-12
        )
    torch.testing.assert_close(post.log_prob(z), exact.log_prob(z), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(post.entropy(), exact.entropy(), rtol=1e-12, atol=1e-12)
    assert px.partition.num_regions == 1


@pytest.mark.parametrize("sizes", [(1, 8, 2), (2, 6, 2)])
def test_quantiles_invert_the_distribution_function(sizes):
    px = CPAMarginal(net(*sizes), 0.3)
    post = px.posterior(px.sample((3,)).detach())
    levels = [0.05, 0.5, 0.9]
    found = post.quantiles(levels)
    assert found.shape == (3, 3, sizes[0])
    draws = post.sample((40_000,))
    for level, at in zip(levels, found, strict=True):
        below = (draws <= at).double().mean(0)
        assert ((below - level).abs() < 5 * (level * (1 - level) / 40_000) ** 0.5).all()


def test_quantiles_of_a_gaussian():
    decoder = nn.Linear(2, 3)
    post = CPAMarginal(decoder, 0.5).posterior(torch.zeros(2, 3))
    expected = dist.Normal(post.mean, post.variance.sqrt()).icdf(torch.tensor([0.1, 0.7])[:, None, None])
    torch.testing.assert_close(post.quantiles([0.1, 0.7]), expected, rtol=1e-10, atol=1e-10)


def test_expand_plates_and_gradient_in_z():
    px = CPAMarginal(net(2, 5, 3), 0.4)
    x = px.sample((4,)).detach()
    post = px.posterior(x)
    wide = post.expand([6, 4])
    assert wide.sample().shape == (6, 4, 2) and wide.sample((3,)).shape == (3, 6, 4, 2)
    assert wide.log_prob(post.sample()).shape == (6, 4) and wide.mean.shape == (6, 4, 2)
    stretched = px.posterior(x[:1]).expand([5])
    assert stretched.log_prob(stretched.sample()).shape == (5,)
    z = post.sample().requires_grad_()
    (gradient,) = torch.autograd.grad(post.log_prob(z).sum(), z)
    with torch.no_grad():
        for i in range(2):
            h = torch.zeros(2)
            h[i] = 1e-6
            slope = (post.log_prob(z + h) - post.log_prob(z - h)) / 2e-6
            torch.testing.assert_close(gradient[:, i], slope, rtol=1e-5, atol=1e-5)
    assert not post.has_rsample
    with pyro.plate("data", 4):
        assert pyro.sample("z", post).shape == (4, 2)


def test_streaming_changes_nothing():
    px = CPAMarginal(net(2, 8, 3), 0.3)
    x = px.sample((30,)).detach()
    small = CPAMarginal(px.partition, 0.3, memory_budget=2**14)
    assert len(list(small.joint.chunks(x))) > 3
    for name in ("mean", "covariance_matrix", "region_probs", "mode", "log_evidence"):
        torch.testing.assert_close(
            getattr(px.posterior(x), name), getattr(small.posterior(x), name), rtol=1e-11, atol=1e-11
        )
    torch.testing.assert_close(
        px.posterior(x).entropy(), small.posterior(x).entropy(), rtol=1e-11, atol=1e-11
    )
    assert small.posterior(x).sample((2,)).shape == (2, 30, 2)
