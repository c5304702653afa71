# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""The conditional VAE against bounds written by hand, and its reduction to the VAE."""

import math

import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.optim import Adam
from torch import nn

from pyro_cpa.errors import InvalidData
from pyro_cpa.infer import AnalyticELBO
from pyro_cpa.models.conditional_vae import ConditionalVAE
from pyro_cpa.models.likelihoods import Bernoulli, Normal
from pyro_cpa.models.vae import VAE

D, C, L = 6, 3, 2
PLACEMENTS = ["prior", "decoder", "both"]


@pytest.fixture
def data():
    return torch.randint(2, (8, D)).double(), torch.randint(C, (8,))


def small_cvae(label_in="both", **options):
    options = {"hidden_dims": (7, 5), "likelihood": Bernoulli(), "dropout": 0.0, **options}
    return ConditionalVAE(D, C, L, label_in=label_in, **options)


def gaussian_kl(q, p_mean, p_std):
    ratio = (q.stddev / p_std) ** 2
    return ((ratio + ((q.mean - p_mean) / p_std) ** 2 - 1 - ratio.log()) / 2).sum(-1)


@pytest.mark.parametrize("label_in", PLACEMENTS)
@pytest.mark.parametrize("objective", [AnalyticELBO, TraceMeanField_ELBO])
def test_bound_and_gradients_equal_those_written_by_hand(label_in, objective, data):
    cvae, (x, y) = small_cvae(label_in), data
    pyro.set_rng_seed(1)
    loss = objective()(cvae.model, cvae.guide)(x, y)
    loss.backward()
    grads = [p.grad.clone() for p in cvae.parameters()]
    cvae.zero_grad()

    pyro.set_rng_seed(1)
    one_hot = torch.eye(C)[y]
    networks = cvae.networks
    q = networks.encoder(torch.cat([x, one_hot], -1))
    z = q.mean + q.stddev * torch.randn(8, L)
    outputs = networks.decoder(z if label_in == "prior" else torch.cat([one_hot, z], -1))
    if label_in == "decoder":
        p_mean, p_std = torch.zeros(L), torch.ones(L)
    else:
        linear = networks.prior_network
        p_mean = linear.loc[0].weight.T[y] + linear.loc[0].bias
        p_std = nn.functional.softplus(linear.raw_scale[0].weight.T[y] + linear.raw_scale[0].bias)
    reconstruction = -nn.functional.binary_cross_entropy_with_logits(outputs, x, reduction="sum")
    expected = gaussian_kl(q, p_mean, p_std).sum() - reconstruction
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    for grad, p in zip(grads, cvae.parameters(), strict=True):
        torch.testing.assert_close(grad, p.grad, rtol=1e-9, atol=1e-12)


def test_without_label_weights_it_is_the_vae(data):
    x, y = data
    cvae = small_cvae("decoder")
    vae = VAE(D, L, hidden_dims=(7, 5), likelihood=Bernoulli(), dropout=0.0)
    state = {name.removeprefix("networks."): value.clone() for name, value in cvae.state_dict().items()}
    state["encoder.hidden.0.weight"] = state["encoder.hidden.0.weight"][:, :D]
    state["decoder.0.weight"] = state["decoder.0.weight"][:, C:]
    vae.load_state_dict(state)
    with torch.no_grad():
        cvae.networks.encoder.hidden[0].weight[:, D:] = 0
        cvae.networks.decoder[0].weight[:, :C] = 0
    for objective in (Trace_ELBO(), AnalyticELBO()):
        pyro.set_rng_seed(4)
        without = objective.loss(vae.model, vae.guide, x)
        pyro.set_rng_seed(4)
        assert objective.loss(cvae.model, cvae.guide, x, y) == pytest.approx(without, rel=1e-12)


def test_one_label_for_all_rows_and_minibatch_size(data):
    cvae, (x, _) = small_cvae(), data
    elbo = AnalyticELBO()
    losses = []
    for y, size in ((2, None), (torch.full((8,), 2), None), (2, 40)):
        pyro.set_rng_seed(1)
        losses.append(elbo.loss(cvae.model, cvae.guide, x, y, size=size))
    assert losses[0] == losses[1] and losses[2] == pytest.approx(5 * losses[0], rel=1e-12)


