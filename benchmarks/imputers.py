# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Imputers side by side: each maps training rows with gaps to a function that completes test rows with gaps."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI
from pyro.nn import PyroModule
from runs import batches
from sklearn.exceptions import ConvergenceWarning
from sklearn.experimental import enable_iterative_imputer  # noqa: F401
from sklearn.impute import IterativeImputer, KNNImputer, SimpleImputer
from sklearn.mixture import GaussianMixture
from torch import Tensor, nn

from pyro_cpa.criticism import CPADensity
from pyro_cpa.infer import ImportanceWeightedELBO

__all__ = ["IMPUTERS", "Completed"]

NUM_DRAWS = 200


class Completed(NamedTuple):
    """Point estimates (N, D), draws (S, N, D) or None, and mean log p(x_obs) with whether it is an estimate."""

    mean: np.ndarray
    draws: np.ndarray | None = None
    log_prob: float = np.nan
    estimated: bool = False


Imputer = Callable[[np.ndarray, np.ndarray, int, bool], Completed]


def by_density(**options: object) -> Imputer:
    def complete(train: np.ndarray, test: np.ndarray, seed: int, smoke: bool) -> Completed:
        fit = CPADensity(**(options | {"random_state": seed} | ({"max_iter": 1} if smoke else {}))).fit(train)
        return Completed(fit.impute(test), fit.impute_draws(test, NUM_DRAWS), fit.score(test))

    return complete


def by_scikit_learn(make: Callable[[int, int], object]) -> Imputer:
    """``make`` takes the seed and the largest number of sweeps."""

    def complete(train: np.ndarray, test: np.ndarray, seed: int, smoke: bool) -> Completed:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            return Completed(make(seed, 1 if smoke else 10).fit(train).transform(test))

    return complete


def by_mixture(train: np.ndarray, test: np.ndarray, seed: int, smoke: bool) -> Completed:
    """scikit-learn's mixture takes no gaps: trained on column means, components chosen by BIC, then conditioned."""
    filled = SimpleImputer().fit_transform(train)
    fits = [GaussianMixture(k, reg_covar=1e-2, random_state=seed).fit(filled) for k in (1, 2, 3, 5)]
    mixture = min(fits, key=lambda fit: fit.bic(filled))
    random = np.random.default_rng(seed)
    mean, draws = test.copy(), np.repeat(test[None], NUM_DRAWS, axis=0)
    log_prob = np.zeros(len(test))
    for n, row in enumerate(test):
        o, m = ~np.isnan(row), np.isnan(row)
        parts = []
        for weight, mu, covariance in zip(
            mixture.weights_, mixture.means_, mixture.covariances_, strict=True
        ):
            root = np.linalg.cholesky(covariance[np.ix_(o, o)])
            white = np.linalg.solve(root, np.c_[row[o] - mu[o], covariance[np.ix_(o, m)]])
            log_k = (
                -0.5 * (white[:, 0] @ white[:, 0] + o.sum() * np.log(2 * np.pi))
                - np.log(root.diagonal()).sum()
            )
            left = covariance[np.ix_(m, m)] - white[:, 1:].T @ white[:, 1:]
            parts.append((np.log(weight) + log_k, mu[m] + white[:, 1:].T @ white[:, 0], left))
        logits = np.array([part[0] for part in parts])
        log_prob[n] = np.logaddexp.reduce(logits)
        share = np.exp(logits - log_prob[n])
        mean[n, m] = sum(s * part[1] for s, part in zip(share, parts, strict=True))
        roots = [np.linalg.cholesky(part[2]) for part in parts]
        for s, k in enumerate(random.choice(len(share), NUM_DRAWS, p=share / share.sum())):
            draws[s, n, m] = parts[k][1] + roots[k] @ random.normal(size=m.sum())
    return Completed(mean, draws, float(log_prob.mean()))


