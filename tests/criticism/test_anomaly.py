# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Anomaly scores against closed forms of a Gaussian, missing cells included."""

from __future__ import annotations

import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch import nn

from pyro_cpa.criticism import feature_surprise, posterior_region, surprise, tail_probability
from pyro_cpa.distributions import CPAMarginal
from pyro_cpa.errors import InvalidData

D = 4


@pytest.fixture
def density():
    """An affine decoder: its marginal is Gaussian, so every score has a closed form."""
    return CPAMarginal(nn.Linear(2, D), torch.linspace(0.3, 0.9, D))


@pytest.fixture
def x(density):
    x = density.sample((12,)) * 1.5
    x[torch.rand(12, D) < 0.3] = math.nan
    x[0] = math.nan
    return x


def test_surprise_is_minus_the_log_density(density, x):
    found = surprise(density, x)
    for n, row in enumerate(x):
        o = ~row.isnan()
        law = (
            stats.multivariate_normal(density.mean[o], density.covariance_matrix[o][:, o])
            if o.any()
            else None
        )
        assert found[n].item() == pytest.approx(-law.logpdf(row[o]) if law else 0.0, abs=1e-9)


def test_feature_surprise_is_the_conditional_gaussian(density, x):
    found = feature_surprise(density, x)
    covariance, mu = density.covariance_matrix, density.mean
    for n, row in enumerate(x):
        for d in range(D):
            if row[d].isnan():
                assert found[n, d].isnan()
                continue
            rest = ~row.isnan()
            rest[d] = False
            gain = covariance[d, rest] @ torch.linalg.inv(covariance[rest][:, rest])
            mean = mu[d] + gain @ (row[rest] - mu[rest])
            variance = covariance[d, d] - gain @ covariance[rest, d]
            expected = -dist.Normal(mean, variance.sqrt()).log_prob(row[d])
            torch.testing.assert_close(found[n, d], expected, rtol=1e-9, atol=1e-9)


def test_posterior_region_is_where_the_posterior_draws_lie():
    """Shares of 4000 posterior draws per region, 5 standard errors."""
    decoder = nn.Sequential(nn.Linear(1, 5), nn.ReLU(), nn.Linear(5, 2))
    px = CPAMarginal(decoder, 0.8)
    x = px.sample((6,)).detach()
    region, probability = posterior_region(px, x)
    drawn = px.partition.locate(px.posterior(x).sample((4000,)))
    share = (drawn == region).double().mean(0)
    error = (probability * (1 - probability) / 4000).sqrt()
    assert ((share - probability).abs() < 5 * error + 1e-12).all()
    assert (probability >= 1 / len(px.partition.offsets)).all()


def test_feature_surprises_of_independent_features_add_up():
    density = dist.Normal(torch.zeros(3), 1.0).to_event(1)

    class Independent:
        def log_prob(self, x):
            return dist.Normal(0.0, 1.0).log_prob(x.nan_to_num()).where(~x.isnan(), 0.0).sum(-1)

    x = torch.randn(5, 3)
    total = feature_surprise(Independent(), x).sum(-1)
    torch.testing.assert_close(total, -density.log_prob(x), rtol=1e-12, atol=1e-12)


def test_tail_probability_is_the_chi_square_tail_of_the_observed_cells(density, x):
    """log p orders a Gaussian's data by their squared distance; 4000 draws, 5 standard errors."""
    found = tail_probability(density, x, num_samples=4000)
    for n, row in enumerate(x):
        o = ~row.isnan()
        if not o.any():
            assert found[n] == 1
            continue
        centred = row[o] - density.mean[o]
        distance = centred @ torch.linalg.solve(density.covariance_matrix[o][:, o], centred)
        exact = stats.chi2.sf(float(distance), int(o.sum()))
        assert abs(found[n] - exact) < 5 * math.sqrt(exact * (1 - exact) / 4000) + 1 / 4001


def test_tail_probability_is_uniform_under_the_model(density):
    t = tail_probability(density, density.sample((500,)), num_samples=2000)
    assert stats.kstest(np.asarray(t), "uniform").pvalue > 1e-5


def test_a_generator_makes_it_repeatable_and_leaves_the_global_state(density, x):
    state = torch.get_rng_state()
    first, second = (
        tail_probability(density, x, num_samples=50, generator=torch.Generator().manual_seed(3))
        for _ in range(2)
    )
    assert torch.equal(first, second)
    assert torch.equal(state, torch.get_rng_state())


def test_mistakes_are_named():
    class Silent:
        def log_prob(self, x):
            return x.sum(-1)

    with pytest.raises(InvalidData, match="cannot be sampled"):
        tail_probability(Silent(), torch.zeros(2, 2))


def test_a_marginal_is_asked_as_it_is():
    """No estimate is involved, whatever the number of samples."""
    torch.manual_seed(0)
    marginal = CPAMarginal(
        torch.nn.Sequential(torch.nn.Linear(1, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2)).double(), 0.3
    )
    x = marginal.sample((5,)).detach()
    without = torch.where(torch.tensor([True, False]), torch.nan, x)
    with torch.no_grad():
        expected = marginal.log_prob(without) - marginal.log_prob(x)
    torch.testing.assert_close(feature_surprise(marginal, x)[:, 0], expected)
