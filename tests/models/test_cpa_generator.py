# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""The exact generator against quadrature, its fits, missing entries, and life as a module."""

import copy
import pickle

import pyro
import pytest
import torch
from line_quadrature import between_kinks, hidden_kinks, log_joint, moments
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam
from torch import nn

from pyro_cpa.errors import InvalidData, UnsupportedModule
from pyro_cpa.infer import ImportanceWeightedELBO
from pyro_cpa.models import CPAGenerator

D, N = 3, 6
KINDS = [("scalar", False), ("diagonal", True), ("full", True), ("full", False)]


def generator(noise="diagonal", learn_prior=False, seed=0, **kwargs):
    """Away from its start in every parameter."""
    torch.manual_seed(seed)
    model = CPAGenerator(D, hidden_dims=(6,), noise=noise, learn_prior=learn_prior, **kwargs)
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.normal_()
        if noise == "full":
            model.likelihood.scale_tril = (0.4 + 0.2 * torch.rand(D, D)).tril()
        else:
            model.likelihood.scale = 0.4 + 0.2 * torch.rand(model.likelihood.scale.shape)
        if learn_prior:
            model.prior_loc, model.prior_scale_tril = torch.tensor([0.7]), torch.tensor([[1.3]])
    return model


def gaps(x):
    x = x.clone()
    x[0, 1], x[1, :2], x[2] = torch.nan, torch.nan, torch.nan
    return x


@pytest.mark.parametrize("noise, learn_prior", KINDS)
def test_evidence_posterior_and_imputation_are_those_of_quadrature(noise, learn_prior):
    model = generator(noise, learn_prior)
    x = gaps(torch.randn(N, D) * 2)
    quadrature = between_kinks(hidden_kinks(model.decoder[0]))
    joint = log_joint(model.model, quadrature, x)
    exact = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(model.log_prob(x).detach(), joint.logsumexp(0), **exact)
    torch.testing.assert_close(model.guide.log_evidence(x).detach(), joint.logsumexp(0), **exact)
    found = model.log_evidence(x, num_particles=7)
    assert found.exact and torch.equal(found.log_prob, model.log_prob(x).detach())
    assert (found.standard_error == 0).all() and (found.ess == 7).all()
    mean = moments(joint, quadrature.z)
    torch.testing.assert_close(model.encode(x), mean, **exact)
    torch.testing.assert_close(
        model.posterior(x).variance, moments(joint, quadrature.z**2) - mean**2, **exact
    )
    torch.testing.assert_close(model.reconstruct(x), model.decoder(mean).detach(), **exact)
    filled = model.impute(x)
    assert torch.equal(filled[~x.isnan()], x[~x.isnan()])
    output = moments(joint, model.decoder(quadrature.z).detach())
    if noise != "full":
        torch.testing.assert_close(filled[x.isnan()], output[x.isnan()], **exact)
    else:  # the noise of the observed entry speaks of the missing ones
        S = model.likelihood.covariance_matrix.detach()
        expected = output[1, :2] + S[:2, 2] / S[2, 2] * (x[1, 2] - output[1, 2])
        torch.testing.assert_close(filled[1, :2], expected, **exact)


@pytest.mark.parametrize("noise, learn_prior", KINDS)
def test_guide_makes_every_draw_the_evidence_and_minibatches_count_for_all(noise, learn_prior):
    model, x = generator(noise, learn_prior), gaps(torch.randn(N, D))
    truth = -model.log_prob(x).sum().item()
    bounds = [Trace_ELBO(), Trace_ELBO(num_particles=4, vectorize_particles=True)]
    for elbo in [*bounds, ImportanceWeightedELBO(num_particles=4, estimator="score")]:
        assert elbo.loss(model.model, model.guide, x) == pytest.approx(truth, abs=1e-10)
        assert elbo.loss(model.model, model.guide, x, size=10 * N) == pytest.approx(10 * truth, abs=1e-9)


def test_imputation_draws_follow_the_exact_conditional():
    model, x = generator("full"), gaps(torch.randn(N, D))
    draws = model.impute(x, num_draws=4000)
    assert draws.shape == (4000, N, D)
    assert torch.equal(draws[:, ~x.isnan()], x[~x.isnan()].expand(4000, -1))
    error = (draws.mean(0) - model.impute(x)) / (draws.std(0) / 4000**0.5)
    assert (error[x.isnan()].abs() < 5).all()


def test_generation_follows_the_exact_marginal():
    model = generator("diagonal", True)
    draws, means = model.generate(20_000), model.generate(20_000, mode="mean")
    px = model.marginal()
    for sample in (draws, means):
        assert ((sample.mean(0) - px.mean).abs() < 5 * (sample.var(0) / 20_000).sqrt()).all()
    spread = (draws - px.mean).square()
    assert ((spread.mean(0) - px.variance).abs() < 5 * spread.std(0) / 20_000**0.5).all()
    within = (means - px.mean).square() + model.likelihood.scale.detach() ** 2
    assert ((within.mean(0) - px.variance).abs() < 5 * within.std(0) / 20_000**0.5).all()


def circle(n=60):
    angle = 2 * torch.pi * torch.rand(n)
    return torch.stack([angle.cos(), angle.sin(), 0.5 * angle.cos()], -1) + 0.1 * torch.randn(n, D)


