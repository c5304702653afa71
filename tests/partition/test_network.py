# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""What a decoder may consist of, and what is said about everything else."""

from __future__ import annotations

import pytest
import torch
from decoders import DECODERS, build, mlp
from geometry import far_and_near, round_trip_error
from pyro.nn import PyroModule
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from pyro_cpa.errors import CPAError, InvalidData, UnsupportedModule
from pyro_cpa.partition import Abs, Network, enumerate_regions


@pytest.mark.parametrize(
    ("module", "replacement"),
    [
        (nn.Tanh(), "nn.Hardtanh"),
        (nn.Sigmoid(), "nn.Hardsigmoid"),
        (nn.Softmax(-1), "leave the last layer linear"),
        (nn.GELU(), "nn.ReLU"),
        (nn.SiLU(), "nn.ReLU"),
        (nn.ELU(), "nn.LeakyReLU"),
        (nn.Softplus(), "nn.ReLU"),
        (nn.Hardswish(), "piecewise quadratic; use nn.ReLU6"),
        (nn.Hardshrink(), "not continuous"),
        (nn.LayerNorm(4), "nn.BatchNorm1d in evaluation mode"),
        (nn.Conv1d(4, 4, 1), "write it as nn.Linear"),
        (nn.GLU(), "supported are Abs, BatchNorm1d, Dropout, Hardsigmoid"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_refusals_name_module_place_and_replacement(module, replacement):
    decoder = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 4), module))
    with pytest.raises(UnsupportedModule) as caught:
        enumerate_regions(decoder)
    message = str(caught.value)
    assert message.startswith(f"decoder.2.1: {type(module).__name__} cannot be part of an exact decoder: ")
    assert replacement in message
    assert isinstance(caught.value, CPAError) and isinstance(caught.value, ValueError)


@pytest.mark.parametrize("module", [nn.Dropout(0.5), nn.BatchNorm1d(4)], ids=["Dropout", "BatchNorm1d"])
def test_training_mode_is_refused(module):
    decoder = nn.Sequential(nn.Linear(2, 4), module)
    with pytest.raises(
        UnsupportedModule, match=rf"decoder\.1: {type(module).__name__} .* training mode .*\.eval\(\)"
    ):
        enumerate_regions(decoder)
    assert enumerate_regions(decoder.eval()).num_regions == 1
    enumerate_regions(nn.Sequential(nn.Linear(2, 4), nn.Dropout(0.0)))


def test_batch_norm_without_running_statistics_is_refused():
    decoder = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4, track_running_stats=False)).eval()
    with pytest.raises(UnsupportedModule, match="track_running_stats=True"):
        enumerate_regions(decoder)
    plain = nn.BatchNorm1d(4, affine=False)
    plain.running_mean.normal_()
    decoder = nn.Sequential(nn.Linear(2, 4), plain, nn.ReLU()).eval()
    assert round_trip_error(decoder, enumerate_regions(decoder), far_and_near(2)) < 1e-12


class Skip(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, z):
        return z + torch.relu(self.layer(z))


class Branching(Skip):
    def forward(self, z):
        return self.layer(z) if z.sum() > 0 else z


class TwoHeads(Skip):
    def forward(self, z):
        return self.layer(z), torch.relu(self.layer(z))


class Swish(Skip):
    def forward(self, z):
        return F.silu(self.layer(z))


class Constant(Skip):
    def forward(self, z):
        return self.layer.bias


