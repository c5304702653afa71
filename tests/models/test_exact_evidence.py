# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Models with one latent dimension against quadrature: the truth behind every bound."""

import math

import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam

from pyro_cpa.infer import AnalyticELBO, AutoCPAPosterior
from pyro_cpa.models import VAE, Bernoulli, ConditionalVAE, GaussianMixtureVAE, Normal, VariationalRNN

D, C, N = 6, 3, 5
GRID = torch.linspace(-12.0, 12.0, 6001, dtype=torch.float64)[:, None]
SMALL = {"hidden_dims": (8,), "dropout": 0.0}


def integrate(log_joint):
    """log of the integral over the grid: (Z, N) -> (N,)."""
    return log_joint.logsumexp(0) + (GRID[1, 0] - GRID[0, 0]).log()


def given_label(networks, likelihood, x, y):
    """log p(x_n | y) for one label."""
    one_hot = torch.eye(C)[y]
    log_prior = networks.prior(one_hot).log_prob(GRID)
    log_lik = likelihood(networks.decode(GRID, one_hot)[:, None]).log_prob(x)
    return integrate(log_prior[:, None] + log_lik)


@pytest.fixture
def x():
    return torch.randint(2, (N, D)).double()


def trained(model, *args):
    svi = SVI(model.model, model.guide, Adam({"lr": 0.02}), AnalyticELBO())
    for _ in range(150):
        svi.step(*args)
    return model


def check(model, args, truth):
    """The model's own estimate row by row, and the bound it gives, against the truth."""
    particles = 3000
    found = model.log_evidence(*args, num_particles=particles)
    assert not found.exact and (found.ess > 100).all()  # else its error says nothing
    # log of a mean lies below the log of its expectation by half the squared standard error
    assert ((found.log_prob - truth).abs() < 5 * found.standard_error + found.standard_error**2).all()
    elbo = AnalyticELBO()
    bounds = torch.tensor([-elbo.loss(model.model, model.guide, *args) for _ in range(30)])
    assert bounds.mean() < truth.sum() + 5 * bounds.std() / 30**0.5
    chunks = model.log_evidence(*args, num_particles=30, chunk_size=7)
    assert chunks.log_prob.shape == truth.shape and torch.isfinite(chunks.standard_error).all()


def test_vae(x):
    vae = trained(VAE(D, 1, likelihood=Bernoulli(), **SMALL), x)
    with torch.no_grad():
        log_prior = -(GRID[:, 0] ** 2) / 2 - math.log(2 * math.pi) / 2
        truth = integrate(log_prior[:, None] + vae.likelihood(vae.decoder(GRID)[:, None]).log_prob(x))
    check(vae, (x,), truth)


def test_gaussian_vae_with_the_exact_posterior_as_guide():
    """Every draw gives the evidence: the decoder is piecewise affine."""
    x = torch.randn(N, D)
    vae = VAE(D, 1, likelihood=Normal(0.4), hidden_dims=(6, 4), dropout=0.0)
    with torch.no_grad():
        log_prior = -(GRID[:, 0] ** 2) / 2 - math.log(2 * math.pi) / 2
        truth = integrate(log_prior[:, None] + vae.likelihood(vae.decoder(GRID)[:, None]).log_prob(x))
    guide = AutoCPAPosterior(vae.model, decoder=vae.decoder)
    for seed in range(3):
        pyro.set_rng_seed(seed)
        assert Trace_ELBO().loss(vae.model, guide, x) == pytest.approx(-truth.sum().item(), rel=1e-5)
    # the grid is fine to 1e-5 where the decoder has kinks; draws agree far better than that
    losses = [Trace_ELBO().loss(vae.model, guide, x) for _ in range(3)]
    assert max(losses) - min(losses) < 1e-9


@pytest.mark.parametrize("label_in", ["prior", "decoder", "both"])
def test_conditional_vae(label_in, x):
    y = torch.arange(N) % C
    cvae = trained(ConditionalVAE(D, C, 1, label_in=label_in, likelihood=Bernoulli(), **SMALL), x, y)
    with torch.no_grad():
        every = torch.stack([given_label(cvae.networks, cvae.likelihood, x, c) for c in range(C)], 1)
    check(cvae, (x, y), every[torch.arange(N), y])


def test_mixture_is_the_sum_of_the_conditional_models_over_labels(x):
    """log p(x) = logsumexp_y [log p(y) + log p(x|y)], p(x|y) from a conditional VAE of the same nets."""
    gmvae = trained(GaussianMixtureVAE(D, C, 1, **SMALL), x)
    cvae = ConditionalVAE(D, C, 1, label_in="prior", likelihood=Bernoulli(), **SMALL)
    cvae.networks.load_state_dict(gmvae.networks.state_dict())
    with torch.no_grad():
        every = torch.stack([given_label(cvae.networks, cvae.likelihood, x, c) for c in range(C)])
    check(gmvae, (x,), every.logsumexp(0) - math.log(C))


def test_recurrent_net_of_two_steps(x):
    """Quadrature over both latents, the second integral inside the first."""
    data = x.reshape(N, 2, 3)
    vrnn = trained(VariationalRNN(3, 1, rnn_dim=4, rnn_layers=1, hidden_dims=(6,)), data)
    networks, grid = vrnn.networks, torch.linspace(-9.0, 9.0, 301)[:, None]
    step = (grid[1, 0] - grid[0, 0]).log()

    def log_step(state, t):  # (..., N, Z2)
        z = grid.expand(*([1] * (state.top.dim() - 1)), *grid.shape)
        outputs = networks.decoder(
            torch.cat(
                [
                    state.top[..., None, :].expand(*state.top.shape[:-1], 301, 4),
                    z.expand(*state.top.shape[:-1], 301, 1),
                ],
                -1,
            )
        )
        prior = networks.prior(state.top)
        log_prior = torch.distributions.Normal(prior.mean, prior.stddev).log_prob(grid[:, 0])
        return log_prior + vrnn.likelihood(outputs).log_prob(data[:, t][:, None])

    with torch.no_grad():
        first = log_step(networks.start(N), 0)  # (N, Z1)
        after = networks.advance(networks.start(), data[:, 0], grid[:, None].expand(301, N, 1))
        second = log_step(after, 1).logsumexp(-1) + step  # (Z1, N)
        truth = (first + second.T).logsumexp(-1) + step
    check(vrnn, (data,), truth)
