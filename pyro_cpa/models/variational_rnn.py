# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""The variational recurrent neural network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import pyro
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.nn.module import pyro_method
from torch import Tensor, nn
from torch.distributions import kl_divergence

from pyro_cpa.errors import InvalidData
from pyro_cpa.infer.evidence import Evidence
from pyro_cpa.models.latent_model import AbstractLatentModel, check_count
from pyro_cpa.models.likelihoods import AbstractLikelihood, Bernoulli, Mode
from pyro_cpa.models.networks import Activation
from pyro_cpa.models.recurrent_networks import RecurrentNetworks, RecurrentState

__all__ = ["VariationalRNN"]


class VariationalRNN(AbstractLatentModel):
    r"""Sequence model with a latent variable at each step, its past carried by an LSTM.

    .. math:: p(x, z) = \prod_t p(z_t \mid h_t)\, p(x_t \mid h_t, z_t), \qquad
        q(z \mid x) = \prod_t q(z_t \mid h_t, s_t), \qquad h_{t+1} = \mathrm{LSTM}(x_t, z_t; h_t)

    The guide filters (:math:`s_t = x_t`) or smooths (:math:`s_t` summarises :math:`x_t, \dots, x_T`). The
    defaults are the tutorial's: MNIST digits read row by row, two latent dimensions a step, a two-layer
    LSTM of 256 units. Sites are ``"z_0"``, ``"x_0"``, ``"z_1"``, ...; the path of z is drawn with
    reparametrisation (drawn without, as in published code, the reconstruction cannot train the guide and the
    latents die). ``AnalyticELBO.kl_by_site`` and :meth:`kl_per_step` tell whether they live.

    Args:
        data_dim: D, the width of one step.
        latent_dim: L, for each step.
        inference: "filtering" or "smoothing".
        rnn_dim: Units of each LSTM layer.
        rnn_layers: Number of LSTM layers.
        hidden_dims: Widths of the hidden layers of prior, decoder and encoder.
        likelihood: As for :class:`VAE`; None means Bernoulli.
        activation: Makes the activation module of the hidden layers.
        dropout: Probability of dropping a hidden unit in training.

    Raises:
        InvalidData: For bad settings; by the methods, for lengths out of range and for data of another shape
            or outside the likelihood's support.

    Note:
        The encoder shares the model's LSTM, so an objective that updates model and guide apart (wake-sleep)
        is not made for this pair.

    References:
        Chung, Kastner, Dinh, Goel, Courville and Bengio (2015), A recurrent latent variable model for
        sequential data.
        Yang (2022), Training latent variable models with auto-encoding variational Bayes: a tutorial.

    Example:
        >>> from pyro_cpa.infer import AnalyticELBO
        >>> vrnn = VariationalRNN(data_dim=4, rnn_dim=8, hidden_dims=(8,))
        >>> x = torch.rand(5, 3, 4).round()
        >>> AnalyticELBO()(vrnn.model, vrnn.guide)(x, lengths=torch.tensor([3, 1, 2, 3, 3])).shape
        torch.Size([])
        >>> vrnn.generate(2, num_steps=6).shape, vrnn.extend(x, num_steps=2).shape
        (torch.Size([2, 6, 4]), torch.Size([5, 2, 4]))
    """

    def __init__(
        self,
        data_dim: int = 28,
        latent_dim: int = 2,
        *,
        inference: Literal["filtering", "smoothing"] = "filtering",
        rnn_dim: int = 256,
        rnn_layers: int = 2,
        hidden_dims: Sequence[int] = (500, 500),
        likelihood: AbstractLikelihood | None = None,
        activation: Activation = nn.ReLU,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(data_dim, latent_dim, likelihood or Bernoulli())
        check_count(rnn_dim=rnn_dim, rnn_layers=rnn_layers)
        if inference not in ("filtering", "smoothing"):
            raise InvalidData(f"inference is {inference!r}; choose 'filtering' or 'smoothing'.")
        self.networks = RecurrentNetworks(
            self.likelihood.inputs_per_entry * data_dim,
            self.likelihood.outputs_per_entry * data_dim,
            latent_dim,
            rnn_dim,
            rnn_layers,
            inference == "smoothing",
            hidden_dims,
            activation=activation,
            dropout=dropout,
        )

    @pyro_method
    def model(self, x: Tensor, lengths: Tensor | None = None, *, size: int | None = None) -> None:
        """p(x, z).

        Args:
            x: (N, T, D) sequences; what stands beyond a sequence's length is ignored.
            lengths: (N,) integers from 1 to T; None if all sequences are complete.
            size: Number of sequences of the whole data set, if x is a minibatch of it.
        """
        x, keep = self._sequences(x, lengths)
        features, networks, likelihood = self.likelihood.features(x), self.networks, self.likelihood
        state = networks.start()
        with self.data_plate(len(x), size):
            for t in range(x.shape[1]):
                with _mask(keep, t):
                    z = pyro.sample(f"z_{t}", networks.prior(state.top))
                    pyro.sample(f"x_{t}", likelihood(networks.decode(state, z)), obs=x[:, t])
                state = networks.advance(state, features[:, t], z)

    @pyro_method
    def guide(self, x: Tensor, lengths: Tensor | None = None, *, size: int | None = None) -> None:
        """q(z | x), step by step; arguments as for ``model``."""
        x, keep = self._sequences(x, lengths)
        features, networks = self.likelihood.features(x), self.networks
        summaries = networks.summaries(features, keep)
        state = networks.start()
        with self.data_plate(len(x), size):
            for t in range(x.shape[1]):
                with _mask(keep, t):
                    z = pyro.sample(f"z_{t}", networks.encode(state, summaries[:, t]))
                state = networks.advance(state, features[:, t], z)

    def generate(self, n: int = 1, num_steps: int = 28, *, mode: Mode = "sample") -> Tensor:
        """(n, num_steps, D) new sequences.

        Args:
            n: How many.
            num_steps: Their length.
            mode: What to return of each step, as for :meth:`VAE.generate`, given a sampled past.
        """
        check_count(n=n, num_steps=num_steps)
        with self.evaluation():
            return self._roll(self.networks.start(n), num_steps, mode)

    def extend(self, prefix: Tensor, num_steps: int, *, mode: Mode = "sample") -> Tensor:
        """(N, num_steps, D) continuations of the beginnings (N, P, D), whose latents the guide draws."""
        check_count(num_steps=num_steps)
        with self.evaluation():
            *_, (_, _, after) = self._path(prefix, None, sample=True)
            return self._roll(after, num_steps, mode)

    def encode(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """(N, T, L) means of q(z_t | h_t, s_t) along the path of means."""
        with self.evaluation():
            return torch.stack([q.mean for _, q, _ in self._path(x, lengths, sample=False)], 1)

    def reconstruct(self, x: Tensor, lengths: Tensor | None = None, *, mode: Mode = "mean") -> Tensor:
        """(N, T, D) each step decoded from the true past and the path of means; idle beyond the lengths."""
        with self.evaluation():
            path = self._path(x, lengths, sample=False)
            outputs = [self.networks.decode(state, q.mean) for state, q, _ in path]
            return torch.stack([self.likelihood.summary(output, mode) for output in outputs], 1)

    def kl_per_step(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """(N, T) divergences of q(z_t|h_t, s_t) from p(z_t|h_t) on one sampled path, 0 beyond the lengths."""
        with self.evaluation():
            path = self._path(x, lengths, sample=True)
            kl = torch.stack([kl_divergence(q, self.networks.prior(state.top)) for state, q, _ in path], 1)
            _, keep = self._sequences(x, lengths)
            return kl if keep is None else torch.where(keep, kl, torch.zeros_like(kl))

    def log_evidence(
        self,
        x: Tensor,
        lengths: Tensor | None = None,
        num_particles: int = 100,
        *,
        chunk_size: int | None = None,
    ) -> Evidence:
        """Importance-sampled log p(x_n) of every sequence; see :meth:`VAE.log_evidence`."""
        return self._log_evidence(x, lengths, num_particles=num_particles, chunk_size=chunk_size)

    def _path(
        self, x: Tensor, lengths: Tensor | None, sample: bool
    ) -> Iterator[tuple[RecurrentState, TorchDistribution, RecurrentState]]:
        """Yields (state before, q(z_t | .), state after) along the path of draws or of means."""
        x, keep = self._sequences(x, lengths)
        features = self.likelihood.features(x)
        summaries = self.networks.summaries(features, keep)
        state = self.networks.start(len(x))
        for t in range(x.shape[1]):
            q = self.networks.encode(state, summaries[:, t])
            after = self.networks.advance(state, features[:, t], q.sample() if sample else q.mean)
            yield state, q, after
            state = after

    def _roll(self, state: RecurrentState, num_steps: int, mode: Mode) -> Tensor:
        shown = []
        for _ in range(num_steps):
            z = self.networks.prior(state.top).sample()
            outputs = self.networks.decode(state, z)
            x = self.likelihood.summary(outputs, "sample")
            shown.append(x if mode == "sample" else self.likelihood.summary(outputs, mode))
            state = self.networks.advance(state, self.likelihood.features(x), z)
        return torch.stack(shown, 1)

    def _sequences(self, x: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Checked x, zero beyond the lengths, and (N, T) where it counts."""
        keep = None
        if lengths is not None and isinstance(x, Tensor) and x.dim() == 3:
            lengths = torch.as_tensor(lengths)
            rows, steps = x.shape[:2]
            good = lengths.shape == (rows,) and not lengths.is_floating_point()
            if not good or not bool(((lengths >= 1) & (lengths <= steps)).all()):
                raise InvalidData(
                    f"lengths is {lengths.tolist()}; expected {rows} integers from 1 to {steps}, one for "
                    "each sequence. Drop empty sequences."
                )
            keep = torch.arange(steps, device=self.origin.device) < lengths.to(self.origin.device)[:, None]
        return self.checked(x, ("N", "T"), keep), keep


def _mask(keep: Tensor | None, t: int) -> Any:
    """Handler that silences the sequences that have ended by step t."""
    mask: Any = True if keep is None else keep[:, t]
    return poutine.mask(mask=mask)
