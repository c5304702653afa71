# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""The exact conditional generator against quadrature, the conditional VAE and the generator without a label."""

import pyro
import pytest
import torch
from line_quadrature import between_kinks, hidden_kinks, log_joint, moments
from pyro.infer import Trace_ELBO

from pyro_cpa.errors import InvalidData, UnsupportedModule
from pyro_cpa.infer import ImportanceWeightedELBO
from pyro_cpa.models import ConditionalCPAGenerator, ConditionalVAE, CPAGenerator, Normal

C, D, N = 3, 2, 7
PLACES = ["prior", "decoder", "both"]
EXACT = {"rtol": 1e-9, "atol": 1e-9}


def generator(label_in="both", noise="diagonal", seed=0):
    torch.manual_seed(seed)
    model = ConditionalCPAGenerator(
        D,
        C,
        label_in=label_in,
        hidden_dims=(5,),
        noise=noise,
        noise_scale=0.5,
        label_probs=torch.tensor([0.5, 0.3, 0.2]),
    )
    for parameter in model.decoders.parameters():
        torch.nn.init.normal_(parameter)
    if label_in != "decoder":
        model.prior_scale = 0.5 + torch.rand(C, 1)
    return model


def data():
    x = torch.randn(N, D) * 2
    x[1, 0], x[4] = torch.nan, torch.nan
    return x, torch.arange(N) % C


def quadrature_of(model):
    return between_kinks(torch.cat([hidden_kinks(decoder[0]) for decoder in model.decoders]))


@pytest.mark.parametrize("noise", ["scalar", "full"])
@pytest.mark.parametrize("label_in", PLACES)
def test_everything_is_that_of_quadrature(label_in, noise):
    model, (x, y), exact = generator(label_in, noise), data(), EXACT
    quadrature = quadrature_of(model)
    every = torch.stack([log_joint(model.model, quadrature, x, c) for c in range(C)])  # (C, Q, N)
    given = every.logsumexp(1).T
    torch.testing.assert_close(model.log_prob(x, y).detach(), given[torch.arange(N), y], **exact)
    for c in range(C):
        torch.testing.assert_close(model.log_prob(x, c).detach(), given[:, c], **exact)
    joint = given + torch.tensor([0.5, 0.3, 0.2]).log()
    torch.testing.assert_close(model.log_prob(x).detach(), joint.logsumexp(-1), **exact)
    torch.testing.assert_close(model.class_probs(x), joint.softmax(-1), **exact)
    assert torch.equal(model.classify(x), joint.argmax(-1))
    own = every[y, :, torch.arange(N)].T
    mean = moments(own, quadrature.z)
    torch.testing.assert_close(model.encode(x, y), mean, **exact)
    variance = moments(own, quadrature.z**2) - mean**2
    torch.testing.assert_close(model.posterior(x, y).variance, variance, **exact)
    summed = (every + torch.tensor([0.5, 0.3, 0.2]).log()[:, None, None]).logsumexp(0)
    torch.testing.assert_close(model.encode(x), moments(summed, quadrature.z), **exact)
    found = model.log_evidence(x, y)
    assert found.exact and torch.equal(found.log_prob, model.log_prob(x, y).detach())


@pytest.mark.parametrize("label_in", PLACES)
def test_guide_makes_every_draw_the_evidence(label_in):
    model, (x, y) = generator(label_in), data()
    truth = -model.log_prob(x, y).sum().item()
    particles = Trace_ELBO(num_particles=4, vectorize_particles=True)
    for elbo in (Trace_ELBO(), particles, ImportanceWeightedELBO(num_particles=4, estimator="score")):
        assert elbo.loss(model.model, model.guide, x, y) == pytest.approx(truth, abs=1e-9)
        assert elbo.loss(model.model, model.guide, x, y, size=5 * N) == pytest.approx(5 * truth, abs=1e-8)


def test_label_shifts_the_first_layer_as_an_input_beside_z_would():
    """The exact Gaussian version of a conditional VAE: same decoder, whose own estimate agrees."""
    x, y = torch.randn(N, D), torch.arange(N) % C
    vae = ConditionalVAE(D, C, 1, label_in="decoder", hidden_dims=(5,), likelihood=Normal(0.8), dropout=0.0)
    for parameter in vae.networks.decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    model = ConditionalCPAGenerator(
        D, C, label_in="decoder", hidden_dims=(5,), noise="scalar", noise_scale=0.8
    )
    first, last = vae.networks.decoder[0], vae.networks.decoder[2]
    with torch.no_grad():
        for c, decoder in enumerate(model.decoders):
            decoder[0].weight.copy_(first.weight[:, C:])
            decoder[0].bias.copy_(first.bias + first.weight[:, c])
        model.decoders[0][2].load_state_dict(last.state_dict())
    z = torch.randn(N, 1)
    torch.testing.assert_close(model.decode(z, y), vae.decode(z, y), rtol=1e-12, atol=1e-12)
    truth = model.log_evidence(x, y).log_prob
    estimate = vae.log_evidence(x, y, num_particles=5000)
    assert (estimate.ess > 50).all()
    error = estimate.log_prob - truth
    assert (error.abs() < 5 * estimate.standard_error + estimate.standard_error**2).all()


