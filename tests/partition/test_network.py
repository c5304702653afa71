# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""What a decoder may consist of, and what is said about everything else."""

from __future__ import annotations

import pytest
import torch
from decoders import DECODERS, build, mlp
from geometry import far_and_near, round_trip_error
from pyro.nn import PyroModule
from refused_forwards import REFUSED, Layer
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
        (nn.GroupNorm(2, 4), "nn.BatchNorm1d in evaluation mode"),
        (nn.GLU(), "multiplies what depends on z"),
        (nn.RReLU(), "use nn.LeakyReLU"),
        (nn.CosineSimilarity(), "see pyro_cpa.partition.Network for what is"),
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


@pytest.mark.parametrize(("kind", "message"), REFUSED)
def test_forwards_that_are_refused(kind, message):
    state = torch.get_rng_state()
    decoder = nn.Sequential(kind())
    torch.set_rng_state(state)
    with pytest.raises(UnsupportedModule, match=message):
        enumerate_regions(decoder)
    assert torch.equal(torch.get_rng_state(), state)
    assert set(vars(decoder[0])) == set(vars(kind()))


def test_what_the_output_does_not_need_is_not_looked_at():
    class Unused(Layer):
        def forward(self, z):
            h = self.layer(z)
            torch.sigmoid(h)
            greatest, _ = h.max(dim=1, keepdim=True)
            return self.act(h) + greatest

    decoder = Unused()
    assert round_trip_error(decoder, enumerate_regions(decoder), far_and_near(2)) < 1e-12


def test_overwriting_what_is_not_used_again_is_read():
    class InPlace(Layer):
        def forward(self, z):
            h = self.layer(z)
            rows = h.shape[0]
            h += 0.5
            h = F.relu_(h.view(rows, 2, 1))
            skip = h
            h = h - 1
            return (skip + F.relu(h, inplace=True)).flatten(1)

    decoder = InPlace()
    assert round_trip_error(decoder, enumerate_regions(decoder), far_and_near(2)) < 1e-12


def test_weights_changed_by_a_forward_and_arguments_with_defaults():
    class Masked(nn.Linear):
        def forward(self, input):
            return F.linear(input, self.weight.tril(), self.bias)

    class Optional(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = Masked(2, 4), Masked(4, 4)

        def forward(self, z, skip=None, *, times=2):
            h = self.first(z)
            for _ in range(times):
                h = torch.relu(self.second(h))
            return h if skip is None else h + skip

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Optional()

        def forward(self, z):
            return self.inner(z, times=1, skip=torch.cat([z, z], -1)) - 2 * self.inner(z)

    decoder = Outer()
    part = enumerate_regions(decoder)
    assert part.network.linears == () and len(part.patterns) == 3
    assert round_trip_error(decoder, part, far_and_near(2)) < 1e-12
    slopes, _ = part.affine_maps()
    (gradient,) = torch.autograd.grad(slopes.sum(), decoder.inner.second.weight)
    assert torch.equal(gradient.triu(1), torch.zeros(4, 4)) and gradient.tril().abs().sum() > 0


def test_the_latent_dimension_where_no_layer_tells_it():
    class Reshaped(nn.Module):
        def forward(self, z):
            return torch.relu(z[:, :1] - z[:, 1:])

    with pytest.raises(UnsupportedModule, match="give latent_dim="):
        Network(Reshaped())
    decoder = Reshaped()
    part = enumerate_regions(decoder, latent_dim=2)
    assert part.num_regions == 2 and part.data_dim == 1
    assert round_trip_error(decoder, part, far_and_near(2)) < 1e-12
    image = nn.Sequential(nn.ReLU(), nn.Unflatten(1, (2, 1, 1)), nn.Conv2d(2, 3, 1))
    assert (Network(image).latent_dim, Network(image).data_dim) == (2, 3)


def test_images_that_do_not_fit_are_refused():
    with pytest.raises(
        UnsupportedModule, match=r"decoder\.1: Conv2d takes inputs \(rows, channels, height, width\)"
    ):
        Network(nn.Sequential(nn.Linear(2, 4), nn.Conv2d(4, 1, 1)))
    with pytest.raises(UnsupportedModule, match=r"decoder\.2: Conv2d takes 3 inputs, but 4 arrive"):
        Network(nn.Sequential(nn.Linear(2, 4), nn.Unflatten(1, (4, 1, 1)), nn.Conv2d(3, 1, 1)))
    with pytest.raises(UnsupportedModule, match=r"decoder\.2: Conv2d .* does not take what arrives there"):
        Network(nn.Sequential(nn.Linear(2, 4), nn.Unflatten(1, (4, 1, 1)), nn.Conv2d(4, 1, 3)))
    with pytest.raises(UnsupportedModule, match=r"decoder\.2: MaxPool2d .* return_indices=False"):
        Network(
            nn.Sequential(nn.Linear(2, 4), nn.Unflatten(1, (1, 2, 2)), nn.MaxPool2d(2, return_indices=True))
        )
    with pytest.raises(UnsupportedModule, match=r"decoder\.2: Upsample .* mode='bilinear'"):
        up = nn.Upsample(scale_factor=2, mode="bicubic")
        Network(nn.Sequential(nn.Linear(2, 4), nn.Unflatten(1, (1, 2, 2)), up))


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
        "decoder.forward: leaky_relu",
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
