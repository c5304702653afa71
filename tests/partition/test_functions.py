# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Every function and module that is understood, against PyTorch's own result in every region."""

from __future__ import annotations

import operator

import pytest
import torch
from geometry import far_and_near
from torch import nn
from torch.nn import functional as F

from pyro_cpa.errors import InvalidData, UnsupportedModule
from pyro_cpa.partition import Abs, Maxout, enumerate_regions


class Applied(nn.Module):
    """A function of vectors (N, 12), images (N, 3, 2, 2) or signals (N, 2, 6), and of parameters."""

    def __init__(self, function, shape=(12,)):
        super().__init__()
        self.function, self.shape = function, shape
        self.layer = nn.Linear(2, 12)
        self.one, self.row, self.matrix = (nn.Parameter(torch.randn(s)) for s in ((1,), (12,), (12, 5)))
        self.image = nn.Parameter(torch.randn(1, 3, 2, 2))
        self.kernel, self.up = nn.Parameter(torch.randn(2, 3, 2, 2)), nn.Parameter(torch.randn(3, 2, 2, 2))
        self.register_buffer("index", torch.tensor([3, 0, 0, 7]))
        self.register_buffer("scale", torch.tensor(0.3))

    def forward(self, z):
        return self.function(self, self.layer(z).unflatten(1, self.shape))


def difference(h):
    a, b = h.tensor_split(2, 1)
    return a - b


