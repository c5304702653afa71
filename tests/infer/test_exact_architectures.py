# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""EM, the exact guide and its SVI for decoders with branches and images."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from architectures import SpatialBroadcast, build_architecture
from exact_pairs import net
from pyro.infer import SVI, Trace_ELBO
from pyro.nn import PyroModule, PyroParam
from pyro.optim import Adam
from torch import nn
from torch.distributions import constraints

from pyro_cpa.datasets import load_digits
from pyro_cpa.distributions.fisher import expected_statistics
from pyro_cpa.errors import UnsupportedModel
from pyro_cpa.infer import EM, AutoCPAPosterior, ExactML, m_step
from pyro_cpa.models import CPAGenerator

pytestmark = pytest.mark.filterwarnings("ignore:the normal matrix", "ignore:.*expect overfitting")


class Model(PyroModule):
    def __init__(self, decoder, latent_dim, noise=0.5):
        super().__init__()
        self.decoder, self.latent_dim = decoder, latent_dim
        self.noise = PyroParam(torch.as_tensor(noise), constraint=constraints.positive)

    def forward(self, x):
        zero = torch.zeros(self.latent_dim, dtype=x.dtype)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(zero, 1.0).to_event(1))
            pyro.sample("x", dist.NanMaskedNormal(self.decoder(z), self.noise).to_event(1), obs=x)


def data_of(name, count=15):
    decoder, L = build_architecture(name, seed=5), int(name[-1])
    with torch.no_grad():
        x = decoder(torch.randn(count, L))
    return x + 0.2 * torch.randn_like(x)


@pytest.mark.parametrize("name", ["residual-2", "images-1", "signals-2", "maxout-2", "dense-2", "max-pool-2"])
def test_em_never_falls_and_moves_every_parameter(name):
    model, x = Model(build_architecture(name), int(name[-1])), data_of(name)
    x[0, 1] = torch.nan
    before = {key: p.detach().clone() for key, p in model.decoder.named_parameters()}
    em = EM(model, AutoCPAPosterior(model, decoder=model.decoder))
    losses = [em.step(x) for _ in range(2)] + [em.evaluate_loss(x)]
    assert all(b <= a + 1e-9 * abs(a) for a, b in zip(losses, losses[1:], strict=False))
    assert losses[-1] < losses[0] - 5
    ends_linear = em.guide.partition().network.ends_linear
    assert ("output" in em.history[0].accepted) == ends_linear == (name not in ("images-1", "signals-2"))
    taken = {key: max(r.accepted[key] for r in em.history) for key in em.history[0].accepted}
    assert sum(fraction > 0 for fraction in taken.values()) > len(taken) / 2, taken
    moved = [key for key, p in model.decoder.named_parameters() if not torch.equal(p, before[key])]
    assert len(moved) > len(before) / 2


def e_step(model, x):
    guide = AutoCPAPosterior(model, decoder=model.decoder)
    joint = guide.joint(guide.problem(x))
    return joint, expected_statistics(joint, x)[1]