class MIWAE(PyroModule):
    """Importance-weighted autoencoder on the observed cells (Mattei, Frellsen 2019), gaps zeroed for the encoder."""

    def __init__(self, data_dim: int, latent_dim: int = 5, width: int = 64) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.decoder = nn.Sequential(nn.Linear(latent_dim, width), nn.Tanh(), nn.Linear(width, 2 * data_dim))
        self.encoder = nn.Sequential(
            nn.Linear(2 * data_dim, width), nn.Tanh(), nn.Linear(width, 2 * latent_dim)
        )

    def likelihood(self, z: Tensor) -> dist.Normal:
        mean, raw = self.decoder(z).chunk(2, -1)
        return dist.Normal(mean, 0.05 + nn.functional.softplus(raw))

    def model(self, x: Tensor) -> None:
        pyro.module("miwae", self)
        seen = ~x.isnan()
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.latent_dim), 1.0).to_event(1))
            pyro.sample("x", self.likelihood(z).mask(seen).to_event(1), obs=x.nan_to_num())

    def guide(self, x: Tensor) -> None:
        pyro.module("miwae", self)
        with pyro.plate("data", len(x), dim=-1):
            loc, raw = self.encoder(torch.cat([x.nan_to_num(), x.isnan().to(x)], -1)).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, 1e-3 + nn.functional.softplus(raw)).to_event(1))


def by_miwae(train: np.ndarray, test: np.ndarray, seed: int, smoke: bool) -> Completed:
    """Trained by our ImportanceWeightedELBO with K = 20, 256 rows a step; imputes by 1000 self-normalised samples.

    In float32, as such models usually are, and without the host's checks at every step: together half of the time.
    """
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    x, rows = torch.as_tensor(train).float(), torch.as_tensor(test).float()
    model = MIWAE(train.shape[1]).float()
    loss = ImportanceWeightedELBO(20, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(model.model, model.guide, pyro.optim.Adam({"lr": 3e-3}), loss)
    # A tenth of the training rows decides when to stop: where it has gained nothing for 300 steps.
    held = x[: len(x) // 10]
    best, best_step, state = np.inf, 0, None
    source = batches(x[len(held) :], size=256, seed=seed, steps=0)
    with pyro.validation_enabled(False):
        for step in range(5 if smoke else 1500):
            svi.step(*next(source))
            if step % 50 == 0:
                held_loss = svi.evaluate_loss(held)
                if held_loss < best:
                    best, best_step = held_loss, step
                    state = {k: v.clone() for k, v in model.state_dict().items()}
                if step >= best_step + 300:
                    break
    model.load_state_dict(state)
    particles = 50 if smoke else 1000
    with torch.no_grad():
        evaluate = ImportanceWeightedELBO(particles, vectorize_particles=True, max_plate_nesting=1)
        traces = pyro.plate("particles", particles, dim=-2)
        guide = pyro.poutine.trace(traces(model.guide)).get_trace(rows)
        z = guide.nodes["z"]["value"]
        replayed = pyro.poutine.trace(pyro.poutine.replay(traces(model.model), guide)).get_trace(rows)
        replayed.compute_log_prob()
        guide.compute_log_prob()
        log_w = sum(replayed.nodes[n]["log_prob"] for n in ("z", "x")) - guide.nodes["z"]["log_prob"]
        law = model.likelihood(z)
        share = log_w.softmax(0)
        mean = (share[..., None] * law.mean).sum(0)
        chosen = torch.distributions.Categorical(share.T).sample((NUM_DRAWS,))
        draws = law.sample()[chosen, torch.arange(len(rows))]
        log_prob = -evaluate.loss(model.model, model.guide, rows) / len(rows)
    gaps = rows.isnan()
    keep = [torch.where(gaps, value, rows).double().numpy() for value in (mean, draws)]
    return Completed(*keep, log_prob, estimated=True)


IMPUTERS: dict[str, Imputer] = {
    "column mean": by_scikit_learn(lambda seed, sweeps: SimpleImputer()),
    "KNN": by_scikit_learn(lambda seed, sweeps: KNNImputer()),
    "iterative": by_scikit_learn(lambda seed, sweeps: IterativeImputer(max_iter=sweeps, random_state=seed)),
    "mixture": by_mixture,
    "MIWAE": by_miwae,
    "PPCA": by_density(n_latent=2, hidden=(), noise="isotropic", ridge=0.0),
    "FA, L=5": by_density(n_latent=5, hidden=(), ridge=0.0),
    "CPA, L=1": by_density(n_latent=1, hidden=(16,)),
    "CPA, L=2": by_density(n_latent=2, hidden=(8,)),
}
