# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""The variational autoencoder given a label."""

from __future__ import annotations

from collections.abc import Sequence

import pyro
from pyro.nn.module import pyro_method
from torch import Tensor, nn

from pyro_cpa.infer.evidence import Evidence
from pyro_cpa.models.latent_model import AbstractLatentModel, check_count, one_hot_labels
from pyro_cpa.models.likelihoods import AbstractLikelihood, ContinuousBernoulli, Mode
from pyro_cpa.models.networks import Activation, LabelledNetworks, LabelPlacement

__all__ = ["ConditionalVAE"]


class ConditionalVAE(AbstractLatentModel):
    r"""VAE of x given a label y that is always observed.

    .. math:: p(x, z \mid y) = p(z \mid y)\, p(x \mid g(y, z)), \qquad q(z \mid x, y)

    The defaults are the tutorial's: the label enters both the prior, a Gaussian learned for each label, and
    the decoder; otherwise the sizes are those of :class:`VAE`.

    Args:
        data_dim: D.
        num_classes: C; labels are integers 0, ..., C-1.
        latent_dim: L.
        label_in: "both"; "prior" for p(z|y) p(x|z); "decoder" for p(z) p(x|y,z).
        hidden_dims: Widths of the encoder's hidden layers; the decoder has them in reverse.
        likelihood: As for :class:`VAE`; None means continuous Bernoulli.
        activation: Makes the activation module of the hidden layers.
        dropout: Probability of dropping a hidden unit in training.

    Raises:
        InvalidData: For bad sizes or placement; by the methods, for labels out of range and for data of
            another shape or outside the likelihood's support.

    Note:
        Its bound is on log p(x|y). To compare with a model of x alone add log p(y), or sum over y:
        :math:`\log p(x) = \log \sum_y p(y)\, p(x \mid y)`.

    References:
        Sohn, Lee and Yan (2015), Learning structured output representation using deep conditional generative
        models.
        Yang (2022), Training latent variable models with auto-encoding variational Bayes: a tutorial.

    Example:
        >>> import torch
        >>> from pyro_cpa.infer import AnalyticELBO
        >>> cvae = ConditionalVAE(data_dim=16, num_classes=3, latent_dim=2, hidden_dims=(8,))
        >>> x, y = torch.rand(5, 16), torch.tensor([0, 2, 1, 1, 0])
        >>> AnalyticELBO()(cvae.model, cvae.guide)(x, y).shape
        torch.Size([])
        >>> cvae.generate(4, y=2).shape
        torch.Size([4, 16])
    """

    def __init__(
        self,
        data_dim: int = 784,
        num_classes: int = 10,
        latent_dim: int = 20,
        *,
        label_in: LabelPlacement = "both",
        hidden_dims: Sequence[int] = (500, 500),
        likelihood: AbstractLikelihood | None = None,
        activation: Activation = nn.ReLU,
        dropout: float = 0.1,
    ) -> None:
        super().__init__(data_dim, latent_dim, likelihood or ContinuousBernoulli())
        check_count(num_classes=num_classes)
        self.num_classes = num_classes
        self.networks = LabelledNetworks(
            self.likelihood.inputs_per_entry * data_dim,
            self.likelihood.outputs_per_entry * data_dim,
            latent_dim,
            num_classes,
            label_in,
            hidden_dims,
            activation=activation,
            dropout=dropout,
        )

    @pyro_method
    def model(self, x: Tensor, y: Tensor | int, *, size: int | None = None) -> Tensor:
        """p(x, z | y).

        Args:
            x: (N, D) data.
            y: (N,) labels, or one for all rows.
            size: Number of rows of the whole data set, if x is a minibatch of it.

        Returns:
            The decoder's output, (..., N, D).
        """
        x = self.checked(x)
        one_hot = self._one_hot(y, len(x))
        networks = self.networks
        with self.data_plate(len(x), size):
            z = pyro.sample("z", networks.prior(one_hot))
            outputs = networks.decode(z, one_hot)
            pyro.sample("x", self.likelihood(outputs), obs=x)
        return outputs

    @pyro_method
    def guide(self, x: Tensor, y: Tensor | int, *, size: int | None = None) -> Tensor:
        """q(z | x, y); arguments as for ``model``, x also with dreams (..., N, D). Returns z."""
        x = self.checked(x, ("...", "N"))
        one_hot = self._one_hot(y, x.shape[-2])
        with self.data_plate(x.shape[-2], size):
            return pyro.sample("z", self.networks.encoder(self.likelihood.features(x), one_hot))

    def generate(self, n: int = 1, *, y: Tensor | int, mode: Mode = "sample") -> Tensor:
        """(n, D) new data with the label or labels y; ``mode`` as for :meth:`VAE.generate`."""
        check_count(n=n)
        with self.evaluation():
            prior = self.networks.prior(self._one_hot(y, n))
            return self.decode(prior.expand((n,)).sample(), y, mode=mode)

    def encode(self, x: Tensor, y: Tensor | int) -> Tensor:
        """(N, L) means of q(z | x, y)."""
        x = self.checked(x)
        with self.evaluation():
            return self.networks.encoder(self.likelihood.features(x), self._one_hot(y, len(x))).mean

    def decode(self, z: Tensor, y: Tensor | int, *, mode: Mode = "mean") -> Tensor:
        """(..., N, D) data for latents (..., N, L) and labels (N,)."""
        with self.evaluation():
            outputs = self.networks.decode(z.to(self.origin), self._one_hot(y, z.shape[-2]))
            return self.likelihood.summary(outputs, mode)

    def reconstruct(self, x: Tensor, y: Tensor | int, *, mode: Mode = "mean") -> Tensor:
        """(N, D) data decoded from ``encode(x, y)``."""
        return self.decode(self.encode(x, y), y, mode=mode)

    def log_evidence(
        self, x: Tensor, y: Tensor | int, num_particles: int = 100, *, chunk_size: int | None = None
    ) -> Evidence:
        """Importance-sampled log p(x_n | y_n) of every row, as :meth:`VAE.log_evidence`."""
        return self._log_evidence(x, y, num_particles=num_particles, chunk_size=chunk_size)

    def _one_hot(self, y: Tensor | int, rows: int) -> Tensor:
        return one_hot_labels(y, rows, self.num_classes, self.origin)
