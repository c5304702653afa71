# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""The networks of the variational recurrent net, one step at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyro_cpa.models.networks import GaussianNetwork, concatenate, mlp

__all__ = ["RecurrentNetworks", "RecurrentState"]


class RecurrentState(NamedTuple):
    """Hidden and cell state of a stacked LSTM, (..., layers, H) each: leading dimensions broadcast."""

    hidden: Tensor
    cell: Tensor

    @property
    def top(self) -> Tensor:
        """(..., H) output of the uppermost layer."""
        return self.hidden[..., -1, :]


class RecurrentNetworks(nn.Module):
    r"""Prior, decoder and encoder given the recurrent state, and the recurrence itself.

    .. math:: p(z_t \mid h_t), \qquad g(h_t, z_t), \qquad q(z_t \mid h_t, s_t), \qquad
        h_{t+1} = \mathrm{LSTM}(x_t, z_t; h_t)

    Here :math:`s_t` is x_t (filtering) or the state of a second LSTM run backwards over
    :math:`x_T, \dots, x_t` (smoothing).

    Args:
        in_dim: Width of an encoder's view of x_t.
        out_dim: Width of the decoder's output.
        latent_dim: L.
        rnn_dim: H.
        rnn_layers: Stacked LSTM layers.
        smoothing: Whether the encoder sees the future.
        hidden_dims: Widths of the hidden layers of prior, decoder and encoder.
        options: ``activation`` and ``dropout`` as for :func:`mlp`.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        latent_dim: int,
        rnn_dim: int,
        rnn_layers: int,
        smoothing: bool,
        hidden_dims: Sequence[int],
        **options: Any,
    ) -> None:
        super().__init__()
        self.prior = GaussianNetwork(rnn_dim, hidden_dims, latent_dim, **options)
        self.decoder = mlp(rnn_dim + latent_dim, hidden_dims, out_dim, **options)
        self.rnn = nn.LSTM(in_dim + latent_dim, rnn_dim, rnn_layers)
        self.backward_rnn = nn.LSTM(in_dim, rnn_dim, batch_first=True) if smoothing else None
        seen = rnn_dim if smoothing else in_dim
        self.encoder = GaussianNetwork(rnn_dim + seen, hidden_dims, latent_dim, **options)

    def start(self, *batch: int) -> RecurrentState:
        """The zero state."""
        like = next(self.parameters())
        zeros = like.new_zeros(*batch, self.rnn.num_layers, self.rnn.hidden_size)
        return RecurrentState(zeros, zeros)

    def decode(self, state: RecurrentState, z: Tensor) -> Tensor:
        """(..., out_dim) decoder's output."""
        return self.decoder(concatenate(state.top, z))

    def encode(self, state: RecurrentState, summary: Tensor) -> TorchDistribution:
        """q(z_t | h_t, s_t)."""
        return self.encoder(state.top, summary)

    def advance(self, state: RecurrentState, features: Tensor, z: Tensor) -> RecurrentState:
        """The state after seeing x_t (..., in_dim) and z_t (..., L)."""
        inputs = concatenate(features, z)
        batch = inputs.shape[:-1]
        before = [item.expand(*batch, *item.shape[-2:]).flatten(0, -3).unbind(-2) for item in state]
        # For a single step nn.LSTM is the slower way: it rearranges its weights at every call.
        above, after = inputs.flatten(0, -2), []
        for weights, hidden, cell in zip(self.rnn.all_weights, *before, strict=True):
            above, cell = torch.lstm_cell(above, (hidden, cell), *weights)
            after.append((above, cell))
        stacked = (torch.stack(items, -2) for items in zip(*after, strict=True))
        return RecurrentState(*(item.unflatten(0, batch) for item in stacked))

    def summaries(self, features: Tensor, keep: Tensor | None) -> Tensor:
        """(N, T, .) what the encoder sees at each step besides the state.

        Args:
            features: (N, T, in_dim).
            keep: (N, T) True up to each sequence's length; None if all are complete.
        """
        if self.backward_rnn is None:
            return features
        steps = torch.arange(features.shape[1], device=features.device)
        last = steps[-1:] if keep is None else keep.sum(1, keepdim=True) - 1
        # Turns each sequence round within its own length: its own inverse, and padding stays behind.
        turn = torch.where(steps <= last, last - steps, steps).expand(features.shape[:2])[..., None]
        backwards, _ = self.backward_rnn(features.gather(1, turn.expand_as(features)))
        return backwards.gather(1, turn.expand_as(backwards))
