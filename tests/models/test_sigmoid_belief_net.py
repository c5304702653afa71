# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Sigmoid belief nets: densities against hand-written ones, the paper's defaults, training, use, errors."""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from binary_digits import binary_digits
from enumerated_stack import EnumeratedStack, chi_square_p_value, close, state_index
from pyro import poutine
from pyro.infer import SVI, Predictive, RenyiELBO, Trace_ELBO

from pyro_cpa.errors import InvalidData
from pyro_cpa.infer import TVO, BiHelmholtzELBO, ImportanceWeightedELBO, LogUniform, ReweightedWakeSleepELBO
from pyro_cpa.models.sigmoid_belief_net import SigmoidBeliefNet


def tiny(**kwargs):
    net = SigmoidBeliefNet(4, (3, 2), **kwargs)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return net


def log_bernoulli(value, logits):
    """By probabilities and logarithms, not by logits as the library does."""
    p = 1 / (1 + torch.exp(-logits))
    return (value * p.log() + (1 - value) * (1 - p).log()).sum(-1)


@pytest.mark.parametrize("centre", [True, False])
def test_bound_equals_a_hand_written_one(centre):
    x = torch.bernoulli(torch.full((6, 4), 0.4))
    mean = x.mean(0)
    net = tiny(data_mean=mean, centre_input=centre)
    guide = poutine.trace(net.guide).get_trace(x)
    model = poutine.trace(poutine.replay(net.model, guide)).get_trace(x)
    z1, z2 = guide.nodes["z1"]["value"], guide.nodes["z2"]["value"]
    (up1, up2), (down1, down2) = (
        [net.recognition[i][1] for i in (0, 1)],
        [net.generation[i][1] for i in (0, 1)],
    )
    seen = 2 * ((x - mean + 1) / 2) - 1 if centre else 2 * x - 1
    q = log_bernoulli(z1, seen @ up1.weight.T + up1.bias)
    q = q + log_bernoulli(z2, (2 * z1 - 1) @ up2.weight.T + up2.bias)
    p = log_bernoulli(z2, net.prior_logits.expand(6, 2))
    p = p + log_bernoulli(z1, (2 * z2 - 1) @ down2.weight.T + down2.bias)
    p = p + log_bernoulli(x, (2 * z1 - 1) @ down1.weight.T + down1.bias)
    close(model.log_prob_sum() - guide.log_prob_sum(), (p - q).sum(), 1e-12)
    pyro.set_rng_seed(4)
    loss = Trace_ELBO().loss(net.model, net.guide, x)
    pyro.set_rng_seed(4)
    close(torch.tensor(-loss), net.log_weights(x, 1).sum(), 1e-12)


def test_deterministic_layers_stand_between_stochastic_ones():
    net = SigmoidBeliefNet(6, (4, 2), deterministic=2, deterministic_size=5)
    z = torch.bernoulli(torch.full((3, 4), 0.5))
    signed, first, _, second, _, last = net.generation[0]
    hidden = torch.tanh(second(torch.tanh(first(2 * z - 1))))
    close(net.generation[0](z), last(hidden), 1e-12)
    assert (first.out_features, second.out_features, last.out_features) == (5, 5, 6)
    assert SigmoidBeliefNet(6, (4,), deterministic=1).recognition[0][1].out_features == 5  # (6 + 4) // 2
    assert signed is not None


def test_evidence_of_all_data_sums_to_one_and_particles_reach_it():
    net = tiny()
    with torch.no_grad():
        exact = EnumeratedStack(net)
    close(exact.log_p.logsumexp(0), torch.zeros(()))
    d = net.log_weights(exact.x, 20_000)
    estimate = d.logsumexp(0) - math.log(20_000)
    spread = (d - estimate).exp().std(0) / math.sqrt(20_000)
    assert (estimate - exact.log_p).abs().le(5 * spread).all()
    assert chi_square_p_value(state_index(net.generate(5000)), exact.log_p) > 2e-5


def test_log_evidence_reaches_the_enumerated_one():
    net = tiny()
    with torch.no_grad():
        exact = EnumeratedStack(net)
    found = net.log_evidence(exact.x.bool(), num_particles=5000, chunk_size=1000)
    assert (found.log_prob - exact.log_p).abs().le(5 * found.standard_error).all()
    assert found.standard_error.max() < 0.1
    with pytest.raises(InvalidData, match="expected only 0 and 1"):
        net.log_evidence(torch.full((2, 4), 0.5))


def test_the_papers_net_is_one_call():
    mean = torch.linspace(0, 1, 784)
    net = SigmoidBeliefNet(784, data_mean=mean)
    assert net.sizes == (784, 200, 200, 200) and net.sites == ("x", "z1", "z2", "z3")
    bias = net.generation[0][-1].bias
    close(torch.sigmoid(bias)[1:-1], mean[1:-1], 1e-10)
    assert torch.isfinite(bias).all() and bias.requires_grad
    assert torch.equal(net.prior_logits, torch.zeros(200)) and net.prior_logits.requires_grad
    x = torch.bernoulli(mean.expand(2, -1))
    close(net.recognition[0][0](x), x - mean)
    close(net.recognition[1][0](x), 2 * x - 1)
    plain = SigmoidBeliefNet(784, data_mean=mean, centre_input=False, bias_from_mean=False)
    close(plain.recognition[0][0](x), 2 * x - 1)
    assert plain.generation[0][-1].bias.abs().max() < 0.1


