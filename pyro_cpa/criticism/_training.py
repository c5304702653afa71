# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Maximum likelihood of a small decoder on standardised data with gaps, started at probabilistic PCA."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn

from ..infer.autoguide import AutoCPAPosterior
from ..infer.em import EM
from ..infer.exact_ml import ExactML

__all__ = ["Fitted", "train"]


class Fitted(NamedTuple):
    """A decoder, the standard deviations (D,) of its noise, its summed log-likelihood, the steps taken."""

    decoder: nn.Sequential
    noise_scale: Tensor
    log_likelihood: float
    num_steps: int


class _Model(PyroModule):
    def __init__(self, decoder: nn.Module, noise_scale: Tensor, floor: float, latent_dim: int) -> None:
        super().__init__()
        self.decoder = decoder
        self.latent_dim = latent_dim
        self.floor = floor
        # The floor makes the noise a function of a parameter, which gradients move rather than an M-step.
        self.log_excess = PyroParam((noise_scale - floor).log())

    @property
    def noise_scale(self) -> Tensor:
        return self.floor + torch.as_tensor(self.log_excess).exp()

    def forward(self, x: Tensor) -> None:
        scale = self.noise_scale
        with pyro.plate("data", len(x)):
            prior = dist.Normal(x.new_zeros(self.latent_dim), 1.0).to_event(1)
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Normal(self.decoder(z), scale).to_event(1), obs=x)


def train(
    x: Tensor,
    *,
    latent_dim: int,
    hidden: Sequence[int],
    isotropic: bool,
    solver: str,
    ridge: float,
    noise_floor: float,
    max_iter: int,
    tol: float,
    seed: int,
) -> Fitted:
    """Fits one decoder to ``x`` (N, D), columns of mean 0 and variance 1, NaN where missing.

    Global random state and parameter store are left as they were.
    """
    with (
        torch.random.fork_rng(devices=[]),
        pyro.get_param_store().scope(),
        pyro.validation_enabled(False),
        warnings.catch_warnings(),
    ):
        # EM reports idle units and small data sets; the ridge keeps both regular.
        warnings.filterwarnings("ignore", category=UserWarning, message="(the normal matrix|.* data for the)")
        torch.manual_seed(seed)
        loadings, noise = _principal_components(x, latent_dim, noise_floor)
        decoder = _decoder(loadings, hidden)
        noise = noise.square().mean().sqrt() if isotropic else noise
        model = _Model(decoder, noise, noise_floor, latent_dim)
        guide = AutoCPAPosterior(model, decoder=decoder)
        blocks = ("output", "hidden") if hidden else ("output",)
        fit = (
            ExactML(model, guide, ridge=ridge, warm_start=5)
            if solver == "lbfgs"
            else EM(model, guide, blocks=blocks, ridge=ridge, accelerate="lbfgs", lbfgs_iterations=5)
        )
        history = fit.run(x, num_steps=max_iter, tol=tol, progress=False)
        scale = model.noise_scale.detach().expand(x.shape[1]).clone()
        log_likelihood = history[-1].log_evidence if history else -fit.evaluate_loss(x)
    return Fitted(decoder.requires_grad_(False), scale, log_likelihood, len(history))


def _principal_components(x: Tensor, latent_dim: int, noise_floor: float) -> tuple[Tensor, Tensor]:
    """Loadings (D, L) and residual scales (D,) of PCA, gaps at the column means: a start, no estimate."""
    filled = x.nan_to_num()
    _, values, vectors = torch.linalg.svd(filled, full_matrices=False)
    rank = min(latent_dim, len(values))
    loadings = x.new_zeros(x.shape[1], latent_dim)
    loadings[:, :rank] = vectors[:rank].T * values[:rank] / len(x) ** 0.5
    residual = filled.square().mean(0) - loadings.square().sum(1)
    # Twice the floor: strictly inside the constraint.
    return loadings, residual.clamp(min=(2 * noise_floor) ** 2).sqrt()


def _decoder(loadings: Tensor, hidden: Sequence[int]) -> nn.Sequential:
    """Random ReLU features with kinks where the prior is, and the last layer closest to ``loadings @ z``."""
    D, L = loadings.shape
    layers: list[nn.Module] = []
    width = L
    for units in hidden:
        layer = nn.Linear(width, units, dtype=loadings.dtype)
        if width == L:
            with torch.no_grad():
                layer.weight.normal_()
                layer.weight /= layer.weight.norm(dim=1, keepdim=True)
                layer.bias.normal_()
        layers += [layer, nn.ReLU()]
        width = units
    z = torch.randn(max(500, 20 * width), L, dtype=loadings.dtype)
    with torch.no_grad():
        features = nn.Sequential(*layers)(z)
        design = torch.cat([features, torch.ones_like(features[:, :1])], dim=1)
        # A small ridge: random features may be collinear.
        normal = design.T @ design + 1e-6 * len(z) * torch.eye(width + 1, dtype=z.dtype)
        solution = torch.linalg.solve(normal, design.T @ (z @ loadings.T))
        last = nn.Linear(width, D, dtype=loadings.dtype)
        last.weight.copy_(solution[:-1].T)
        last.bias.copy_(solution[-1])
    return nn.Sequential(*layers, last)
