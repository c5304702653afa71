# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Every quantity of the machine against full enumeration of nets with at most 12 binary units."""

from __future__ import annotations

import math
from functools import partial

import pyro
import pytest
import torch
from binary_digits import binary_digits
from enumerated_stack import (
    GOODNESS_FLOOR,
    EnumeratedStack,
    chi_square_p_value,
    close,
    state_index,
    tiny_machine,
)
from pyro.infer import SVI, RenyiELBO

from pyro_cpa.errors import CPAError, InvalidData
from pyro_cpa.infer import BiHelmholtzELBO
from pyro_cpa.models.helmholtz_machine import BidirectionalHelmholtzMachine, log_mean_exp


@pytest.fixture(params=[dict(), dict(sizes=(5, 2, 3, 2), deterministic=1)], ids=["4-3-2", "5-2-3-2 tanh"])
def machine(request):
    return tiny_machine(**request.param)


@pytest.fixture
def exact(machine):
    with torch.no_grad():
        return EnumeratedStack(machine)


# ---- identities of the exact tables (they pin the two nets) --------------------------------------------


def test_normalisation(exact):
    zero = torch.zeros(())
    close(exact.log_joint.reshape(-1).logsumexp(0), zero)
    close(exact.log_q.logsumexp(1), torch.zeros(len(exact.x)))
    close(exact.log_star_joint.reshape(-1).logsumexp(0), zero)
    assert exact.two_log_z < -0.05


def test_bounds_and_bhattacharyya_identities(exact):
    assert (exact.elbo <= exact.log_p_tilde).all() and (exact.log_p_tilde <= exact.log_p).all()
    assert (exact.log_p_tilde <= exact.log_p_star).all()
    close(exact.log_p - exact.log_p_tilde, -2 * exact.log_bc)
    close(exact.two_log_z, (exact.log_p + 2 * exact.log_bc).logsumexp(0))
    log_q_joint = exact.log_p_star[:, None] + exact.log_q  # q(x) is p*(x)
    close(2 * (0.5 * (exact.log_joint + log_q_joint)).reshape(-1).logsumexp(0), exact.two_log_z)


def test_gradient_of_the_bound_is_an_average_over_p_star(machine):
    table = EnumeratedStack(machine)
    parameters = list(machine.parameters())
    direct = torch.autograd.grad(table.log_p_tilde.sum(), parameters, retain_graph=True)
    weights = table.log_star_conditional.exp().detach()
    both = torch.autograd.grad(
        (weights * (table.log_joint + table.log_q)).sum(), parameters, retain_graph=True
    )
    score = torch.autograd.grad(
        (table.log_q.exp().detach() * table.log_q).sum(), parameters, allow_unused=True
    )
    for one, other, zero in zip(direct, both, score, strict=True):
        close(one, other, 1e-12)
        assert zero is None or zero.abs().max() < 1e-12


# ---- estimators ----------------------------------------------------------------------------------------


def test_log_weights_are_those_of_the_traces(machine, exact):
    x = exact.x[:6]
    pyro.set_rng_seed(3)
    guide = pyro.poutine.trace(machine.guide).get_trace(x)
    model = pyro.poutine.trace(pyro.poutine.replay(machine.model, guide)).get_trace(x)
    layers = [x, *(guide.nodes[site]["value"] for site in machine.sites[1:])]
    model.compute_log_prob()
    guide.compute_log_prob()
    by_site = sum(model.nodes[site]["log_prob"] for site in machine.sites)
    close(machine.log_generation(layers), by_site, 1e-12)
    by_site = sum(guide.nodes[site]["log_prob"] for site in machine.sites[1:])
    close(machine.log_recognition(layers), by_site, 1e-12)


def test_estimates_of_log_p_and_log_p_tilde(machine, exact):
    for estimate, truth in (
        (machine.log_p(exact.x, 20_000), exact.log_p),
        (machine.log_p_tilde(exact.x, 20_000), exact.log_p_tilde),
    ):
        assert (estimate.value - truth).abs().le(5 * estimate.standard_error).all()
        assert estimate.standard_error.max() < 0.1


def test_standard_error_is_the_spread_of_the_estimates(machine, exact):
    x = exact.x[:1].repeat(2000, 1)
    estimate = machine.log_p_tilde(x, 400)
    # Relative standard error of a standard deviation from 2000 draws: 1/sqrt(4000) for normal ones; the
    # estimate of each row's error scatters too.
    assert abs(estimate.value.std() / estimate.standard_error.mean() - 1) < 5 * 0.025


