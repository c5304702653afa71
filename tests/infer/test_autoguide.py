# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
import copy
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact_pairs import Exact, circle, exact_nll, net
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.nn import PyroParam
from torch import nn
from torch.distributions import constraints

from pyro_cpa.distributions import CPAMarginal
from pyro_cpa.errors import UnsupportedModel
from pyro_cpa.infer import AutoCPAPosterior

NOISES = {"scalar": 0.4, "diagonal": [0.3, 0.6], "full": [[0.5, 0.0], [0.2, 0.3]]}


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("sizes", [(1, 6, 2), (2, 5, 2)])
@pytest.mark.parametrize("holes", [False, True])
def test_elbo_is_the_evidence_at_every_draw(noise, sizes, holes):
    model = Exact(*sizes, noise=NOISES[noise])
    x = circle(7)
    if holes:
        x[2, 0] = x[5] = torch.nan
    guide = AutoCPAPosterior(model, decoder=model.decoder)
    expected = exact_nll(model, x).sum().item()
    elbo = Trace_ELBO()
    for _ in range(4):
        assert abs(elbo.loss(model, guide, x) - expected) < 1e-10 * max(1, abs(expected))
    particles = Trace_ELBO(num_particles=5, vectorize_particles=True)
    assert abs(particles.loss(model, guide, x) - expected) < 1e-10 * max(1, abs(expected))
    torch.testing.assert_close(-guide.log_evidence(x).sum().item(), expected, rtol=1e-12, atol=1e-12)


def test_svi_step_returns_the_evidence_and_its_gradient_is_unbiased():
    model = Exact(1, 5, 2)
    x = circle(6)
    guide = AutoCPAPosterior(model, decoder=model.decoder)
    assert list(guide.parameters()) == []
    exact_nll(model, x).sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    draws = []
    elbo = Trace_ELBO(num_particles=500, vectorize_particles=True)
    for _ in range(20):
        elbo.loss_and_grads(model, guide, x)
        draws.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        model.zero_grad()
    draws = torch.stack(draws)
    error = draws.std(0) / len(draws) ** 0.5
    target = torch.cat([g.flatten() for g in expected])
    assert ((draws.mean(0) - target).abs() <= 5 * error + 1e-12).all()
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(3):
        before = exact_nll(model, x).sum().item()
        assert abs(svi.step(x) - before) < 1e-9


def test_parameters_in_the_store_and_float_noise():
    decoder = net(1, 5, 2)

    def model(x):
        pyro.module("decoder", decoder)
        sigma = pyro.param("sigma", torch.tensor(0.4), constraint=constraints.positive)
        loc = pyro.param("loc", torch.tensor([0.3]))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.MultivariateNormal(loc, torch.tensor([[1.7]])))
            pyro.sample("x", dist.MultivariateNormal(decoder(z), sigma**2 * torch.eye(2)), obs=x)

    x = circle(5)
    guide = AutoCPAPosterior(model, decoder=decoder)
    expected = CPAMarginal(
        decoder, 0.4, loc=torch.tensor([0.3]), prior_covariance=torch.tensor([[1.7]])
    ).log_prob(x)
    torch.testing.assert_close(guide.log_evidence(x), expected, rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad(guide.log_evidence(x).sum(), pyro.param("sigma").unconstrained())
    assert gradient != 0

    def fixed(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 0.4).to_event(1), obs=x)

    guide = AutoCPAPosterior(fixed, decoder=decoder)
    torch.testing.assert_close(
        guide.log_evidence(x), CPAMarginal(decoder, 0.4).log_prob(x), rtol=1e-12, atol=1e-12
    )


def test_subsampled_plates_agree_with_the_model():
    model = Exact(1, 6, 2, subsample_size=10)
    x = circle(40)
    guide = AutoCPAPosterior(model, decoder=model.decoder)
    nll = exact_nll(model, x)
    for elbo in (Trace_ELBO(), Trace_ELBO(num_particles=3, vectorize_particles=True)):
        assert elbo.differentiable_loss(model, guide, x).isfinite()
    # The minibatch that the guide draws is the one that the model sees.
    for _ in range(3):
        guide_trace = pyro.poutine.trace(guide).get_trace(x)
        index = guide_trace.nodes["data"]["value"]
        model_trace = pyro.poutine.trace(pyro.poutine.replay(model, trace=guide_trace)).get_trace(x)
        loss = guide_trace.log_prob_sum() - model_trace.log_prob_sum()
        torch.testing.assert_close(loss, 4 * nll[index].sum(), rtol=1e-10, atol=1e-10)

    def plates(x):
        return pyro.plate("data", len(x), subsample=torch.arange(5), dim=-1)

    model.subsample_size = 5
    guide = AutoCPAPosterior(model, decoder=model.decoder, create_plates=plates)
    torch.testing.assert_close(
        Trace_ELBO().loss(model, guide, x), 8 * nll[:5].sum().item(), rtol=1e-10, atol=1e-10
    )


def masked_model(decoder, kind):
    def model(x, keep):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            likelihood = dist.Normal(decoder(z), 0.4)
            if kind == "entries":
                pyro.sample("x", likelihood.mask(keep).to_event(1), obs=x)
            elif kind == "rows":
                pyro.sample("x", likelihood.to_event(1).mask(keep), obs=x)
            elif kind == "poutine":
                with pyro.poutine.mask(mask=keep):
                    pyro.sample("x", likelihood.to_event(1), obs=x)
            else:
                pyro.sample("x", likelihood.to_event(1), obs=x, obs_mask=keep)

    return model


