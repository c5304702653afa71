# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Eighteen identities of the thermodynamic objective, on a closed-form path and on given samples."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from binary_net import BinaryNet, bits
from linear_gaussian import LinearGaussian
from published_tvo import published
from pyro.infer import RenyiELBO
from torch import Tensor

from pyro_cpa.infer.schedules import Linear, LogUniform
from pyro_cpa.infer.thermodynamic_path import (
    guide_terms,
    model_terms,
    path_statistics,
    pathwise_terms,
    riemann_weights,
)

PARAMETERS = torch.tensor([0.2, 1.4, -0.3, -0.6, 0.1], dtype=torch.float64)
BETAS = torch.tensor([0.0, 0.03, 0.2, 0.55, 1.0], dtype=torch.float64)
RULES = ["left", "right", "trapezoid"]


@pytest.fixture
def exact() -> LinearGaussian:
    return LinearGaussian(PARAMETERS.clone().requires_grad_())


def gradient(value: Tensor, exact: LinearGaussian) -> Tensor:
    return torch.autograd.grad(value, exact.parameters, retain_graph=True)[0]


def grid_path(exact: LinearGaussian, beta: float) -> tuple[Tensor, Tensor]:
    """Points z and probabilities of pi_beta: the trapezoid rule, exact to rounding for such smooth tails."""
    mean, variance = exact.moments(beta)
    z = (mean + variance.sqrt() * torch.linspace(-12, 12, 1001)).detach()
    return z, torch.softmax(exact.path(beta)(z), 0).detach()


def jacobian(exact: LinearGaussian, name: str, z: Tensor) -> Tensor:
    """(5, points) gradient of log p, log q or f at fixed z in the five parameters."""
    function = lambda p: getattr(LinearGaussian(p, float(exact.x)), name)(z)  # noqa: E731
    return torch.autograd.functional.jacobian(function, exact.parameters.detach()).T


def samples(exact: LinearGaussian, num_particles: int) -> Tensor:
    mu, log_s = exact.parameters[3:].detach()
    return mu + log_s.exp() * torch.randn(num_particles)


def sums(f: Tensor, betas: Tensor) -> dict[str, Tensor]:
    mean = path_statistics(f, betas).mean
    return {rule: riemann_weights(betas, rule) @ mean for rule in RULES}


def iwae(f: Tensor) -> Tensor:
    return f.logsumexp(0) - math.log(len(f))


def test_riemann_weights_by_hand():
    betas = torch.tensor([0.0, 0.1, 1.0])
    assert torch.allclose(riemann_weights(betas, "left"), torch.tensor([0.1, 0.9, 0.0]))
    assert torch.allclose(riemann_weights(betas, "right"), torch.tensor([0.0, 0.1, 0.9]))
    assert torch.allclose(riemann_weights(betas, "trapezoid"), torch.tensor([0.05, 0.5, 0.45]))


def test_statistics_by_hand_whatever_the_blocks(monkeypatch):
    f = 3 * torch.randn(6, 2, 3)
    terms = model_terms(BETAS, riemann_weights(BETAS, "trapezoid"))
    whole = path_statistics(f, BETAS, terms, correction=1.2)
    for k, beta in enumerate(BETAS):
        w = torch.softmax(beta * f, 0)
        mean = (w * f).sum(0)
        assert torch.allclose(whole.mean[k], mean, rtol=1e-13)
        assert torch.allclose(whole.variance[k], (w * f**2).sum(0) - mean**2, atol=1e-12)
        assert torch.allclose(whole.ess[k], 1 / (w**2).sum(0), rtol=1e-13)
        assert torch.allclose(whole.squared_error[k], (w**2 * (f - mean) ** 2).sum(0), rtol=1e-12)
    monkeypatch.setattr("pyro_cpa.infer.thermodynamic_path._BLOCK", 2 * f.numel())
    blocked = path_statistics(f, BETAS, terms, correction=1.2)
    for a, b in zip(
        [*whole[:4], whole.coefficients[0]], [*blocked[:4], blocked.coefficients[0]], strict=True
    ):
        assert torch.allclose(a, b, rtol=1e-13, atol=1e-15)