def test_bound_grows_with_the_particles_from_the_elbo(machine, exact):
    x = exact.x[3:4].repeat(20_000, 1)
    d = machine.log_weights(x, 8)
    means, errors = [], []
    for particles in (1, 2, 8):
        value = 2 * (torch.logsumexp(0.5 * d[:particles], 0) - math.log(particles))
        means.append(value.mean().item())
        errors.append(value.std().item() / math.sqrt(len(x)))
    assert abs(means[0] - exact.elbo[3]) < 5 * errors[0]
    assert means[0] < means[1] < means[2] < exact.log_p_tilde[3] + 5 * errors[2]


def test_every_sample_set_keeps_the_order_and_the_ess_identity(machine, exact):
    for seed in range(3):
        pyro.set_rng_seed(seed)
        log_p = machine.log_p(exact.x, 7).value
        pyro.set_rng_seed(seed)
        log_p_tilde = machine.log_p_tilde(exact.x, 7).value
        pyro.set_rng_seed(seed)
        ess = machine.ess(exact.x, 7)
        assert (log_p_tilde <= log_p + 1e-12).all()
        close(ess.p_star, (log_p_tilde - log_p).exp(), 1e-12)
        assert (ess.p <= ess.p_star + 1e-12).all() and (ess.p >= 1 / 7 - 1e-12).all()


def test_ess_tends_to_the_bhattacharyya_coefficient(machine, exact):
    ess = machine.ess(exact.x, 20_000)
    chi_square = (2 * exact.log_posterior - exact.log_q).exp().sum(1)
    close(ess.p_star, exact.log_bc.mul(2).exp(), 0.03)
    close(ess.p, 1 / chi_square, 0.05)


def test_two_log_z(machine, exact):
    estimate = machine.two_log_z(num_samples=40_000, num_inner=5)
    assert abs(estimate.value - exact.two_log_z) < 5 * estimate.standard_error
    assert estimate.standard_error < 0.02
    star = machine.log_p_star(exact.x, 20_000, two_log_z=estimate)
    assert (star.value - exact.log_p_star).abs().le(5 * star.standard_error).all()


def test_partition_function_is_unbiased_whatever_the_inner_samples(machine, exact):
    runs = torch.stack([machine.two_log_z(200, num_inner=1).value.exp() for _ in range(200)])
    assert abs(runs.mean() - exact.two_log_z.exp()) < 5 * runs.std() / math.sqrt(len(runs))


def test_exact_recognition_has_no_variance():
    machine = BidirectionalHelmholtzMachine(4, (3, 2))
    with torch.no_grad():
        for name, parameter in machine.named_parameters():
            if name.endswith("weight"):
                parameter.zero_()
        machine.prior_logits.copy_(torch.tensor([0.3, -1.0]))
        machine.recognition[1][0].bias.copy_(machine.prior_logits)
        machine.recognition[0][0].bias.copy_(machine.generation[1][0].bias)
        exact = EnumeratedStack(machine)
    assert abs(exact.two_log_z) < 1e-12
    close(machine.log_weights(exact.x, 5), exact.log_p.expand(5, -1), 1e-12)
    close(machine.log_p_tilde(exact.x, 3).value, exact.log_p, 1e-12)
    assert machine.log_p_tilde(exact.x, 3).standard_error.max() < 1e-6
    assert abs(machine.two_log_z(50).value) < 1e-12


@pytest.mark.parametrize("objective", [partial(RenyiELBO, 0.5), BiHelmholtzELBO], ids=["Renyi", "BiHM"])
def test_bound_equals_the_objectives_on_the_same_samples(machine, exact, objective):
    elbo = objective(num_particles=6, vectorize_particles=True, max_plate_nesting=1)
    pyro.set_rng_seed(11)
    loss = elbo.loss(machine.model, machine.guide, exact.x)
    pyro.set_rng_seed(11)
    close(torch.tensor(-loss), machine.log_p_tilde(exact.x, 6).value.sum(), 1e-12)


def test_log_weights_do_not_depend_on_the_order_of_particles_and_rows(machine, exact):
    order = torch.randperm(len(exact.x))
    layers = machine.sample_recognition(exact.x, 5)
    permuted = [layers[0][order], *(z[:, order].flip(0) for z in layers[1:])]
    d = machine.log_generation(layers) - machine.log_recognition(layers)
    e = machine.log_generation(permuted) - machine.log_recognition(permuted)
    close(log_mean_exp(d).value[order], log_mean_exp(e).value, 1e-12)


def test_chunks_of_particles_are_further_particles(machine, exact, monkeypatch):
    monkeypatch.setattr("pyro_cpa.models.bernoulli_layers.MAX_ROWS", 2 * len(exact.x))
    d = machine.log_weights(exact.x, 401)
    assert d.shape == (401, len(exact.x))
    estimate = log_mean_exp(0.5 * d)
    assert (2 * estimate.value - exact.log_p_tilde).abs().le(10 * estimate.standard_error).all()
    assert (d[0] != d[2]).any() and (d[0] != d[400]).any()