@pytest.mark.parametrize("kind", ["entries", "rows", "poutine", "obs_mask"])
def test_masks_mean_missing(kind):
    decoder = net(1, 5, 2)
    x = circle(6)
    rows = torch.tensor([True, True, False, True, False, True])
    keep = torch.rand(6, 2) < 0.6 if kind == "entries" else rows
    model = masked_model(decoder, kind)
    holed = torch.where(keep if kind == "entries" else rows[:, None], x, torch.nan)
    expected = -CPAMarginal(decoder, 0.4).log_prob(holed)
    guide = AutoCPAPosterior(model, decoder=decoder)
    for _ in range(3):
        assert abs(Trace_ELBO().loss(model, guide, x, keep) - expected.sum().item()) < 1e-10
    torch.testing.assert_close(-guide.log_evidence(x, keep), expected, rtol=1e-12, atol=1e-12)


def test_a_mask_over_the_whole_plate():
    decoder, keep = net(1, 5, 2), torch.tensor([True, False, True])

    def model(x):
        with pyro.plate("data", len(x)), pyro.poutine.mask(mask=keep):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 0.4).to_event(1), obs=x)

    x = circle(3)
    guide = AutoCPAPosterior(model, decoder=decoder)
    expected = -CPAMarginal(decoder, 0.4).log_prob(x[keep]).sum().item()
    assert abs(Trace_ELBO().loss(model, guide, x) - expected) < 1e-10


@pytest.mark.parametrize("parallel", [False, True])
def test_predictive(parallel):
    model = Exact(2, 5, 3)
    x = CPAMarginal(model.decoder, 0.5).sample((4,)).detach()
    guide = AutoCPAPosterior(model, decoder=model.decoder)
    draws = Predictive(model, guide=guide, num_samples=100, parallel=parallel, return_sites=["z"])(x)["z"]
    error = draws.std(0) / 100**0.5
    assert ((draws.mean(0) - guide.posterior(x).mean).abs() < 5 * error).all()


def test_new_parameters_and_new_data_are_noticed():
    model = Exact(1, 5, 2)
    guide = AutoCPAPosterior(model, decoder=model.decoder)
    for n in (5, 9):
        x = circle(n)
        for _ in range(2):
            assert abs(Trace_ELBO().loss(model, guide, x) - exact_nll(model, x).sum().item()) < 1e-9
            partition = guide.partition()
            assert guide.partition() is partition
            model.decoder[0].weight.data.mul_(1.1)
            model.noise = model.noise.detach() * 0.9


def test_copies_and_pickles_are_independent_and_exact():
    model = Exact(1, 5, 2)
    guide = AutoCPAPosterior(model, decoder=model.decoder)
    x = circle(4)
    before = guide.log_evidence(x)
    twin_model, twin = copy.deepcopy((model, guide))
    assert twin.decoder is twin_model.decoder is not model.decoder
    torch.testing.assert_close(twin.log_evidence(x), before, rtol=0, atol=0)
    torch.testing.assert_close(guide.log_evidence(x), before, rtol=0, atol=0)
    loaded = pickle.loads(pickle.dumps(guide))
    torch.testing.assert_close(loaded.log_evidence(x), before, rtol=0, atol=0)


def test_median_quantiles_and_posterior():
    model = Exact(1, 5, 2)
    guide = AutoCPAPosterior(model, decoder=model.decoder)
    x = circle(5)
    z = guide.posterior(x).sample((20_000,))
    found = guide.quantiles([0.1, 0.9], x)["z"]
    assert found.shape == (2, 5, 1)
    for level, at in zip([0.1, 0.9], found, strict=True):
        assert (((z <= at).double().mean(0) - level).abs() < 5 * (0.09 / 20_000) ** 0.5).all()
    torch.testing.assert_close(guide.median(x)["z"], guide.quantiles([0.5], x)["z"][0])


decoder = net(1, 4, 2).double()


def two_latents(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        pyro.sample("w", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(decoder(z), 0.4).to_event(1), obs=x)


def bernoulli(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=(x > 0).double())


def other_mean(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(decoder(z).tanh(), 0.4).to_event(1), obs=x)


def laplace_prior(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Laplace(torch.zeros(1), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(decoder(z), 0.4).to_event(1), obs=x)


def heteroscedastic(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(decoder(z), 0.4 + torch.rand(len(x), 1)).to_event(1), obs=x)


def no_event(x):
    with pyro.plate("pixels", 2), pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0))
        pyro.sample("x", dist.Normal(z, 0.4), obs=x)


def nothing_observed(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(decoder(z), 0.4).to_event(1))


@pytest.mark.parametrize(
    "model, message",
    [
        (two_latents, "2 latent sites .'z', 'w'."),
        (bernoulli, "site 'x' is Bernoulli"),
        (other_mean, r"mean of site 'x' is not decoder\(z\)"),
        (laplace_prior, "site 'z' is Laplace"),
        (heteroscedastic, "scale of site 'x' differs from row to row"),
        (no_event, r"site 'z' has event shape \(\)"),
        (nothing_observed, "2 latent sites"),
    ],
)
def test_models_without_an_exact_posterior_are_refused_by_site(model, message):
    with pytest.raises(UnsupportedModel, match=message):
        AutoCPAPosterior(model, decoder=decoder)(circle(4))


def test_a_param_with_a_transformation_is_still_exact():
    model = Exact(1, 4, 2)
    model.noise = PyroParam(torch.tensor(-1.0))
    model.likelihood = lambda mean: dist.Normal(mean, nn.functional.softplus(model.noise)).to_event(1)
    x = circle(4)
    guide = AutoCPAPosterior(model, decoder=model.decoder)
    scale = nn.functional.softplus(torch.tensor(-1.0)).item()
    torch.testing.assert_close(guide.log_evidence(x), CPAMarginal(model.decoder, scale).log_prob(x))