# The path itself, in closed form.


def test_identity_01_the_integrand_integrates_to_the_evidence(exact):
    nodes, weights = (torch.as_tensor(a) for a in np.polynomial.legendre.leggauss(60))
    integral = sum(w / 2 * exact.eta((1 + b) / 2) for b, w in zip(nodes, weights, strict=True))
    assert integral.item() == pytest.approx(exact.evidence.item(), rel=1e-10)
    for beta in torch.tensor([0.1, 0.5, 0.9]):
        beta.requires_grad_()
        assert torch.autograd.grad(exact.log_z(beta), beta)[0].item() == pytest.approx(
            exact.eta(beta).item(), rel=1e-10
        )
        assert torch.autograd.grad(exact.eta(beta), beta)[0].item() == pytest.approx(
            exact.var(beta).item(), rel=1e-10
        )


def test_identity_02_gaps_are_sums_of_divergences_of_neighbours(exact):
    pairs = list(zip(BETAS[:-1], BETAS[1:], strict=True))
    lower, upper = (sum(exact.kl(*p) for p in pairs), sum(exact.kl(b, a) for a, b in pairs))
    assert (exact.evidence - exact.left(BETAS)).item() == pytest.approx(lower.item(), rel=1e-10)
    assert (exact.right(BETAS) - exact.evidence).item() == pytest.approx(upper.item(), rel=1e-10)


def test_identity_03_one_interval_is_the_elbo_on_the_left_and_the_eubo_on_the_right(exact):
    one = Linear(1).betas
    z, q = grid_path(exact, 0.0)
    assert exact.left(one).item() == pytest.approx((q * exact.f(z)).sum().item(), rel=1e-10)
    assert exact.right(one).item() == pytest.approx((exact.evidence + exact.kl(1.0, 0.0)).item(), rel=1e-10)


def test_identity_04_one_interval_left_is_reinforce_with_a_leave_one_out_baseline(exact):
    f = exact.f(samples(exact, 7)).detach()
    one = Linear(1).betas
    left = riemann_weights(one, "left")
    a, b = path_statistics(
        f, one, model_terms(one, left), guide_terms(one, left), correction=7 / 6
    ).coefficients
    others = (f.sum() - f) / 6
    assert torch.allclose(a, torch.full_like(f, 1 / 7), rtol=1e-12)
    assert torch.allclose(b, (f - others) / 7 - 1 / 7, rtol=1e-12)


def test_identity_05_gradient_is_an_expectation_plus_a_covariance(exact):
    for beta in (0.0, 0.3, 0.8, 1.0):
        z, prob = grid_path(exact, beta)
        f, df = exact.f(z).detach(), jacobian(exact, "f", z)
        dpath = (1 - beta) * jacobian(exact, "log_q", z) + beta * jacobian(exact, "log_p", z)
        covariance = (prob * f * dpath).sum(1) - (prob * f).sum() * (prob * dpath).sum(1)
        assert torch.allclose(gradient(exact.eta(beta), exact), (prob * df).sum(1) + covariance, atol=1e-7)


def test_identity_06_one_interval_right_is_wake_phi_up_to_sign(exact):
    one = Linear(1).betas
    z, posterior = grid_path(exact, 1.0)
    wake = (posterior * jacobian(exact, "log_q", z)).sum(1)
    assert torch.allclose(gradient(exact.right(one), exact)[3:], -wake[3:], atol=1e-7)
    f = exact.f(samples(exact, 9)).detach()
    terms = guide_terms(one, riemann_weights(one, "right"))
    (b,) = path_statistics(f, one, terms, correction=9 / 8).coefficients
    assert torch.allclose(b, -torch.softmax(f, 0), atol=1e-12)