# ---- samples of p* -------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_inner", [1, 10])
def test_resampling_weights_turn_p_into_p_star(machine, exact, num_inner):
    with torch.no_grad():
        layers, log_w = machine._pool(200_000, num_inner)
    weights, index = torch.softmax(log_w, 0), exact.joint_index(layers)
    truth = exact.log_star_joint.exp().reshape(-1)
    frequency = torch.zeros_like(truth).index_add_(0, index, weights)
    # variance of a self-normalised estimate by the delta method; states seen often enough for it to hold
    seen = torch.bincount(index, minlength=len(truth)) >= 100
    squares = torch.zeros_like(truth).index_add_(0, index, weights**2)
    variance = squares * (1 - 2 * truth) + truth**2 * (weights**2).sum()
    assert seen.sum() > 100
    assert (frequency - truth).abs().le(5 * variance.sqrt())[seen].all()


def test_generated_x_follow_p_star(machine, exact):
    # few picks from each large pool are nearly independent, as the chi-square test assumes
    x = torch.cat([machine.generate(20, oversample=500, num_inner=2) for _ in range(60)])
    assert chi_square_p_value(state_index(x), exact.log_p_star) > GOODNESS_FLOOR
    assert chi_square_p_value(state_index(machine.sample_generation(5000)[0]), exact.log_p) > GOODNESS_FLOOR


def test_generate_modes():
    machine = tiny_machine()
    assert machine.generate(3, oversample=5).unique().tolist() in ([0.0, 1.0], [0.0], [1.0])
    means = machine.generate(3, "mean", oversample=5, num_sweeps=2)
    assert means.shape == (3, 4) and ((means > 0) & (means < 1)).all() and not means.requires_grad
    with pytest.raises(InvalidData, match="mode is 'best'"):
        machine.generate(2, "best")


# ---- use as a Pyro model, defaults, errors -------------------------------------------------------------


def test_training_raises_the_bound_on_digits():
    x, _ = binary_digits()
    machine = BidirectionalHelmholtzMachine(64, (30, 20, 10))
    before = machine.log_p(x, 50).value.mean()
    elbo = BiHelmholtzELBO(5, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(machine.model, machine.guide, pyro.optim.Adam({"lr": 1e-2}), elbo)
    for step in range(150):
        svi.step(x[(step * 100) % 500 :][:100])
    after = machine.log_p(x, 50).value.mean()
    assert after > before + 10


def test_defaults_are_the_authors_net():
    machine = BidirectionalHelmholtzMachine(784)
    assert machine.sizes == (784, 300, 200, 100, 75, 50, 35, 30, 25, 20, 15, 10, 10)
    assert all((p == -1).all() for name, p in machine.named_parameters() if not name.endswith("weight"))
    small = BidirectionalHelmholtzMachine(20, (10,), small_weights=True).recognition[0][0].weight
    assert small.abs().max() <= math.sqrt(6 / 30) / 20 and small.abs().max() > math.sqrt(6 / 30) / 40


def test_float32_and_integer_data():
    machine = tiny_machine().to(torch.float32)
    x = torch.tensor([[0, 1, 1, 0]], dtype=torch.uint8)
    for value in (machine.log_p(x, 5).value, machine.two_log_z(10).value, machine.generate(2, oversample=3)):
        assert value.dtype == torch.float32


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m: m.log_p(torch.full((1, 4), 0.5), 5), r"x\[0, 0\] is 0.5; expected only 0 and 1. Binarise"),
        (
            lambda m: m.log_p(torch.tensor([[0, 1, 0, math.nan]]), 5),
            r"x\[0, 3\] is nan.*no missing-data path",
        ),
        (lambda m: m.log_p(torch.zeros(4), 5), r"x is \(4,\); expected a tensor of shape \(N, 4\)"),
        (lambda m: m.log_p(torch.zeros(1, 4), 1), "1 sample was given; expected at least 2"),
        (lambda m: m.log_p(torch.zeros(1, 4), 0), "num_particles is 0; expected a positive integer"),
        (lambda m: m.model(torch.zeros(2, 5)), r"x is \(2, 5\)"),
        (lambda m: BidirectionalHelmholtzMachine(4, ()), "layer_sizes is empty"),
        (lambda m: BidirectionalHelmholtzMachine(4, (3, 0)), r"layer_sizes\[1\] is 0"),
        (lambda m: BidirectionalHelmholtzMachine(4, (3,), deterministic=-1), "deterministic is -1"),
    ],
)
def test_errors_name_what_was_given(call, message):
    with pytest.raises(InvalidData, match=message) as caught:
        call(tiny_machine())
    assert isinstance(caught.value, CPAError)
