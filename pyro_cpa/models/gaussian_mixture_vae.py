# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""The Gaussian-mixture variational autoencoder: clustering, and semi-supervised classification."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from pyro.nn.module import pyro_method
from torch import Tensor, nn

from pyro_cpa.errors import InvalidData, UnsupportedModel
from pyro_cpa.infer.evidence import Evidence
from pyro_cpa.models.cluster_start import (
    codes_mixture,
    copy_layers,
    fit_classifier,
    paired_networks,
    set_prior,
)
from pyro_cpa.models.latent_model import (
    UNLABELLED,
    AbstractLatentModel,
    check_count,
    check_labels,
    one_hot_labels,
)
from pyro_cpa.models.likelihoods import AbstractLikelihood, Bernoulli, Mode
from pyro_cpa.models.networks import Activation, LabelledNetworks, LabelPlacement, mlp, xavier_start
from pyro_cpa.models.relaxed_category import RelaxedCategory
from pyro_cpa.models.vae import VAE

__all__ = ["GaussianMixtureVAE"]

ClusterTreatment = Literal["enumerate", "sample", "relax"]


class GaussianMixtureVAE(AbstractLatentModel):
    r"""VAE whose latent z is a mixture of C Gaussians, with the cluster y inferred as well.

    .. math:: p(x, y, z) = \tfrac1C\, p(z \mid y)\, p(x \mid g(z)), \qquad q(y \mid x)\, q(z \mid x, y)

    The defaults are the tutorial's: 10 clusters, 64 latent dimensions, two hidden layers of 512 rectified
    units, Bernoulli pixels, Xavier's start. How the guide treats y (site ``"y"``, one-hot) is ``clusters``,
    which may be set anew at any time:

    - "enumerate": summed out, by ``AnalyticELBO`` (with closed-form divergences) or ``TraceEnum_ELBO``;
    - "sample": drawn, for objectives made for discrete latents (``TVO``, wake-sleep, VIMCO);
    - "relax": drawn from its Gumbel-softmax relaxation at ``temperature``; biased, cost independent of C.

    With ``label_in="decoder"`` (z standard normal, x given y and z) this is the semi-supervised model M2.
    Labels may be given for some rows in any placement: there q(y|x) is replaced by certainty, so that
    enumeration gives the bound on log p(x, y); ``label_weight`` adds the classifier's own
    log q(y|x), without which the labelled rows do not train it.

    Args:
        data_dim: D.
        num_clusters: C.
        latent_dim: L.
        clusters: Treatment of y by the guide.
        label_in: Where the model uses y: "prior", "decoder" or "both".
        hidden_dims: Widths of the hidden layers of the classifier and the encoder, reversed in the decoder.
        likelihood: As for :class:`VAE`; None means Bernoulli.
        activation: Makes the activation module of the hidden layers.
        dropout: Probability of dropping a hidden unit in training.
        temperature: Of the relaxation.
        label_weight: Weight of log q(y|x) on labelled rows.

    Raises:
        InvalidData: For bad settings; by the methods, for labels out of range and for data of another shape
            or outside the likelihood's support.
        UnsupportedModel: For labels together with ``clusters="relax"``.

    Note:
        Values include the constant -log C of the uniform prior, which some published figures leave out.
        Clusters from a random start depend strongly on it, and the bound does not tell which are good: start from
        a trained VAE, :meth:`start_from`.

    References:
        Kingma, Rezende, Mohamed and Welling (2014), Semi-supervised learning with deep generative models.
        Jang, Gu and Poole (2017), Categorical reparameterization with Gumbel-softmax.
        Yang (2022), Training latent variable models with auto-encoding variational Bayes: a tutorial.

    Example:
        >>> from pyro_cpa.infer import AnalyticELBO
        >>> gmvae = GaussianMixtureVAE(data_dim=16, num_clusters=3, latent_dim=2, hidden_dims=(8,))
        >>> x = torch.rand(5, 16).round()
        >>> AnalyticELBO()(gmvae.model, gmvae.guide)(x).shape
        torch.Size([])
        >>> gmvae.cluster(x).shape, gmvae.generate(4, y=2).shape
        (torch.Size([5]), torch.Size([4, 16]))
    """

    def __init__(
        self,
        data_dim: int = 784,
        num_clusters: int = 10,
        latent_dim: int = 64,
        *,
        clusters: ClusterTreatment = "enumerate",
        label_in: LabelPlacement = "prior",
        hidden_dims: Sequence[int] = (512, 512),
        likelihood: AbstractLikelihood | None = None,
        activation: Activation = nn.ReLU,
        dropout: float = 0.0,
        temperature: float = 0.5,
        label_weight: float = 0.0,
    ) -> None:
        super().__init__(data_dim, latent_dim, likelihood or Bernoulli())
        check_count(num_clusters=num_clusters)
        if not temperature > 0 or label_weight < 0:
            raise InvalidData(
                f"temperature is {temperature!r} and label_weight {label_weight!r}; "
                "expected a positive and a non-negative number."
            )
        self.num_clusters = num_clusters
        self.clusters = clusters
        self.temperature = temperature
        self.label_weight = label_weight
        in_dim = self.likelihood.inputs_per_entry * data_dim
        out_dim = self.likelihood.outputs_per_entry * data_dim
        options: dict[str, Any] = {"activation": activation, "dropout": dropout}
        self.classifier = mlp(in_dim, hidden_dims, num_clusters, **options)
        self.networks = LabelledNetworks(
            in_dim, out_dim, latent_dim, num_clusters, label_in, hidden_dims, **options
        )
        xavier_start(self.classifier)
        xavier_start(self.networks)

    @pyro_method
    def model(self, x: Tensor, labels: Tensor | None = None, *, size: int | None = None) -> Tensor:
        """p(x, y, z).

        Args:
            x: (N, D) data.
            labels: (N,) labels, -1 where unknown; None if all are. Give the same to the guide.
            size: Number of rows of the whole data set, if x is a minibatch of it.

        Returns:
            The decoder's output, (..., N, D).
        """
        x = self.checked(x)
        networks = self.networks
        with self.data_plate(len(x), size):
            if labels is not None:
                known, one_hot = self._known(labels, len(x))
                if self.label_weight:
                    fit = (self._logits(x).log_softmax(-1) * one_hot).sum(-1)
                    fit = torch.where(known, fit, torch.zeros_like(fit))
                    pyro.factor("label_fit", self.label_weight * fit)
            y = pyro.sample("y", self._cluster_distribution(self.origin.new_zeros(self.num_clusters)))
            z = pyro.sample("z", networks.prior(y))
            outputs = networks.decode(z, y)
            pyro.sample("x", self.likelihood(outputs), obs=x)
        return outputs

    @pyro_method
    def guide(self, x: Tensor, labels: Tensor | None = None, *, size: int | None = None) -> None:
        """q(y | x) q(z | x, y); arguments as for ``model``, x also with dreams (..., N, D)."""
        x = self.checked(x, ("...", "N"))
        features = self.likelihood.features(x)
        infer: Any = {"enumerate": "parallel"} if self.clusters == "enumerate" else {}
        with self.data_plate(x.shape[-2], size):
            logits = self._logits(x)
            if labels is not None:
                known, one_hot = self._known(labels, x.shape[-2])
                logits = torch.where(known[:, None], one_hot.log(), logits)
            y = pyro.sample("y", self._cluster_distribution(logits), infer=infer)
            pyro.sample("z", self.networks.encoder(features, y))

    def start_from(self, vae: VAE, x: Tensor, *, restarts: int = 5, steps: int = 1000) -> Tensor:
        r"""Starts at a trained VAE and at a Gaussian mixture of its codes, instead of at random.

        A mixture of C Gaussians is fitted to draws :math:`z_n \sim q(z \mid x_n)` of the VAE, over the latents that vary
        with the data, and gives responsibilities and p(z|y):

        .. math:: \rho_{nc} \propto \pi_c\, N(z_n; \mu_c, \Sigma_c), \qquad
            p(z \mid y = c) = N(\mu_c, \mathrm{diag}\, \Sigma_c).

        Encoder and decoder become the VAE's, blind to y; q(y|x) starts at the hidden layers of the encoder and is fitted
        to the responsibilities by their cross-entropy.

        Args:
            vae: Trained, of the same data_dim, latent_dim, hidden_dims, activation and likelihood.
            x: (N, D) data.
            restarts: Fits of the mixture, of which the likeliest is taken.
            steps: Of Adam on batches of 100 rows, by which q(y|x) is fitted.

        Returns:
            (N, C) responsibilities of the mixture.

        Raises:
            InvalidData: For a VAE of other networks or none of whose latents vary, for fewer rows than clusters, and if
                scikit-learn is not installed.
            UnsupportedModel: For ``label_in="decoder"``, which has no p(z|y).

        Note:
            Draws come from torch's generator. Cost: the mixture's, O(N C L^2) an iteration, and the steps'. The networks
            that see y are blind to it at first: train ``gmvae.networks`` alone for some epochs before the whole, lest
            q(y|x) follow them instead of they the clusters.

        References:
            Jiang, Zheng, Tan, Tang and Zhou (2017), Variational deep embedding (a start from a mixture of an
            autoencoder's codes).

        Example:
            >>> x = torch.rand(40, 16).round()
            >>> vae = VAE(16, 2, hidden_dims=(8,), likelihood=Bernoulli(), dropout=0.0)
            >>> gmvae = GaussianMixtureVAE(16, 3, 2, hidden_dims=(8,))
            >>> gmvae.start_from(vae, x).shape
            torch.Size([40, 3])
        """
        prior = self.networks.prior_network
        if prior is None:
            raise UnsupportedModel(
                "label_in='decoder' has no p(z|y) to start from clusters of z; use 'prior' or 'both'."
            )
        check_count(restarts=restarts, steps=steps)
        x = self.checked(x)
        if len(x) < self.num_clusters:
            raise InvalidData(
                f"x has {len(x)} rows; expected at least as many as clusters, {self.num_clusters}."
            )
        layers = paired_networks(self, vae)
        responsibilities, location, variance = codes_mixture(vae, x, self.num_clusters, restarts)
        responsibilities = responsibilities.to(x)
        copy_layers(*layers)
        self.likelihood.load_state_dict(vae.likelihood.state_dict())
        set_prior(prior, location, variance)
        fit_classifier(self, x, responsibilities, steps)
        return responsibilities

    def cluster_probs(self, x: Tensor) -> Tensor:
        """(N, C) probabilities q(y | x)."""
        x = self.checked(x)
        with self.evaluation():
            return self._logits(x).softmax(-1)

    def cluster(self, x: Tensor) -> Tensor:
        """(N,) most probable clusters."""
        return self.cluster_probs(x).argmax(-1)

    def generate(self, n: int = 1, *, y: Tensor | int | None = None, mode: Mode = "sample") -> Tensor:
        """(n, D) new data of the cluster or clusters y, drawn if None; ``mode`` as for :class:`VAE`."""
        check_count(n=n)
        y = torch.randint(self.num_clusters, (n,)) if y is None else y
        with self.evaluation():
            prior = self.networks.prior(one_hot_labels(y, n, self.num_clusters, self.origin))
            return self.decode(prior.expand((n,)).sample(), y, mode=mode)

    def encode(self, x: Tensor, y: Tensor | int | None = None) -> Tensor:
        """(N, L) means of q(z | x, y), or of q(z | x) with y summed out if it is None."""
        x = self.checked(x)
        features = self.likelihood.features(x)
        with self.evaluation():
            if y is not None:
                one_hot = one_hot_labels(y, len(x), self.num_clusters, self.origin)
                return self.networks.encoder(features, one_hot).mean
            every = torch.eye(self.num_clusters).to(self.origin)[:, None]
            return torch.einsum(
                "nc,cnl->nl", self.cluster_probs(x), self.networks.encoder(features, every).mean
            )

    def decode(self, z: Tensor, y: Tensor | int, *, mode: Mode = "mean") -> Tensor:
        """(..., N, D) data for latents (..., N, L) and clusters (N,), idle if ``label_in="prior"``."""
        with self.evaluation():
            one_hot = one_hot_labels(y, z.shape[-2], self.num_clusters, self.origin)
            return self.likelihood.summary(self.networks.decode(z.to(self.origin), one_hot), mode)

    def reconstruct(self, x: Tensor, *, mode: Mode = "mean") -> Tensor:
        """(N, D) data decoded from the most probable cluster and the mean of z given it."""
        y = self.cluster(x)
        return self.decode(self.encode(x, y), y, mode=mode)

    def log_evidence(self, x: Tensor, num_particles: int = 100, *, chunk_size: int | None = None) -> Evidence:
        """Importance-sampled log p(x_n) of every row, y drawn from q(y|x); see :meth:`VAE.log_evidence`."""
        treatment, self.clusters = self.clusters, "sample"
        try:
            return self._log_evidence(x, num_particles=num_particles, chunk_size=chunk_size)
        finally:
            self.clusters = treatment

    @property
    def clusters(self) -> ClusterTreatment:
        return self._clusters

    @clusters.setter
    def clusters(self, value: ClusterTreatment) -> None:
        if value not in ("enumerate", "sample", "relax"):
            raise InvalidData(f"clusters is {value!r}; choose 'enumerate', 'sample' or 'relax'.")
        self._clusters = value

    def _logits(self, x: Tensor) -> Tensor:
        return self.classifier(self.likelihood.features(x))

    def _cluster_distribution(self, logits: Tensor) -> TorchDistribution:
        if self.clusters == "relax":
            return RelaxedCategory(logits.new_tensor(self.temperature), logits=logits)
        return dist.OneHotCategorical(logits=logits)

    def _known(self, labels: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """(N,) whether a label is known, and (N, C) the label one-hot (that of 0 if unknown)."""
        if self.clusters == "relax":
            raise UnsupportedModel(
                "labels are given while clusters='relax'; a relaxed y has no certain value. "
                "Set clusters='enumerate' and train with AnalyticELBO."
            )
        labels = check_labels(labels, rows, self.num_clusters, missing=UNLABELLED).to(self.origin.device)
        one_hot = nn.functional.one_hot(labels.clamp(min=0), self.num_clusters).to(self.origin)
        return labels != UNLABELLED, one_hot
