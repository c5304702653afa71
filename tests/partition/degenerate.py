# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Random decoders, ordinary and degenerate, for property tests."""

from __future__ import annotations

import torch
from hypothesis import note
from hypothesis import strategies as st
from torch import Tensor, nn

from pyro_cpa.partition import Abs

__all__ = ["MODES", "UNITS", "decoders", "random_decoder"]

MODES = (
    "plain",
    "integer",
    "zero",
    "duplicated",
    "huge",
    "tiny",
    "dead",
    "cancelling",
    "unbiased",
    "rank one",
)
UNITS = {
    "relu": nn.ReLU,
    "leaky": lambda: nn.LeakyReLU(0.1),
    "abs": Abs,
    "hardtanh": nn.Hardtanh,
    "prelu": nn.PReLU,
    "relu6": nn.ReLU6,
}


def _edit(mode: str, weight: Tensor, bias: Tensor, generator: torch.Generator) -> None:
    half = len(weight) // 2
    if mode == "integer":
        weight.copy_(torch.randint(-1, 2, weight.shape, generator=generator))
        bias.copy_(torch.randint(-1, 2, bias.shape, generator=generator))
    elif mode == "zero":
        weight[::2] = 0
    elif mode == "duplicated" and half:
        weight[half : 2 * half] = -2 * weight[:half]
        bias[half : 2 * half] = -2 * bias[:half]
    elif mode == "huge":
        weight.mul_(1e6)
    elif mode == "tiny":
        weight.mul_(1e-6)
    elif mode == "dead":
        weight.copy_(-weight.abs())
        bias.fill_(-1.0)
    elif mode == "cancelling" and weight.shape[1] > 1:
        weight[:, 1] = -weight[:, 0]
    elif mode == "unbiased":
        bias.zero_()
    elif mode == "rank one":
        weight.copy_(torch.outer(weight[:, 0].clone(), weight[0].clone()))


def random_decoder(
    latent_dim: int, seed: int, widths: list[int], modes: list[str], units: list[str], outputs: int = 2
) -> nn.Sequential:
    """One hidden layer for each width, with weights edited as ``modes`` say."""
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    fan_in = latent_dim
    for width, mode, unit in zip(widths, modes, units, strict=True):
        linear = nn.Linear(fan_in, width)
        with torch.no_grad():
            linear.weight.copy_(torch.randn(width, fan_in, generator=generator))
            linear.bias.copy_(torch.randn(width, generator=generator))
            _edit(mode, linear.weight, linear.bias, generator)
        layers += [linear, UNITS[unit]()]
        fan_in = width
    last = nn.Linear(fan_in, outputs)
    with torch.no_grad():
        last.weight.copy_(torch.randn(outputs, fan_in, generator=generator))
    return nn.Sequential(*layers, last).double()


@st.composite
def decoders(
    draw: st.DrawFn,
    latent_dim: int,
    modes: tuple[str, ...] = MODES,
    units: tuple[str, ...] = tuple(UNITS),
    most: int = 6,
):
    """Decoders with up to three hidden layers of one to ``most`` units."""
    depth = draw(st.integers(1, 3))
    recipe = {
        "seed": draw(st.integers(0, 2**31)),
        "widths": [draw(st.integers(1, most)) for _ in range(depth)],
        "modes": [draw(st.sampled_from(modes)) for _ in range(depth)],
        "units": [draw(st.sampled_from(units)) for _ in range(depth)],
    }
    note(f"random_decoder({latent_dim}, **{recipe})")
    return random_decoder(latent_dim, **recipe)
