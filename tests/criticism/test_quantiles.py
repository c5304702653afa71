# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Quantiles of missing cells: Gaussian closed form, and a bimodal conditional by independent quadrature."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import nn

from pyro_cpa.criticism import conditional_quantiles
from pyro_cpa.distributions import CPAMarginal
from pyro_cpa.errors import InvalidData

PROBS = (0.001, 0.05, 0.5, 0.9)


def folded_decoder():
    """x = (|z|, z): given |z|, the second cell has two modes."""
    decoder = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 2))
    with torch.no_grad():
        decoder[0].weight.copy_(torch.tensor([[1.0], [-1.0]]))
        decoder[0].bias.zero_()
        decoder[2].weight.copy_(torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
        decoder[2].bias.zero_()
    return decoder


def test_affine_decoder_has_normal_quantiles():
    decoder = nn.Linear(1, 3)
    loading, bias = decoder.weight.detach(), decoder.bias.detach()
    covariance = loading @ loading.T + 0.25 * torch.eye(3)
    x = torch.tensor([[0.3, math.nan, math.nan], [math.nan, -1.0, 2.0], [math.nan] * 3, [1.0, 2.0, 3.0]])
    found = conditional_quantiles(CPAMarginal(decoder, 0.5), x, PROBS)
    for n, row in enumerate(x):
        o, m = ~row.isnan(), row.isnan()
        gain = covariance[m][:, o] @ torch.linalg.inv(covariance[o][:, o])
        mean = bias[m] + gain @ (row[o] - bias[o])
        sd = (covariance[m][:, m] - gain @ covariance[o][:, m]).diagonal().sqrt()
        expected = mean + sd * torch.as_tensor(stats.norm.ppf(PROBS))[:, None]
        # tol = 1e-6 in probability; the density at the 0.1 % quantile is 0.0034 / sd.
        torch.testing.assert_close(found[:, n, m], expected, rtol=0, atol=1e-6 / 0.0034)
        torch.testing.assert_close(found[:, n, o], row[o].expand(len(PROBS), -1), rtol=0, atol=0)


@pytest.mark.parametrize("scale", [0.5, 0.05])
def test_two_modes_against_quadrature_over_the_latent(scale):
    """P(x_2 <= t | x_1) = int Phi((t - z) / s) p(z | x_1) dz, by SciPy."""
    x1 = 1.2
    x = torch.tensor([[x1, math.nan]])
    found = conditional_quantiles(CPAMarginal(folded_decoder(), scale), x, PROBS, tol=1e-8)[:, 0, 1]

    def weight(z):
        return stats.norm.pdf(z) * stats.norm.pdf(x1, abs(z), scale)

    options = {"points": [-x1, 0.0, x1], "limit": 400, "epsabs": 1e-13}
    total = integrate.quad(weight, -6, 6, **options)[0]
    for prob, t in zip(PROBS, found, strict=True):
        below = integrate.quad(lambda z, t=t: weight(z) * stats.norm.cdf(t, z, scale), -6, 6, **options)[0]
        assert below / total == pytest.approx(prob, abs=1e-7)


def test_quantiles_agree_with_draws():
    marginal = CPAMarginal(folded_decoder(), 0.3)
    x = torch.tensor([[0.4, math.nan], [math.nan, -0.5]])
    draws = marginal.conditional(x).sample((20_000,)).numpy()
    found = conditional_quantiles(marginal, x, [0.25, 0.5, 0.75]).numpy()
    for n, d in ((0, 1), (1, 0)):
        for prob, q in zip((0.25, 0.5, 0.75), found[:, n, d], strict=True):
            error = math.sqrt(prob * (1 - prob) / 20_000)
            assert abs((draws[:, n, d] <= q).mean() - prob) < 5 * error


def test_complete_data_come_back_and_mistakes_are_named():
    marginal = CPAMarginal(nn.Linear(1, 2), 0.5)
    x = torch.randn(3, 2)
    np.testing.assert_array_equal(conditional_quantiles(marginal, x, [0.5])[0], x)
    with pytest.raises(InvalidData, match="strictly between 0 and 1"):
        conditional_quantiles(marginal, x, [0.0])
    with pytest.raises(InvalidData, match="strictly between 0 and 1"):
        conditional_quantiles(marginal, x, [])


def test_a_density_too_narrow_says_so():
    marginal = CPAMarginal(folded_decoder(), 1e-5)
    with pytest.raises(InvalidData, match="raise tol, or use quantiles of draws"):
        conditional_quantiles(marginal, torch.tensor([[1.2, math.nan]]), [0.3])
