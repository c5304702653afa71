# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Factor analysis three ways: dense Gaussian algebra, closed forms, and the piecewise-affine machinery."""

import pyro
import pytest
import torch
from pyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.optim import Adam
from torch.distributions import MultivariateNormal

from pyro_cpa.datasets import factor_analysis_toy
from pyro_cpa.distributions.fisher import expected_statistics
from pyro_cpa.errors import InvalidData
from pyro_cpa.infer import (
    EM,
    TVO,
    AlternatingTrainer,
    AnalyticELBO,
    BiHelmholtzELBO,
    ImportanceWeightedELBO,
    LogUniform,
    ReweightedWakeSleepELBO,
    m_step,
)
from pyro_cpa.models import PPCA, FactorAnalysis, LinearGuide

N = 30
KINDS = [(FactorAnalysis, 5, 1), (FactorAnalysis, 5, 2), (FactorAnalysis, 6, 4), (PPCA, 5, 2), (PPCA, 3, 2)]


def fitted(kind, D, L, seed=0, **kwargs):
    """A model away from its start, and data of its own size."""
    torch.manual_seed(seed)
    model = kind(D, L, noise_scale=0.7, **kwargs)
    with torch.no_grad():
        model.decoder.weight.normal_()
        if model.decoder.bias is not None:
            model.decoder.bias.normal_()
        if kind is FactorAnalysis:
            model.likelihood.scale = 0.3 + torch.rand(D)
    return model, torch.randn(N, D) @ torch.randn(D, D) + torch.randn(D)


def with_gaps(x):
    x = x.clone()
    x[torch.rand(x.shape) < 0.3] = torch.nan
    x[0] = torch.nan
    return x


