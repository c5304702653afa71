# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""The networks that the models are made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyro_cpa.errors import InvalidData

__all__ = [
    "Activation",
    "GaussianNetwork",
    "LabelPlacement",
    "LabelledNetworks",
    "concatenate",
    "mlp",
    "xavier_start",
]

Activation = Callable[[], nn.Module]
LabelPlacement = Literal["prior", "decoder", "both"]


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


class LabelledNetworks(nn.Module):
    r"""The three networks of a latent-variable model that knows a label y, given one-hot.

    .. math:: p(z \mid y), \qquad g(y, z), \qquad q(z \mid x, y)

    Args:
        in_dim: Width of an encoder's view of x.
        out_dim: Width of the decoder's output.
        latent_dim: L.
        num_classes: C.
        label_in: Where the model uses y: "prior" alone, with p(z|y) a Gaussian learned for each label;
            "decoder" alone, with p(z) standard normal; or "both".
        hidden_dims: Widths of the encoder's hidden layers; the decoder has them in reverse.
        options: ``activation`` and ``dropout`` as for :func:`mlp`.

    Raises:
        InvalidData: If ``label_in`` is none of the three.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        latent_dim: int,
        num_classes: int,
        label_in: LabelPlacement,
        hidden_dims: Sequence[int],
        **options: Any,
    ) -> None:
        super().__init__()
        if label_in not in ("prior", "decoder", "both"):
            raise InvalidData(f"label_in is {label_in!r}; choose 'prior', 'decoder' or 'both'.")
        self.latent_dim = latent_dim
        self.decoder_sees_label = label_in != "prior"
        seen = num_classes if self.decoder_sees_label else 0
        self.prior_network = (
            None if label_in == "decoder" else GaussianNetwork(num_classes, (), latent_dim, **options)
        )
        self.encoder = GaussianNetwork(in_dim + num_classes, hidden_dims, latent_dim, **options)
        self.decoder = mlp(seen + latent_dim, tuple(reversed(hidden_dims)), out_dim, **options)

    def prior(self, y: Tensor) -> TorchDistribution:
        """p(z | y) for one-hot y (..., C)."""
        if self.prior_network is None:
            return dist.Normal(y.new_zeros(self.latent_dim), y.new_ones(self.latent_dim)).to_event(1)
        return self.prior_network(y)

    def decode(self, z: Tensor, y: Tensor) -> Tensor:
        """Decoder's output for latents (..., L) and one-hot labels (..., C)."""
        return self.decoder(concatenate(y, z) if self.decoder_sees_label else z)


@torch.no_grad()
def xavier_start(network: nn.Module) -> None:
    """Draws the weights of all linear layers from Xavier's normal distribution and zeroes their biases."""
    for layer in network.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
