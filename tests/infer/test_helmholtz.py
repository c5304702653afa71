# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""The bidirectional Helmholtz objective against full enumeration and against Pyro's Renyi bound."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from binary_net import VARIANTS, BinaryNet, bits, three_x
from linear_gaussian import LinearGaussian
from pyro.infer import SVI, RenyiELBO, Trace_ELBO
from torch import Tensor

from pyro_cpa.errors import CPAError, InvalidData, UnsupportedModel
from pyro_cpa.infer.helmholtz import BiHelmholtzELBO


class Enumerated:
    """All exact quantities of a net, per x of the 16."""

    def __init__(self, net: BinaryNet, x: Tensor | None = None) -> None:
        x = bits(4) if x is None else x
        self.log_p, self.log_q = net.log_joint(x), net.log_guide(x)
        self.evidence = self.log_p.logsumexp(0)
        self.star = 2 * ((self.log_p + self.log_q) / 2).logsumexp(0)  # log p~*
        self.elbo = (self.log_q.exp() * (self.log_p - self.log_q)).sum(0)
        self.star_posterior = torch.softmax((self.log_p + self.log_q) / 2, 0)
        self.two_log_z = self.star.logsumexp(0)
        self.affinity = ((self.log_p - self.evidence + self.log_q) / 2).logsumexp(0)  # log Bhattacharyya


def gradients(elbo: BiHelmholtzELBO, net: BinaryNet, x: Tensor, **kwargs) -> Tensor:
    net.zero_grad()
    elbo.loss_and_grads(net.model, net.guide, x, **kwargs)
    return torch.cat([p.grad.flatten() for p in net.parameters()])


