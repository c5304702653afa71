# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""The exact mixture generator against quadrature, and its fits."""

import pyro
import pytest
import torch
from line_quadrature import between_kinks, hidden_kinks
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam

from pyro_cpa.errors import InvalidData
from pyro_cpa.infer import TVO, BiHelmholtzELBO, ImportanceWeightedELBO, LogUniform
from pyro_cpa.models import CPAGenerator, MixtureCPAGenerator, cluster_accuracy

C, D, N = 3, 2, 6
EXACT = {"rtol": 1e-9, "atol": 1e-9}


def mixture(noise="diagonal", seed=0, hidden_dims=(5,), data_dim=D):
    torch.manual_seed(seed)
    model = MixtureCPAGenerator(
        data_dim,
        C,
        hidden_dims=hidden_dims,
        noise=noise,
        noise_scale=0.5,
        label_probs=torch.tensor([0.5, 0.3, 0.2]),
    )
    for parameter in model.decoders.parameters():
        torch.nn.init.normal_(parameter)
    model.prior_scale = 0.4 + torch.rand(C, 1)
    return model


def data():
    x = torch.randn(N, D) * 2
    x[1, 0], x[4] = torch.nan, torch.nan
    return x


@torch.no_grad()
def log_joint(model, quadrature, x):
    """(Q, N, C) log of weight times p(x_n, y, z), written by hand."""
    z = quadrature.z
    prior = torch.distributions.Normal(model.prior_loc[:, 0], model.prior_scale[:, 0]).log_prob(z)
    likelihood = model.likelihood(model.decoders[0](z)[:, None]).log_prob(x)
    joint = likelihood[..., None] + (prior + model.label_probs.log())[:, None]
    return joint + quadrature.log_weight[..., None]


@pytest.mark.parametrize("noise", ["scalar", "diagonal", "full"])
def test_everything_is_that_of_quadrature(noise):
    model, x = mixture(noise), data()
    quadrature = between_kinks(hidden_kinks(model.decoders[0][0]))
    joint = log_joint(model, quadrature, x)
    torch.testing.assert_close(model.log_prob(x).detach(), joint.logsumexp((0, 2)), **EXACT)
    torch.testing.assert_close(model.class_probs(x), joint.logsumexp(0).softmax(-1), **EXACT)
    assert torch.equal(model.cluster(x), joint.logsumexp(0).argmax(-1))
    of_z = joint.logsumexp(-1)
    weights = of_z.softmax(0).T
    posterior = model.posterior(x)
    mean = weights @ quadrature.z
    torch.testing.assert_close(posterior.mean, mean, **EXACT)
    torch.testing.assert_close(posterior.variance, weights @ quadrature.z**2 - mean**2, **EXACT)
    density = posterior.log_prob(quadrature.z[:, None].expand(-1, N, 1))
    torch.testing.assert_close(density + quadrature.log_weight, of_z - of_z.logsumexp(0), **EXACT)
    decoded = weights @ model.decoders[0](quadrature.z).detach()
    filled = model.impute(x)
    assert torch.equal(filled[~x.isnan()], x[~x.isnan()])
    if noise != "full":
        torch.testing.assert_close(filled[x.isnan()], decoded[x.isnan()], **EXACT)
    component = model.component(quadrature.z).probs
    torch.testing.assert_close(component, joint[:, 0].softmax(-1), **EXACT)


def test_posterior_draws_follow_the_exact_posterior():
    posterior = mixture().posterior(data())
    draws = posterior.sample((6000,))
    assert draws.shape == (6000, N, 1)
    assert ((draws.mean(0) - posterior.mean).abs() < 5 * (posterior.variance / 6000).sqrt()).all()
    spread = (draws - posterior.mean).square()
    assert ((spread.mean(0) - posterior.variance).abs() < 5 * spread.std(0) / 6000**0.5).all()
    wide = posterior.expand((2, N))
    assert wide.sample((3,)).shape == (3, 2, N, 1) and wide.mean.shape == (2, N, 1)
    assert wide.log_prob(draws[0]).shape == (2, N)