class Masked(nn.Linear):
    def forward(self, input):
        return F.linear(input, self.weight.tril(), self.bias)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Skip(), r"decoder\.0: Skip .* no chain"),
        (Branching(), r"decoder\.0: Branching .* not a fixed chain of modules \(symbolically traced"),
        (TwoHeads(), r"decoder\.0: TwoHeads .* no chain"),
        (Swish(), r"decoder\.0\.forward: silu .* nn\.ReLU"),
        (Constant(), r"decoder\.0: Constant .* no chain"),
        (Masked(2, 2), r"decoder\.0: Masked"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_forwards_that_are_no_chain_are_refused(module, message):
    with pytest.raises(UnsupportedModule, match=message):
        enumerate_regions(nn.Sequential(module))


class Functional(nn.Module):
    """Every function that has a module, with arguments."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 5), nn.ReLU())
        self.middle, self.out, self.drop = nn.Linear(5, 5), nn.Linear(5, 3), nn.Dropout(0.5)

    def forward(self, z, scale=None):
        h = F.leaky_relu(self.middle(self.drop(self.net(z))), 0.3)
        h = F.hardtanh(h, -0.5, max_val=2.0).relu().abs()
        return F.relu6(torch.abs(self.out(h)))


def test_a_forward_of_ones_own_is_read():
    decoder = Functional().eval()
    part = enumerate_regions(decoder)
    assert round_trip_error(decoder, part, far_and_near(2)) < 1e-12
    assert part.network.places[:4] == (
        "decoder.net.0: Linear",
        "decoder.net.1: ReLU",
        "decoder.middle: Linear",
        "decoder.forward: LeakyReLU",
    )
    with pytest.raises(UnsupportedModule, match=r"decoder\.drop: Dropout"):
        enumerate_regions(decoder.train())


def test_hooks_are_refused():
    decoder = mlp(2, 4, 2)
    handle = decoder[0].register_forward_hook(lambda module, args, output: 2 * output)
    with pytest.raises(UnsupportedModule, match=r"decoder\.0: Linear .* hook"):
        enumerate_regions(decoder)
    handle.remove()
    enumerate_regions(decoder)


def test_parametrized_and_pyro_modules_and_repeated_modules():
    shared = nn.ReLU()
    square = PyroModule[nn.Linear](4, 4)
    decoder = PyroModule[nn.Sequential](
        parametrizations.weight_norm(nn.Linear(2, 4)), shared, square, shared, square, nn.Linear(4, 3)
    )
    part = enumerate_regions(decoder)
    assert len(part.network.linears) == 4 and len(part.patterns) == 2
    assert part.network.linears[1] is part.network.linears[2] is square
    assert round_trip_error(decoder, part, far_and_near(2)) < 1e-12


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(UnsupportedModule, match=r"decoder\.2: Linear takes 5 inputs, but 4 arrive"):
        Network(nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(5, 3)))
    with pytest.raises(UnsupportedModule, match=r"decoder\.1: PReLU takes 3 inputs, but 4 arrive"):
        Network(nn.Sequential(nn.Linear(2, 4), nn.PReLU(3)))
    with pytest.raises(UnsupportedModule, match=r"takes 2 inputs, but 3 arrive there \(latent_dim=3\)"):
        Network(mlp(2, 4, 3), latent_dim=3)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["0.weight", "0.bias", "1.running_var", "2.weight", "3.bias"])
def test_parameters_that_are_not_finite_are_named(where, value):
    decoder = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.PReLU(4), nn.Linear(4, 3)).eval()
    decoder.state_dict()[where].view(-1)[1] = value
    with pytest.raises(InvalidData, match=rf"decoder\.{where} must be finite"):
        enumerate_regions(decoder)


def test_values_in_float64_whatever_the_decoder():
    decoder = mlp(2, 4, 3).float()
    network = Network(decoder)
    assert network.dtype == torch.float32
    assert network.layers()[0].weight.dtype == torch.float64
    part = enumerate_regions(network)
    assert part.dtype == torch.float32
    assert part.slopes.dtype == part.offsets.dtype == part.cells.normals.dtype == torch.float64
    z = torch.randn(500, 2)
    region = part.locate(z.float())
    piece = (part.slopes[region] @ z[..., None])[..., 0] + part.offsets[region]
    assert torch.allclose(piece, decoder(z.float()).double(), atol=1e-5)


def test_reading_changes_nothing():
    for name in DECODERS:
        decoder, latent_dim = build(name)
        before = {key: value.clone() for key, value in decoder.state_dict().items()}
        part = enumerate_regions(decoder)
        assert all(torch.equal(value, before[key]) for key, value in decoder.state_dict().items())
        assert not part.slopes.requires_grad and not part.offsets.requires_grad
        assert part.network.latent_dim == latent_dim


def test_abs_module():
    assert torch.equal(Abs()(torch.tensor([-2.0, 0.0, 3.0])), torch.tensor([2.0, 0.0, 3.0]))
