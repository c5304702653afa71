# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""TVO on Pyro pairs: values, gradients against enumeration and closed forms, schedules, refusals."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from binary_net import VARIANTS, BinaryNet, bits, three_x
from linear_gaussian import GaussianPair, LinearGaussian
from published_tvo import guide_sum, published
from pyro.infer import SVI, RenyiELBO, Trace_ELBO
from torch import Tensor, nn

from pyro_cpa.distributions import CPAMarginal
from pyro_cpa.errors import CPAError, UnsupportedModel
from pyro_cpa.infer.autoguide import AutoCPAPosterior
from pyro_cpa.infer.helmholtz import BiHelmholtzELBO
from pyro_cpa.infer.schedules import Fixed, Linear, LogUniform, Moments, OptimalLeft
from pyro_cpa.infer.thermodynamic import TVO
from pyro_cpa.infer.thermodynamic_path import riemann_weights

BETAS = [0.0, 0.1, 0.4, 1.0]


def gradients(elbo: TVO, model: Callable, guide: Callable, module: nn.Module, *args, **kwargs) -> Tensor:
    module.zero_grad()
    elbo.loss_and_grads(model, guide, *args, **kwargs)
    return torch.cat(
        [torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in module.parameters()]
    )


# Value.


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_one_interval_equals_trace_elbo_with_the_same_seed(variant, vectorize):
    if variant == "subsampled" and not vectorize:
        pytest.skip("Trace_ELBO draws a new minibatch for each particle of its loop")
    net, options = BinaryNet(), {"num_particles": 5, "vectorize_particles": vectorize}
    pyro.set_rng_seed(3)
    expected = Trace_ELBO(**options, max_plate_nesting=1).loss(
        net.model, net.guide, three_x(), **VARIANTS[variant]
    )
    pyro.set_rng_seed(3)
    value = TVO.elbo(**options).loss(net.model, net.guide, three_x(), **VARIANTS[variant])
    assert value == pytest.approx(expected, rel=1e-12)


def test_many_nodes_equal_pyros_importance_weighted_value_with_the_same_seed():
    net = BinaryNet()
    options = {"num_particles": 5, "vectorize_particles": True, "max_plate_nesting": 1}
    pyro.set_rng_seed(3)
    expected = RenyiELBO(alpha=0, **options).loss(net.model, net.guide, three_x())
    pyro.set_rng_seed(3)
    value = TVO(5, Linear(4000), "trapezoid", vectorize_particles=True).loss(net.model, net.guide, three_x())
    assert value == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("rule", ["left", "right", "trapezoid"])
def test_the_loss_is_minus_the_bound_and_not_the_surrogate(rule):
    net = BinaryNet()
    tvo = TVO(6, BETAS, rule)
    values = []
    for evaluate in (tvo.loss, tvo.loss_and_grads, tvo.differentiable_loss, lambda m, g, x: tvo(m, g)(x)):
        pyro.set_rng_seed(5)
        values.append(float(torch.as_tensor(evaluate(net.model, net.guide, three_x())).detach()))
    f = tvo.log_weights(net.model, net.guide, three_x()).log_w
    pyro.set_rng_seed(5)
    f = tvo.log_weights(net.model, net.guide, three_x()).log_w.detach()
    eta = torch.stack([(torch.softmax(b * f, 0) * f).sum() for b in torch.tensor(BETAS)])
    bound = riemann_weights(torch.tensor(BETAS), rule) @ eta
    assert values == pytest.approx([-bound.item()] * 4, rel=1e-12)


# Gradient.


@pytest.mark.parametrize("rule", ["left", "right", "trapezoid"])
def test_uncentred_gradient_is_the_published_one_on_the_same_samples(rule):
    net, betas = BinaryNet(), torch.tensor(BETAS)
    tvo = TVO(7, BETAS, rule, center=False)
    pyro.set_rng_seed(1)
    weights = tvo.log_weights(net.model, net.guide, three_x())
    m = riemann_weights(betas, rule)
    maximised = published(weights.log_p, weights.log_q, betas, m, 7 / 6).sum()
    expected = torch.autograd.grad(-maximised, list(net.parameters()))
    pyro.set_rng_seed(1)
    gradients(tvo, net.model, net.guide, net, three_x())
    for parameter, grad in zip(net.parameters(), expected, strict=True):
        if rule == "trapezoid" and any(parameter is p for p in net.q.parameters()):
            continue  # the guide follows the left sum: the trapezoid is no bound
        # Published code maximises the right sum in the guide too, which drives it away from the posterior.
        sign = -1 if rule == "right" and any(parameter is p for p in net.q.parameters()) else 1
        # Nodes and samples are summed in another order: equal up to units in the last place.
        assert (parameter.grad - sign * grad).abs().max() <= 32 * torch.finfo(
            torch.float64
        ).eps * grad.abs().max()


