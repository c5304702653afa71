# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""The networks that the models are made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyro_cpa.errors import InvalidData

__all__ = ["Activation", "GaussianNetwork", "concatenate", "mlp", "xavier_start"]

Activation = Callable[[], nn.Module]


def concatenate(*inputs: Tensor) -> Tensor:
    """Joins along the last dimension after broadcasting all others (particles, enumerated values, data)."""
    batch = torch.broadcast_shapes(*(item.shape[:-1] for item in inputs))
    return torch.cat([item.expand(*batch, item.shape[-1]) for item in inputs], dim=-1)


def mlp(
    in_dim: int,
    hidden_dims: Sequence[int],
    out_dim: int | None = None,
    *,
    activation: Activation = nn.ReLU,
    dropout: float = 0.0,
) -> nn.Sequential:
    """Linear layers with activation, and dropout if any, after each hidden one.

    Args:
        in_dim: Width of the input.
        hidden_dims: Widths of the hidden layers; may be empty.
        out_dim: Width of a last linear layer; None stops after the last hidden layer.
        activation: Makes the activation module, for example ``torch.nn.Tanh``.
        dropout: Probability of dropping a hidden unit in training.

    Raises:
        InvalidData: For a width that is not a positive integer or a dropout outside [0, 1).

    Example:
        >>> mlp(2, (8,), 3)(torch.zeros(5, 2)).shape
        torch.Size([5, 3])
    """
    widths = [in_dim, *hidden_dims] + ([] if out_dim is None else [out_dim])
    if any(isinstance(width, bool) or not isinstance(width, int) or width < 1 for width in widths):
        raise InvalidData(f"the layers' widths are {widths}; expected positive integers.")
    if not 0 <= dropout < 1:
        raise InvalidData(f"dropout is {dropout!r}; expected a probability in [0, 1).")
    layers: list[nn.Module] = []
    for below, above in zip([in_dim, *hidden_dims], hidden_dims, strict=False):
        layers += [nn.Linear(below, above), activation()]
        if dropout:
            layers.append(nn.Dropout(dropout))
    if out_dim is not None:
        layers.append(nn.Linear(widths[-2], out_dim))
    return nn.Sequential(*layers)


class GaussianNetwork(nn.Module):
    r"""Diagonal Gaussian whose location and scale are read off one hidden stack.

    .. math:: N\bigl(W_1 h + b_1,\ \mathrm{diag}(\mathrm{softplus}(W_2 h + b_2))^2\bigr),
        \qquad h = \mathrm{mlp}(\mathrm{inputs})

    Args:
        in_dim: Summed width of the inputs.
        hidden_dims: Widths of the stack; empty for two linear maps.
        out_dim: Dimension of the Gaussian.
        activation: As for :func:`mlp`.
        dropout: As for :func:`mlp`.
    """

    def __init__(
        self,
        in_dim: int,
        hidden_dims: Sequence[int],
        out_dim: int,
        *,
        activation: Activation = nn.ReLU,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        width = hidden_dims[-1] if hidden_dims else in_dim
        self.hidden = mlp(in_dim, hidden_dims, activation=activation, dropout=dropout)
        self.loc = mlp(width, (), out_dim)
        self.raw_scale = mlp(width, (), out_dim)

    def forward(self, *inputs: Tensor) -> TorchDistribution:
        """Batch shape as the inputs' after broadcasting, event shape (out_dim,)."""
        hidden = self.hidden(concatenate(*inputs))
        scale = nn.functional.softplus(self.raw_scale(hidden))
        # softplus underflows to 0 (below -104 in float32), which no Gaussian accepts. The least number whose
        # square, as densities and divergences need it, is above 0 alters no scale that matters.
        return dist.Normal(self.loc(hidden), scale + torch.finfo(scale.dtype).tiny ** 0.5).to_event(1)


@torch.no_grad()
def xavier_start(network: nn.Module) -> None:
    """Draws the weights of all linear layers from Xavier's normal distribution and zeroes their biases."""
    for layer in network.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