def test_vectorised_particles(data):
    cvae, (x, y) = small_cvae(), data
    one = AnalyticELBO()
    many = AnalyticELBO(num_particles=300, vectorize_particles=True)
    draws = torch.tensor([one.loss(cvae.model, cvae.guide, x, y) for _ in range(300)])
    error = draws.std() / 300**0.5
    assert abs(many.loss(cvae.model, cvae.guide, x, y) - draws.mean()) < 5 * 2**0.5 * error
    assert many.kl == pytest.approx(one.kl, rel=1e-12)


@pytest.mark.parametrize("label_in", PLACEMENTS)
def test_all_parameters_move_and_the_bound_rises(label_in, data):
    cvae, (x, y) = small_cvae(label_in, dropout=0.1), data
    svi = SVI(cvae.model, cvae.guide, Adam({"lr": 0.02}), AnalyticELBO())
    score = AnalyticELBO(num_particles=50, vectorize_particles=True)
    before, start = score.loss(cvae.model, cvae.guide, x, y), [p.clone() for p in cvae.parameters()]
    for _ in range(60):
        svi.step(x, y)
    assert score.loss(cvae.model, cvae.guide, x, y) < before
    assert not any(torch.equal(a, b) for a, b in zip(start, cvae.parameters(), strict=True))


@pytest.mark.parametrize("label_in", PLACEMENTS)
def test_generate_encode_reconstruct(label_in, data):
    cvae, (x, y) = small_cvae(label_in), data
    assert cvae.generate(4, y=1).shape == cvae.generate(4, y=torch.tensor([0, 1, 2, 0])).shape == (4, D)
    assert cvae.encode(x, y).shape == (8, L)
    assert cvae.reconstruct(x, y, mode="param").shape == (8, D)
    z = torch.randn(5, 8, L)
    assert cvae.decode(z, y).shape == (5, 8, D)


def test_generation_follows_the_label():
    """Each label has its own prior mean; the decoder is the identity."""
    cvae = ConditionalVAE(2, 2, 2, label_in="prior", hidden_dims=(), likelihood=Normal(0.1), dropout=0.0)
    prior = cvae.networks.prior_network
    with torch.no_grad():
        prior.loc[0].weight.copy_(torch.tensor([[-5.0, 5.0], [1.0, 2.0]]))
        prior.loc[0].bias.zero_()
        prior.raw_scale[0].weight.zero_()
        prior.raw_scale[0].bias.fill_(math.log(math.expm1(0.2)))
        cvae.networks.decoder[0].weight.copy_(torch.eye(2))
        cvae.networks.decoder[0].bias.zero_()
    for label, mean in enumerate([[-5.0, 1.0], [5.0, 2.0]]):
        x = cvae.generate(2000, y=label)
        error = math.sqrt((0.2**2 + 0.1**2) / 2000)
        assert ((x.mean(0) - torch.tensor(mean)).abs() < 5 * error).all()


def test_defaults_are_those_of_the_tutorial():
    cvae = ConditionalVAE()
    assert cvae.networks.encoder.hidden[0].weight.shape == (500, 794)
    assert cvae.networks.decoder[0].weight.shape == (500, 30)
    assert cvae.networks.prior_network.loc[0].weight.shape == (20, 10)


@pytest.mark.parametrize(
    "bad, message",
    [
        (torch.full((8,), 3), "a label is 3; expected integers from 0 to 2"),
        (-1, "a label is -1"),
        (torch.full((8,), 0.5), "a label is 0.5"),
        (torch.zeros(7), r"shape \(7,\); expected \(8,\)"),
        (torch.eye(3)[torch.zeros(8, dtype=torch.long)], "not one-hot vectors"),
        (torch.full((8,), math.nan), "a label is nan"),
    ],
)
def test_bad_labels(bad, message, data):
    cvae = small_cvae()
    for method in (cvae.model, cvae.guide, cvae.encode):
        with pytest.raises(InvalidData, match=message):
            method(data[0], bad)


def test_bad_placement():
    with pytest.raises(InvalidData, match="choose 'prior', 'decoder' or 'both'"):
        small_cvae("nowhere")