def test_identity_06_averaged_over_the_model_it_is_sleep_phi():
    parameters = PARAMETERS.clone()
    m, a, log_sigma, mu, log_s = parameters
    nodes, weights = (torch.as_tensor(v) for v in np.polynomial.hermite_e.hermegauss(40))
    weights = weights / weights.sum()
    scale = (a**2 + (2 * log_sigma).exp()).sqrt()
    wake = torch.zeros(2)
    for node, weight in zip(nodes, weights, strict=True):
        at_x = LinearGaussian(parameters.clone().requires_grad_(), float(a * m + scale * node))
        wake += weight * gradient(at_x.right(Linear(1).betas), at_x)[3:]
    residual = m - mu  # E_p(z) of the score of log q, in closed form
    sleep = torch.stack([residual * (-2 * log_s).exp(), (residual**2 + 1) * (-2 * log_s).exp() - 1])
    assert torch.allclose(wake, -sleep, atol=1e-7)


def test_identity_07_one_interval_right_is_not_wake_theta(exact):
    upper, evidence = gradient(exact.right(Linear(1).betas), exact), gradient(exact.evidence, exact)
    assert (upper - evidence)[:3].abs().min() > 0.05


def test_identity_08_wake_theta_is_the_left_rule_of_one_interval(exact):
    z, q = grid_path(exact, 0.0)
    wake = (q * jacobian(exact, "log_p", z)).sum(1)
    assert torch.allclose(gradient(exact.left(Linear(1).betas), exact)[:3], wake[:3], atol=1e-7)


# The estimator, on given samples.


@pytest.mark.parametrize("num_particles", [2, 5, 50])
def test_identity_09_sums_straddle_the_importance_weighted_value_on_every_sample_set(num_particles):
    f = torch.randn(num_particles, 500) * torch.logspace(-2, 3, 500)
    value, statistics = sums(f, BETAS), path_statistics(f, BETAS)
    slack = 1e-12 * f.abs().amax(0)
    assert (f.mean(0) <= value["left"] + slack).all()
    assert (value["left"] <= iwae(f) + slack).all()
    assert (iwae(f) <= value["right"] + slack).all()
    assert (statistics.mean.diff(dim=0) >= -slack).all()


def test_identity_10_many_intervals_give_the_importance_weighted_value_and_its_model_gradient(exact):
    f = exact.f(samples(exact, 6)).detach()
    betas = Linear(20_000).betas
    terms = model_terms(betas, riemann_weights(betas, "trapezoid"))
    (a,) = path_statistics(f, betas, terms).coefficients
    assert sums(f, betas)["trapezoid"].item() == pytest.approx(iwae(f).item(), abs=1e-5)
    assert torch.allclose(a, torch.softmax(f, 0), atol=1e-5)


