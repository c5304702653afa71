# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""The partition object: maps, their derivatives, factors, and location."""

from __future__ import annotations

import pytest
import torch
from decoders import DECODERS, build, mlp
from geometry import far_and_near, round_trip_error
from torch import nn

from pyro_cpa.errors import InvalidData
from pyro_cpa.partition import enumerate_regions


def apply(slopes, offsets, z):
    return (slopes @ z[..., None])[..., 0] + offsets


@pytest.mark.parametrize("name", DECODERS)
def test_shapes_and_factors(name):
    decoder, L = build(name)
    part = enumerate_regions(decoder)
    R, D, H = part.num_regions, part.data_dim, part.output_weight.shape[1]
    assert len(part.cells) == R
    assert part.slopes.shape == (R, D, L) and part.offsets.shape == (R, D)
    assert part.feature_slopes.shape == (R, H, L) and part.feature_offsets.shape == (R, H)
    assert part.output_weight.shape == (D, H) and part.output_bias.shape == (D,)
    assert torch.allclose(part.output_weight @ part.feature_slopes, part.slopes, rtol=1e-13)
    assert torch.allclose(part.feature_offsets @ part.output_weight.mT + part.output_bias, part.offsets)
    slopes, offsets = part.affine_maps()
    for live, stored in ((slopes, part.slopes), (offsets, part.offsets)):
        assert live.shape == stored.shape and live.dtype == torch.float64
        assert torch.allclose(live, stored, rtol=1e-13, atol=1e-15 * float(stored.abs().max() + 1))


def test_the_last_factor():
    ends_linear = enumerate_regions(mlp(2, 4, 3))
    assert torch.equal(ends_linear.output_weight, ends_linear.network.linears[-1].weight.detach())
    ends_otherwise = enumerate_regions(nn.Sequential(mlp(2, 4, 3), nn.ReLU()))
    assert torch.equal(ends_otherwise.output_weight, torch.eye(3))
    assert torch.equal(ends_otherwise.output_bias, torch.zeros(3))


@pytest.mark.parametrize("name", DECODERS)
def test_gradients_of_the_maps_are_those_of_the_decoder(name):
    decoder, L = build(name)
    part = enumerate_regions(decoder)
    z = torch.cat([torch.randn(40, L), part.cells.interior_points()[:200]])
    probe = torch.randn(len(z), part.data_dim)
    parameters = dict(decoder.named_parameters())
    wanted = torch.autograd.grad((decoder(z) * probe).sum(), list(parameters.values()), allow_unused=True)
    slopes, offsets = part.affine_maps()
    region = part.locate(z)
    value = (apply(slopes[region], offsets[region], z) * probe).sum()
    found = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
    # PyTorch's own derivative of Hardsigmoid holds 1/6 in single precision.
    rtol = 1e-7 if name == "hardsigmoid-2" else 1e-10
    for key, a, b in zip(parameters, found, wanted, strict=True):
        a, b = (torch.zeros_like(parameters[key]) if g is None else g for g in (a, b))
        assert torch.allclose(a, b, rtol=rtol, atol=rtol * float(b.abs().max() + 1)), key


