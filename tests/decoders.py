# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""The one table of tiny decoders: every kind of unit, and every degeneracy, by name.

@pytest.mark.parametrize("name", DECODERS)
def test_something(name):
    decoder, latent_dim = build(name)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from pyro_cpa.partition import Abs

__all__ = ["DECODERS", "DecoderCase", "build", "mlp"]


class DecoderCase(NamedTuple):
    """A factory of float64 decoders R^L -> R^D in evaluation mode, and L."""

    factory: Callable[[], nn.Module]
    latent_dim: int


def mlp(*widths: int, activation: Callable[[], nn.Module] = nn.ReLU, bias: bool = True) -> nn.Sequential:
    """Linear layers with an activation between them, biases of the size of the weights."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(fan_in, fan_out, bias=bias), activation()]
    return nn.Sequential(*layers[:-1])


def _edited(decoder: nn.Sequential, edit: Callable[[nn.Sequential], None]) -> nn.Sequential:
    with torch.no_grad():
        edit(decoder)
    return decoder


def _zero_biases(decoder: nn.Sequential) -> None:
    for module in decoder:
        if isinstance(module, nn.Linear):
            module.bias.zero_()


def _duplicate(decoder: nn.Sequential) -> None:
    # Copies, opposite copies and rescaled copies of the first neurons: their walls coincide.
    first = decoder[0]
    for unit, factor in ((3, 1.0), (4, -1.0), (5, 1 / 3)):
        first.weight[unit] = factor * first.weight[unit - 3]
        first.bias[unit] = factor * first.bias[unit - 3]


def _kill(decoder: nn.Sequential) -> None:
    # Behind the first activation everything is non-negative, so that these units never switch on.
    decoder[2].weight.copy_(-decoder[2].weight.abs())
    decoder[2].bias.fill_(-0.5)


def _cancel(decoder: nn.Sequential) -> None:
    # The second neuron copies the first; the next layer takes their difference, which is zero up to rounding.
    decoder[0].weight[1] = decoder[0].weight[0]
    decoder[0].bias[1] = decoder[0].bias[0]
    decoder[2].weight[:, 2:] = 0
    decoder[2].weight[:, 1] = -decoder[2].weight[:, 0]


def _sliver(decoder: nn.Sequential) -> None:
    # Two walls 1e-9 apart.
    decoder[0].weight[1] = decoder[0].weight[0]
    decoder[0].bias[1] = decoder[0].bias[0] + 1e-9 * decoder[0].weight[0].norm()


def _flatten(decoder: nn.Sequential) -> None:
    # All walls of the first layer are parallel to one direction, so that every cell holds a line.
    decoder[0].weight[:, -1] = decoder[0].weight[:, 0]


def _scale(factor: float) -> Callable[[nn.Sequential], None]:
    def edit(decoder: nn.Sequential) -> None:
        decoder[0].weight.mul_(factor)
        decoder[0].bias.mul_(factor)
        decoder[-1].weight.div_(factor)

    return edit


def _with_batch_norm() -> nn.Sequential:
    norm = nn.BatchNorm1d(6)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2.0)
        norm.bias.normal_()
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2.0)
    return nn.Sequential(nn.Linear(2, 6), norm, nn.ReLU(), nn.Dropout(0.3), nn.Linear(6, 3))


def _nested() -> nn.Sequential:
    block = nn.Sequential(nn.Linear(5, 5), nn.LeakyReLU(0.2))
    return nn.Sequential(
        nn.Sequential(nn.Linear(2, 5), nn.ReLU()), nn.Identity(), block, nn.Linear(5, 4), nn.ReLU()
    )


class _OwnForward(nn.Module):
    """A module with a ``forward`` of its own, as most decoders in the wild are."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.out, self.act = nn.Linear(2, 6), nn.Linear(6, 3), nn.ReLU()

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return torch.abs(self.out(self.act(self.hidden(z))))