def test_particles_and_further_dimensions_broadcast():
    net = tiny()
    x = torch.bernoulli(torch.full((5, 4), 0.5))
    with pyro.plate("outer", 3, dim=-3), pyro.plate("particles", 7, dim=-2):
        guide = poutine.trace(net.guide).get_trace(x)
        model = poutine.trace(poutine.replay(net.model, guide)).get_trace(x)
    assert guide.nodes["z2"]["value"].shape == (3, 7, 5, 2)
    model.compute_log_prob()
    assert all(model.nodes[site]["log_prob"].shape == (3, 7, 5) for site in net.sites)
    draws = Predictive(net.model, guide=net.guide, num_samples=6, parallel=True)(x)
    assert draws["z1"].shape == (6, 5, 3)


OBJECTIVES = {
    "score": lambda: ImportanceWeightedELBO(5, estimator="score"),
    "vimco": lambda: ImportanceWeightedELBO(5, estimator="vimco"),
    "tvo": lambda: TVO(5, LogUniform(2, 0.3)),
    "wake": lambda: ReweightedWakeSleepELBO(5),
    "wake and sleep": lambda: ReweightedWakeSleepELBO(5, insomnia=0.5),
    "helmholtz": lambda: BiHelmholtzELBO(5),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_evidence_of_digits_rises_under_every_objective(name):
    x, _ = binary_digits(300)
    net = SigmoidBeliefNet(64, (20, 10), data_mean=x.mean(0))
    elbo = OBJECTIVES[name]()
    elbo.vectorize_particles, elbo.max_plate_nesting = True, 2
    svi = SVI(net.model, net.guide, pyro.optim.Adam({"lr": 0.01}), elbo)
    before = log_p(net, x)
    for step in range(120):
        svi.step(x[100 * (step % 3) :][:100])
    assert log_p(net, x) > before + 2


def log_p(net, x):
    d = net.log_weights(x, 200)
    return (d.logsumexp(0) - math.log(200)).mean().item()


def test_encode_reconstruct_generate():
    net = tiny().to(torch.float32)
    x = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1]], dtype=torch.bool)
    first, second = net.encode(x)
    floats = x.float()
    close(first, torch.sigmoid(net.recognition[0](floats)).detach(), 1e-6)
    close(second, torch.sigmoid(net.recognition[1](first)).detach(), 1e-6)
    assert first.shape == (2, 3) and second.shape == (2, 2)
    reconstruction = net.reconstruct(x)
    assert reconstruction.shape == (2, 4) and ((reconstruction > 0) & (reconstruction < 1)).all()
    assert set(net.generate(50).unique().tolist()) <= {0.0, 1.0}
    assert net.generate(5, "mean").dtype == torch.float32


def test_bound_is_pyros_renyi_bound_for_every_dtype():
    net = tiny().to(torch.float32)
    x = torch.bernoulli(torch.full((5, 4), 0.5, dtype=torch.float32))
    pyro.set_rng_seed(2)
    loss = RenyiELBO(0.0, num_particles=9, vectorize_particles=True, max_plate_nesting=1).loss(
        net.model, net.guide, x
    )
    pyro.set_rng_seed(2)
    d = net.log_weights(x, 9)
    assert d.dtype == torch.float32
    assert abs(-loss - (d.logsumexp(0) - math.log(9)).sum().item()) < 1e-4


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda n: n.guide(torch.full((2, 4), 0.3)),
            r"x\[0, 0\] is 0.3; expected only 0 and 1. Binarise first",
        ),
        (lambda n: n.encode(torch.full((2, 4), math.nan)), r"x\[0, 0\] is nan.*no missing-data path"),
        (lambda n: n.model(torch.zeros(2, 3)), r"x is \(2, 3\); expected a tensor of shape \(N, 4\)"),
        (lambda n: n.model([[0, 1, 0, 1]]), "x is list; expected a tensor"),
        (lambda n: n.generate(0), "num_samples is 0"),
        (lambda n: SigmoidBeliefNet(4, (3,), data_mean=torch.full((3,), 0.5)), r"data_mean has shape \(3,\)"),
        (lambda n: SigmoidBeliefNet(4, (3,), data_mean=torch.full((4,), math.nan)), "values from nan"),
        (lambda n: SigmoidBeliefNet(4, (3,), data_mean=torch.full((4,), 2.0)), r"within \[0, 1\]"),
        (lambda n: SigmoidBeliefNet(4, (3,), deterministic_size=0), "deterministic_size is 0"),
        (lambda n: SigmoidBeliefNet(4.0, (3,)), "data_dim is 4.0; expected a positive integer"),
    ],
)
def test_errors_name_what_was_given(call, message):
    with pytest.raises(InvalidData, match=message):
        call(tiny())