@pytest.mark.parametrize("label_in", PLACES)
def test_label_without_effect_gives_the_generator_without_label(label_in):
    model, (x, y) = generator(label_in), data()
    plain = CPAGenerator(D, hidden_dims=(5,), noise_scale=0.5)
    plain.decoder.load_state_dict(model.decoders[0].state_dict())
    for decoder in model.decoders:
        decoder[0].bias.data.copy_(plain.decoder[0].bias)
    if label_in != "decoder":
        model.prior_loc, model.prior_scale = torch.zeros(C, 1), torch.ones(C, 1)
    truth = plain.log_prob(x)
    exact = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(model.log_prob(x, y), truth, **exact)
    torch.testing.assert_close(model.log_prob(x), truth, **exact)
    torch.testing.assert_close(model.class_probs(x), torch.tensor([0.5, 0.3, 0.2]).expand(N, C), **exact)
    torch.testing.assert_close(model.encode(x), plain.encode(x), **exact)
    torch.testing.assert_close(model.impute(x), plain.impute(x), **exact)
    torch.testing.assert_close(model.impute(x, y), plain.impute(x), **exact)


@pytest.mark.parametrize("label_in", PLACES)
def test_gradient_is_that_of_finite_differences(label_in):
    model, (x, y) = generator(label_in), data()
    for log_prob in (lambda: model.log_prob(x, y).sum(), lambda: model.log_prob(x).sum()):
        parameters = [p for p in model.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(log_prob(), parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            step, flat = 1e-5, parameter.data.view(-1)
            flat[0] += step
            up = log_prob().item()
            flat[0] -= 2 * step
            difference = (up - log_prob().item()) / (2 * step)
            flat[0] += step
            found = 0.0 if gradient is None else gradient.reshape(-1)[0].item()
            assert found == pytest.approx(difference, abs=1e-6)


@pytest.mark.parametrize("label_in", PLACES)
def test_fit_climbs_and_classifies(label_in):
    torch.manual_seed(6)
    y = torch.arange(90) % C
    x = 0.3 * torch.randn(90, D) + torch.tensor([[0.0, 0.0], [2.0, 0.0], [2.0, 2.0]])[y]
    model = ConditionalCPAGenerator(D, C, label_in=label_in, hidden_dims=(5,))
    history = model.fit(x[:80], y[:80], num_steps=40)
    assert history == sorted(history) and history[-1] > history[0] + 40
    assert history[-1] == pytest.approx(model.log_prob(x[:80], y[:80]).sum().item(), rel=1e-12)
    torch.testing.assert_close(model.label_probs, torch.bincount(y[:80]) / 80)
    assert (model.classify(x[80:]) == y[80:]).double().mean() >= 0.9
    error = (model.reconstruct(x, y) - x).square().mean()
    assert error < 0.3 * x.var(0).mean()


def test_generation_follows_the_label():
    model = generator("both")
    marginals = model.marginals()
    for c in range(C):
        sample = model.generate(5000, y=c)
        assert ((sample.mean(0) - marginals[c].mean).abs() < 5 * (sample.var(0) / 5000).sqrt()).all()
    mixed = model.generate(8000)
    mean = sum(p * m.mean for p, m in zip(model.label_probs, marginals, strict=True)).detach()
    assert ((mixed.mean(0) - mean).abs() < 5 * (mixed.var(0) / 8000).sqrt()).all()


@pytest.mark.parametrize("label_in", PLACES)
def test_state_dict_keeps_the_density_and_the_shared_weights(label_in):
    model, (x, y) = generator(label_in), data()
    fresh = ConditionalCPAGenerator(D, C, label_in=label_in, hidden_dims=(5,))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh.log_prob(x, y), model.log_prob(x, y))
    first = fresh.decoders[0]
    for decoder in fresh.decoders:
        assert decoder[0].weight is first[0].weight and decoder[2] is first[2]
        assert (decoder is first) == (label_in == "prior" or decoder is fresh.decoders[0])
    pyro.clear_param_store()


def test_errors():
    model, (x, y) = generator(), data()
    for bad in (
        torch.full((N,), C),
        torch.full((N,), -1),
        torch.zeros(N - 1, dtype=torch.long),
        torch.full((N,), 0.5),
    ):
        with pytest.raises(InvalidData, match="label"):
            model.log_prob(x, bad)
    with pytest.raises(InvalidData, match="label_in"):
        ConditionalCPAGenerator(D, C, label_in="nowhere")
    for probs in (torch.ones(C), torch.tensor([1.0, 0.0, 0.0]), torch.ones(2) / 2):
        with pytest.raises(InvalidData, match="label_probs"):
            ConditionalCPAGenerator(D, C, label_probs=probs)
    with pytest.raises(InvalidData, match="no row has label \\[2\\]"):
        model.fit(x, torch.arange(N) % 2)
    with pytest.raises(UnsupportedModule, match="Tanh"):
        ConditionalCPAGenerator(D, C, activation=torch.nn.Tanh).log_prob(x, y)
