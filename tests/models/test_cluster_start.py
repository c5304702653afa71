# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""A mixture started from a VAE: its networks compute what the VAE's do, its clusters are those of the codes."""

import pytest
import torch
from torch import nn

from pyro_cpa.errors import InvalidData, UnsupportedModel
from pyro_cpa.infer import AnalyticELBO
from pyro_cpa.models import VAE, Bernoulli, GaussianMixtureVAE, Normal, cluster_accuracy

CENTRES = torch.tensor([[-4.0, 0.0], [4.0, 0.0], [0.0, 5.0]]).double()
WIDTHS = torch.tensor([[0.5, 0.3], [0.2, 0.6], [0.4, 0.4]]).double()
NOISE = 0.3


@pytest.fixture
def blobs():
    """(600, 2) rows of three Gaussians, and which."""
    labels = torch.arange(600) % 3
    return CENTRES[labels] + WIDTHS[labels] * torch.randn(600, 2).double(), labels


@pytest.fixture
def reader():
    """A VAE whose code is x itself with noise of a known scale, and a third latent that is the prior."""
    vae = VAE(2, 3, hidden_dims=(), likelihood=Normal(), dropout=0.0)
    with torch.no_grad():
        vae.encoder.loc[0].weight.copy_(torch.eye(3, 2))
        vae.encoder.loc[0].bias.zero_()
        vae.decoder[0].weight.copy_(torch.eye(2, 3))
        vae.decoder[0].bias.zero_()
        vae.encoder.raw_scale[0].weight.zero_()
        vae.encoder.raw_scale[0].bias.copy_(torch.tensor([NOISE, NOISE, 1.0]).expm1().log())
    return vae


def mixture(**options):
    return GaussianMixtureVAE(2, 3, 3, **{"hidden_dims": (), "likelihood": Normal(), **options})


def test_the_clusters_are_those_of_the_codes(blobs, reader):
    x, labels = blobs
    model = mixture()
    found = model.start_from(reader, x)
    assert found.shape == (600, 3) and torch.allclose(found.sum(-1), torch.ones(600))
    accuracy, matched = cluster_accuracy(found.argmax(-1), labels)
    assert accuracy == 1 and cluster_accuracy(model.cluster(x), labels)[0] == 1
    prior = model.networks.prior(torch.eye(3))
    for cluster, label in matched.items():
        rows = x[labels == label]
        # The codes are drawn: their means and variances have these standard errors about those of the rows.
        variance = rows.var(0, correction=0) + NOISE**2
        assert ((prior.mean[cluster, :2] - rows.mean(0)).abs() < 5 * NOISE / 200**0.5).all()
        assert ((prior.variance[cluster, :2] / variance - 1).abs() < 5 * (2 / 200) ** 0.5).all()
    assert torch.allclose(prior.mean[:, 2], torch.zeros(3))
    assert torch.allclose(prior.variance[:, 2], torch.ones(3))


@pytest.mark.parametrize("label_in", ["prior", "both"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_the_networks_compute_what_the_vae_does_whatever_the_cluster(label_in, dropout):
    x = torch.randint(2, (40, 6)).double()
    vae = VAE(6, 2, hidden_dims=(7, 5), likelihood=Bernoulli(), dropout=dropout).eval()
    model = GaussianMixtureVAE(6, 3, 2, hidden_dims=(7, 5), label_in=label_in)
    model.start_from(vae, x)
    z, every = torch.randn(40, 2), torch.eye(3)[:, None]
    encoded, expected = model.networks.encoder(x, every), vae.encoder(x)
    assert torch.allclose(encoded.mean, expected.mean.expand(3, 40, 2))
    assert torch.allclose(encoded.stddev, expected.stddev.expand(3, 40, 2))
    assert torch.allclose(model.networks.decode(z, every), vae.decoder(z).expand(3, 40, 6))


def test_the_noise_of_the_likelihood_is_taken_over(blobs, reader):
    with torch.no_grad():
        for value in reader.likelihood.parameters():
            value.fill_(-1.5)
    model = mixture()
    model.start_from(reader, blobs[0])
    assert list(model.likelihood.parameters())
    assert all((value == -1.5).all() for value in model.likelihood.parameters())


def test_the_start_is_ahead_of_a_random_one_and_follows_torchs_seed(blobs, reader):
    x, _ = blobs
    bounds = []
    for _ in range(2):
        torch.manual_seed(3)
        model = mixture()
        random = AnalyticELBO().loss(model.model, model.guide, x)
        model.start_from(reader, x)
        bounds.append(AnalyticELBO().loss(model.model, model.guide, x))
    assert bounds[0] == bounds[1] < random


def test_single_precision(blobs, reader):
    x, labels = blobs
    model = mixture().float()
    found = model.start_from(reader.float(), x)
    assert found.dtype == torch.float32 and cluster_accuracy(found.argmax(-1), labels)[0] == 1


@pytest.mark.parametrize(
    "options, message",
    [
        ({"data_dim": 3}, "data_dim is 3, the mixture's 2"),
        ({"latent_dim": 2}, "latent_dim is 2, the mixture's 3"),
        ({"likelihood": Bernoulli()}, "likelihood is Bernoulli, the mixture's Normal"),
        ({"hidden_dims": (5,)}, "same hidden_dims and activation"),
        ({"hidden_dims": (4, 4)}, "same hidden_dims and activation"),
        ({"activation": nn.Tanh}, "same hidden_dims and activation"),
    ],
)
def test_a_vae_of_other_networks(options, message, blobs):
    vae = VAE(**{"data_dim": 2, "latent_dim": 3, "hidden_dims": (4,), "likelihood": Normal(), **options})
    with pytest.raises(InvalidData, match=message):
        mixture(hidden_dims=(4,)).start_from(vae, blobs[0])


def test_bad_input(blobs, reader):
    x, _ = blobs
    with pytest.raises(InvalidData, match="2 rows; expected at least as many as clusters, 3"):
        mixture().start_from(reader, x[:2])
    model = mixture()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InvalidData, match="the same for all rows"):
        model.start_from(reader, torch.zeros(9, 2))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(InvalidData, match="restarts"):
        mixture().start_from(reader, x, restarts=0)
    with pytest.raises(UnsupportedModel, match="use 'prior' or 'both'"):
        mixture(label_in="decoder").start_from(reader, x)