def flat(grads: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([g.flatten() for g in grads])


# The bound that the objective estimates, enumerated.


def test_01_everything_is_normalised():
    exact = Enumerated(BinaryNet())
    assert exact.log_p.exp().sum().item() == pytest.approx(1, abs=1e-12)
    assert torch.allclose(exact.log_q.exp().sum(0), torch.ones(16))
    assert (exact.star - exact.two_log_z).exp().sum().item() == pytest.approx(1, abs=1e-12)
    assert exact.two_log_z < -0.1


def test_02_order_of_the_bounds():
    exact = Enumerated(BinaryNet())
    assert (exact.elbo < exact.star).all() and (exact.star < exact.evidence).all()
    assert (exact.star < exact.star - exact.two_log_z).all()


def test_03_gaps_in_closed_form():
    exact = Enumerated(BinaryNet())
    assert torch.allclose(exact.evidence - exact.star, -2 * exact.affinity, rtol=1e-10)
    assert torch.allclose(exact.two_log_z, (exact.evidence + 2 * exact.affinity).logsumexp(0), rtol=1e-10)
    z = ((exact.log_p + exact.star - exact.two_log_z + exact.log_q) / 2).exp().sum()
    assert 2 * z.log().item() == pytest.approx(exact.two_log_z.item(), rel=1e-10)


def test_04_gradient_of_the_bound_is_an_expectation_under_the_geometric_mean():
    net = BinaryNet()
    exact = Enumerated(net)
    parameters = list(net.parameters())
    weighted = (exact.star_posterior.detach() * (exact.log_p + exact.log_q)).sum()
    ours, truth = (
        torch.autograd.grad(v, parameters, retain_graph=True) for v in (weighted, exact.star.sum())
    )
    assert torch.allclose(flat(ours), flat(truth), atol=1e-13)


# The objective.


@pytest.mark.parametrize("vectorize", [True, False])
def test_05_value_is_the_estimate_between_elbo_and_bound_and_grows_with_particles(vectorize):
    net, x = BinaryNet(), three_x()
    elbo = BiHelmholtzELBO(6, vectorize_particles=vectorize)
    pyro.set_rng_seed(1)
    loss = elbo.loss(net.model, net.guide, x)
    pyro.set_rng_seed(1)
    log_w = elbo.log_weights(net.model, net.guide, x).log_w
    by_hand = 2 * (log_w / 2).exp().mean(0).log().sum()
    assert loss == pytest.approx(-by_hand.item(), rel=1e-12)
    seen = elbo.diagnostics
    assert seen.bound == -loss and seen.bound <= seen.iwae
    assert seen.iwae == pytest.approx((log_w.exp().mean(0).log()).sum().item(), rel=1e-12)
    # Share of the effective sample size under p*: the ratio of the two estimates on the same samples.
    ratio = ((log_w / 2).exp().mean(0) ** 2 / log_w.exp().mean(0)).mean()
    assert seen.ess_star == pytest.approx(ratio.item(), rel=1e-12)
    assert seen.ess_model == pytest.approx(
        (log_w.exp().mean(0) ** 2 / (2 * log_w).exp().mean(0)).mean().item()
    )

    exact, rows = Enumerated(net, x), 20_000
    means = []
    for count in (1, 2, 8) if vectorize else ():
        weights = BiHelmholtzELBO(count, vectorize_particles=True).log_weights(
            net.model, net.guide, x.repeat(rows, 1)
        )
        value = 2 * ((weights.log_w.detach() / 2).logsumexp(0) - math.log(count)).reshape(rows, 3)
        error = value.std(0) / math.sqrt(rows)
        means.append(value.mean(0))
        assert (value.mean(0) < exact.star + 5 * error).all()
        if count == 1:
            assert ((value.mean(0) - exact.elbo).abs() < 5 * error).all()
    assert all((b > a).all() for a, b in zip(means, means[1:], strict=False))


@pytest.mark.parametrize("pair", ["discrete", "gaussian"])
def test_07_exact_posterior_gives_the_evidence_without_variance_and_no_guide_gradient(pair):
    elbo = BiHelmholtzELBO(5)
    if pair == "discrete":
        net, x = BinaryNet(posterior=True), three_x()
        grad, evidence = gradients(elbo, net, x), Enumerated(net, x).evidence.sum().item()
        guide_grad = grad[-sum(p.numel() for p in net.q.parameters()) :]
        model_grad = grad[: -len(guide_grad)]
    else:
        exact = LinearGaussian(torch.tensor([0.2, 1.4, -0.3, 0.0, 0.0]), x=0.9).exact_guide()
        theta, phi = (v.clone().requires_grad_() for v in exact.parameters.split((3, 2)))

        def model(x):
            with pyro.plate("data", 1):
                z = pyro.sample("z", dist.Normal(theta[0], 1.0))
                pyro.sample("x", dist.Normal(theta[1] * z, theta[2].exp()), obs=x)

        def guide(x):
            with pyro.plate("data", 1):
                pyro.sample("z", dist.Normal(phi[0], phi[1].exp()))

        elbo.loss_and_grads(model, guide, torch.tensor([0.9]))
        model_grad, guide_grad, evidence = theta.grad, phi.grad, exact.evidence.item()
    assert elbo.diagnostics.bound == pytest.approx(evidence, rel=1e-12)
    assert (elbo.diagnostics.ess_star, elbo.diagnostics.ess_model) == pytest.approx((1.0, 1.0))
    assert guide_grad.abs().max() < 1e-14 and model_grad.abs().max() > 0.01


def test_08_equals_pyros_renyi_bound_of_order_one_half_up_to_the_control_variate():
    net, x, count = BinaryNet(), three_x(), 6
    options = {"num_particles": count, "vectorize_particles": True, "max_plate_nesting": 1}
    elbo = BiHelmholtzELBO(**options)
    pyro.set_rng_seed(2)
    ours = gradients(elbo, net, x)
    loss = -elbo.diagnostics.bound
    net.zero_grad()
    pyro.set_rng_seed(2)
    theirs_loss = RenyiELBO(alpha=0.5, **options).loss_and_grads(net.model, net.guide, x)
    theirs = torch.cat([p.grad.flatten() for p in net.parameters()])
    pyro.set_rng_seed(2)
    log_q = elbo.log_weights(net.model, net.guide, x).log_q
    variate = torch.autograd.grad(log_q.mean(0).sum(), list(net.parameters()), allow_unused=True)
    variate = flat(
        [torch.zeros_like(p) if g is None else g for p, g in zip(net.parameters(), variate, strict=True)]
    )
    assert loss == pytest.approx(theirs_loss, rel=1e-13)
    assert torch.allclose(ours, theirs + variate, atol=1e-13)


@pytest.mark.parametrize("variant", VARIANTS)
def test_mean_gradient_equals_its_expectation_over_all_pairs(variant):
    net, x, options = BinaryNet(), three_x(), VARIANTS[variant]
    mask = options.get("mask", torch.ones(4)).to(x)
    log_p, log_q = net.log_joint(x, mask), net.log_guide(x, mask)
    pairs = torch.cartesian_prod(torch.arange(32), torch.arange(32)).T
    probability = log_q[pairs].sum(0).exp().detach()
    v = torch.softmax((log_p - log_q)[pairs] / 2, 0).detach()
    scale = options.get("size", 3) / 3
    surrogate = scale * (probability * (v * log_p[pairs] + (v - 0.5) * log_q[pairs]).sum(0)).sum()
    expected = flat(torch.autograd.grad(-surrogate, list(net.parameters())))
    copies, steps = 1500, 40
    size = {"size": options["size"] * copies} if "size" in options else {}
    elbo = BiHelmholtzELBO(2, vectorize_particles=True)
    runs = torch.stack(
        [gradients(elbo, net, x.repeat(copies, 1), **{**options, **size}) / copies for _ in range(steps)]
    )
    error = runs.std(0) / math.sqrt(steps)
    assert error.max() < 0.1 * expected.abs().max()
    assert ((runs.mean(0) - expected).abs() < 5 * error + 1e-12).all()


def test_gradient_of_many_particles_is_that_of_the_exact_bound():
    net, x = BinaryNet(), three_x()
    expected = flat(torch.autograd.grad(-Enumerated(net, x).star.sum(), list(net.parameters())))
    elbo = BiHelmholtzELBO(5000, vectorize_particles=True)
    runs = torch.stack([gradients(elbo, net, x) for _ in range(40)])
    error = runs.std(0) / math.sqrt(40)
    assert error.max() < 0.01 and ((runs.mean(0) - expected).abs() < 5 * error + 1e-3 * expected.abs()).all()


def test_10_order_of_data_does_not_matter():
    net = BinaryNet(posterior=True)
    elbo, x = BiHelmholtzELBO(4), bits(4)
    assert elbo.loss(net.model, net.guide, x) == pytest.approx(
        elbo.loss(net.model, net.guide, x.flip(0)), rel=1e-12
    )


def test_10_order_of_particles_does_not_matter():
    net, x = BinaryNet(), three_x()
    elbo = BiHelmholtzELBO(7)
    weights = elbo.log_weights(net.model, net.guide, x)
    order = torch.randperm(7)
    shuffled = type(weights)(weights.log_p[order], weights.log_q[order], weights.scale, weights.outer)
    for a, b in zip(elbo.objective(weights), elbo.objective(shuffled), strict=True):
        assert torch.allclose(a, b, rtol=1e-13)


def test_11_a_single_particle_evaluates_the_elbo_but_cannot_train_a_guide():
    net, x = BinaryNet(), three_x()
    pyro.set_rng_seed(3)
    expected = Trace_ELBO().loss(net.model, net.guide, x)
    pyro.set_rng_seed(3)
    assert BiHelmholtzELBO(1).loss(net.model, net.guide, x) == pytest.approx(expected, rel=1e-12)
    with pytest.raises(InvalidData, match="at least 2"):
        BiHelmholtzELBO(1).loss_and_grads(net.model, net.guide, x)
    net.q.train(False).requires_grad_(False)
    BiHelmholtzELBO(1).loss_and_grads(net.model, net.guide, x)
    assert net.p["b0"].grad.abs().max() > 0


def test_hierarchical_reparameterised_guide_has_no_leak():
    phi = torch.tensor([0.4, 0.6], requires_grad=True)

    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(0.5 * a, 1.0))
        pyro.sample("x", dist.Normal(a + b, 1.0), obs=torch.tensor(0.8))

    def guide():
        a = pyro.sample("a", dist.Normal(phi[0], 1.0))
        pyro.sample("b", dist.Normal(phi[1] * a, 0.7))

    elbo, draws = BiHelmholtzELBO(5), []

    def watched():
        guide_trace = pyro.poutine.trace(guide).get_trace()
        draws.append((guide_trace.nodes["a"]["value"], guide_trace.nodes["b"]["value"]))

    elbo.loss_and_grads(model, watched)
    a, b = (torch.stack(v).detach() for v in zip(*draws, strict=True))
    log_p = dist.Normal(0.0, 1.0).log_prob(a) + dist.Normal(0.5 * a, 1.0).log_prob(b)
    log_p = log_p + dist.Normal(a + b, 1.0).log_prob(torch.tensor(0.8))
    log_q = dist.Normal(phi[0], 1.0).log_prob(a) + dist.Normal(phi[1] * a, 0.7).log_prob(b)
    v = torch.softmax((log_p - log_q).detach() / 2, 0)
    expected = torch.autograd.grad(-((v - 0.2) * log_q).sum(), phi)[0]
    assert torch.allclose(phi.grad, expected, atol=1e-13)


