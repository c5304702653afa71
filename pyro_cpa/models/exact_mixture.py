# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""The exact Gaussian version of the Gaussian-mixture VAE."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from pyro.nn.module import pyro_method
from torch import Tensor, nn

from pyro_cpa.distributions.fisher import expected_statistics
from pyro_cpa.errors import InvalidData
from pyro_cpa.infer import m_step
from pyro_cpa.models.gaussian_noise import NoiseKind
from pyro_cpa.models.labelled_generator import AbstractLabelledGenerator
from pyro_cpa.models.likelihoods import Mode
from pyro_cpa.models.networks import Activation

__all__ = ["MixtureCPAGenerator"]


class MixtureCPAGenerator(AbstractLabelledGenerator):
    r"""Piecewise-affine generator whose latent is a mixture of C Gaussians, with exact evidence and clusters.

    .. math:: p(x) = \sum_{y} \pi_y \sum_r N(x; A_r m_y + b_r, S_x + A_r V_y A_r^\top)\,
        P(z \in \text{cell } r \mid x, y), \qquad V_y = \mathrm{diag}(s_y^2)

    The decoder does not see y, so that all components share one partition. The guide is exact:
    p(z | x) p(y | z). NaN marks a missing entry of x in every method.

    Args:
        data_dim: D.
        num_clusters: C.
        latent_dim: L; beyond 3 the evidence is an estimate unless the decoder is affine.
        hidden_dims: Widths of the decoder's hidden layers.
        activation: Makes the piecewise-linear activation module of the hidden layers.
        noise: Form of S_x: "scalar", "diagonal" or "full".
        noise_scale: Its initial standard deviation, a number or (D,).
        label_probs: (C,) initial p(y); uniform by default.
        max_regions: More regions than this raise ``RegionBudgetExceeded``.

    Raises:
        UnsupportedModule: If the activation is not piecewise affine.
        InvalidData: For bad settings; by the methods, for data of another shape or with infinite entries.

    Note:
        Exact up to float64 rounding, at C times the cost of :class:`~pyro_cpa.distributions.CPAMarginal`.
        Clusters depend on the start: compare several seeds by ``log_evidence``. Before ``model`` and ``guide``
        of a second model run in the same process call ``pyro.clear_param_store()``.

    References:
        R. Balestriero, S. Paris, R. Baraniuk (2020), "Analytical Probability Distributions and Exact
        Expectation-Maximization for Deep Generative Networks".
        Yang (2022), Training latent variable models with auto-encoding variational Bayes: a tutorial.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> mixture = MixtureCPAGenerator(data_dim=2, num_clusters=2, hidden_dims=(4,))
        >>> x = torch.randn(30, 2)
        >>> losses = [mixture.em_step(x) for _ in range(5)]
        >>> losses == sorted(losses, reverse=True)
        True
        >>> mixture.class_probs(x).shape, mixture.generate(4).shape
        (torch.Size([30, 2]), torch.Size([4, 2]))
    """

    def __init__(
        self,
        data_dim: int,
        num_clusters: int,
        latent_dim: int = 1,
        *,
        hidden_dims: Sequence[int] = (32,),
        activation: Activation = nn.ReLU,
        noise: NoiseKind = "diagonal",
        noise_scale: float | Tensor = 1.0,
        label_probs: Tensor | None = None,
        max_regions: int = 200_000,
    ) -> None:
        super().__init__(
            data_dim,
            num_clusters,
            latent_dim,
            "prior",
            hidden_dims,
            activation,
            noise,
            noise_scale,
            label_probs,
            max_regions,
        )

    @pyro_method
    def model(self, x: Tensor, *, size: int | None = None) -> Tensor:
        """p(x, y, z).

        Args:
            x: (N, D) data, NaN where missing.
            size: Number of rows of the whole data set, if x is a minibatch of it.

        Returns:
            The decoder's output, (..., N, D).
        """
        x = self.checked(x)
        with self.data_plate(len(x), size):
            y = pyro.sample("y", dist.Categorical(self.label_probs))
            z = pyro.sample("z", self.prior(y))
            outputs = self.decoders[0](z)
            pyro.sample("x", self.likelihood(outputs), obs=x)
        return outputs

    @pyro_method
    def guide(self, x: Tensor, *, size: int | None = None) -> Tensor:
        """Exact p(y, z | x), z first; arguments as for ``model``. Returns z, without gradients."""
        posterior = self.posterior(x)
        with self.data_plate(len(x), size):
            z = pyro.sample("z", posterior)
            # x depends on z alone, so that z tells all that there is to know of y.
            pyro.sample("y", self.component(z))
        return z

    @torch.no_grad()
    def component(self, z: Tensor) -> TorchDistribution:
        """Exact p(y | z) of latents (..., L)."""
        every = torch.arange(self.num_classes, device=self.origin.device)
        return dist.Categorical(logits=self.label_probs.log() + self.prior(every).log_prob(z[..., None, :]))

    def cluster(self, x: Tensor) -> Tensor:
        """(N,) most probable clusters given x."""
        return self.class_probs(x).argmax(-1)

    def reconstruct(self, x: Tensor, *, mode: Mode = "mean") -> Tensor:
        """(N, D) data decoded from ``encode(x)``."""
        return self.decode(self.encode(x), 0, mode=mode)

    @torch.no_grad()
    def em_step(self, x: Tensor) -> float:
        """One step of exact EM on all but the hidden layers: mixture, last layer and noise in closed form.

        Args:
            x: (N, D) data, NaN where missing.

        Returns:
            -log p(x) before the step, summed over the rows; it never rises from step to step.

        Raises:
            InvalidData: If a cluster dies out or shrinks to a point, or a column leaves no noise.
        """
        x = self.checked(x).double()
        marginals = self.marginals()
        given = torch.stack([marginal.log_prob(x) for marginal in marginals], -1)
        joint_log_probs = given + self.label_probs.double().log()
        weights = joint_log_probs.softmax(-1)
        parts = [
            expected_statistics(marginal.joint, x, weights[:, c])[1] for c, marginal in enumerate(marginals)
        ]
        total = sum(parts[1:], parts[0])
        partition, noise_scale = marginals[0].partition, marginals[0].joint.noise.scale
        moments = [m_step.prior_moments(part) for part in parts]
        loc = torch.stack([mean for mean, _ in moments])
        variance = torch.stack([covariance.diagonal() for _, covariance in moments])
        if not bool((variance > 0).all()):
            gone = (~(variance > 0).all(-1)).nonzero().flatten().tolist()
            raise InvalidData(
                f"cluster {gone} has no rows or no spread left; expected some. Lower num_clusters or start anew."
            )
        weight, bias, _ = m_step.output_layer(partition, total, noise_scale, 0.0)
        last: Any = self.decoders[0][-1]  # type: ignore[index]
        last.weight.copy_(weight)
        last.bias.copy_(bias)
        slopes, offsets = partition.affine_maps()
        self._write_noise(total.residual(slopes, offsets) / total.count)
        self.prior_loc = loc.to(self.origin)
        self.prior_scale = variance.sqrt().to(self.origin)
        self.label_probs = (weights.sum(0) / weights.sum()).to(self.origin)
        return -joint_log_probs.logsumexp(-1).sum().item()

    def _write_noise(self, moment: Tensor) -> None:
        """Noise of the given variances (D,) or covariance (D, D)."""
        noise = self.likelihood
        if noise.kind == "full":
            root, failed = torch.linalg.cholesky_ex(moment)
            good = not bool(failed)
        else:
            moment = moment.mean() if noise.kind == "scalar" else moment
            root, good = moment.sqrt(), bool((moment > 0).all())
        if not good:
            raise InvalidData("the decoder fits a column exactly; expected noise. Drop constant columns.")
        setattr(noise, "scale_tril" if noise.kind == "full" else "scale", root.to(self.origin))

    def fit(
        self,
        x: Tensor,
        method: Literal["em", "ml", "em+lbfgs"] = "em+lbfgs",
        *,
        num_steps: int = 100,
        tol: float = 1e-6,
    ) -> list[float]:
        """Maximum likelihood on the exact evidence.

        Args:
            x: (N, D) data, NaN where missing.
            method: "em" for :meth:`em_step`, which leaves the hidden layers as they are; "ml" for L-BFGS on all
                parameters; "em+lbfgs" for one after the other.
            num_steps: At most so many steps of EM, and so many evaluations of L-BFGS.
            tol: EM stops when a step gains less than this, in nats per row.

        Returns:
            Summed log p(x) before each step that improved it and at the end; it never falls.
        """
        if method not in ("em", "ml", "em+lbfgs"):
            raise InvalidData(f"method is {method!r}; choose 'em', 'ml' or 'em+lbfgs'.")
        x = self.checked(x)
        history: list[float] = []
        if method != "ml":
            for _ in range(num_steps):
                history.append(-self.em_step(x))
                if len(history) > 1 and history[-1] - history[-2] < tol * len(x):
                    break
        if method != "em":
            return history + self._climb(lambda: self.log_prob(x), len(x), num_steps)
        return [*history, self.log_evidence(x).log_prob.sum().item()]