@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_both_blocks_solve_a_linear_layer_alike(ridge):
    model = Model(net(2, 5, 4, 3), 2, noise=torch.tensor([0.5, 0.7, 0.9]))
    x = torch.randn(60, 3)
    joint, statistics = e_step(model, x)
    for index in (0, 1):
        layer = model.decoder[2 * index]
        precise = {"max_iterations": 500, "tolerance": 1e-13}
        weight, bias = m_step.hidden_layer(
            joint.partition, statistics, joint.noise.scale, ridge, index, **precise
        )
        found = m_step.other_parameters(
            joint.partition,
            statistics,
            joint.noise.scale,
            [layer.weight, layer.bias],
            [ridge, 0.0],
            **precise,
        )
        torch.testing.assert_close(found[0], weight, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found[1], bias, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("full", [False, True])
def test_a_kernel_minimises_the_expected_loss(full):
    decoder, x = build_architecture("images-1"), data_of("images-1")
    model = Model(decoder, 1)
    joint, statistics = e_step(model, x)
    part = joint.partition
    scale = 0.5 * torch.ones(64)
    if full:
        factor = torch.randn(64, 64) / 16
        scale = torch.linalg.cholesky(factor @ factor.mT + torch.eye(64))
        statistics = type(statistics)(statistics.zz, statistics.xz, torch.zeros(64, 64))
    kernel = decoder[3].weight
    (new,) = m_step.other_parameters(
        part, statistics, scale, [kernel], [0.0], max_iterations=300, tolerance=1e-12
    )
    with torch.no_grad():
        kernel.copy_(new)
    value = statistics.expected_log_likelihood(*part.affine_maps(), scale)
    (gradient,) = torch.autograd.grad(value, kernel)
    start = build_architecture("images-1")[3].weight.detach()
    with torch.no_grad():
        kernel.copy_(start)
    (steep,) = torch.autograd.grad(statistics.expected_log_likelihood(*part.affine_maps(), scale), kernel)
    assert gradient.norm() < 1e-6 * steep.norm()


def test_ridge_counts_the_kernels_too():
    decoder = build_architecture("images-1")
    model = Model(decoder, 1)
    em = EM(model, AutoCPAPosterior(model, decoder=decoder), ridge=2.0)
    weights = [m.weight for m in decoder if isinstance(m, nn.Linear | nn.ConvTranspose2d)]
    assert len(weights) == 3
    expected = torch.stack([w.square().sum() for w in weights]).sum()
    torch.testing.assert_close(em._penalty(), expected, rtol=1e-12, atol=0.0)


def test_exact_maximum_likelihood_of_a_residual_decoder():
    model, x = Model(build_architecture("residual-2"), 2), data_of("residual-2")
    ml = ExactML(model, AutoCPAPosterior(model, decoder=model.decoder))
    losses = [ml.step(x) for _ in range(2)] + [ml.evaluate_loss(x)]
    assert losses[-1] < losses[0] - 5


def test_the_latent_dimension_comes_from_the_prior_where_the_decoder_does_not_tell_it():
    decoder = SpatialBroadcast().double()
    decoder.project = nn.Identity()
    model = Model(decoder, 2)
    x = torch.randn(5, 9)
    guide = AutoCPAPosterior(model, decoder=decoder)
    svi = SVI(model, guide, Adam({"lr": 1e-2}), Trace_ELBO())
    assert svi.evaluate_loss(x) == pytest.approx(-guide.log_evidence(x).sum().item(), rel=1e-10)
    assert guide.partition().latent_dim == 2


def test_images_are_to_be_flattened_for_a_vector_of_data():
    decoder = build_architecture("residual-images-1")
    model = Model(nn.Sequential(decoder, nn.Flatten()), 1)
    x = torch.randn(3, 16)
    flat = AutoCPAPosterior(model, decoder=model.decoder).log_evidence(x)
    with pytest.raises(UnsupportedModel, match="is not decoder"):
        AutoCPAPosterior(model, decoder=decoder).log_evidence(x)
    assert torch.isfinite(flat).all()


def test_a_convolutional_decoder_of_real_digits():
    digits = load_digits().x_train[:25]
    assert digits.shape[1] == 64
    torch.manual_seed(1)
    decoder = nn.Sequential(
        nn.Linear(2, 12),
        nn.ReLU(),
        nn.Unflatten(1, (3, 2, 2)),
        nn.ConvTranspose2d(3, 2, 2, stride=2),
        nn.ReLU(),
        nn.ConvTranspose2d(2, 1, 2, stride=2),
        nn.Flatten(),
    ).double()
    model = Model(decoder, 2)
    guide = AutoCPAPosterior(model, decoder=decoder)
    svi = SVI(model, guide, Adam({"lr": 2e-2}), Trace_ELBO())
    losses = [svi.step(digits) for _ in range(4)]
    # With the exact posterior as guide the loss is -log p(x), at every draw.
    again = [svi.evaluate_loss(digits) for _ in range(2)]
    assert again == pytest.approx([-guide.log_evidence(digits).sum().item()] * 2, rel=1e-10)
    assert again[0] < losses[0] - 10 and losses == sorted(losses, reverse=True)


def test_a_generator_takes_any_decoder():
    decoder = build_architecture("images-1")
    model = CPAGenerator(64, 1, decoder=decoder)
    x = data_of("images-1", 10)
    assert model.log_prob(x).shape == (10,)