def test_trains_a_discrete_pair_under_svi():
    net, x = BinaryNet(), bits(4)[torch.randint(0, 16, (20,)) // 4 * 4]
    before = Enumerated(net, x).star.sum().item()
    svi = SVI(
        net.model, net.guide, pyro.optim.Adam({"lr": 0.03}), BiHelmholtzELBO(10, vectorize_particles=True)
    )
    for _ in range(300):
        svi.step(x)
    assert Enumerated(net, x).star.sum().item() > before + 10


# log Z.


@pytest.mark.parametrize("num_inner", [1, 10])
def test_06_log_z_agrees_with_enumeration(num_inner):
    net = BinaryNet()
    exact = Enumerated(net).two_log_z.item()
    elbo = BiHelmholtzELBO(2, vectorize_particles=True)
    seen = elbo.log_z(net.model, net.guide, torch.zeros(2000, 4), num_samples=100_000, num_inner=num_inner)
    assert 0 < seen.relative_error < 0.01
    assert abs(math.expm1(seen.value - exact)) < 5 * seen.relative_error


def test_log_z_of_an_exact_guide_is_zero_whatever_the_samples():
    net = BinaryNet(posterior=True)
    seen = BiHelmholtzELBO(2).log_z(net.model, net.guide, torch.zeros(5, 4), num_samples=12, num_inner=3)
    assert seen.value == pytest.approx(0, abs=1e-12) and seen.relative_error < 1e-12


def test_log_z_refuses_what_it_cannot_simulate():
    net, x = BinaryNet(), three_x()
    with pytest.raises(UnsupportedModel, match="plates"):
        BiHelmholtzELBO(2, plates=("data",)).log_z(net.model, net.guide, x)
    with pytest.raises(UnsupportedModel, match="'x'"):
        BiHelmholtzELBO(2).log_z(lambda: net.model(x), lambda: net.guide(x))

    def auxiliary(x):
        net.guide(x)
        pyro.sample("extra", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})

    with pytest.raises(UnsupportedModel, match="'extra'"):
        BiHelmholtzELBO(2).log_z(net.model, auxiliary, x)


def test_no_diagnostics_before_the_first_evaluation():
    with pytest.raises(CPAError, match="no diagnostics"):
        BiHelmholtzELBO(2).diagnostics  # noqa: B018