@pytest.mark.parametrize(
    "rule,objective,center,correction,variant",
    [
        ("left", "lower", True, "bessel", "plain"),
        ("left", "lower", False, "bessel", "plain"),
        ("right", "upper", True, None, "plain"),
        ("trapezoid", "wake", True, "bessel", "plain"),
        ("left", "upper", True, "bessel", "masked"),
        ("left", "lower", True, "bessel", "subsampled"),
    ],
)
def test_mean_gradient_equals_its_expectation_over_all_pairs(rule, objective, center, correction, variant):
    net, betas, x, options = BinaryNet(), torch.tensor(BETAS), three_x(), VARIANTS[variant]
    mask = options.get("mask", torch.ones(4)).to(x)
    log_p, log_q = net.log_joint(x, mask), net.log_guide(x, mask)
    pairs = torch.cartesian_prod(torch.arange(32), torch.arange(32)).T  # two particles, 1024 outcomes
    probability = log_q[pairs].sum(0).exp().detach()
    c = 2.0 if correction else 1.0
    theta = published(log_p[pairs], log_q[pairs].detach(), betas, riemann_weights(betas, rule), c)
    sign, m = guide_sum(objective, betas)
    phi = sign * published(log_p[pairs].detach(), log_q[pairs], betas, m, c, float(center))
    scale = options.get("size", 3) / 3
    expected = torch.autograd.grad(-scale * (probability * (theta + phi)).sum(), list(net.parameters()))
    expected = torch.cat([g.flatten() for g in expected])

    copies, steps = 1500, 40
    tvo = TVO(2, BETAS, rule, objective, center=center, correction=correction, vectorize_particles=True)
    size = {"size": options["size"] * copies} if "size" in options else {}
    tvo._warned = True
    runs = torch.stack(
        [
            gradients(tvo, net.model, net.guide, net, x.repeat(copies, 1), **{**options, **size}) / copies
            for _ in range(steps)
        ]
    )
    error = runs.std(0) / math.sqrt(steps)
    assert error.max() < 0.1 * scale * expected.abs().max()
    assert ((runs.mean(0) - expected).abs() < 5 * error + 1e-12).all()