@pytest.mark.parametrize("kind, D, L", KINDS)
def test_closed_forms_are_dense_gaussian_algebra(kind, D, L):
    model, x = fitted(kind, D, L)
    W = model.loadings.detach()
    covariance = (W @ W.T + torch.diag(model.likelihood.scale.expand(D) ** 2)).detach()
    # Not bit by bit: on some processors W W' is not symmetric to the last digit.
    torch.testing.assert_close(model.covariance_matrix, covariance.T, rtol=1e-14, atol=1e-14)
    truth = MultivariateNormal(model.mean.detach(), covariance).log_prob(x)
    torch.testing.assert_close(model.log_prob(x), truth, rtol=1e-12, atol=1e-12)
    gain = W.T @ covariance.inverse()
    posterior = model.posterior(x)
    torch.testing.assert_close(posterior.mean, (x - model.mean) @ gain.T, rtol=1e-11, atol=1e-11)
    dense = (torch.eye(L) - gain @ W).expand(N, L, L)
    torch.testing.assert_close(posterior.covariance_matrix, dense, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("kind, D, L", KINDS)
def test_machinery_with_one_region_gives_the_closed_forms(kind, D, L, gaps):
    model, x = fitted(kind, D, L)
    x = with_gaps(x) if gaps else x
    exact = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(model.log_prob(x), model.marginal().log_prob(x), **exact)
    torch.testing.assert_close(model.log_evidence(x).log_prob, model.guide.log_evidence(x), **exact)
    closed, machine = model.posterior(x), model.guide.posterior(x)
    assert machine.region_probs.shape == (N, 1)
    torch.testing.assert_close(closed.mean, machine.mean, **exact)
    torch.testing.assert_close(closed.covariance_matrix, machine.covariance_matrix, **exact)
    torch.testing.assert_close(closed.entropy(), machine.entropy(), **exact)


def test_small_noise_costs_no_digits():
    """As small as lets the dense covariance still be inverted to 1e-6."""
    model, x = fitted(FactorAnalysis, 5, 2)
    model.likelihood.scale = torch.full((5,), 1e-5)
    torch.testing.assert_close(model.log_prob(x), model.marginal().log_prob(x), rtol=1e-9, atol=0)
    with torch.no_grad():
        close = model.decoder(torch.randn(N, 2)) + 1e-5 * torch.randn(N, 5)
    torch.testing.assert_close(model.log_prob(close), model.marginal().log_prob(close), rtol=1e-9, atol=0)


def test_log_prob_has_the_gradient_of_the_dense_density():
    model, x = fitted(FactorAnalysis, 5, 2)
    parameters = list(model.parameters())
    ours = torch.autograd.grad(model.log_prob(x).sum(), parameters)
    dense = MultivariateNormal(model.mean, model.covariance_matrix).log_prob(x).sum()
    for a, b in zip(ours, torch.autograd.grad(dense, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("learn_mean", [True, False])
@pytest.mark.parametrize("kind", [FactorAnalysis, PPCA])
def test_em_step_is_the_m_step_of_the_machinery(kind, learn_mean):
    model, x = fitted(kind, 5, 2, learn_mean=learn_mean)
    joint = model.guide.joint(model.guide.problem(x))
    log_prob, statistics = expected_statistics(joint, x)
    weight, bias, _ = m_step.output_layer(joint.partition, statistics, joint.noise.scale, 0.0)
    before = model.em_step(x)
    assert before == pytest.approx(-log_prob.sum().item(), rel=1e-12)
    exact = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(model.loadings.detach(), weight, **exact)
    assert (bias is None) is not learn_mean
    torch.testing.assert_close(model.mean.detach(), torch.zeros(5) if bias is None else bias, **exact)
    slopes, offsets = (item.detach() for item in joint.partition.affine_maps())
    variance = statistics.residual(slopes, offsets) / statistics.count
    variance = variance.mean().expand(5) if kind is PPCA else variance
    torch.testing.assert_close(model.noise_variance.detach(), variance, **exact)


def test_em_step_moves_the_loadings_as_the_machinery_s_em():
    pair = [fitted(FactorAnalysis, 5, 2) for _ in range(2)]
    (closed, x), (machine, _) = pair
    EM(machine.model, machine.guide, blocks=("output",)).step(x)
    closed.em_step(x)
    torch.testing.assert_close(closed.loadings, machine.loadings, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(closed.mean, machine.mean, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [FactorAnalysis, PPCA])
def test_em_with_gaps_is_monotone_and_ends_where_the_gradient_vanishes(kind):
    torch.manual_seed(4)
    x = with_gaps(torch.randn(150, 1) * torch.tensor([1.0, -1, 0.8, 1.2]) + 0.5 * torch.randn(150, 4))
    model = kind(4, 1)
    losses = [model.em_step(x) for _ in range(300)]
    assert all(b <= a + 1e-9 for a, b in zip(losses, losses[1:], strict=False))
    assert losses[-1] < losses[0] - 10
    for gradient in torch.autograd.grad(model.log_prob(x).sum(), list(model.parameters())):
        assert gradient.abs().max() < 1e-4


# The tutorial's data. Three dimensions and two factors are saturated: eight parameters for six moments.


def per_row(model, x):
    return model.log_evidence(x).log_prob.mean().item()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_em_climbs_to_the_known_optimum_of_the_tutorial_s_data(seed):
    torch.manual_seed(seed)
    x = factor_analysis_toy().x_train
    model = FactorAnalysis(3, 2, learn_mean=False)
    torch.nn.init.normal_(model.decoder.weight)
    losses = [model.em_step(x) / 1000 for _ in range(800)]
    assert all(b <= a + 1e-12 for a, b in zip(losses, losses[1:], strict=False))
    assert 3.93279 < losses[100] < 3.935
    assert losses[-1] == pytest.approx(3.932798, abs=2e-6)
    scatter = x.T @ x / 1000
    saturated = MultivariateNormal(torch.zeros(3), scatter).log_prob(x).mean().item()
    assert saturated == pytest.approx(-3.932798, abs=5e-7)
    assert -losses[-1] <= saturated + 1e-12


def test_true_parameters_and_closed_form_optimum_of_the_tutorial_s_data():
    toy = factor_analysis_toy()
    truth = FactorAnalysis(3, 2, learn_mean=False, noise_scale=toy.scale)
    with torch.no_grad():
        truth.decoder.weight.copy_(toy.loadings)
    assert per_row(truth, toy.x_train) == pytest.approx(-3.934837, abs=5e-7)
    assert per_row(truth, toy.x_test) == pytest.approx(-3.970452, abs=5e-7)
    ppca = PPCA(3, 2, learn_mean=False)
    assert ppca.fit_closed_form(toy.x_train).mean().item() == pytest.approx(-3.932798, abs=5e-7)
    assert per_row(ppca, toy.x_test) == pytest.approx(-3.972135, abs=5e-7)
    smallest = torch.linalg.eigvalsh(toy.x_train.T @ toy.x_train / 1000)[0]
    assert ppca.likelihood.scale.item() ** 2 == pytest.approx(smallest.item(), rel=1e-12)


def test_general_fit_reaches_the_optimum_too():
    x = factor_analysis_toy(num_train=300).x_train
    model, ppca = FactorAnalysis(3, 2), PPCA(3, 2)
    model.fit(x, "ml", num_steps=40, tol=1e-12)
    assert per_row(model, x) == pytest.approx(ppca.fit_closed_form(x).mean().item(), abs=1e-6)


@pytest.mark.parametrize("learn_mean", [True, False])
def test_closed_form_maximum_of_ppca(learn_mean):
    """Stationary, and where EM arrives from a random start."""
    torch.manual_seed(1)
    x = torch.randn(200, 5) @ torch.randn(5, 5) + 1
    model = PPCA(5, 2, learn_mean=learn_mean)
    best = model.fit_closed_form(x).sum()
    for gradient in torch.autograd.grad(model.log_prob(x).sum(), list(model.parameters())):
        assert gradient.abs().max() < 1e-8
    start = PPCA(5, 2, learn_mean=learn_mean)
    losses = [start.em_step(x) for _ in range(500)]
    assert best.item() == pytest.approx(-losses[-1], abs=1e-5) and best >= -losses[-1] - 1e-9


BOUNDS = {
    "elbo": Trace_ELBO,
    "graph": TraceGraph_ELBO,
    "analytic": AnalyticELBO,
    "particles": lambda: Trace_ELBO(num_particles=3, vectorize_particles=True),
    "renyi": lambda: RenyiELBO(alpha=0.5, num_particles=3),
    "iwae": lambda: ImportanceWeightedELBO(num_particles=3, estimator="score"),
    "vimco": lambda: ImportanceWeightedELBO(num_particles=3, estimator="vimco"),
    "wake-sleep": lambda: ReweightedWakeSleepELBO(num_particles=3),
    "tvo left": lambda: TVO(num_particles=3, schedule=LogUniform(4, beta_1=0.025), rule="left"),
    "tvo right": lambda: TVO(num_particles=3, schedule=LogUniform(4, beta_1=0.025), rule="right"),
    "tvo trapezoid": lambda: TVO(num_particles=3, schedule=LogUniform(4, beta_1=0.025), rule="trapezoid"),
    "bihm": lambda: BiHelmholtzELBO(num_particles=3),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_every_bound_with_the_exact_guide_is_the_evidence_at_every_draw(name):
    model, x = fitted(FactorAnalysis, 5, 2)
    truth = -model.log_prob(x[:6]).sum().item()
    elbo = BOUNDS[name]()
    for seed in range(3):
        pyro.set_rng_seed(seed)
        assert elbo.loss(model.model, model.guide, x[:6]) == pytest.approx(truth, abs=1e-11)


def test_linear_guide_learns_as_in_the_tutorial():
    """Amortised inference is still short of the optimum after 35 epochs, but near it, and never above."""
    toy = factor_analysis_toy()
    torch.manual_seed(42)
    model, guide = FactorAnalysis(3, 2, learn_mean=False), LinearGuide(3, 2)
    torch.nn.init.normal_(model.decoder.weight)
    svi = SVI(model.model, guide, Adam({"lr": 0.01}), TraceMeanField_ELBO())
    shown = []
    for step in range(1120):
        if step in (5, 400):
            shown.append(per_row(model, toy.x_test))
        start = 32 * step % 992
        svi.step(toy.x_train[start : start + 32])
    shown.append(per_row(model, toy.x_test))
    assert shown == sorted(shown) and shown[0] < -4.5
    assert -4.05 < shown[-1] < -3.95
    assert per_row(model, toy.x_train) < -3.932798


def test_e_phases_leave_the_evidence_and_m_phases_raise_it():
    toy = factor_analysis_toy(num_train=200)
    torch.manual_seed(1)
    model, guide = FactorAnalysis(3, 2, learn_mean=False), LinearGuide(3, 2)
    torch.nn.init.normal_(model.decoder.weight)
    trainer = AlternatingTrainer(
        model.model,
        guide,
        Adam({"lr": 0.02}),
        TraceMeanField_ELBO(),
        phases=[("E", 300), ("M", 300)],
        evidence=model.log_prob,
    )
    log = trainer.fit(toy.x_train, num_steps=900, log_every=300, progress=False)
    start, e, m, again = log
    assert e.evidence == start.evidence and again.evidence == m.evidence
    assert m.evidence > e.evidence + 0.1
    assert e.gap < 0.1 * start.gap and again.gap < m.gap
    assert all(line.gap > -0.02 for line in log)


def test_optimal_linear_guide_is_the_exact_posterior():
    model, x = fitted(FactorAnalysis, 5, 2)
    guide = LinearGuide(5, 2)
    posterior = model.posterior(x)
    covariance = posterior.covariance_matrix[0].detach()
    with torch.no_grad():
        gain = covariance @ (model.loadings / model.noise_variance[:, None]).T
        guide.loc.weight.copy_(gain)
        guide.loc.bias.copy_(-gain @ model.mean)
    guide.scale_tril = torch.linalg.cholesky(covariance)
    truth = -model.log_prob(x).sum().item()
    bounds = [Trace_ELBO()]
    bounds += [ImportanceWeightedELBO(num_particles=3, estimator=e) for e in ("reparam", "stl", "dreg")]
    for bound in bounds:
        assert bound.loss(model.model, guide, x) == pytest.approx(truth, abs=1e-10)
        batch = bound.loss(model.model, guide, x[:10], size=N)
        assert batch == pytest.approx(-3 * model.log_prob(x[:10]).sum().item(), abs=1e-10)


def test_errors():
    model, x = fitted(FactorAnalysis, 5, 2)
    with pytest.raises(InvalidData, match="infinit|finite"):
        model.log_prob(torch.full((3, 5), torch.inf))
    with pytest.raises(InvalidData, match=r"\(N, 5\)"):
        model.em_step(torch.zeros(3, 4))
    x[:, 2] = 1.5
    with pytest.raises(InvalidData, match="constant"):
        for _ in range(2000):
            model.em_step(x)
    gone = torch.randn(20, 5)
    gone[:, 1] = torch.nan
    with pytest.raises(InvalidData, match="almost never observed"):
        FactorAnalysis(5, 2).em_step(gone)
    with pytest.raises(InvalidData, match="complete rows"):
        PPCA(5, 2).fit_closed_form(gone)
    with pytest.raises(InvalidData, match="less than data_dim"):
        PPCA(5, 5).fit_closed_form(torch.randn(20, 5))
    with pytest.raises(InvalidData, match="fill only 2"):
        PPCA(5, 2).fit_closed_form(torch.randn(20, 2) @ torch.randn(2, 5))
    with pytest.raises(InvalidData, match="scalar noise"):
        PPCA(5, 2, noise_scale=torch.ones(5))
    with pytest.raises(InvalidData, match="latent_dim"):
        FactorAnalysis(5, 0)
