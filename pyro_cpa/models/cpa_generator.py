# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""The piecewise-affine generator with exact inference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from pyro.nn import PyroParam
from pyro.nn.module import pyro_method
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_cpa.distributions import CPAMarginal, CPAPosterior
from pyro_cpa.errors import InvalidData
from pyro_cpa.infer.autoguide import AutoCPAPosterior
from pyro_cpa.infer.em import EM
from pyro_cpa.infer.evidence import Evidence, integrated_evidence
from pyro_cpa.infer.exact_fit import AbstractExactFit, StepRecord
from pyro_cpa.infer.exact_ml import ExactML
from pyro_cpa.models.gaussian_noise import GaussianNoise, NoiseKind
from pyro_cpa.models.latent_model import AbstractLatentModel, check_count
from pyro_cpa.models.likelihoods import Mode
from pyro_cpa.models.networks import Activation, mlp
from pyro_cpa.partition import Network

__all__ = ["CPAGenerator", "FitMethod"]

FitMethod = Literal["em", "em+lbfgs", "ml"]


class CPAGenerator(AbstractLatentModel):
    r"""Continuous piecewise-affine decoder with Gaussian prior and noise: evidence and posterior are exact.

    .. math:: z \sim N(m, V), \qquad x \mid z \sim N(g(z), S_x), \qquad q(z \mid x) = p(z \mid x)

    ``guide`` is :class:`~pyro_cpa.infer.AutoCPAPosterior`: with it every bound on log p(x) is tight, at every
    draw. NaN marks a missing entry of x in every method, and is marginalised out.

    Args:
        data_dim: D.
        latent_dim: L; beyond 3 the evidence is an estimate unless the decoder is affine.
        hidden_dims: Widths of the decoder's hidden layers; none for an affine decoder.
        activation: Makes the piecewise-linear activation module of the hidden layers.
        decoder: A module R^L -> R^D instead of the one that ``hidden_dims`` and ``activation`` describe.
        noise: Form of S_x: "scalar", "diagonal" or "full".
        noise_scale: Its initial standard deviation, a number or (D,).
        learn_noise: Whether the noise is a parameter.
        learn_prior: Whether m and V are parameters, or 0 and I.
        max_regions: More regions than this raise ``RegionBudgetExceeded``.

    Raises:
        UnsupportedModule: If the decoder is not piecewise affine.
        InvalidData: For bad settings; by the methods, for data of another shape or with infinite entries.

    Note:
        Exact up to float64 rounding, at the cost of :class:`~pyro_cpa.distributions.CPAMarginal`. Pyro's
        parameter store knows parameters by name: before ``model`` and ``guide`` of a second one run in the same
        process call ``pyro.clear_param_store()``, or the two share their noise and prior. The other methods,
        ``fit`` included, do not look into the store.

    References:
        R. Balestriero, S. Paris, R. Baraniuk (2020), "Analytical Probability Distributions and Exact
        Expectation-Maximization for Deep Generative Networks".

    Example:
        >>> _ = torch.manual_seed(0)
        >>> generator = CPAGenerator(data_dim=2, hidden_dims=(6,))
        >>> x = torch.randn(30, 2)
        >>> x[0, 1] = torch.nan
        >>> history = generator.fit(x, num_steps=3)
        >>> history[0].log_evidence <= history[2].log_evidence
        True
        >>> generator.encode(x).shape, generator.impute(x).isnan().any().item()
        (torch.Size([30, 1]), False)
    """

    likelihood: GaussianNoise
    prior_loc: Any
    prior_scale_tril: Any

    def __init__(
        self,
        data_dim: int,
        latent_dim: int = 1,
        *,
        hidden_dims: Sequence[int] = (32,),
        activation: Activation = nn.ReLU,
        decoder: nn.Module | None = None,
        noise: NoiseKind = "diagonal",
        noise_scale: float | Tensor = 1.0,
        learn_noise: bool = True,
        learn_prior: bool = False,
        max_regions: int = 200_000,
    ) -> None:
        check_count(data_dim=data_dim)
        super().__init__(data_dim, latent_dim, GaussianNoise(data_dim, noise, noise_scale, learn=learn_noise))
        self.decoder = (
            mlp(latent_dim, hidden_dims, data_dim, activation=activation) if decoder is None else decoder
        )
        network = Network(self.decoder, latent_dim)
        if (network.latent_dim, network.data_dim) != (latent_dim, data_dim):
            raise InvalidData(
                f"the decoder maps R^{network.latent_dim} to R^{network.data_dim}; expected R^{latent_dim} to "
                f"R^{data_dim}. Change latent_dim and data_dim, or the decoder."
            )
        self.learn_prior = learn_prior
        if learn_prior:
            self.prior_loc = PyroParam(torch.zeros(latent_dim))
            self.prior_scale_tril = PyroParam(torch.eye(latent_dim), constraints.lower_cholesky)
        self.max_regions = max_regions
        self.guide = self._exact_guide()

    @pyro_method
    def model(self, x: Tensor, *, size: int | None = None) -> Tensor:
        """p(x, z).

        Args:
            x: (N, D) data, NaN where missing.
            size: Number of rows of the whole data set, if x is a minibatch of it.

        Returns:
            The decoder's output, (..., N, D).
        """
        x = self.checked(x)
        with self.data_plate(len(x), size):
            z = pyro.sample("z", self.prior())
            outputs = self.decoder(z)
            pyro.sample("x", self.likelihood(outputs), obs=x)
        return outputs

    def prior(self) -> TorchDistribution:
        """p(z)."""
        if self.learn_prior:
            return dist.MultivariateNormal(self.prior_loc, scale_tril=self.prior_scale_tril)
        return self.standard_normal()

    def marginal(self) -> CPAMarginal:
        """Exact p(x) at the present parameters, in which it is differentiable."""
        prior: dict[str, Any] = {}
        if self.learn_prior:
            tril = self.prior_scale_tril
            prior = {"loc": self.prior_loc, "prior_covariance": tril @ tril.mT}
        partition = self.guide.partition()
        return CPAMarginal(
            partition,
            **self.likelihood.arguments(),
            **prior,
            memory_budget=self.guide.memory_budget,
            num_points=self.guide.num_points,
        )

    def log_prob(self, x: Tensor) -> Tensor:
        """(N,) exact log p(x) of the observed entries, differentiable in all parameters."""
        return self.marginal().log_prob(self.checked(x))

    def log_evidence(self, x: Tensor, num_particles: int = 100) -> Evidence:
        """:meth:`log_prob` without gradients, in the form that sampled evidence has; nothing is drawn.

        Args:
            x: (N, D) data.
            num_particles: Idle where the evidence is exact; here so that exact and sampled models are called alike.
        """
        found = self.marginal().log_prob(self.checked(x), return_error=True)
        return integrated_evidence(*found, num_particles)

    def posterior(self, x: Tensor) -> CPAPosterior:
        """Exact p(z | x): batch shape (N,), event shape (L,)."""
        return self.marginal().posterior(self.checked(x))

    def encode(self, x: Tensor) -> Tensor:
        """(N, L) exact means of p(z | x)."""
        with torch.no_grad():
            return self.posterior(x).mean

    def decode(self, z: Tensor, *, mode: Mode = "mean") -> Tensor:
        """(..., D) data for latents (..., L): a draw of x, its mean, or the decoder's output (the same)."""
        with self.evaluation():
            return self.likelihood.summary(self.decoder(z.to(self.origin)), mode)

    def reconstruct(self, x: Tensor, *, mode: Mode = "mean") -> Tensor:
        """(N, D) data decoded from ``encode(x)``, missing entries too."""
        return self.decode(self.encode(x), mode=mode)

    def impute(self, x: Tensor, num_draws: int | None = None) -> Tensor:
        """Missing entries filled in, observed ones kept.

        Args:
            x: (N, D) data, NaN where missing.
            num_draws: S.

        Returns:
            (N, D) with exact conditional means, or (S, N, D) exact draws of p(missing | observed).
        """
        if num_draws is not None:
            check_count(num_draws=num_draws)
        with torch.no_grad():
            filled = self.marginal().conditional(self.checked(x))
            return filled.mean if num_draws is None else filled.sample(torch.Size([num_draws]))

    def generate(self, n: int = 1, *, mode: Mode = "sample") -> Tensor:
        """(n, D) new data; ``mode`` as in :meth:`decode`, given a draw of z."""
        check_count(n=n)
        with torch.no_grad():
            return self.decode(self.prior().sample(torch.Size([n])), mode=mode)

    def fit(
        self,
        x: Tensor,
        method: FitMethod = "em",
        *,
        num_steps: int = 100,
        tol: float = 1e-6,
        ridge: float = 0.0,
        progress: bool = False,
    ) -> list[StepRecord]:
        """Exact maximum likelihood.

        Args:
            x: (N, D) data, NaN where missing.
            method: "em" for :class:`~pyro_cpa.infer.EM`; "em+lbfgs" for the same with rounds of L-BFGS
                between; "ml" for :class:`~pyro_cpa.infer.ExactML`.
            num_steps: At most so many steps.
            tol: Stop when a step gains less than this, in nats per row.
            ridge: Precision of a Gaussian prior on the decoder's weights.
            progress: Whether to show a progress bar.

        Returns:
            One record for each step; the evidence in them never falls (with a ridge: the objective).
        """
        fit: AbstractExactFit
        if method == "ml":
            fit = ExactML(self.model, self.guide, ridge=ridge)
        elif method in ("em", "em+lbfgs"):
            blocks = ["output", "hidden"] + ["noise"] * self._learns_noise + ["prior"] * self.learn_prior
            fit = EM(
                self.model,
                self.guide,
                ridge=ridge,
                blocks=blocks,
                accelerate="lbfgs" if method == "em+lbfgs" else None,
            )
        else:
            raise InvalidData(f"method is {method!r}; choose 'em', 'em+lbfgs' or 'ml'.")
        # In a parameter store of its own, where no other model has parameters of the same names.
        with pyro.get_param_store().scope():
            return fit.run(self.checked(x), num_steps=num_steps, tol=tol, progress=progress)

    def __getstate__(self) -> dict[str, Any]:
        # Pyro's automatic guides lose their model when they are copied or pickled, the original's too.
        modules = {name: module for name, module in self._modules.items() if name != "guide"}
        return {**super().__getstate__(), "_modules": modules}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.guide = self._exact_guide()

    def _exact_guide(self) -> AutoCPAPosterior:
        return AutoCPAPosterior(self.model, decoder=self.decoder, max_regions=self.max_regions)

    @property
    def _learns_noise(self) -> bool:
        return any(p.requires_grad for p in self.likelihood.parameters())