def chain(x: Tensor, phi: Tensor) -> tuple[Callable, Callable]:
    """A reparameterised guide whose second site depends on the first."""

    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            b = pyro.sample("b", dist.Normal(0.5 * a, 1.0))
            pyro.sample("x", dist.Normal(a + b, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(phi[0], 1.0))
            pyro.sample("b", dist.Normal(phi[1] * a + phi[2], 0.7))

    return model, guide


@pytest.mark.parametrize("objective", ["lower", "wake", "upper"])
def test_hierarchical_reparameterised_guide_has_no_leak(objective):
    x, phi = torch.tensor([0.8]), torch.tensor([0.4, 0.6, -0.2], requires_grad=True)
    model, guide = chain(x, phi)
    draws = []

    def watched(x):
        trace = pyro.poutine.trace(guide).get_trace(x)
        draws.append([trace.nodes[name]["value"].detach() for name in "ab"])

    TVO(5, BETAS, guide_objective=objective).loss_and_grads(model, watched, x)
    a, b = (torch.stack(v) for v in zip(*draws, strict=True))
    normal = dist.Normal
    log_p = normal(0.0, 1.0).log_prob(a) + normal(0.5 * a, 1.0).log_prob(b) + normal(a + b, 1.0).log_prob(x)
    log_q = normal(phi[0], 1.0).log_prob(a) + normal(phi[1] * a + phi[2], 0.7).log_prob(b)
    sign, m = guide_sum(objective, torch.tensor(BETAS))
    surrogate = sign * published(log_p, log_q, torch.tensor(BETAS), m, 5 / 4, center=1.0)
    assert torch.allclose(phi.grad, torch.autograd.grad(-surrogate, phi)[0], rtol=1e-10)


@pytest.mark.parametrize("estimator", ["covariance", "dreg"])
def test_mean_gradient_of_a_hierarchical_guide(estimator):
    x, phi = torch.tensor(0.8), torch.tensor([0.4, 0.6, -0.2], requires_grad=True)
    # ELBO up to a constant, in closed form: a = phi0 + e, b = phi1 a + phi2 + .7 d.
    second = 1 + phi[0] ** 2  # E a^2
    gap_b = (phi[1] - 0.5) ** 2 * second + 2 * (phi[1] - 0.5) * phi[2] * phi[0] + phi[2] ** 2
    rest = x - phi[2]
    gap_x = rest**2 - 2 * rest * (1 + phi[1]) * phi[0] + (1 + phi[1]) ** 2 * second
    expected = torch.autograd.grad((second + gap_b + gap_x) / 2, phi)[0]

    model, guide = chain(x, phi)
    tvo, rows, steps = TVO.elbo(4, vectorize_particles=True, estimator=estimator), 1000, 40
    runs = []
    for _ in range(steps):
        phi.grad = None
        tvo.loss_and_grads(model, guide, x.expand(rows))
        runs.append(phi.grad / rows)
    runs = torch.stack(runs)
    error = runs.std(0) / math.sqrt(steps)
    assert error.max() < 0.03
    assert ((runs.mean(0) - expected).abs() < 5 * error).all()


@pytest.mark.parametrize("estimator", ["covariance", "dreg"])
@pytest.mark.parametrize("rule", ["left", "right"])
def test_gradient_of_many_particles_is_that_of_the_exact_sums(rule, estimator):
    parameters = torch.tensor([0.2, 1.4, -0.3, -0.2, -0.4])
    exact = LinearGaussian(parameters.clone().requires_grad_(), x=0.9)
    betas = LogUniform(3, 0.1).betas
    expected = -torch.autograd.grad(getattr(exact, rule)(betas), exact.parameters)[0]
    if rule == "right":
        expected[3:] *= -1
    pair, steps = GaussianPair(parameters), 40
    tvo = TVO(5000, LogUniform(3, 0.1), rule, estimator=estimator, vectorize_particles=True)
    runs = torch.stack(
        [gradients(tvo, pair.model, pair.guide, pair, torch.tensor([0.9])) for _ in range(steps)]
    )
    error = runs.std(0) / math.sqrt(steps)
    assert ((runs.mean(0) - expected).abs() < 5 * error).all()
    assert error.max() < 0.02


@pytest.mark.parametrize("rule", ["left", "right", "trapezoid"])
@pytest.mark.parametrize("objective", ["lower", "wake", "upper"])
@pytest.mark.parametrize("pair", ["discrete", "gaussian", "gaussian, dreg"])
def test_exact_posterior_gives_the_evidence_without_variance_and_no_guide_gradient(rule, objective, pair):
    if pair == "discrete":
        module, x = BinaryNet(posterior=True), three_x()
        evidence = module.log_joint(x).logsumexp(0).sum().item()
    else:
        exact = LinearGaussian(torch.tensor([0.2, 1.4, -0.3, 0.0, 0.0]), x=0.9).exact_guide()
        module, x, evidence = GaussianPair(exact.parameters), torch.tensor([0.9]), exact.evidence.item()
    tvo = TVO(8, BETAS, rule, objective, estimator="dreg" if "dreg" in pair else "covariance")
    grad = gradients(tvo, module.model, module.guide, module, x)
    is_guide = torch.cat([torch.full((p.numel(),), n.startswith("q.")) for n, p in module.named_parameters()])
    if pair != "discrete":
        is_guide = torch.tensor([False, False, False, True, True])
    assert -tvo.diagnostics.bound == pytest.approx(-evidence, rel=1e-12)
    assert tvo.diagnostics.variance.max() < 1e-20
    assert grad[is_guide].abs().max() < 1e-13
    assert grad[~is_guide].abs().max() > 0.01


@pytest.mark.parametrize(
    "make", [lambda: TVO(3, BETAS), lambda: TVO(3, rule="right"), lambda: BiHelmholtzELBO(3)]
)
def test_exact_guide_of_a_piecewise_affine_decoder_gives_its_evidence_at_every_draw(make):
    decoder = nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 3))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 0.5).to_event(1), obs=x)

    guide, x, objective = AutoCPAPosterior(model, decoder=decoder), torch.randn(4, 3), make()
    evidence = CPAMarginal(decoder, 0.5).log_prob(x).sum().item()
    for _ in range(3):
        assert objective.loss(model, guide, x) == pytest.approx(-evidence, rel=1e-10)


@pytest.mark.parametrize("objective", ["lower", "wake", "upper"])
def test_every_guide_objective_moves_the_guide_towards_the_posterior(objective):
    net, x = BinaryNet(), three_x()
    posterior = torch.softmax(net.log_joint(x), 0).detach()
    divergence = lambda: (posterior * (posterior.log() - net.log_guide(x))).sum().item()  # noqa: E731
    before, optimiser = divergence(), torch.optim.Adam(net.q.parameters(), 0.05)
    tvo = TVO(200, LogUniform(3, 0.1), "right", objective, vectorize_particles=True)
    for _ in range(100):
        optimiser.zero_grad()
        tvo.differentiable_loss(net.model, net.guide, x).backward()
        optimiser.step()
    assert divergence() < 0.2 * before