@pytest.mark.parametrize("method", ["em", "em+lbfgs", "ml"])
@pytest.mark.parametrize("noise, learn_prior", [("scalar", True), ("full", False)])
def test_fits_never_fall_and_report_the_exact_evidence(method, noise, learn_prior):
    torch.manual_seed(2)
    x = gaps(circle())
    model = CPAGenerator(D, hidden_dims=(4,), noise=noise, learn_prior=learn_prior)
    before = model.log_prob(x).sum().item()
    history = model.fit(x, method, num_steps=11, tol=0.0)
    rises = [r.log_evidence for r in history]
    assert all(b >= a - 1e-7 for a, b in zip([before, *rises], rises, strict=False))
    assert rises[-1] > before + 20
    assert rises[-1] == pytest.approx(model.log_prob(x).sum().item(), rel=1e-10)
    assert not learn_prior or model.prior_loc.item() != 0


def test_fixed_noise_stays_and_ridge_shrinks():
    torch.manual_seed(2)
    x = circle()
    model = CPAGenerator(D, hidden_dims=(4,), noise_scale=0.3, learn_noise=False)
    free = copy.deepcopy(model)
    model.fit(x, num_steps=10, ridge=10.0)
    free.fit(x, num_steps=10)
    assert (model.likelihood.scale == 0.3).all()
    norms = [sum(w.square().sum() for w in (m.decoder[0].weight, m.decoder[2].weight)) for m in (model, free)]
    assert norms[0] < norms[1]


def test_gradient_of_log_prob_trains_under_svi():
    torch.manual_seed(3)
    x, model = circle(), CPAGenerator(D, hidden_dims=(4,))
    svi = SVI(model.model, model.guide, Adam({"lr": 0.03}), Trace_ELBO())
    losses = [svi.step(x) for _ in range(40)]
    assert losses[-1] < losses[0] - 20
    assert losses[-1] > svi.evaluate_loss(x) - 20 and -model.log_prob(x).sum().item() < losses[0]


def test_fits_of_two_models_do_not_meet():
    """Neither the store's content nor the other model changes, and the second fit is that of a fresh process."""
    torch.manual_seed(4)
    x, y = circle(), circle() * 3
    first, second = (CPAGenerator(D, hidden_dims=(4,)) for _ in range(2))
    alone = copy.deepcopy(second)
    first.fit(x, num_steps=3)
    kept = first.log_prob(x).detach()
    records = second.fit(y, num_steps=3)
    assert torch.equal(first.log_prob(x).detach(), kept)
    assert [r.log_evidence for r in alone.fit(y, num_steps=3)] == [r.log_evidence for r in records]
    assert len(pyro.get_param_store()) == 0


@pytest.mark.parametrize("noise, learn_prior", KINDS)
def test_state_dict_copy_and_pickle_keep_the_density(noise, learn_prior):
    model, x = generator(noise, learn_prior), torch.randn(N, D)
    truth = model.log_prob(x)
    fresh = CPAGenerator(D, hidden_dims=(6,), noise=noise, learn_prior=learn_prior)
    assert not torch.allclose(fresh.log_prob(x), truth)
    fresh.load_state_dict(model.state_dict())
    for other in (fresh, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.log_prob(x), truth)
        other.decoder[0].weight.data.add_(1.0)
        assert not torch.allclose(other.guide.log_evidence(x), truth)
        assert torch.equal(model.log_prob(x), truth)
        pyro.clear_param_store()


def test_two_latent_dimensions_and_a_decoder_of_one_s_own():
    torch.manual_seed(5)
    decoder = nn.Sequential(nn.Linear(2, 4), nn.LeakyReLU(0.1), nn.Linear(4, D))
    model, x = CPAGenerator(D, 2, decoder=decoder), torch.randn(N, D)
    assert model.decoder is decoder and model.encode(x).shape == (N, 2)
    truth = -model.log_prob(x).sum().item()
    assert Trace_ELBO().loss(model.model, model.guide, x) == pytest.approx(truth, abs=1e-9)
    assert model.posterior(x).region_probs.shape[1] == model.guide.partition().num_regions > 4


def test_single_precision_in_and_out():
    model = generator().float()
    x = torch.randn(N, D, dtype=torch.float32)
    for found in (model.log_prob(x), model.encode(x), model.impute(gaps(x)), model.generate(2)):
        assert found.dtype == torch.float32
    torch.testing.assert_close(
        model.log_prob(x), model.double().log_prob(x.double()).float(), rtol=1e-5, atol=1e-5
    )


def test_errors():
    model = generator()
    with pytest.raises(UnsupportedModule, match="Tanh"):
        CPAGenerator(D, activation=nn.Tanh)
    with pytest.raises(InvalidData, match="R\\^1 to R\\^2"):
        CPAGenerator(D, decoder=nn.Linear(1, 2))
    with pytest.raises(InvalidData, match="'diagonal'"):
        CPAGenerator(D, noise="spherical")
    for scale in (0.0, float("nan"), torch.ones(2)):
        with pytest.raises(InvalidData, match="expected a positive number"):
            CPAGenerator(D, noise_scale=scale)
    for size in ({"data_dim": 0}, {"data_dim": D, "latent_dim": -1}):
        with pytest.raises(InvalidData, match="positive integer"):
            CPAGenerator(**size)
    with pytest.raises(InvalidData, match="'em\\+lbfgs'"):
        model.fit(torch.randn(N, D), "sgd")
    with pytest.raises(InvalidData, match="finite"):
        model.encode(torch.full((2, D), torch.inf))
    with pytest.raises(InvalidData, match="expected a tensor of shape"):
        model.model(torch.randn(N, D + 1))
    with pytest.raises(InvalidData, match="'mean'"):
        model.generate(2, mode="mode")
    with pytest.raises(InvalidData, match="num_draws"):
        model.impute(torch.randn(N, D), num_draws=0)
