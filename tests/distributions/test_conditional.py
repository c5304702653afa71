# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch
from brute_force import posterior_1d
from scipy.stats import kstest
from test_posterior import net
from torch import nn

from pyro_cpa.distributions import CPAMarginal
from pyro_cpa.errors import InvalidData


def holes(x, seed=0):
    torch.manual_seed(seed)
    x = x.clone()
    x[torch.rand(x.shape) < 0.4] = torch.nan
    x[0] = torch.nan
    return x


@pytest.mark.parametrize("full", [False, True])
def test_linear_gaussian_conditional(full):
    torch.manual_seed(2)
    decoder = nn.Linear(2, 5)
    factor = torch.randn(5, 5) if full else torch.diag(torch.rand(5) + 0.3)
    covariance = factor @ factor.mT + (0.1 * torch.eye(5) if full else 0)
    noise = {"covariance_matrix": covariance} if full else {"scale": covariance.diagonal().sqrt()}
    px = CPAMarginal(decoder, **noise)
    x = holes(px.sample((8,)).detach())
    found = px.conditional(x)
    mean, total = px.mean.detach(), px.covariance_matrix.detach()
    for n in range(8):
        m, o = x[n].isnan(), ~x[n].isnan()
        gain = total[m][:, o] @ torch.linalg.inv(total[o][:, o])
        torch.testing.assert_close(
            found.mean[n, m], mean[m] + gain @ (x[n, o] - mean[o]), rtol=1e-10, atol=1e-10
        )
        torch.testing.assert_close(found.mean[n, o], x[n, o], rtol=0, atol=0)
        left = total[m][:, m] - gain @ total[o][:, m]
        torch.testing.assert_close(found.covariance_matrix[n][m][:, m], left, rtol=1e-9, atol=1e-10)
        assert (found.covariance_matrix[n][o] == 0).all() and (found.variance[n, o] == 0).all()
        torch.testing.assert_close(found.variance[n, m], left.diagonal(), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("full", [False, True])
def test_against_quadrature_over_the_latent(full):
    decoder = net(1, 7, 3)
    covariance = 0.05 * torch.eye(3) + (0.04 if full else 0)
    px = CPAMarginal(decoder, **({"covariance_matrix": covariance} if full else {"scale": 0.05**0.5}))
    x = px.sample((6,)).detach()
    x[:3, 1] = torch.nan
    x[3:5, :2] = torch.nan
    found = px.conditional(x)
    if not full:
        _, z, weights = posterior_1d(decoder, x, torch.tensor(0.05**0.5))
        g = decoder(z[:, None]).detach()
        mean = torch.where(x.isnan(), weights @ g, x)
        torch.testing.assert_close(found.mean, mean, rtol=1e-8, atol=1e-8)
        variance = torch.where(x.isnan(), weights @ g**2 - (weights @ g) ** 2 + 0.05, 0.0)
        torch.testing.assert_close(found.variance, variance, rtol=1e-7, atol=1e-7)
    draws = found.sample((20_000,))
    torch.testing.assert_close(
        draws.nan_to_num()[:, ~x.isnan()], x[~x.isnan()].expand(20_000, -1), rtol=0, atol=0
    )
    error = draws.std(0) / 20_000**0.5
    assert ((draws.mean(0) - found.mean).abs() <= 5 * error + 1e-12).all()
    centred = draws - found.mean
    products = centred[..., :, None] * centred[..., None, :]
    error = products.std(0) / 20_000**0.5
    assert ((products.mean(0) - found.covariance_matrix).abs() <= 5 * error + 1e-12).all()


def test_density_of_one_missing_entry_and_its_draws():
    px = CPAMarginal(net(2, 6, 3), 0.3)
    x = px.sample().detach()
    x[1] = torch.nan
    found = px.conditional(x)
    # The noise smooths the density over 0.3: sums over a grid of a tenth of that are exact to rounding.
    step = 0.03
    grid = torch.linspace(-30, 30, 2001)
    full = x.expand(2001, 3).clone()
    full[:, 1] = grid
    density = found.log_prob(full).exp()
    assert abs(density.sum() * step - 1) < 1e-8
    assert abs((density * grid).sum() * step - found.mean[1]) < 1e-7
    cdf = torch.cumulative_trapezoid(density, dx=step).numpy()
    draws = found.sample((20_000,))[:, 1].numpy()
    assert kstest(draws, lambda v: np.interp(v, grid[1:], cdf)).pvalue > 2e-5


def test_errors_and_complete_rows():
    px = CPAMarginal(net(2, 6, 3), 0.3)
    x = px.sample((2,)).detach()
    torch.testing.assert_close(px.conditional(x).log_prob(x), torch.zeros(2), rtol=0, atol=0)
    torch.testing.assert_close(px.conditional(x).sample((3,)), x.expand(3, 2, 3), rtol=0, atol=0)
    holed = x.clone()
    holed[0, 0] = torch.nan
    with pytest.raises(InvalidData, match="still holds NaN"):
        px.conditional(holed).log_prob(holed)
    with pytest.raises(InvalidData, match="differs from the observed"):
        px.conditional(holed).log_prob(x + 1)