def test_default_guide_objective_follows_the_rule():
    assert [TVO(rule=r).guide_objective for r in ("left", "right", "trapezoid")] == [
        "lower",
        "upper",
        "lower",
    ]


def test_trains_a_discrete_pair_under_svi():
    torch.manual_seed(0)
    net, x = BinaryNet(), bits(4)[torch.randint(0, 16, (20,)) // 4 * 4]
    evidence = lambda: net.log_joint(x).logsumexp(0).sum().item()  # noqa: E731
    before = evidence()
    svi = SVI(
        net.model,
        net.guide,
        pyro.optim.Adam({"lr": 0.03}),
        TVO(10, OptimalLeft(5, every=20), vectorize_particles=True),
    )
    losses = [svi.step(x) for _ in range(300)]
    assert evidence() > before + 10
    assert all(isinstance(loss, float) for loss in losses)
    assert -svi.evaluate_loss(x) < evidence() + 1


def test_chunks_give_the_same_gradient():
    net = BinaryNet()
    grads = []
    for chunk_size in (None, 2):
        pyro.set_rng_seed(2)
        grads.append(gradients(TVO(6, BETAS, chunk_size=chunk_size), net.model, net.guide, net, three_x()))
    assert torch.allclose(*grads, rtol=1e-12, atol=1e-14)


def test_autograd_keeps_nothing_with_an_axis_for_the_nodes():
    net, x, nodes = BinaryNet(), three_x().repeat(50, 1), 97
    largest = []

    def record(tensor: Tensor) -> Tensor:
        largest.append(tensor.numel())
        return tensor

    for schedule in (Linear(1), Linear(nodes)):
        start = len(largest)
        with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
            TVO(8, schedule, vectorize_particles=True).differentiable_loss(net.model, net.guide, x)
        largest[start:] = [max(largest[start:]), len(largest) - start]
    assert largest[:2] == largest[2:]


# Schedules in training.


def test_adaptive_schedules_learn_in_training_alone_and_draw_nothing():
    net, x = BinaryNet(), three_x()
    states = []
    for schedule in (Moments(3), Fixed(LogUniform(3).betas)):
        pyro.set_rng_seed(4)
        tvo = TVO(5, schedule)
        tvo.loss(net.model, net.guide, x)
        tvo.bounds(net.model, net.guide, x)
        assert torch.equal(schedule.betas, LogUniform(3).betas)
        tvo.loss_and_grads(net.model, net.guide, x)
        assert torch.equal(schedule.betas, LogUniform(3).betas) == isinstance(schedule, Fixed)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_float32_in_float32_out():
    net = BinaryNet().float()
    tvo = TVO(5, Moments(3))
    loss = tvo.differentiable_loss(net.model, net.guide, three_x().float())
    assert loss.dtype == torch.float32
    assert tvo.diagnostics.eta.dtype == torch.float32 and tvo.schedule.betas.dtype == torch.float64


def test_copies_and_survives_pickling():
    net = BinaryNet()
    tvo = TVO(5, Moments(3))
    tvo.loss_and_grads(net.model, net.guide, three_x())
    assert copy.deepcopy(tvo).diagnostics.bound == tvo.diagnostics.bound


# Refusals and warnings.


@pytest.mark.parametrize(
    "options,message",
    [
        ({"num_particles": 1}, "at least 2"),
        ({"rule": "trap"}, "'trapezoid'"),
        ({"guide_objective": "higher"}, "'wake'"),
        ({"estimator": "reinforce"}, "'dreg'"),
        ({"correction": "none"}, "'bessel'"),
        ({"schedule": [0.0, 0.5]}, "partition"),
    ],
)
def test_refuses_bad_options(options, message):
    with pytest.raises(CPAError, match=message):
        TVO(**options)


def test_dreg_refuses_a_discrete_guide():
    net = BinaryNet()
    with pytest.raises(UnsupportedModel, match="'h1'"):
        TVO(3, estimator="dreg").loss_and_grads(net.model, net.guide, three_x())


def test_warns_once_where_one_particle_rules(caplog):
    pair = GaussianPair(torch.tensor([0.0, 1.0, -4.0, 3.0, -1.0]))
    tvo = TVO(5, Linear(5))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            tvo.loss(pair.model, pair.guide, torch.tensor([0.9]))
        TVO.elbo(5).loss(pair.model, pair.guide, torch.tensor([0.9]))
    assert [r.message.split(":")[0].split(" at ")[1] for r in caplog.records] == ["beta = 0.8"]
