# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""The coupled pair: shared weights, forward pass as inference, exact one-layer posterior, learning."""

from __future__ import annotations

import copy
import math

import pyro
import pytest
import torch
from binary_digits import binary_digits
from enumerated_stack import EnumeratedStack, binary_states, close, state_index
from pyro import poutine
from pyro.infer import SVI, RenyiELBO, Trace_ELBO
from torch import nn

from pyro_cpa.errors import InvalidData
from pyro_cpa.infer import TVO, BiHelmholtzELBO, ImportanceWeightedELBO, LogUniform, ReweightedWakeSleepELBO
from pyro_cpa.models.coupled_sigmoid_net import CoupledSigmoidNet


def random_net(*args, spread=0.8, **kwargs):
    net = CoupledSigmoidNet(*args, **kwargs)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=spread)
    return net


# ---- the seven identities ------------------------------------------------------------------------------


@pytest.mark.parametrize("num_classes", [None, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_forward_pass_of_an_ordinary_network_is_the_mean_field_recursion_bitwise(num_classes, dtype):
    net = random_net(7, (5, 4), num_classes=num_classes).to(dtype)
    plain, sizes = [], net.sizes
    for i, linear in enumerate(net.recognition):
        copied = nn.Linear(sizes[i], sizes[i + 1], dtype=dtype)
        copied.load_state_dict(linear.state_dict())
        plain += [copied, nn.Sigmoid()]
    plain[-1] = nn.Sigmoid() if num_classes is None else nn.Softmax(-1)
    x = torch.bernoulli(torch.full((50, 7), 0.5, dtype=dtype))
    activations = net.encode(x)
    for level in range(len(activations)):
        assert torch.equal(nn.Sequential(*plain[: 2 * level + 2])(x), activations[level])
    assert torch.equal(net.network()(x), activations[-1])
    assert torch.equal(nn.Sequential(*plain[:-1])(x), net.logits(x))


def exact_marginals(net):
    """q(z_l = 1 | x) of every layer by enumeration, for all x."""
    table = EnumeratedStack(net)
    return table, [(table.log_q.exp()[..., None] * z[None]).sum(1) for z in table.z]


def test_first_layer_is_exact_and_the_second_within_its_bound():
    net = random_net(4, (5, 3))
    with torch.no_grad():
        table, marginals = exact_marginals(net)
    first, second = net.encode(table.x)
    close(first, marginals[0])
    weight = net.recognition[1].weight.detach()
    bound = (first * (1 - first)) @ (weight**2).T / (12 * math.sqrt(3))
    error = (second - marginals[1]).abs()
    assert (error <= bound).all() and error.max() > 1e-3


def test_saturated_layers_and_zero_weights_above_are_exact():
    net = random_net(4, (5, 3, 2))
    with torch.no_grad():
        for linear in net.recognition[:2]:
            linear.weight.mul_(1000)
            linear.bias.mul_(1000)
        table, marginals = exact_marginals(net)
        # rows whose pre-activations are all far from zero: the sampled layers are deterministic there
        far = (net.recognition[0](table.x).abs() > 25).all(1)
        hidden = (net.recognition[0](table.x) > 0).to(table.x)
        far &= (net.recognition[1](hidden).abs() > 25).all(1)
    assert far.sum() >= 3
    for activation, marginal in zip(net.encode(table.x), marginals, strict=True):
        assert (activation - marginal)[far].abs().max() < 1e-9
    with torch.no_grad():
        for parameter in net.parameters():
            nn.init.normal_(parameter)
        for linear in net.recognition[1:]:
            linear.weight.zero_()
        _, marginals = exact_marginals(net)
    for activation, marginal in zip(net.encode(table.x), marginals, strict=True):
        close(activation, marginal)


def interaction(table):
    """What is left of a table after row and column means: zero iff it is f(x) + g(y)."""
    return (table - table.mean(0) - table.mean(1, keepdim=True) + table.mean()).abs().max()


def test_conditionals_are_compatible_iff_the_weights_are_tied():
    net = random_net(4, (3,))
    x, y = binary_states(4), binary_states(3)
    forward, reverse = net.recognition[0], net.generation[0]

    def conditionals():
        log_x = net.layer(0, reverse(y)).log_prob(x[:, None])
        log_y = net.layer(1, forward(x)).log_prob(y[:, None]).T
        return log_x - log_y

    with torch.no_grad():
        assert interaction(conditionals()) < 1e-12
        energy = x @ forward.weight.T @ y.T + (x @ reverse.bias)[:, None] + y @ forward.bias  # RBM
        close(net.layer(0, reverse(y)).log_prob(x[:, None]), energy.log_softmax(0))
        close(net.layer(1, forward(x)).log_prob(y[:, None]).T, energy.log_softmax(1))
        reverse.weight = nn.Parameter(forward.weight + torch.randn(3, 4))
        assert interaction(conditionals()) > 0.1


def test_binary_top_has_a_factorised_posterior_under_the_complementary_prior_alone():
    net = random_net(4, (3,))
    with torch.no_grad():
        table = EnumeratedStack(net)
        y, reverse, forward = table.z[0], net.generation[0], net.recognition[0]
        mean_field = net.layer(1, forward(table.x)).log_prob(y[:, None]).T
        assert (table.log_posterior.exp() - table.log_q.exp()).abs().max() > 0.01
        likelihood = table.log_joint - net.layer(1, net.top_logits()).log_prob(y)
        prior = (y @ forward.bias + nn.functional.softplus(reverse(y)).sum(-1)).log_softmax(0)
    close((likelihood + prior).log_softmax(1), mean_field)
    close(table.log_q, mean_field)


@pytest.mark.parametrize("trained", [False, True])
def test_one_layer_forward_pass_is_the_exact_posterior_of_the_class(trained):
    net = random_net(5, (), num_classes=3)
    x = binary_states(5)
    if trained:
        optimiser = torch.optim.Adam(net.parameters(), 0.05)
        for _ in range(20):
            optimiser.zero_grad()
            net.loss(x, x.sum(-1).long() % 3, beta=1.0).backward()
            optimiser.step()
    y = torch.eye(3)
    with torch.no_grad():
        joint = net.log_generation([x[:, None], y[None]])
        # prior given by itself: log pi_c as stated, biases of the softmax determined by the generative ones
        reverse = net.generation[0]
        log_prior = net.top_logits().log_softmax(0)
        logits = (
            x @ reverse.weight.T + log_prior - nn.functional.softplus(reverse.weight + reverse.bias).sum(1)
        )
    close(joint.reshape(-1).logsumexp(0), torch.zeros(()))
    close(joint.log_softmax(1), net.logits(x).detach().log_softmax(1))
    close(joint.log_softmax(1), logits.log_softmax(1))
    close(joint.softmax(1), net.encode(x)[0])
    assert net.error(x, joint.argmax(1)) == 0.0


def test_weights_are_one_parameter_in_memory():
    net = random_net(6, (4,), num_classes=3)
    names = [name for name, _ in net.named_parameters()]
    assert len(names) == len(set(names)) == 6  # 2 weights, 2 forward and 2 reverse biases
    for forward, reverse in zip(net.recognition, net.generation, strict=True):
        assert forward.weight is reverse.weight
        assert forward.weight.data_ptr() == reverse.weight.data_ptr()
    for other in (copy.deepcopy(net), net.to(torch.float32)):
        assert all(f.weight is r.weight for f, r in zip(other.recognition, other.generation, strict=True))


def test_gradient_is_the_sum_of_both_directions_and_one_step_moves_both():
    net = random_net(6, (4,), num_classes=3)
    x, y = torch.bernoulli(torch.full((20, 6), 0.5)), torch.randint(3, (20,))
    layers = [x, *(z[0] for z in net.sample_recognition(x, 1)[1:])]

    def objective(model):
        return (model.log_generation(layers) + model.log_recognition(layers)).sum()

    tied = torch.autograd.grad(objective(net), [linear.weight for linear in net.recognition])
    untied = copy.deepcopy(net)
    for linear in untied.generation:
        linear.weight = nn.Parameter(linear.weight.detach().clone())
    # the prior of y uses the top weight of the generation net, so it belongs to that direction
    up = torch.autograd.grad(
        objective(untied), [linear.weight for linear in untied.recognition], retain_graph=True
    )
    down = torch.autograd.grad(objective(untied), [linear.weight for linear in untied.generation])
    for whole, one, other in zip(tied, up, down, strict=True):
        close(whole, one + other, 1e-12)
        assert one.abs().max() > 1e-3 and other.abs().max() > 1e-3
    before = net.generation[0](layers[1]).detach()
    optimiser = torch.optim.SGD([net.recognition[0].weight], 0.1)
    net.loss(x, y).backward()
    optimiser.step()
    assert (net.generation[0](layers[1]) - before).abs().max() > 1e-4


# ---- the objective -------------------------------------------------------------------------------------


def test_loss_is_the_weighted_sum_of_its_terms():
    net = random_net(6, (4,), num_classes=3)
    x, y = torch.bernoulli(torch.full((20, 6), 0.5)), torch.tensor([0, 1, 2, -1] * 5)
    pyro.set_rng_seed(1)
    terms = net.losses(x, y)
    pyro.set_rng_seed(1)
    close(
        net.loss(x, y, alpha=0.3, beta=2.0),
        terms.generation + 0.3 * terms.recognition + 2 * terms.discrimination,
    )
    labelled = y >= 0
    log_probs = net.encode(x)[-1].log()
    close(terms.discrimination, -log_probs[labelled, y[labelled]].mean(), 1e-12)
    assert net.losses(x).discrimination == 0


def test_terms_estimate_their_expectations():
    net = random_net(4, (3,), num_classes=3)
    with torch.no_grad():
        x = binary_states(4)
        z, y = binary_states(3), torch.eye(3)
        hidden, classes = z[:, None].expand(8, 3, 3).reshape(24, 3), y.repeat(8, 1)
        layers = [x[:, None], hidden, classes]
        log_p, log_q = net.log_generation(layers), net.log_recognition(layers)
        close(log_p.reshape(-1).logsumexp(0), torch.zeros(()))
        close(log_q.logsumexp(1), torch.zeros(16))
        free = -(log_q.exp() * log_p).sum(1)[5]
        # with y clamped, z alone is drawn from q
        log_qz = net.layer(1, net.recognition[0](x)).log_prob(z[:, None]).T
        clamped = -(log_qz.exp() * net.log_generation([x[:, None], z, y[2]])).sum(1)[5]
        asleep = -(log_p.exp() * log_q).sum()
        n = 40_000
        many = x[5].repeat(n, 1)
        for labels, truth in ((None, free), (torch.full((n,), 2), clamped), (torch.full((n,), -1), free)):
            seen = net.losses(many, labels)
            spread = 2.5  # of one row's term; checked below
            assert (seen.generation - truth).abs() < 5 * spread / math.sqrt(n)
            assert (seen.recognition - asleep).abs() < 5 * spread / math.sqrt(n)
        assert (log_p.exp() * (log_q + asleep) ** 2).sum().sqrt() < spread
        assert (log_q.exp()[5] * (log_p[5] + free) ** 2).sum().sqrt() < spread


@pytest.mark.parametrize("labels", ["none", "all", "some"])
def test_pyro_pair_has_the_log_densities_of_the_nets(labels):
    net = random_net(5, (4,), num_classes=3)
    x = torch.bernoulli(torch.full((6, 5), 0.5))
    y = {"none": None, "all": torch.tensor([0, 1, 2, 0, 1, 2]), "some": torch.tensor([0, -1, 2, -1, -1, 1])}[
        labels
    ]
    guide = poutine.trace(net.guide).get_trace(x, y)
    model = poutine.trace(poutine.replay(net.model, guide)).get_trace(x, y)
    model.compute_log_prob()
    guide.compute_log_prob()
    names = {"none": {"y"}, "all": {"y"}, "some": {"y_observed", "y_unobserved", "y"}}[labels]
    assert {name for name in model.nodes if name.startswith("y")} == names
    top = model.nodes["y"]["value"]
    if y is not None:
        assert (top.argmax(-1) == y)[y >= 0].all()
    layers = [x, guide.nodes["z1"]["value"], top]
    close(model.log_prob_sum(), net.log_generation(layers).sum(), 1e-12)
    q_z = net.layer(1, net.recognition[0](x)).log_prob(layers[1])
    q_y = net.layer(2, net.recognition[1](layers[1])).log_prob(top)
    unlabelled = torch.ones(6, dtype=torch.bool) if y is None else y < 0
    close(guide.log_prob_sum(), (q_z + q_y * unlabelled).sum(), 1e-12)


def test_labelled_bound_is_below_the_unlabelled_evidence():
    """log p(x) >= log p(x, y), and the particles of both approach the enumerated values."""
    net = random_net(4, (3,), num_classes=2, spread=0.5)
    x = binary_states(4)
    with torch.no_grad():
        hidden = binary_states(3)
        joint = torch.stack(
            [net.log_generation([x[:, None], hidden, c]).logsumexp(1) for c in torch.eye(2)], 1
        )
    elbo = RenyiELBO(0.0, num_particles=20_000, vectorize_particles=True, max_plate_nesting=1)
    assert abs(-elbo.loss(net.model, net.guide, x) - joint.logsumexp(1).sum()) < 0.1
    y = torch.arange(16) % 2
    assert abs(-elbo.loss(net.model, net.guide, x, y) - joint[torch.arange(16), y].sum()) < 0.1


# ---- learning on digits --------------------------------------------------------------------------------


def accuracy_after(train):
    x, y = binary_digits(1000)
    net = CoupledSigmoidNet(64, (32,), num_classes=10)
    train(net, x[:800], y[:800])
    return net, 1 - net.error(x[800:], y[800:]), x, y


@pytest.mark.parametrize("labelled", [1.0, 0.3])
def test_mixed_objective_learns_to_classify_and_to_generate(labelled):
    def train(net, x, y):
        optimiser = torch.optim.Adam(net.parameters(), 0.02)
        y = torch.where(torch.rand(len(y)) < labelled, y, torch.full_like(y, -1))
        before = net.losses(x, y)
        for step in range(200):
            rows = slice(100 * (step % 8), 100 * (step % 8) + 100)
            optimiser.zero_grad()
            net.loss(x[rows], y[rows], alpha=1.0, beta=2.0).backward()
            optimiser.step()
        assert net.losses(x, y).generation < before.generation - 5

    net, accuracy, x, y = accuracy_after(train)
    assert accuracy > 0.75
    # class-conditional pictures are nearest to their own class's mean image more often than chance
    classes = torch.arange(10).repeat_interleave(20)
    pictures = net.generate(200, "mean", y=classes)
    means = torch.stack([x[y == c].mean(0) for c in range(10)])
    nearest = torch.cdist(pictures, means).argmin(-1)
    assert (nearest == classes).double().mean() > 0.4


OBJECTIVES = {
    "renyi": lambda: RenyiELBO(0.5, num_particles=5, vectorize_particles=True, max_plate_nesting=1),
    "helmholtz": lambda: BiHelmholtzELBO(5, vectorize_particles=True, max_plate_nesting=1),
    "tvo": lambda: TVO(5, LogUniform(2, 0.3), vectorize_particles=True, max_plate_nesting=1),
    "vimco": lambda: ImportanceWeightedELBO(5, "vimco", vectorize_particles=True, max_plate_nesting=1),
    "wake": lambda: ReweightedWakeSleepELBO(5, vectorize_particles=True, max_plate_nesting=1),
    "wake and sleep": lambda: ReweightedWakeSleepELBO(5, 0.5, vectorize_particles=True, max_plate_nesting=1),
}


@pytest.mark.parametrize("labels", ["all", "some", "none"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_tied_weights_train_under_every_objective(name, labels):
    x, y = binary_digits(300)
    if labels == "some":
        y = torch.where(torch.arange(300) % 3 > 0, y, torch.full_like(y, -1))
    args = (x, None if labels == "none" else y)
    net = CoupledSigmoidNet(64, (16,), num_classes=10)
    renyi = OBJECTIVES["renyi"]()
    svi = SVI(net.model, net.guide, pyro.optim.Adam({"lr": 0.02}), OBJECTIVES[name]())
    before = renyi.loss(net.model, net.guide, *args)
    for _ in range(40):
        svi.step(*args)
    assert renyi.loss(net.model, net.guide, *args) < before - 3 * len(x)
    assert net.recognition[0].weight is net.generation[0].weight


def test_unsupervised_net_without_classes_trains():
    x, _ = binary_digits(300)
    net = CoupledSigmoidNet(64, (20, 10))
    elbo = Trace_ELBO()
    svi = SVI(net.model, net.guide, pyro.optim.Adam({"lr": 0.01}), elbo)
    before = elbo.loss(net.model, net.guide, x)
    for _ in range(60):
        svi.step(x)
    assert elbo.loss(net.model, net.guide, x) < before - 5 * len(x)
    optimiser = torch.optim.Adam(net.parameters(), 0.01)
    net.loss(x, alpha=0.5).backward()
    optimiser.step()
    assert net.generate(4).shape == (4, 64) and net.reconstruct(x).shape == x.shape


def test_generation_given_a_class_follows_the_conditional():
    net = random_net(3, (), num_classes=2)
    x = net.generate(20_000, y=1)
    with torch.no_grad():
        probs = net.layer(0, net.generation[0](torch.eye(2)[1])).log_prob(binary_states(3)).exp()
    counts = torch.bincount(state_index(x), minlength=8) / 20_000
    assert (counts - probs).abs().le(5 * (probs * (1 - probs) / 20_000).sqrt()).all()
    with torch.no_grad():
        marginal = net.log_generation([binary_states(3)[:, None], torch.eye(2)]).logsumexp(1).exp()
    counts = torch.bincount(state_index(net.generate(20_000)), minlength=8) / 20_000
    assert (counts - marginal).abs().le(5 * (marginal * (1 - marginal) / 20_000).sqrt()).all()


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda n, x: n.loss(x, torch.tensor([0, 3])),
            "a label is 3; expected integers from 0 to 2, or -1",
        ),
        (lambda n, x: n.loss(x, torch.tensor([0, -2])), "a label is -2"),
        (lambda n, x: n.model(x, torch.tensor([0.0, 0.5])), "a label is 0.5"),
        (lambda n, x: n.guide(x, torch.tensor([0])), r"the labels have shape \(1,\); expected \(2,\)"),
        (lambda n, x: n.error(x, torch.tensor([0, -1])), "y holds -1; expected a label for every row"),
        (lambda n, x: n.generate(2, y=3), "a label is 3"),
        (lambda n, x: n.generate(2, y=-1), "y holds -1; expected classes"),
        (lambda n, x: n.loss(x + 0.5), "expected only 0 and 1"),
        (lambda n, x: CoupledSigmoidNet(4, ()), "at least one latent layer"),
        (lambda n, x: CoupledSigmoidNet(4, (3,), num_classes=0), "num_classes is 0"),
        (lambda n, x: CoupledSigmoidNet(4, (3,)).predict(x), "predict needs classes; this net has none"),
        (lambda n, x: CoupledSigmoidNet(4, (3,)).loss(x, torch.tensor([0, 1])), "y needs classes"),
    ],
)
def test_errors_name_what_was_given(call, message):
    with pytest.raises(InvalidData, match=message):
        call(CoupledSigmoidNet(4, (3,), num_classes=3), torch.zeros(2, 4))
