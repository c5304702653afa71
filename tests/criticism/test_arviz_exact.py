# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Exact guides, EM fits, exact posteriors and posteriors over decoder weights in ArviZ."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS
from pyro.nn import PyroModule, PyroSample
from torch import nn

from pyro_cpa.criticism import compare, to_arviz
from pyro_cpa.criticism._arviz_versions import pointwise_loo
from pyro_cpa.distributions import CPAMarginal
from pyro_cpa.infer import EM, AutoCPAPosterior

N, D = 20, 2
DECODER_SITES = ("net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias")


class Generator(PyroModule):
    """z ~ N(0, 1), x | z ~ N(decoder(z), 0.5), a row with a gap included."""

    def __init__(self):
        super().__init__()
        self.decoder = nn.Sequential(nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, D))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 0.5).to_event(1), obs=x)


class WeightPosterior(PyroModule):
    """Normal priors on every weight; the latent is integrated out exactly."""

    def __init__(self, hidden, scale=0.5):
        super().__init__()
        self.scale = scale
        first, last = PyroModule[nn.Linear](1, hidden), PyroModule[nn.Linear](hidden, D)
        for layer in (first, last):
            layer.weight = PyroSample(dist.Normal(0.0, 1.0).expand(layer.weight.shape).to_event(2))
            layer.bias = PyroSample(dist.Normal(0.0, 1.0).expand(layer.bias.shape).to_event(1))
        self.net = PyroModule[nn.Sequential](first, nn.ReLU(), last)

    def forward(self, x):
        px = CPAMarginal(self.net, self.scale)
        with pyro.plate("data", len(x)):
            pyro.sample("x", px, obs=x)


@pytest.fixture
def x():
    return torch.randn(N, D)


@pytest.mark.parametrize("fitted", [False, True])
def test_exact_guide_and_em(x, fitted):
    model = Generator()
    source = guide = AutoCPAPosterior(model, decoder=model.decoder)
    if fitted:
        source = EM(model, guide)
        source.run(x, num_steps=2, progress=False)
    data = to_arviz(source, x, num_samples=30, dims={"z": ["latent"]})
    exact = guide.log_evidence(x).detach().numpy()
    assert data["log_likelihood"].attrs["latents"] == "integrated out"
    np.testing.assert_allclose(data["log_likelihood"]["x"].values, np.tile(exact, (1, 30, 1)), rtol=1e-12)
    np.testing.assert_allclose(data["sample_stats"]["log_weight"].values, exact.sum(), rtol=1e-9)
    assert data["posterior"]["z"].dims == ("chain", "draw", "data", "latent")
    assert data["posterior_predictive"]["x"].shape == (1, 30, N, D)
    elpd, pareto_k = pointwise_loo(data)
    np.testing.assert_allclose(elpd, exact, rtol=1e-11)
    assert pareto_k.max() < 0.5


def test_draws_of_the_exact_posterior_in_arviz_have_its_moments(x):
    """2000 draws: mean and variance of every latent within 5 standard errors."""
    model = Generator()
    posterior = AutoCPAPosterior(model, decoder=model.decoder).posterior(x)
    data = to_arviz(posterior, num_samples=2000)
    z = data["posterior"]["z"].values[0]
    variance = posterior.covariance_matrix[..., 0].numpy()
    assert (np.abs(z.mean(0) - posterior.mean.numpy()) < 5 * np.sqrt(variance / 2000)).all()
    fourth = ((z - z.mean(0)) ** 4).mean(0)
    error = np.sqrt((fourth - variance**2) / 2000)
    assert (np.abs(z.var(0) - variance) < 5 * error).all()
    lp = posterior.log_prob(torch.as_tensor(z)).numpy()
    np.testing.assert_allclose(data["sample_stats"]["lp"].values[0], lp, rtol=1e-12)


def test_posterior_over_weights_has_the_exact_log_likelihood(x):
    x[3, 1] = math.nan
    model, prior = WeightPosterior(3), {}
    for _ in range(6):
        trace = pyro.poutine.trace(model).get_trace(x)
        for name in DECODER_SITES:
            prior.setdefault(name, []).append(trace.nodes[name]["value"].detach())
    draws = {name: torch.stack(values) for name, values in prior.items()}
    data = to_arviz(draws, x, model=model, prior_samples=2)
    assert data["log_likelihood"].attrs["latents"] == "integrated out"
    decoder = nn.Sequential(nn.Linear(1, 3), nn.ReLU(), nn.Linear(3, D))
    for s in range(6):
        decoder.load_state_dict({name[4:]: value[s] for name, value in draws.items()})
        expected = CPAMarginal(decoder, 0.5).log_prob(x).detach()
        np.testing.assert_allclose(data["log_likelihood"]["x"].values[0, s], expected, rtol=1e-12)
    assert math.isnan(data["observed_data"]["x"].values[3, 1])
    assert np.isfinite(data["posterior_predictive"]["x"].values).all()


@pytest.mark.slow
def test_nuts_over_weights_chooses_the_noise_by_loo():
    """Data with noise 0.3: the posterior that assumes 1.2 loses by many standard errors."""
    z = torch.randn(30, 1)
    x = torch.cat([z, -z], dim=1) + 0.3 * torch.randn(30, 2)
    found = {}
    for scale in (0.3, 1.2):
        sampler = NUTS(WeightPosterior(2, scale), max_tree_depth=4)
        mcmc = MCMC(sampler, num_samples=60, warmup_steps=60, disable_progbar=True)
        mcmc.run(x)
        found[f"noise {scale}"] = to_arviz(mcmc, prior_samples=0)
    result = compare(found)
    assert result.best == "noise 0.3"
    assert result.difference[1] < -5 * result.difference_error[1]
