# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""A guide keeps the partition of its decoder, and notices whatever changes in it."""

import copy
import pickle

import pytest
import torch
from exact_pairs import Exact, circle, exact_nll, net
from torch import nn

from pyro_cpa.errors import UnsupportedModule
from pyro_cpa.infer import AutoCPAPosterior


class Own(nn.Module):
    """A forward of one's own, with a constant from outside and something that it keeps."""

    factor = 1.0

    def __init__(self, *sizes):
        super().__init__()
        self.layers = net(*sizes, seed=3)

    def forward(self, z):
        self.kept = self.layers(z)
        return Own.factor * self.kept


def changes():
    def swapped(decoder):
        decoder[1] = nn.ReLU()

    def slope(decoder):
        decoder[1].negative_slope = 0.4

    def weights(decoder):
        decoder[0].weight.data.mul_(-1.3)

    def replaced(decoder):
        decoder[2].bias = nn.Parameter(torch.tensor([3.0, -1.0]))

    def removed(decoder):
        decoder[0].bias = None

    def wider(decoder):
        decoder[0], decoder[2] = nn.Linear(1, 9), nn.Linear(9, 2)

    def statistics(decoder):
        decoder[3].running_var.mul_(4.0)

    return (swapped, slope, weights, replaced, removed, wider, statistics)


@pytest.mark.parametrize("change", changes())
def test_whatever_changes_in_the_decoder_is_noticed(change):
    model = Exact(1, 6, 2, noise=0.4, seed=3)
    model.decoder.append(nn.BatchNorm1d(2).eval())
    guide = AutoCPAPosterior(model, decoder=model.decoder)
    x = circle(6)
    before, partition = guide.log_evidence(x), guide.partition()
    assert guide.partition() is partition
    change(model.decoder)
    z = torch.linspace(-3, 3, 50)[:, None]
    for _ in range(2):
        now = guide.partition()
        assert now is not partition
        pieces = (now.slopes[now.locate(z)] @ z[..., None])[..., 0] + now.offsets[now.locate(z)]
        torch.testing.assert_close(pieces, model.decoder(z), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(guide.log_evidence(x), -exact_nll(model, x), rtol=1e-12, atol=1e-12)
        assert not torch.allclose(guide.log_evidence(x), before)
        # What is read once more under other values is right too.
        with torch.no_grad():
            model.decoder[2].weight.mul_(1.5)


def test_a_hook_is_noticed():
    model = Exact(1, 6, 2, noise=0.4, seed=3)
    guide = AutoCPAPosterior(model, decoder=model.decoder)
    partition = guide.partition()
    handle = model.decoder[0].register_forward_hook(lambda module, args, output: 2 * output)
    with pytest.raises(UnsupportedModule, match="hook"):
        guide.partition()
    handle.remove()
    assert guide.partition() is partition


def test_training_mode_is_noticed():
    model = Exact(1, 6, 2, noise=0.4, seed=3)
    model.decoder.append(nn.BatchNorm1d(2).eval())
    guide = AutoCPAPosterior(model, decoder=model.decoder)
    guide.partition()
    model.decoder.train()
    with pytest.raises(UnsupportedModule, match="in training mode"):
        guide.partition()
    with torch.no_grad():
        model.decoder[0].weight.mul_(2.0)
    with pytest.raises(UnsupportedModule, match="in training mode"):
        guide.partition()
    model.decoder.eval()
    assert guide.partition().num_regions > 1


def test_a_forward_of_ones_own_is_read_again_with_new_values(monkeypatch):
    model = Exact(1, 6, 2, noise=0.4, seed=3)
    model.decoder = Own(1, 6, 2)
    guide, x = AutoCPAPosterior(model, decoder=model.decoder), circle(6)
    guide.log_evidence(x)
    partition = guide.partition()
    guide.log_evidence(x)
    assert guide.partition() is partition
    monkeypatch.setattr(Own, "factor", 2.0)
    with torch.no_grad():
        model.decoder.layers[0].weight.mul_(1.1)
    torch.testing.assert_close(guide.log_evidence(x), -exact_nll(model, x), rtol=1e-12, atol=1e-12)


def test_copies_and_pickles_of_a_guide_follow_their_own_decoder():
    model = Exact(1, 6, 2, noise=0.4, seed=3)
    guide = AutoCPAPosterior(model, decoder=model.decoder)
    guide.partition()
    for copied in (copy.deepcopy(guide), pickle.loads(pickle.dumps(guide))):
        with torch.no_grad():
            copied.decoder[0].weight.mul_(2.0)
        assert copied.partition().network.decoder is copied.decoder
        slopes = guide.partition().slopes
        assert not torch.allclose(copied.partition().slopes[0], slopes[0])
        torch.testing.assert_close(slopes, guide.partition().affine_maps()[0].detach())
