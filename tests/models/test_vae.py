# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""The VAE against bounds written by hand, quadrature, and factor analysis in closed form."""

import copy
import math

import pyro
import pytest
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.optim import Adam
from torch.distributions import MultivariateNormal

from pyro_cpa.errors import InvalidData
from pyro_cpa.infer import AnalyticELBO
from pyro_cpa.models.likelihoods import Bernoulli, Categorical, ContinuousBernoulli, Normal
from pyro_cpa.models.vae import VAE

D = 6
LIKELIHOODS = {
    "normal": (Normal(0.7), lambda: torch.randn(8, D)),
    "bernoulli": (Bernoulli(), lambda: torch.randint(2, (8, D)).double()),
    "continuous": (ContinuousBernoulli(), lambda: torch.rand(8, D)),
    "categorical": (Categorical(3), lambda: torch.randint(3, (8, D)).double()),
}


def small_vae(name="bernoulli", **options):
    likelihood, draw = LIKELIHOODS[name]
    options = {"latent_dim": 2, "hidden_dims": (7, 5), "dropout": 0.0, **options}
    return VAE(D, likelihood=copy.deepcopy(likelihood), **options), draw()


def by_hand(vae, x):
    """One reparametrised draw of the reconstruction and the diagonal Gaussians' divergence, row by row."""
    q = vae.encoder(vae.likelihood.features(x))
    mean, std = q.mean, q.stddev
    z = mean + std * torch.randn(mean.shape)
    kl = ((std**2 + mean**2 - 1) / 2 - std.log()).sum(-1)
    return vae.likelihood(vae.decoder(z)).log_prob(x), kl


@pytest.mark.parametrize("name", LIKELIHOODS)
@pytest.mark.parametrize("objective", [AnalyticELBO, TraceMeanField_ELBO])
def test_bound_and_gradients_equal_those_written_by_hand(name, objective):
    vae, x = small_vae(name)
    pyro.set_rng_seed(1)
    loss = objective()(vae.model, vae.guide)(x)
    loss.backward()
    grads = [p.grad.clone() for p in vae.parameters()]
    vae.zero_grad()
    pyro.set_rng_seed(1)
    reconstruction, kl = by_hand(vae, x)
    expected = (kl - reconstruction).sum()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-13)
    for grad, p in zip(grads, vae.parameters(), strict=True):
        torch.testing.assert_close(grad, p.grad, rtol=1e-10, atol=1e-12)


def test_sampled_bound_equals_the_one_written_by_hand():
    vae, x = small_vae()
    pyro.set_rng_seed(1)
    loss = Trace_ELBO().loss(vae.model, vae.guide, x)
    pyro.set_rng_seed(1)
    q = vae.encoder(x)
    z = q.mean + q.stddev * torch.randn(q.mean.shape)
    prior = (-(z**2) / 2 - math.log(2 * math.pi) / 2).sum()
    expected = vae.likelihood(vae.decoder(z)).log_prob(x).sum() + prior - q.log_prob(z).sum()
    assert loss == pytest.approx(-expected.item(), rel=1e-13)


def test_linear_gaussian_case_is_factor_analysis():
    """Orthogonal loadings: the exact posterior is diagonal, the bound is the evidence at every draw."""
    loadings = torch.linalg.qr(torch.randn(D, 2)).Q * torch.tensor([0.8, 1.7])
    noise = 0.6
    vae = VAE(D, 2, hidden_dims=(), likelihood=Normal(noise), dropout=0.0)
    posterior_variance = 1 / (1 + (loadings**2).sum(0) / noise**2)
    with torch.no_grad():
        vae.decoder[0].weight.copy_(loadings)
        vae.decoder[0].bias.zero_()
        vae.encoder.loc[0].weight.copy_(posterior_variance[:, None] * loadings.T / noise**2)
        vae.encoder.loc[0].bias.zero_()
        vae.encoder.raw_scale[0].weight.zero_()
        vae.encoder.raw_scale[0].bias.copy_(torch.expm1(posterior_variance.sqrt()).log())
    x = torch.randn(5, D)
    covariance = loadings @ loadings.T + noise**2 * torch.eye(D)
    evidence = MultivariateNormal(torch.zeros(D), covariance).log_prob(x).sum().item()
    for seed in range(3):
        pyro.set_rng_seed(seed)
        assert Trace_ELBO().loss(vae.model, vae.guide, x) == pytest.approx(-evidence, rel=1e-12)


def test_minibatch_stands_for_the_whole_set():
    vae, x = small_vae()
    for objective in (Trace_ELBO(), AnalyticELBO()):
        pyro.set_rng_seed(1)
        part = objective.loss(vae.model, vae.guide, x)
        pyro.set_rng_seed(1)
        whole = objective.loss(vae.model, vae.guide, x, size=80)
        assert whole == pytest.approx(10 * part, rel=1e-12)
    with pytest.raises(InvalidData, match="size is 3, below the 8 rows"):
        vae.model(x, size=3)


