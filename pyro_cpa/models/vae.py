# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""The variational autoencoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro
from pyro.nn.module import pyro_method
from torch import Tensor, nn

from pyro_cpa.infer.evidence import Evidence
from pyro_cpa.models.latent_model import AbstractLatentModel, check_count
from pyro_cpa.models.likelihoods import AbstractLikelihood, ContinuousBernoulli, Mode
from pyro_cpa.models.networks import Activation, GaussianNetwork, mlp

__all__ = ["VAE"]


class VAE(AbstractLatentModel):
    r"""Standard normal latent, neural decoder, diagonal Gaussian guide.

    .. math:: p(x, z) = N(z; 0, I)\, p(x \mid g(z)), \qquad
        q(z \mid x) = N(z; \mu(x), \mathrm{diag}(\sigma(x)^2))

    The defaults are the tutorial's: two hidden layers of 500 rectified units with dropout 0.1 on either
    side, 20 latent dimensions, continuous-Bernoulli pixels. ``decoder`` is a plain ``nn.Sequential``: with
    ``likelihood=Normal()``, a small ``latent_dim`` and no dropout it is a piecewise-affine generator on
    which the library's exact posterior and evidence work as they are.

    Args:
        data_dim: D.
        latent_dim: L.
        hidden_dims: Widths of the encoder's hidden layers; the decoder has them in reverse.
        likelihood: One of :class:`Normal`, :class:`Bernoulli`, :class:`ContinuousBernoulli` (None means this
            one) and :class:`Categorical`.
        activation: Makes the activation module of the hidden layers.
        dropout: Probability of dropping a hidden unit in training.

    Raises:
        InvalidData: For sizes that are not positive integers; by the methods, for data of another shape or
            outside the likelihood's support.

    Note:
        ``Trace_ELBO`` samples both terms of the bound; ``AnalyticELBO`` takes the divergence in closed form,
        which is the estimator of the paper. Pyro sums over the rows where the paper averages: divide by N.

    References:
        Kingma and Welling (2014), Auto-encoding variational Bayes.
        Yang (2022), Training latent variable models with auto-encoding variational Bayes: a tutorial.

    Example:
        >>> import torch
        >>> from pyro_cpa.infer import AnalyticELBO
        >>> vae = VAE(data_dim=16, latent_dim=2, hidden_dims=(8,))
        >>> x = torch.rand(5, 16)
        >>> AnalyticELBO()(vae.model, vae.guide)(x).shape
        torch.Size([])
        >>> vae.encode(x).shape, vae.reconstruct(x).shape, vae.generate(3, mode="mean").shape
        (torch.Size([5, 2]), torch.Size([5, 16]), torch.Size([3, 16]))
    """

    def __init__(
        self,
        data_dim: int = 784,
        latent_dim: int = 20,
        *,
        hidden_dims: Sequence[int] = (500, 500),
        likelihood: AbstractLikelihood | None = None,
        activation: Activation = nn.ReLU,
        dropout: float = 0.1,
    ) -> None:
        super().__init__(data_dim, latent_dim, likelihood or ContinuousBernoulli())
        options: dict[str, Any] = {"activation": activation, "dropout": dropout}
        inputs, outputs = self.likelihood.inputs_per_entry, self.likelihood.outputs_per_entry
        self.encoder = GaussianNetwork(inputs * data_dim, hidden_dims, latent_dim, **options)
        self.decoder = mlp(latent_dim, tuple(reversed(hidden_dims)), outputs * data_dim, **options)

    @pyro_method
    def model(self, x: Tensor, *, size: int | None = None) -> Tensor:
        """p(x, z).

        Args:
            x: (N, D) data.
            size: Number of rows of the whole data set, if x is a minibatch of it.

        Returns:
            The decoder's output, (..., N, D).
        """
        x = self.checked(x)
        with self.data_plate(len(x), size):
            z = pyro.sample("z", self.standard_normal())
            outputs = self.decoder(z)
            pyro.sample("x", self.likelihood(outputs), obs=x)
        return outputs

    @pyro_method
    def guide(self, x: Tensor, *, size: int | None = None) -> Tensor:
        """q(z | x); arguments as for ``model``, x also with dreams (..., N, D). Returns z."""
        x = self.checked(x, ("...", "N"))
        with self.data_plate(x.shape[-2], size):
            return pyro.sample("z", self.encoder(self.likelihood.features(x)))

    def generate(self, n: int = 1, *, mode: Mode = "sample") -> Tensor:
        """(n, D) new data.

        Args:
            n: How many.
            mode: What to return given a draw of z: a draw of x, the mean of x, or the distribution's
                parameter (for continuous-Bernoulli pixels not the mean).
        """
        check_count(n=n)
        with self.evaluation():
            return self.decode(self.standard_normal().sample((n,)), mode=mode)

    def encode(self, x: Tensor) -> Tensor:
        """(N, L) means of q(z | x)."""
        x = self.checked(x)
        with self.evaluation():
            return self.encoder(self.likelihood.features(x)).mean

    def decode(self, z: Tensor, *, mode: Mode = "mean") -> Tensor:
        """(..., D) data for latents (..., L); ``mode`` as in ``generate``."""
        with self.evaluation():
            return self.likelihood.summary(self.decoder(z.to(self.origin)), mode)

    def reconstruct(self, x: Tensor, *, mode: Mode = "mean") -> Tensor:
        """(N, D) data decoded from ``encode(x)``."""
        return self.decode(self.encode(x), mode=mode)

    def log_evidence(self, x: Tensor, num_particles: int = 100, *, chunk_size: int | None = None) -> Evidence:
        """Importance-sampled log p(x_n) of every row, with standard error.

        Args:
            x: (N, D) data.
            num_particles: K; the estimate is a lower bound in expectation that tightens with K.
            chunk_size: Particles held in memory at a time; all if None.

        Returns:
            ``log_prob``, ``standard_error`` and effective sample size ``ess``, (N,) each.
        """
        return self._log_evidence(x, num_particles=num_particles, chunk_size=chunk_size)