def test_maps_follow_the_parameters_and_stored_ones_do_not():
    decoder, _ = build("prelu-2")
    part = enumerate_regions(decoder)
    stored = part.output_weight.clone(), enumerate_regions(decoder).slopes
    before = [p.detach().clone() for p in part.affine_maps()]
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(1e-3 * torch.randn_like(parameter))
    assert torch.equal(part.output_weight, stored[0]) and torch.equal(part.slopes, stored[1])
    after = part.affine_maps()
    assert not torch.allclose(before[0], after[0])
    # Deep inside a cell the pattern is still the same, so that the live maps are the decoder's.
    z = part.cells.interior_points()
    moved = enumerate_regions(decoder)
    same = (torch.cat(part.patterns, 1) == torch.cat(moved.patterns, 1)[moved.locate(z)]).all(1)
    assert same.sum() > 10
    assert torch.allclose(apply(*after, z)[same], decoder(z)[same], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "name", ["leaky-1", "deep-2", "prelu-2", "hardtanh-2", "batch-norm-2", "nested-2", "relu6-2"]
)
def test_inputs_and_derivatives_of_every_linear_layer(name):
    decoder, L = build(name)
    part = enumerate_regions(decoder)
    z = part.cells.interior_points()
    captured = {}
    handles = [
        layer.register_forward_hook(lambda module, args, out, i=i: captured.update({i: (args[0], out)}))
        for i, layer in enumerate(part.network.linears)
    ]
    x = decoder(z)
    for handle in handles:
        handle.remove()
    for i, (given, returned) in captured.items():
        slopes, offsets = part.linear_inputs(i)
        assert slopes.shape == (part.num_regions, given.shape[1], L)
        assert torch.allclose(apply(slopes, offsets, z), given, rtol=1e-12, atol=1e-12)
        downstream = part.downstream(i)
        assert downstream.shape == (part.num_regions, part.data_dim, returned.shape[1])
        assert not downstream.requires_grad and not slopes.requires_grad
        for d in range(part.data_dim):
            (row,) = torch.autograd.grad(x[:, d].sum(), returned, retain_graph=True)
            assert torch.allclose(downstream[:, d], row, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["linear-5", "leaky-1", "deep-2"])
def test_locate_takes_any_batch_shape(name):
    decoder, L = build(name)
    part = enumerate_regions(decoder)
    z = torch.randn(4, 1, 3, L)
    region = part.locate(z)
    assert region.shape == (4, 1, 3) and region.dtype == torch.long
    assert torch.equal(region.flatten(), part.locate(z.reshape(-1, L)))
    assert part.locate(z[0, 0, 0]).shape == ()
    assert part.locate(torch.empty(0, L)).shape == (0,)
    assert torch.equal(part.locate(z.clone().requires_grad_()), region)
    with pytest.raises(InvalidData, match=rf"shape \(\.\.\., {L}\), but has \(3, {L + 1}\)"):
        part.locate(torch.zeros(3, L + 1))


def test_points_on_walls_lie_in_one_cell():
    part = enumerate_regions(mlp(1, 5, 2))
    upper = part.cells.upper[:-1, None]
    assert torch.equal(part.locate(upper), torch.arange(len(upper)))
    decoder = mlp(2, 6, 6, 2)
    part = enumerate_regions(decoder)
    corners = torch.cat([torch.as_tensor(c) for c in part.cells.clip_to_box(-3.0, 3.0)])
    assert round_trip_error(decoder, part, corners) < 1e-12


def test_a_network_can_be_enumerated_again():
    decoder = mlp(2, 5, 3)
    first = enumerate_regions(decoder)
    again = enumerate_regions(first.network)
    assert torch.equal(first.slopes, again.slopes)
    with torch.no_grad():
        decoder[0].bias.add_(0.5)
    moved = enumerate_regions(first.network)
    z = far_and_near(2)
    assert round_trip_error(decoder, moved, z) < 1e-12
    assert round_trip_error(decoder, first, z) > 1e-3


@pytest.mark.parametrize("name", ["leaky-1", "deep-2", "hardtanh-2", "batch-norm-2"])
def test_the_default_dtype_does_not_matter(name):
    decoder, _ = build(name)
    part = enumerate_regions(decoder)
    torch.set_default_dtype(torch.float32)
    again = enumerate_regions(decoder)
    assert torch.equal(again.slopes, part.slopes) and torch.equal(again.offsets, part.offsets)
    assert all(torch.equal(a, b) for a, b in zip(again.patterns, part.patterns, strict=True))


def test_repr_tells_the_size():
    assert repr(enumerate_regions(mlp(1, 3, 2))) == "Partition(R^1 -> R^2, 4 regions)"


def test_progress_is_shown_where_it_is_asked_for(capsys):
    enumerate_regions(mlp(2, 8, 8, 3), progress=True)
    assert "100%" in capsys.readouterr().err
    enumerate_regions(mlp(2, 8, 8, 3))
    assert capsys.readouterr().err == ""