def test_vectorised_particles_average_the_same_bound():
    vae, x = small_vae()
    looped = Trace_ELBO(num_particles=400)
    vectorised = Trace_ELBO(num_particles=400, vectorize_particles=True)
    a, b = (torch.tensor([e.loss(vae.model, vae.guide, x) for _ in range(6)]) for e in (looped, vectorised))
    assert (a.mean() - b.mean()).abs() < 5 * ((a.var() + b.var()) / 6).sqrt()
    draws = Predictive(vae.model, guide=vae.guide, num_samples=9, parallel=True)(x)
    assert draws["z"].shape == (9, 8, 2)


@pytest.mark.parametrize("objective", [Trace_ELBO, AnalyticELBO])
def test_svi_sees_all_parameters_and_the_bound_rises(objective):
    vae, x = small_vae(dropout=0.1)
    svi = SVI(vae.model, vae.guide, Adam({"lr": 0.02}), objective())
    score = AnalyticELBO(num_particles=100, vectorize_particles=True)
    before = score.loss(vae.model, vae.guide, x)
    start = copy.deepcopy(list(vae.parameters()))
    for _ in range(60):
        svi.step(x)
    assert score.loss(vae.model, vae.guide, x) < before
    assert not any(torch.equal(a, b) for a, b in zip(start, vae.parameters(), strict=True))


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_generation_and_reconstruction_lie_where_they_should(name):
    vae, x = small_vae(name)
    modes = ("sample", "param") if name == "categorical" else ("sample", "mean", "param")
    for mode in modes:
        table = (3,) if name == "categorical" and mode == "param" else ()
        assert vae.generate(4, mode=mode).shape == (4, D, *table)
        assert vae.reconstruct(x, mode=mode).shape == (8, D, *table)
    vae.likelihood.check(vae.generate(50))
    assert vae.encode(x).shape == (8, 2)
    torch.testing.assert_close(vae.encode(x), vae.encoder(vae.likelihood.features(x)).mean.detach())


def test_evaluation_methods_switch_dropout_off_and_restore_the_modes():
    vae, x = small_vae(dropout=0.5)
    vae.decoder.eval()
    assert torch.equal(vae.encode(x), vae.encode(x))
    assert vae.encoder.training and not vae.decoder.training
    assert not vae.reconstruct(x, mode="mean").requires_grad


def test_defaults_are_those_of_the_tutorial():
    vae = VAE()
    assert vae.encoder.hidden[0].weight.shape == (500, 784) and vae.decoder[-1].weight.shape == (784, 500)
    assert vae.latent_dim == 20 and vae.decoder[2].p == 0.1
    assert isinstance(vae.likelihood, ContinuousBernoulli)


def test_dtype_and_state_dict():
    vae, x = small_vae()
    other, _ = small_vae()
    other.load_state_dict(vae.state_dict())
    assert torch.equal(other.encode(x), vae.encode(x))
    single = vae.float()
    assert single.encode(x).dtype == torch.float32
    assert math.isfinite(AnalyticELBO().loss(single.model, single.guide, x.int()))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu():
    vae, x = small_vae()
    vae = vae.cuda()
    loss = AnalyticELBO()(vae.model, vae.guide)(x.cuda(), size=100)
    loss.backward()
    assert loss.is_cuda and vae.generate(3).is_cuda


@pytest.mark.parametrize(
    "bad, message",
    [
        (torch.rand(4, D), "expected only 0 and 1"),
        (torch.full((4, D), math.nan), "no missing-data path"),
        (torch.zeros(4, D + 1), r"\(4, 7\); expected a tensor of shape \(N, 6\)"),
        (torch.zeros(2, 2, D), "Flatten images"),
        (torch.zeros(0, D), "not empty"),
        ([[0.0] * D], "x is list"),
    ],
)
def test_bad_data(bad, message):
    vae, _ = small_vae()
    for method in (vae.model, vae.encode, vae.reconstruct):
        with pytest.raises(InvalidData, match=message):
            method(bad)


@pytest.mark.parametrize("bad", [torch.rand(4, D), torch.zeros(4, D + 1), torch.zeros(D)])
def test_bad_data_in_the_guide(bad):
    with pytest.raises(InvalidData, match="expected"):
        small_vae()[0].guide(bad)


def test_bad_settings():
    with pytest.raises(InvalidData, match="latent_dim is 0"):
        VAE(D, 0)
    with pytest.raises(InvalidData, match="n is -1"):
        small_vae()[0].generate(-1)