VECTOR, IMAGE, SIGNAL = (12,), (3, 2, 2), (2, 6)
FUNCTIONS = {
    # units
    "relu": (lambda m, h: F.relu(h).relu(), VECTOR),
    "leaky_relu": (lambda m, h: F.leaky_relu(h, negative_slope=0.3), VECTOR),
    "relu6": (lambda m, h: F.relu6(3 * h), VECTOR),
    "hardtanh": (lambda m, h: F.hardtanh(h, -0.5, max_val=0.2), VECTOR),
    "hardsigmoid": (lambda m, h: F.hardsigmoid(2 * h), VECTOR),
    "softshrink": (lambda m, h: F.softshrink(h, 0.3), VECTOR),
    "abs": (lambda m, h: abs(h) + h.abs() - torch.abs(h - 1), VECTOR),
    "prelu": (lambda m, h: F.prelu(h, m.row), VECTOR),
    "prelu of one": (lambda m, h: torch.prelu(h, m.one), IMAGE),
    "clamp": (lambda m, h: torch.clamp(h, -0.3, 0.4) + h.clamp(min=m.row) + h.clip(max=0.1), VECTOR),
    "clamp_min": (lambda m, h: h.clamp_min(0.2) - torch.clamp_max(h, m.scale), VECTOR),
    # extrema
    "max": (lambda m, h: torch.max(h, h.flip(1)) + h.max(1, keepdim=True).values, VECTOR),
    "max of dim": (lambda m, h: torch.max(h, dim=2)[0], IMAGE),
    "min": (lambda m, h: torch.min(h, m.row) - h.min(dim=-1, keepdim=True)[0], VECTOR),
    "amax": (lambda m, h: h.amax((-1, 2)), IMAGE),
    "amin": (lambda m, h: torch.amin(h, dim=1, keepdim=True), IMAGE),
    "maximum": (lambda m, h: torch.maximum(h[:, :1], h[:, 1:]), VECTOR),
    "minimum of constant": (lambda m, h: torch.minimum(m.image, h), IMAGE),
    "max_pool": (lambda m, h: F.max_pool2d(h, 2), IMAGE),
    "max_pool1d": (lambda m, h: F.max_pool1d(h, 3, stride=2, padding=1, ceil_mode=True), SIGNAL),
    "dilated pool": (lambda m, h: F.max_pool2d(h.reshape(-1, 1, 3, 4), 2, 1, 0, 2), VECTOR),
    "pool of no channels": (lambda m, h: F.max_pool1d(h, 2), VECTOR),
    # sums and multiples
    "add": (lambda m, h: torch.add(h, h.flip(1), alpha=2) + m.row + 1, VECTOR),
    "add to image": (lambda m, h: (h + m.image) + h[:, :1], IMAGE),
    "sub": (lambda m, h: 1 - (m.row - h) - torch.sub(h, h.roll(1, 1), alpha=0.5), VECTOR),
    "mul": (lambda m, h: m.row * h * 2 * m.scale, VECTOR),
    "mul to image": (lambda m, h: h.mul(m.image[:, :1]), IMAGE),
    "outer": (lambda m, h: h[:, :, None] * m.row, VECTOR),
    "div": (lambda m, h: h / 3 / m.row.exp() + torch.div(h, m.one), VECTOR),
    "neg": (lambda m, h: -h + torch.neg(h) * 3, VECTOR),
    "in place": (lambda m, h: F.relu_(operator.iadd(h, m.row).mul_(2)), VECTOR),
    # linear maps
    "linear": (lambda m, h: F.linear(h, m.matrix.T.tril(), m.matrix[0]), VECTOR),
    "linear of signals": (lambda m, h: F.linear(h, m.matrix[:6, :].T, m.row[:5]), SIGNAL),
    "matmul": (lambda m, h: h @ m.matrix, VECTOR),
    "matmul from the left": (lambda m, h: torch.matmul(m.kernel[0, 0], h), SIGNAL),
    "einsum": (lambda m, h: torch.einsum("ncij,ocij->no", h, m.kernel), IMAGE),
    "conv2d": (lambda m, h: F.conv2d(h, m.kernel, m.row[:2], padding=1, stride=2), IMAGE),
    "conv1d": (lambda m, h: F.conv1d(h, m.up[:, :, 0], dilation=2), SIGNAL),
    "grouped conv2d": (lambda m, h: F.conv2d(h, m.up[:, :1], groups=3), IMAGE),
    "conv_transpose2d": (lambda m, h: F.conv_transpose2d(h, m.up, m.row[:2], 2, 1, 1), IMAGE),
    "conv_transpose1d": (lambda m, h: F.conv_transpose1d(h, m.kernel[:, :, 0], stride=3), SIGNAL),
    "batch_norm": (
        lambda m, h: F.batch_norm(h, m.row[:3].detach(), m.row.detach()[3:6].abs(), m.row[6:9], m.row[9:]),
        IMAGE,
    ),
    "avg_pool": (lambda m, h: F.avg_pool2d(h, 2, 1, padding=1), IMAGE),
    "adaptive_avg_pool": (lambda m, h: F.adaptive_avg_pool2d(h, 1).squeeze(-1), IMAGE),
    "mean": (lambda m, h: h.mean((2, 3)) + h.mean(dim=(2, 3), keepdim=True).flatten(1), IMAGE),
    "sum": (lambda m, h: torch.sum(h, 2) - h.sum(1)[:, 2:4], SIGNAL),
    "sum of all": (lambda m, h: h.sum(1)[:, None], VECTOR),
    "dropout": (lambda m, h: F.dropout(h, 0.5, training=m.training), VECTOR),
    # entries moved about
    "interpolate": (lambda m, h: F.interpolate(h, scale_factor=2), IMAGE),
    "bilinear": (lambda m, h: F.interpolate(h, size=(3, 5), mode="bilinear", align_corners=True), IMAGE),
    "pad": (lambda m, h: F.pad(h, (1, 0, 2, 1)) + F.pad(h, (1, 0, 2, 1), value=1.0), IMAGE),
    "reflect": (lambda m, h: F.pad(h, (2, 1), mode="reflect"), SIGNAL),
    "cropped": (lambda m, h: F.pad(h, (-1, 1)), SIGNAL),
    "pixel_shuffle": (lambda m, h: F.pixel_shuffle(h.view(-1, 12, 1, 1), 2), VECTOR),
    "cat": (lambda m, h: torch.cat([h, m.image.expand(h.shape[0], -1, -1, -1), h * 2], 1), IMAGE),
    "cat of zeros": (lambda m, h: torch.cat([h.new_zeros(h.size(0), 2), h, torch.ones_like(h)], 1), VECTOR),
    "stack": (lambda m, h: torch.stack([h, -h], dim=-1), IMAGE),
    "chunk": (lambda m, h: torch.cat(h.chunk(3, 1)[::-1], 1), VECTOR),
    "split": (lambda m, h: h.split([5, 7], dim=1)[1] - h.split(7, 1)[0], VECTOR),
    "unbind": (lambda m, h: h.unbind(1)[0] - torch.unbind(h, dim=1)[1], SIGNAL),
    "unpacked": (lambda m, h: difference(h), VECTOR),
    "getitem": (lambda m, h: h[:, m.index] + h[:, 1:5] + h[..., -1:] + h[:, [0, 2, 4, 6]], VECTOR),
    "getitem of image": (lambda m, h: h[:, 0, None] + h[:, :, ::2], IMAGE),
    "index_select": (lambda m, h: torch.index_select(h, 1, m.index), VECTOR),
    "permute": (lambda m, h: h.permute(0, 2, 3, 1).contiguous().view(h.size(0), -1), IMAGE),
    "transpose": (lambda m, h: h.transpose(1, 2).mT.movedim(1, 2), SIGNAL),
    "flatten": (lambda m, h: torch.flatten(h, 2).unflatten(1, (3, 1)).squeeze(2), IMAGE),
    "reshape": (lambda m, h: h.reshape(h.shape[0], h.shape[1] * 2, h.size(3)), IMAGE),
    "reshape by count": (lambda m, h: h.view(h.shape[0], h.numel() // h.shape[0]), IMAGE),
    "expand": (lambda m, h: h[:, :, None].expand(-1, -1, 3).repeat(1, 1, 2), VECTOR),
    "repeat_interleave": (lambda m, h: h.repeat_interleave(2, dim=1), VECTOR),
    "ranks": (lambda m, h: h.flatten(h.dim() - 2).flatten(h.ndim - 3), IMAGE),
    "casts": (lambda m, h: h.to(torch.float64).type_as(m.row).double().clone(), VECTOR),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name):
    decoder = Applied(*FUNCTIONS[name]).eval()
    assert_agrees(decoder)


MODULES = {
    "Softshrink": (nn.Softshrink(0.2), VECTOR),
    "RReLU": (nn.RReLU().eval(), VECTOR),
    "Hardsigmoid": (nn.Hardsigmoid(), VECTOR),
    "Abs": (Abs(), VECTOR),
    "Maxout": (Maxout(4), VECTOR),
    "Maxout of channels": (Maxout(3, dim=1), IMAGE),
    "Conv3d": (nn.Conv3d(3, 2, (1, 2, 2)), (3, 1, 2, 2)),
    "ConvTranspose3d": (nn.ConvTranspose3d(3, 1, 2), (3, 1, 2, 2)),
    "reflecting Conv2d": (nn.Conv2d(3, 2, 3, padding=1, padding_mode="reflect"), IMAGE),
    "MaxPool3d": (nn.MaxPool3d((1, 2, 2)), (3, 1, 2, 2)),
    "MaxPool2d": (nn.MaxPool2d((2, 1), padding=(1, 0), dilation=(2, 1)), IMAGE),
    "AvgPool1d": (nn.AvgPool1d(2, ceil_mode=True), SIGNAL),
    "AdaptiveAvgPool2d": (nn.AdaptiveAvgPool2d((1, None)), IMAGE),
    "BatchNorm3d": (nn.BatchNorm3d(3).eval(), (3, 1, 2, 2)),
    "UpsamplingNearest2d": (nn.UpsamplingNearest2d(size=3), IMAGE),
    "UpsamplingBilinear2d": (nn.UpsamplingBilinear2d(scale_factor=2), IMAGE),
    "ZeroPad2d": (nn.ZeroPad2d(1), IMAGE),
    "ConstantPad1d": (nn.ConstantPad1d(2, 0.7), SIGNAL),
    "ReplicationPad2d": (nn.ReplicationPad2d((1, 0, 2, 1)), IMAGE),
    "CircularPad2d": (nn.CircularPad2d(1), IMAGE),
    "PixelUnshuffle": (nn.PixelUnshuffle(2), IMAGE),
    "ChannelShuffle": (nn.ChannelShuffle(2), (4, 3, 1)),
    "Unfold": (nn.Unfold(2, padding=1), IMAGE),
    "Fold": (nn.Fold(3, 2, stride=1), (4, 4)),
    "Linear of signals": (nn.Linear(6, 4), SIGNAL),
    "Identity": (nn.Sequential(nn.Identity(), nn.Dropout2d(0.4).eval()), IMAGE),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules(name):
    module, shape = MODULES[name]
    if name == "Fold":
        decoder = nn.Sequential(
            nn.Linear(2, 16), nn.ReLU(), nn.Unflatten(1, shape), module.double(), nn.ReLU()
        )
    else:
        decoder = nn.Sequential(
            nn.Linear(2, 12), nn.ReLU(), nn.Unflatten(1, shape), module.double(), nn.ReLU()
        )
    assert_agrees(decoder.eval())


def assert_agrees(decoder):
    part = enumerate_regions(decoder, latent_dim=2)
    z = torch.cat([far_and_near(2), part.cells.interior_points()])
    region = part.locate(z)
    with torch.no_grad():
        x = decoder(z).flatten(1)
    assert part.data_dim == x.shape[1]
    piece = (part.slopes[region] @ z[..., None])[..., 0] + part.offsets[region]
    size = 1 + x.abs().amax(1, keepdim=True) + z.abs().amax(1, keepdim=True)
    # PyTorch's Hardsigmoid holds 1/6 in single precision.
    tolerance = (
        1e-7 if "ardsigmoid" in str(decoder) or "hardsigmoid" in str(getattr(decoder, "name", "")) else 1e-12
    )
    assert float(((piece - x).abs() / size).max()) < tolerance
    slopes, offsets = part.affine_maps()
    value = ((slopes[region] @ z[..., None])[..., 0] + offsets[region])[: len(z) // 2].square().sum()
    parameters = list(decoder.parameters())
    found = torch.autograd.grad(value, parameters, allow_unused=True)
    wanted = torch.autograd.grad(decoder(z)[: len(z) // 2].square().sum(), parameters, allow_unused=True)
    for a, b, p in zip(found, wanted, parameters, strict=True):
        a, b = (torch.zeros_like(p) if g is None else g for g in (a, b))
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-6 * float(1 + b.abs().max()))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda m, h: torch.sigmoid(h), "use nn.Hardsigmoid"),
        (lambda m, h: h.tanh(), "use nn.Hardtanh"),
        (lambda m, h: F.softmax(h, 1), "leave the last layer linear"),
        (lambda m, h: h**2, "not piecewise affine; use nn.ReLU"),
        (lambda m, h: F.layer_norm(h, (12,)), "nn.BatchNorm1d in evaluation mode"),
        (lambda m, h: F.batch_norm(h, m.row, m.row, training=True), "normalises by the batch"),
        (lambda m, h: h.sign(), "not continuous"),
        (lambda m, h: h.detach(), "cut the evidence off"),
        (lambda m, h: h.to(torch.int64), "without fractions"),
        (lambda m, h: h.max(), "extremum over all data"),
        (lambda m, h: h.amax(0, keepdim=True), "first dimension, which is that of the data"),
        (lambda m, h: torch.cat([h, h], 0), "first dimension, which is that of the data"),
        (lambda m, h: h.flip(0), "mixes rows of data"),
        (lambda m, h: h + h[:1], "mixes rows of data|does not take"),
        (lambda m, h: h + h[:, None].repeat(1, 3, 1), "another dimension"),
        (lambda m, h: h * m.image[:, :, 0, :1], "another dimension"),
        (lambda m, h: torch.einsum("ni,nj->nij", h, h), "multiplies two things"),
        (lambda m, h: h + torch.randn_like(h), "randn_like"),
        (lambda m, h: h * h.shape[0], "how many rows"),
        (lambda m, h: h + torch.arange(3.0)[:, None], "other values for other rows"),
        (lambda m, h: F.max_pool1d(h[:, None], 2, return_indices=True)[0], "return_indices=False"),
        (lambda m, h: h[:, 100], "does not take what arrives there"),
        (lambda m, h: h.requires_grad_(), "requires_grad_"),
        (lambda m, h: h.real, "attribute real"),
    ],
)
def test_functions_that_are_refused(function, message):
    with pytest.raises(UnsupportedModule, match=message) as caught:
        enumerate_regions(Applied(function))
    assert "decoder.forward: " in str(caught.value)
    # torch.fx notes attributes only when the forward is over.
    assert ("test_functions.py, line" in str(caught.value)) == ("getattr" not in str(caught.value))


def test_maxout_is_told_what_it_can_do():
    assert torch.equal(Maxout(2)(torch.tensor([[1.0, 2.0, 4.0, 3.0]])), torch.tensor([[2.0, 4.0]]))
    assert Maxout(2, dim=1)(torch.zeros(3, 4, 5)).shape == (3, 2, 5)
    assert repr(Maxout(3)) == "Maxout(pieces=3, dim=-1)"
    with pytest.raises(InvalidData, match="at least one"):
        Maxout(0)
    with pytest.raises(
        UnsupportedModule, match=r"decoder\.1: Maxout takes groups of 3, but 4 features arrive"
    ):
        enumerate_regions(nn.Sequential(nn.Linear(2, 4), Maxout(3)))
