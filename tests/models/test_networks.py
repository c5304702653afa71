# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0

import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_cpa.errors import InvalidData
from pyro_cpa.models.networks import GaussianNetwork, concatenate, mlp, xavier_start


def test_mlp_layers():
    names = [type(layer).__name__ for layer in mlp(3, (5, 4), 2, activation=nn.Tanh, dropout=0.1)]
    assert names == ["Linear", "Tanh", "Dropout", "Linear", "Tanh", "Dropout", "Linear"]
    assert [type(layer).__name__ for layer in mlp(3, (5,))] == ["Linear", "ReLU"]
    assert len(mlp(3, ())) == 0


def test_concatenate_broadcasts_particles_and_enumerated_values():
    x, z, y = torch.zeros(5, 3), torch.ones(7, 5, 2), torch.full((4, 1, 1, 1), 2.0)
    joined = concatenate(x, z, y)
    assert joined.shape == (4, 7, 5, 6)
    assert joined[1, 2, 3].tolist() == [0, 0, 0, 1, 1, 2]


def test_gaussian_network_by_hand():
    net = GaussianNetwork(3, (4,), 2)
    x = torch.randn(5, 3)
    hidden = torch.relu(x @ net.hidden[0].weight.T + net.hidden[0].bias)
    loc = hidden @ net.loc[0].weight.T + net.loc[0].bias
    scale = torch.log1p(torch.exp(hidden @ net.raw_scale[0].weight.T + net.raw_scale[0].bias))
    q = net(x)
    assert q.batch_shape == (5,) and q.event_shape == (2,)
    torch.testing.assert_close(q.mean, loc)
    torch.testing.assert_close(q.stddev, scale)


def test_scale_never_reaches_zero():
    net = GaussianNetwork(1, (), 1).float()
    nn.init.constant_(net.raw_scale[0].bias, -500.0)
    q = net(torch.zeros(1, 1, dtype=torch.float32))
    assert q.stddev.item() > 0 and torch.isfinite(q.log_prob(q.mean)).all()
    prior = dist.Normal(torch.zeros(1, 1), 1.0).to_event(1)
    assert torch.isfinite(torch.distributions.kl_divergence(q, prior)).all()


def test_xavier_start():
    net = mlp(400, (300,), 2)
    xavier_start(net)
    expected = (2 / 700) ** 0.5
    error = expected / (2 * 400 * 300) ** 0.5
    assert abs(net[0].weight.std().item() - expected) < 5 * error
    assert not net[0].bias.any() and not net[2].bias.any()


@pytest.mark.parametrize("widths", [(0, (3,), 2), (2, (3.0,), 2), (2, (3,), -1)])
def test_bad_widths(widths):
    with pytest.raises(InvalidData, match="positive integers"):
        mlp(*widths)


def test_bad_dropout():
    with pytest.raises(InvalidData, match="probability"):
        mlp(2, (3,), 1, dropout=1.0)
