# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""The table of small decoders that are no plain chain of layers: images, branches, maxima.

@pytest.mark.parametrize("name", ARCHITECTURES)
def test_something(name):
    decoder = build_architecture(name)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn import functional as F

from pyro_cpa.partition import Maxout

__all__ = ["ARCHITECTURES", "build_architecture"]


def upsampler(latent_dim: int) -> nn.Sequential:
    """Images of 8 x 8 by two transposed convolutions, with batch normalisation between them."""
    return nn.Sequential(
        nn.Linear(latent_dim, 8),
        nn.ReLU(),
        nn.Unflatten(1, (2, 2, 2)),
        nn.ConvTranspose2d(2, 3, 2, stride=2, bias=False),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.ConvTranspose2d(3, 1, 2, stride=2),
        nn.Flatten(),
    )


def resizer() -> nn.Sequential:
    """Images of 8 x 8 by upsampling and convolution, in the ways that there are."""
    return nn.Sequential(
        nn.Linear(2, 8),
        nn.LeakyReLU(0.2),
        nn.Unflatten(1, (2, 2, 2)),
        nn.Upsample(scale_factor=2),
        nn.Conv2d(2, 2, 3, padding=1),
        nn.ReLU(),
        nn.Upsample(scale_factor=2, mode="bilinear"),
        nn.Conv2d(2, 4, 3, padding="same", padding_mode="circular"),
        nn.PixelShuffle(2),
        nn.AvgPool2d(2),
        nn.Flatten(),
    )


class Residual(nn.Module):
    """Two residual blocks, their sums scaled and shifted by parameters of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(2, 6), nn.Linear(6, 3)
        self.blocks = nn.ModuleList([nn.Sequential(nn.ReLU(), nn.Linear(6, 6)) for _ in range(2)])
        self.scale, self.shift = nn.Parameter(torch.tensor(0.7)), nn.Parameter(torch.randn(6))

    def forward(self, z: Tensor) -> Tensor:
        h = self.first(z)
        for block in self.blocks:
            h = h + self.scale * block(h) - self.shift
        return self.last(F.relu(h))


class DenselyConnected(nn.Module):
    """Every layer takes the results of all layers before it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2 + 3 * i, 3) for i in range(3)])
        self.last = nn.Linear(11, 4)

    def forward(self, z: Tensor) -> Tensor:
        found = [z]
        for layer in self.layers:
            found.append(F.leaky_relu(layer(torch.cat(found, 1)), 0.2))
        return self.last(torch.cat(found, dim=1))


class Bottleneck(nn.Module):
    """A residual convolutional block, as those of image networks."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.squeeze, self.expand = nn.Conv2d(channels, 2, 1), nn.Conv2d(2, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(2)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.expand(self.act(self.norm(self.squeeze(x))))
        out += x
        return self.act(out)


class ResidualImages(nn.Module):
    """Images of 4 x 4 by a residual block; the result is an image, not flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.block, self.end = nn.Linear(1, 12), Bottleneck(3), nn.ConvTranspose2d(3, 1, 2, 2)

    def forward(self, z: Tensor) -> Tensor:
        x = self.start(z).view(z.shape[0], 3, 2, -1)
        return self.end(self.block(x))


class SpatialBroadcast(nn.Module):
    """The latent beside coordinates at each place of an image."""

    def __init__(self) -> None:
        super().__init__()
        axis = torch.linspace(-1, 1, 3)
        self.register_buffer("grid", torch.stack(torch.meshgrid(axis, axis, indexing="ij"))[None])
        self.net = nn.Sequential(nn.Conv2d(4, 2, 1), nn.ReLU(), nn.Conv2d(2, 1, 1))
        self.project = nn.Linear(2, 2)

    def forward(self, z: Tensor) -> Tensor:
        rows = z.size(0)
        x = self.project(z).view(rows, -1, 1, 1).expand(-1, -1, 3, 3)
        return self.net(torch.cat([x, self.grid.expand(rows, -1, -1, -1)], 1)).flatten(1)


class Mixed(nn.Module):
    """Split, compared, bounded and put together again by functions."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.bound = nn.Linear(2, 12), nn.Parameter(torch.randn(4))
        self.mix = nn.Parameter(torch.randn(12, 5))

    def forward(self, z: Tensor) -> Tensor:
        a, b, c = self.layer(z).chunk(3, dim=1)
        greatest, least = torch.maximum(a, b), torch.min(b, c)
        bounded = torch.maximum(greatest - least / 2, self.bound).clamp(max=2.0)
        best = torch.stack([a, c], 1).amax(1)
        return torch.cat([bounded, -best.flip(1), torch.minimum(a, torch.abs(c))], 1) @ self.mix


class Positive(PyroModule):
    """Weights that Pyro keeps positive, used in a ``forward`` of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = PyroModule[nn.Linear](1, 5)
        self.weight = PyroParam(torch.rand(3, 5) + 0.1, constraint=constraints.positive)

    def forward(self, z: Tensor) -> Tensor:
        return F.linear(torch.relu(self.layer(z)), self.weight)


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "images-1": lambda: upsampler(1),
    "images-2": lambda: upsampler(2),
    "resized-images-2": resizer,
    "residual-2": Residual,
    "dense-2": DenselyConnected,
    "residual-images-1": ResidualImages,
    "broadcast-2": SpatialBroadcast,
    "mixed-2": Mixed,
    "positive-1": Positive,
    "maxout-2": lambda: nn.Sequential(
        nn.Linear(2, 12), Maxout(3), nn.Linear(4, 4), Maxout(2), nn.Linear(2, 3)
    ),
    "max-pool-2": lambda: nn.Sequential(
        nn.Linear(2, 18),
        nn.Unflatten(1, (2, 3, 3)),
        nn.MaxPool2d(2, stride=1),
        nn.Conv2d(2, 3, 2),
        nn.Flatten(),
        nn.Linear(3, 4),
    ),
    "padded-pool-2": lambda: nn.Sequential(
        nn.Linear(2, 16), nn.Unflatten(1, (1, 4, 4)), nn.MaxPool2d(3, 2, 1, ceil_mode=True), nn.Flatten()
    ),
    "signals-2": lambda: nn.Sequential(
        nn.Linear(2, 12),
        nn.Unflatten(1, (3, 4)),
        nn.Conv1d(3, 2, 3, padding=1, padding_mode="reflect"),
        nn.PReLU(2, init=0.3),
        nn.BatchNorm1d(2),
        nn.MaxPool1d(2),
        nn.ConvTranspose1d(2, 2, 3, stride=2, output_padding=1, groups=2),
        nn.Linear(6, 4),
        nn.AvgPool1d(2),
        nn.Flatten(),
    ),
}
"""Name -> factory; the latent dimension is the last character of the name."""


def build_architecture(name: str, seed: int = 0) -> nn.Module:
    """The decoder ``name`` in float64 and evaluation mode with statistics of its own, the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        decoder = ARCHITECTURES[name]().double().eval()
        for module in decoder.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2.0)
    return decoder
