# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""What exact generators with a label share: one piecewise-affine model of x for each label."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from pyro.nn import PyroParam
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_cpa.distributions import CPAMarginal
from pyro_cpa.errors import InvalidData
from pyro_cpa.infer.evidence import Evidence, integrated_evidence
from pyro_cpa.infer.lbfgs import climb, optimizer_of
from pyro_cpa.models.gaussian_noise import GaussianNoise, NoiseKind
from pyro_cpa.models.latent_model import AbstractLatentModel, check_count, check_labels
from pyro_cpa.models.likelihoods import Mode
from pyro_cpa.models.mixture_posterior import MixturePosterior
from pyro_cpa.models.networks import Activation, LabelPlacement, mlp
from pyro_cpa.partition import enumerate_regions

__all__ = ["AbstractLabelledGenerator"]


class AbstractLabelledGenerator(AbstractLatentModel):
    r"""Piecewise-affine generators that differ by label in their prior, their first layer's bias, or both.

    .. math:: p(y) = \pi_y, \qquad z \mid y \sim N(m_y, \mathrm{diag}(s_y^2)), \qquad
        x \mid y, z \sim N(g(z; c_y), S_x)

    Subclasses say whether y is given. Where a method takes ``y=None`` it sums y out.

    Args:
        data_dim: D.
        num_classes: C; labels are integers 0, ..., C-1.
        latent_dim: L; beyond 3 the evidence is an estimate unless the decoder is affine.
        label_in: Where y enters: "prior", "decoder" or "both".
        hidden_dims: Widths of the decoder's hidden layers.
        activation: Makes the piecewise-linear activation module of the hidden layers.
        noise: Form of S_x: "scalar", "diagonal" or "full".
        noise_scale: Its initial standard deviation, a number or (D,).
        label_probs: (C,) initial pi; uniform by default.
        max_regions: More regions than this raise ``RegionBudgetExceeded``.
    """

    likelihood: GaussianNoise
    prior_loc: Any
    prior_scale: Any

    def __init__(
        self,
        data_dim: int,
        num_classes: int,
        latent_dim: int,
        label_in: LabelPlacement,
        hidden_dims: Sequence[int],
        activation: Activation,
        noise: NoiseKind,
        noise_scale: float | Tensor,
        label_probs: Tensor | None,
        max_regions: int,
    ) -> None:
        check_count(data_dim=data_dim, num_classes=num_classes)
        super().__init__(data_dim, latent_dim, GaussianNoise(data_dim, noise, noise_scale))
        if label_in not in ("prior", "decoder", "both"):
            raise InvalidData(f"label_in is {label_in!r}; choose 'prior', 'decoder' or 'both'.")
        self.num_classes = num_classes
        self.max_regions = max_regions
        shared = mlp(latent_dim, hidden_dims, data_dim, activation=activation)
        # One decoder a label; all but the bias of the first layer is the same module or tensor in each.
        decoders = [shared]
        for _ in range(1, num_classes):
            decoders.append(shared if label_in == "prior" else _with_own_bias(shared))
        self.decoders = nn.ModuleList(decoders)
        if label_in == "decoder":
            self.register_buffer("prior_loc", torch.zeros(num_classes, latent_dim))
            self.register_buffer("prior_scale", torch.ones(num_classes, latent_dim))
        else:
            self.prior_loc = PyroParam(torch.randn(num_classes, latent_dim))
            self.prior_scale = PyroParam(torch.ones(num_classes, latent_dim), constraints.positive)
        uniform = torch.full((num_classes,), 1 / num_classes)
        self.label_probs: Any = PyroParam(_checked_probs(label_probs, uniform), constraints.simplex)

    def prior(self, y: Tensor) -> TorchDistribution:
        """p(z | y) for labels (...)."""
        return dist.Normal(self.prior_loc[y], self.prior_scale[y]).to_event(1)

    def marginals(self) -> list[CPAMarginal]:
        """Exact p(x | y) of each label at the present parameters; labels with one decoder share its partition."""
        partitions: dict[int, Any] = {}
        for decoder in self.decoders:
            if id(decoder) not in partitions:
                partitions[id(decoder)] = enumerate_regions(decoder, self.max_regions)
        noise = self.likelihood.arguments()
        return [
            CPAMarginal(partitions[id(decoder)], **noise, loc=loc, prior_covariance=torch.diag(scale**2))
            for decoder, loc, scale in zip(self.decoders, self.prior_loc, self.prior_scale, strict=True)
        ]

    def joint_log_probs(self, x: Tensor) -> Tensor:
        """(N, C) exact log p(x | y) + log p(y) for every label, differentiable in all parameters."""
        x = self.checked(x)
        given = torch.stack([marginal.log_prob(x) for marginal in self.marginals()], -1)
        return given + self.label_probs.log()

    def log_prob(self, x: Tensor, y: Tensor | int | None = None) -> Tensor:
        """(N,) exact log p(x | y), or log p(x) if y is None, differentiable in all parameters."""
        if y is None:
            return self.joint_log_probs(x).logsumexp(-1)
        return self._given_labels(self.checked(x), y, lambda marginal, rows: marginal.log_prob(rows))

    @torch.no_grad()
    def log_evidence(self, x: Tensor, y: Tensor | int | None = None, num_particles: int = 100) -> Evidence:
        """:meth:`log_prob` without gradients, in the form that sampled evidence has.

        Args:
            x: (N, D) data, NaN where missing.
            y: (N,) labels or one for all rows; None for log p(x).
            num_particles: Idle where the evidence is exact; here so that exact and sampled models are called alike.
        """
        x = self.checked(x)
        if y is not None:
            log_prob, error = self._given_labels(x, y, _log_prob_and_error).unbind(-1)
        else:
            given, errors = torch.stack([_log_prob_and_error(p, x) for p in self.marginals()], 1).unbind(-1)
            joint = given + self.label_probs.log()
            # Labels share their points: at worst their errors add up.
            log_prob, error = joint.logsumexp(-1), (joint.softmax(-1) * errors).sum(-1)
        return integrated_evidence(log_prob, error, num_particles)

    @torch.no_grad()
    def class_probs(self, x: Tensor) -> Tensor:
        """(N, C) exact p(y | x)."""
        return self.joint_log_probs(x).softmax(-1)

    @torch.no_grad()
    def posterior(self, x: Tensor, y: Tensor | int | None = None) -> MixturePosterior:
        """Exact p(z | x, y), or p(z | x) if y is None: batch shape (N,), event shape (L,)."""
        x = self.checked(x)
        return MixturePosterior(self.marginals(), x, self._log_weights(x, y))

    def encode(self, x: Tensor, y: Tensor | int | None = None) -> Tensor:
        """(N, L) exact means of p(z | x, y), or of p(z | x) if y is None."""
        return self.posterior(x, y).mean

    def decoder_output(self, z: Tensor, y: Tensor) -> Tensor:
        """(..., N, D) g(z; c_y) for latents (..., N, L) and labels (N,), row by row its own decoder."""
        first: Any = [decoder[0] for decoder in self.decoders]  # type: ignore[index]
        bias = torch.stack([layer.bias for layer in first])
        hidden = nn.functional.linear(z, first[0].weight) + bias[y]
        return self.decoders[0][1:](hidden)  # type: ignore[index]

    def decode(self, z: Tensor, y: Tensor | int, *, mode: Mode = "mean") -> Tensor:
        """(..., N, D) data for latents (..., N, L) and labels (N,): a draw of x, or its mean."""
        with self.evaluation():
            outputs = self.decoder_output(z.to(self.origin), self._labels(y, z.shape[-2]))
            return self.likelihood.summary(outputs, mode)

    def generate(self, n: int = 1, *, y: Tensor | int | None = None, mode: Mode = "sample") -> Tensor:
        """(n, D) new data with the label or labels y, drawn from p(y) if None; ``mode`` as in :meth:`decode`."""
        check_count(n=n)
        with torch.no_grad():
            drawn = dist.Categorical(self.label_probs).sample(torch.Size([n])) if y is None else y
            labels = self._labels(drawn, n)
            return self.decode(self.prior(labels).sample(), labels, mode=mode)

    @torch.no_grad()
    def impute(self, x: Tensor, y: Tensor | int | None = None) -> Tensor:
        """(N, D) missing entries filled with their exact conditional means, given y or with y summed out."""
        x = self.checked(x)
        weights = self._log_weights(x, y).exp()
        filled = torch.stack([marginal.conditional(x).mean for marginal in self.marginals()], 1)
        return torch.where(x.isnan(), torch.einsum("nc,ncd->nd", weights, filled), x)

    def _given_labels(
        self, x: Tensor, y: Tensor | int, method: Callable[[CPAMarginal, Tensor], Tensor]
    ) -> Tensor:
        """(N, ...) what ``method`` of p(x | y) and rows gives for each row of x under its own label."""
        labels = self._labels(y, len(x))
        found = [method(marginal, x[labels == c]) for c, marginal in enumerate(self.marginals())]
        return torch.cat(found)[labels.argsort(stable=True).argsort()]

    def _log_weights(self, x: Tensor, y: Tensor | int | None) -> Tensor:
        if y is None:
            return self.joint_log_probs(x).log_softmax(-1)
        return nn.functional.one_hot(self._labels(y, len(x)), self.num_classes).to(x).log()

    def _labels(self, y: Tensor | int, rows: int) -> Tensor:
        return check_labels(y, rows, self.num_classes).to(self.origin.device)

    def _climb(self, log_prob: Callable[[], Tensor], rows: int, num_steps: int) -> list[float]:
        """Up to ``num_steps`` evaluations of L-BFGS on the mean of ``log_prob()`` (rows,); keeps the best parameters seen.

        Returns:
            Summed log_prob before, and after each evaluation that improved it.
        """
        parameters = [p for p in self.parameters() if p.requires_grad]
        optimizer = optimizer_of(parameters, num_steps, evaluations=num_steps)
        return climb(optimizer, lambda: log_prob().sum(), rows)


def _log_prob_and_error(marginal: CPAMarginal, x: Tensor) -> Tensor:
    """(N, 2) log p(x) and its standard error."""
    return torch.stack(marginal.log_prob(x, return_error=True), -1)


def _with_own_bias(decoder: nn.Sequential) -> nn.Sequential:
    """The same modules, after a first layer that shares the weight but not the bias."""
    first: Any = decoder[0]
    own = nn.Linear(first.in_features, first.out_features)
    own.weight = first.weight
    return nn.Sequential(own, *list(decoder)[1:])


def _checked_probs(probs: Tensor | None, uniform: Tensor) -> Tensor:
    if probs is None:
        return uniform
    probs = torch.as_tensor(probs).to(uniform)
    if probs.shape != uniform.shape or not bool((probs > 0).all()) or abs(float(probs.sum()) - 1) > 1e-6:
        raise InvalidData(
            f"label_probs is {probs.tolist()}; expected {len(uniform)} positive probabilities that sum to 1."
        )
    return probs