DECODERS: dict[str, DecoderCase] = {
    "linear-1": DecoderCase(lambda: nn.Linear(1, 3), 1),
    "linear-2": DecoderCase(lambda: nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 3, bias=False)), 2),
    "linear-5": DecoderCase(lambda: nn.Linear(5, 3), 5),
    "relu-1": DecoderCase(lambda: mlp(1, 8, 2), 1),
    "leaky-1": DecoderCase(lambda: mlp(1, 8, 8, 2, activation=lambda: nn.LeakyReLU(0.1)), 1),
    "relu-2": DecoderCase(lambda: mlp(2, 8, 3), 2),
    "deep-2": DecoderCase(lambda: mlp(2, 8, 8, 8, 3), 2),
    "wide-output-2": DecoderCase(lambda: mlp(2, 6, 40, activation=lambda: nn.LeakyReLU(0.1)), 2),
    "no-bias-2": DecoderCase(lambda: mlp(2, 6, 6, 3, bias=False), 2),
    "zero-biases-1": DecoderCase(lambda: _edited(mlp(1, 6, 6, 2), _zero_biases), 1),
    "zero-biases-2": DecoderCase(lambda: _edited(mlp(2, 6, 6, 3), _zero_biases), 2),
    "duplicated-1": DecoderCase(lambda: _edited(mlp(1, 6, 4, 2), _duplicate), 1),
    "duplicated-2": DecoderCase(lambda: _edited(mlp(2, 6, 4, 2), _duplicate), 2),
    "dead-layer-2": DecoderCase(lambda: _edited(mlp(2, 5, 4, 2), _kill), 2),
    "cancelling-2": DecoderCase(lambda: _edited(mlp(2, 5, 4, 2), _cancel), 2),
    "sliver-1": DecoderCase(lambda: _edited(mlp(1, 4, 2), _sliver), 1),
    "sliver-2": DecoderCase(lambda: _edited(mlp(2, 4, 4, 2), _sliver), 2),
    "width-one-1": DecoderCase(lambda: mlp(1, 1, 1, 1), 1),
    "width-one-2": DecoderCase(lambda: mlp(2, 1, 1, 1), 2),
    "huge-1": DecoderCase(lambda: _edited(mlp(1, 6, 6, 2), _scale(1e6)), 1),
    "huge-2": DecoderCase(lambda: _edited(mlp(2, 6, 6, 2), _scale(1e6)), 2),
    "tiny-2": DecoderCase(lambda: _edited(mlp(2, 6, 6, 2), _scale(1e-6)), 2),
    "prelu-2": DecoderCase(lambda: mlp(2, 6, 6, 2, activation=lambda: nn.PReLU(6, init=0.3)), 2),
    "hardtanh-1": DecoderCase(lambda: mlp(1, 6, 2, activation=lambda: nn.Hardtanh(-0.5, 1.5)), 1),
    "hardtanh-2": DecoderCase(lambda: mlp(2, 6, 6, 2, activation=lambda: nn.Hardtanh(-0.5, 1.5)), 2),
    "relu6-2": DecoderCase(lambda: nn.Sequential(*mlp(2, 6, 2), nn.ReLU6()), 2),
    "hardsigmoid-2": DecoderCase(lambda: nn.Sequential(*mlp(2, 6, 2), nn.Hardsigmoid()), 2),
    "abs-2": DecoderCase(lambda: mlp(2, 6, 6, 2, activation=Abs), 2),
    "batch-norm-2": DecoderCase(_with_batch_norm, 2),
    "nested-2": DecoderCase(_nested, 2),
    "own-forward-2": DecoderCase(_OwnForward, 2),
    "relu-3": DecoderCase(lambda: mlp(3, 7, 3), 3),
    "deep-3": DecoderCase(lambda: mlp(3, 5, 5, 3, activation=lambda: nn.LeakyReLU(0.1)), 3),
    "no-bias-3": DecoderCase(lambda: mlp(3, 5, 4, 3, bias=False), 3),
    "duplicated-3": DecoderCase(lambda: _edited(mlp(3, 6, 3, 2), _duplicate), 3),
    "sliver-3": DecoderCase(lambda: _edited(mlp(3, 4, 4, 2), _sliver), 3),
    "flat-3": DecoderCase(lambda: _edited(mlp(3, 5, 4, 2), _flatten), 3),
    "hardtanh-3": DecoderCase(lambda: mlp(3, 4, 3, 2, activation=lambda: nn.Hardtanh(-0.5, 1.5)), 3),
    "relu-4": DecoderCase(lambda: mlp(4, 6, 3), 4),
}
"""Name -> factory and latent dimension."""


def build(name: str, seed: int = 0) -> tuple[nn.Module, int]:
    """The decoder ``name`` in float64 and evaluation mode, the same for the same seed, and its latent dimension."""
    case = DECODERS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        decoder = case.factory().double().eval()
    return decoder, case.latent_dim