BOUNDS = {
    "elbo": Trace_ELBO,
    "particles": lambda: Trace_ELBO(num_particles=4, vectorize_particles=True),
    "iwae": lambda: ImportanceWeightedELBO(num_particles=4, estimator="vimco"),
    "tvo": lambda: TVO(num_particles=4, schedule=LogUniform(3, beta_1=0.1)),
    "bihm": lambda: BiHelmholtzELBO(num_particles=4),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_guide_makes_every_draw_the_evidence(name):
    model, x = mixture(), data()
    truth = -model.log_prob(x).sum().item()
    for _ in range(2):
        assert BOUNDS[name]().loss(model.model, model.guide, x) == pytest.approx(truth, abs=1e-9)
    batch = BOUNDS[name]().loss(model.model, model.guide, x, size=5 * N)
    assert batch == pytest.approx(5 * truth, abs=1e-8)


def test_all_components_share_one_partition():
    marginals = mixture().marginals()
    assert len(marginals) == C and all(m.partition is marginals[0].partition for m in marginals)


def test_one_component_is_the_generator_with_a_learned_prior():
    torch.manual_seed(1)
    model, x = MixtureCPAGenerator(D, 1, hidden_dims=(5,), noise_scale=0.5), data()
    plain = CPAGenerator(D, hidden_dims=(5,), noise_scale=0.5, learn_prior=True)
    plain.decoder.load_state_dict(model.decoders[0].state_dict())
    plain.prior_loc, plain.prior_scale_tril = model.prior_loc.detach()[0], model.prior_scale.detach()
    torch.testing.assert_close(model.log_prob(x), plain.log_prob(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model.encode(x), plain.encode(x), rtol=1e-12, atol=1e-12)


def test_gradient_is_that_of_finite_differences():
    model, x = mixture(), data()
    parameters = list(model.parameters())
    for parameter, gradient in zip(
        parameters, torch.autograd.grad(model.log_prob(x).sum(), parameters), strict=True
    ):
        step, flat = 1e-5, parameter.data.view(-1)
        flat[0] += step
        up = model.log_prob(x).sum().item()
        flat[0] -= 2 * step
        difference = (up - model.log_prob(x).sum().item()) / (2 * step)
        flat[0] += step
        assert gradient.reshape(-1)[0].item() == pytest.approx(difference, abs=1e-6)


def three_groups(n=90):
    y = torch.arange(n) % 3
    centre = torch.tensor([[-3.0, 1.0], [0.0, 0.0], [3.0, 1.0]])
    return centre[y] + 0.4 * torch.randn(n, D), y


@pytest.mark.parametrize("noise", ["scalar", "diagonal", "full"])
def test_em_is_monotone_with_gaps(noise):
    torch.manual_seed(3)
    x, _ = three_groups()
    x[::7, 0] = torch.nan
    model = mixture(noise)
    losses = [model.em_step(x) for _ in range(25)]
    assert all(b <= a + 1e-9 for a, b in zip(losses, losses[1:], strict=False))
    assert losses[-1] < losses[0] - 50
    assert -model.log_prob(x).sum().item() <= losses[-1] + 1e-9


def test_em_ends_where_the_gradient_vanishes():
    """Without hidden layers every parameter has its M-step."""
    torch.manual_seed(4)
    y = torch.arange(120) % 2
    x = (
        torch.tensor([[-3.0, 2.0, 1.0], [2.0, -2.0, 0.0]])[y]
        + torch.randn(120, 1) * 0.5
        + 0.5 * torch.randn(120, 3)
    )
    model = MixtureCPAGenerator(3, 2, hidden_dims=())
    steepest = []
    for _ in range(150):
        model.em_step(x)
        gradients = torch.autograd.grad(model.log_prob(x).sum(), list(model.parameters()))
        steepest.append(max(gradient.abs().max().item() for gradient in gradients))
    assert steepest[-1] < 0.015 * steepest[0]
    counts = torch.bincount(model.cluster(x), minlength=2) / 120
    torch.testing.assert_close(counts, model.label_probs.detach(), atol=0.02, rtol=0)


@pytest.mark.parametrize("method", ["em", "ml", "em+lbfgs"])
def test_fits_never_fall_and_end_at_the_exact_evidence(method):
    torch.manual_seed(3)
    x, y = three_groups()
    model = mixture()
    before = model.log_prob(x).sum().item()
    history = model.fit(x, method, num_steps=25)
    assert history[0] == pytest.approx(before, rel=1e-12)
    assert all(b >= a - 1e-9 for a, b in zip(history, history[1:], strict=False))
    assert history[-1] > before + 50
    assert history[-1] == pytest.approx(model.log_prob(x).sum().item(), rel=1e-12)
    if method == "em+lbfgs":
        assert cluster_accuracy(model.cluster(x), y)[0] > 0.6
        assert (model.reconstruct(x) - x).square().mean() < x.var(0).mean()


def test_trains_under_svi():
    torch.manual_seed(3)
    (x, _), model = three_groups(45), mixture()
    svi = SVI(model.model, model.guide, Adam({"lr": 0.03}), Trace_ELBO())
    losses = [svi.step(x) for _ in range(25)]
    assert losses[-1] < losses[0] - 20


def test_generation_follows_the_exact_marginal_and_clusters():
    model = mixture()
    marginals = model.marginals()
    sample = model.generate(8000)
    mean = sum(p * m.mean for p, m in zip(model.label_probs, marginals, strict=True)).detach()
    assert ((sample.mean(0) - mean).abs() < 5 * (sample.var(0) / 8000).sqrt()).all()
    one = model.generate(4000, y=2, mode="mean")
    assert ((one.mean(0) - marginals[2].mean).abs() < 5 * (one.var(0) / 4000).sqrt()).all()


def test_state_dict_keeps_the_density():
    model, x = mixture(), data()
    fresh = MixtureCPAGenerator(D, C, hidden_dims=(5,))
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(fresh.log_prob(x), model.log_prob(x), rtol=1e-14, atol=0)
    assert fresh.decoders[2] is fresh.decoders[0]
    pyro.clear_param_store()


def test_errors():
    model = mixture()
    with pytest.raises(InvalidData, match="choose 'em', 'ml'"):
        model.fit(data(), "adam")
    with pytest.raises(InvalidData, match="expected noise"):
        constant = torch.randn(20, D)
        constant[:, 1] = 2.0
        for _ in range(3000):
            model.em_step(constant)
    with pytest.raises(InvalidData, match="num_classes"):
        MixtureCPAGenerator(D, 0)