def test_identity_11_many_intervals_leave_the_guide_a_signal_of_one_over_s(exact):
    f = exact.f(samples(exact, 6)).detach()
    betas = Linear(20_000).betas
    m = riemann_weights(betas, "trapezoid")
    b = {
        c: path_statistics(f, betas, guide_terms(betas, m), correction=c).coefficients[0]
        for c in (1.0, 6 / 5)
    }
    average_weight = torch.stack([torch.softmax(beta * f, 0) for beta in betas[::10]])
    average_weight = torch.trapezoid(average_weight, betas[::10], dim=0)
    assert torch.allclose(b[1.0], torch.full_like(f, -1 / 6), atol=1e-5)
    assert torch.allclose(b[6 / 5], (average_weight - 1) / 5, atol=1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_identity_12_model_coefficients_are_the_derivative_of_the_estimate(rule):
    f = (3 * torch.randn(8)).requires_grad_()
    m = riemann_weights(BETAS, rule)
    (a,) = path_statistics(f, BETAS, model_terms(BETAS, m)).coefficients
    estimate = sum(w * (torch.softmax(b * f, 0) * f).sum() for w, b in zip(m, BETAS, strict=True))
    assert torch.allclose(a, torch.autograd.grad(estimate, f)[0], atol=1e-12)


@pytest.mark.parametrize("beta", [0.25, 0.5, 0.9])
def test_identity_13_partial_integrals_are_renyi_bounds_of_pyro_on_the_same_samples(beta):
    f = []

    def model():
        z = pyro.sample("z", dist.Normal(0.3, 1.0))
        pyro.sample("x", dist.Normal(2 * z, 0.4), obs=torch.tensor(1.1))

    def guide():
        q = dist.Normal(torch.tensor(-0.2), torch.tensor(0.8))
        z = pyro.sample("z", q)
        f.append(
            (dist.Normal(0.3, 1.0).log_prob(z) + dist.Normal(2 * z, 0.4).log_prob(torch.tensor(1.1)))
            - q.log_prob(z)
        )

    renyi = -RenyiELBO(alpha=1 - beta, num_particles=5).loss(model, guide)
    f = torch.stack(f)
    betas = torch.linspace(0, beta, 30_001)
    eta = path_statistics(f, betas).mean
    assert torch.trapezoid(eta, betas).item() == pytest.approx(beta * renyi, abs=1e-6)


def test_identity_14_two_intervals_degenerate_to_the_elbo_at_both_ends(exact):
    elbo = exact.eta(0.0)
    middle = torch.linspace(0, 1, 101)[1:-1]
    values = torch.stack([exact.left(torch.tensor([0.0, b, 1.0])) for b in middle])
    for b in (1e-9, 1 - 1e-9):
        assert exact.left(torch.tensor([0.0, b, 1.0])).item() == pytest.approx(elbo.item(), abs=1e-7)
    assert 0 < values.argmax() < 98 and values.max() > elbo + 0.1


def test_identity_15_linear_gap_shrinks_like_one_over_k(exact):
    limit = (exact.eta(1.0) - exact.eta(0.0)) / 2
    gap = exact.evidence - exact.left(Linear(1000).betas)
    assert 1000 * gap.item() == pytest.approx(limit.item(), rel=2e-3)


def test_identity_16_derivative_of_the_bound_in_a_node(exact):
    betas = BETAS.clone().requires_grad_()
    slope = torch.autograd.grad(exact.left(betas), betas)[0]
    for k in range(1, 4):
        expected = (
            exact.eta(BETAS[k - 1]) - exact.eta(BETAS[k]) + (BETAS[k + 1] - BETAS[k]) * exact.var(BETAS[k])
        )
        assert slope[k].item() == pytest.approx(expected.item(), rel=1e-10)


@pytest.mark.parametrize("rule", RULES)
def test_identity_17_exact_posterior_has_a_flat_integrand_and_no_guide_gradient(exact, rule):
    tight = LinearGaussian(exact.parameters.detach(), float(exact.x)).exact_guide()
    f = tight.f(samples(tight, 10))
    m = riemann_weights(BETAS, rule)
    result = path_statistics(f, BETAS, guide_terms(BETAS, m), correction=10 / 9)
    assert sums(f, BETAS)[rule].item() == pytest.approx(tight.evidence.item(), rel=1e-12)
    assert result.variance.max() < 1e-20
    assert (result.coefficients[0] + m.sum() / 10).abs().max() < 1e-14


def test_identity_18_pathwise_gradient_of_the_integrand(exact):
    mu, log_s = exact.parameters[3:].detach()
    for beta in (0.0, 0.3, 0.8, 1.0):
        z, prob = grid_path(exact, beta)
        f, slope = exact.f(z).detach(), (exact.f.b - exact.f.a * z).detach()
        pathwise = slope * torch.stack([torch.ones_like(z), z - mu])  # dz/dmu, dz/dlog s
        covariance = (prob * f * pathwise).sum(1) - (prob * f).sum() * (prob * pathwise).sum(1)
        expected = (1 - 2 * beta) * (prob * pathwise).sum(1) + beta * (1 - beta) * covariance
        assert torch.allclose(gradient(exact.eta(beta), exact)[3:], expected, atol=1e-7)


def test_identity_18_pathwise_coefficients_estimate_it(exact):
    mu = exact.parameters[3].detach()
    betas = LogUniform(3, 0.1).betas
    m = riemann_weights(betas, "left")
    estimates = []
    for _ in range(20):
        z = samples(exact, 10_000)
        f, slope = exact.f(z).detach(), (exact.f.b - exact.f.a * z).detach()
        (c,) = path_statistics(f, betas, pathwise_terms(betas, m)).coefficients
        estimates.append((c * slope * torch.stack([torch.ones_like(z), z - mu])).sum(1))
    estimates = torch.stack(estimates)
    error = estimates.std(0) / math.sqrt(20)
    assert ((estimates.mean(0) - gradient(exact.left(betas), exact)[3:]).abs() < 5 * error).all()


# Fidelity to the published estimator.


@pytest.mark.parametrize("rule", RULES)
def test_collapsed_gradient_is_the_published_one(rule):
    theta, phi = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
    features = torch.randn(2, 10, 4, 3)
    log_p, log_q = features[0] @ theta - (features[0] @ theta) ** 2 / 7, -((features[1] @ phi) ** 2)
    f, c, m = log_p - log_q, 10 / 9, riemann_weights(BETAS, rule)
    reference = published(log_p, log_q, BETAS, m, c).sum()
    a, b = path_statistics(f, BETAS, model_terms(BETAS, m), guide_terms(BETAS, m), correction=c).coefficients
    collapsed = (a * log_p + b * log_q).sum()
    for ours, theirs in zip(
        torch.autograd.grad(collapsed, (theta, phi), retain_graph=True),
        torch.autograd.grad(reference, (theta, phi)),
        strict=True,
    ):
        # Nodes and samples are summed in another order: equal up to a few units in the last place.
        assert (ours - theirs).abs().max() <= 16 * torch.finfo(torch.float64).eps * theirs.abs().max()


# Discrete latents, all states enumerated.


@pytest.fixture
def enumerated() -> tuple[BinaryNet, Tensor, Tensor]:
    """A net, its (32, N) log p and log q at three x."""
    net, x = BinaryNet(), bits(4)[[1, 6, 15]]
    return net, net.log_joint(x), net.log_guide(x)


def test_enumerated_integrand_has_the_same_identities(enumerated):
    net, log_p, log_q = enumerated
    f, evidence = log_p - log_q, log_p.logsumexp(0)
    path = [(torch.softmax(log_q + b * f, 0), (log_q + b * f).logsumexp(0)) for b in BETAS]
    eta = torch.stack([(prob * f).sum(0) for prob, _ in path])
    neighbours = list(zip(path[:-1], path[1:], strict=True))
    lower_gap = sum((a * (a / b).log()).sum(0) for (a, _), (b, _) in neighbours)
    upper_gap = sum((b * (b / a).log()).sum(0) for (a, _), (b, _) in neighbours)
    lower, upper = riemann_weights(BETAS, "left") @ eta, riemann_weights(BETAS, "right") @ eta
    assert torch.allclose(evidence - lower, lower_gap, rtol=1e-10)
    assert torch.allclose(upper - evidence, upper_gap, rtol=1e-10)
    parameters = list(net.parameters())
    for k, beta in enumerate(BETAS):
        prob = path[k][0].detach()
        tempered, f0 = beta * log_p + (1 - beta) * log_q, f.detach()
        surrogate = (prob * (f + (f0 - eta[k].detach()) * tempered)).sum()
        ours = torch.autograd.grad(surrogate, parameters, retain_graph=True)
        exact = torch.autograd.grad(eta[k].sum(), parameters, retain_graph=True)
        assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(ours, exact, strict=True))


def test_gradient_of_one_interval_is_unbiased_for_the_elbo_over_all_pairs_of_states(enumerated):
    net, log_p, log_q = enumerated
    pairs = torch.cartesian_prod(torch.arange(32), torch.arange(32)).T  # two particles, 1024 outcomes
    probability = log_q[pairs].sum(0).exp().detach()
    one = Linear(1).betas
    m = riemann_weights(one, "left")
    terms = model_terms(one, m), guide_terms(one, m)
    a, b = path_statistics((log_p - log_q)[pairs].detach(), one, *terms, correction=2.0).coefficients
    surrogate = (probability * (a * log_p[pairs] + b * log_q[pairs]).sum(0)).sum()
    elbo = (log_q.exp() * (log_p - log_q)).sum()
    parameters = list(net.parameters())
    ours, exact = (torch.autograd.grad(v, parameters, retain_graph=True) for v in (surrogate, elbo))
    assert all(torch.allclose(g, e, atol=1e-12) for g, e in zip(ours, exact, strict=True))
