# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Short runs on scikit-learn's digits: the evidence rises under every objective that applies."""

import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO
from pyro.optim import Adam

from pyro_cpa.datasets import binarize, load_digits, row_sequences
from pyro_cpa.infer import TVO, AnalyticELBO, BiHelmholtzELBO, ImportanceWeightedELBO, ReweightedWakeSleepELBO
from pyro_cpa.models import (
    VAE,
    Bernoulli,
    ConditionalVAE,
    ContinuousBernoulli,
    GaussianMixtureVAE,
    Normal,
    VariationalRNN,
)

ROWS, STEPS = 40, 25
VECTORISED = {"vectorize_particles": True, "max_plate_nesting": 1}
OBJECTIVES = {
    "sampled": lambda: Trace_ELBO(),
    "analytic": lambda: AnalyticELBO(),
    "enumerated": lambda: TraceEnum_ELBO(max_plate_nesting=1),
    "importance": lambda: ImportanceWeightedELBO(num_particles=5, **VECTORISED),
    "tvo": lambda: TVO(num_particles=5, **VECTORISED),
    "wake": lambda: ReweightedWakeSleepELBO(num_particles=5, **VECTORISED),
    "wake-sleep": lambda: ReweightedWakeSleepELBO(num_particles=5, insomnia=0.5, **VECTORISED),
    "helmholtz": lambda: BiHelmholtzELBO(num_particles=5, **VECTORISED),
}
BINARY = ["sampled", "analytic", "importance", "tvo", "wake", "wake-sleep", "helmholtz"]
CONTINUOUS = ["sampled", "analytic", "importance"]  # densities of 64 pixels: heavy-tailed weights
SEQUENCE = ["sampled", "analytic", "importance", "tvo", "wake"]
DISCRETE = ["sampled", "importance", "tvo", "wake", "wake-sleep", "helmholtz"]
CASES = [
    *(("vae", name) for name in BINARY),
    *(("vae-normal", name) for name in CONTINUOUS),
    *(("vae-continuous", name) for name in CONTINUOUS),
    *(("cvae", name) for name in BINARY),
    *(("gmvae-enumerate", name) for name in ("analytic", "enumerated")),
    *(("gmvae-sample", name) for name in DISCRETE),
    *(("gmvae-relax", name) for name in ("sampled", "analytic", "importance")),
    *(("vrnn-filtering", name) for name in SEQUENCE),
    *(("vrnn-smoothing", name) for name in ("analytic",)),
]


def build(name):
    """A small model of the kind, and the digits as it takes them."""
    digits = load_digits()
    grey, y = digits.x_train[:ROWS], digits.y_train[:ROWS]
    x = binarize(grey)
    kind, _, variant = name.partition("-")
    small = {"hidden_dims": (16,), "dropout": 0.0}
    if kind == "vae" and variant:
        likelihood = Normal(0.5) if variant == "normal" else ContinuousBernoulli()
        return VAE(64, 2, likelihood=likelihood, **small), (grey,)
    if kind == "vae":
        return VAE(64, 2, likelihood=Bernoulli(), **small), (x,)
    if kind == "cvae":
        return ConditionalVAE(64, 10, 2, likelihood=Bernoulli(), **small), (x, y)
    if kind == "gmvae":
        return GaussianMixtureVAE(64, 3, 2, clusters=variant, **small), (x,)
    return VariationalRNN(8, 2, inference=variant, rnn_dim=8, rnn_layers=1, **small), (
        row_sequences(x, (8, 8)),
    )


def evidence(model, args):
    """Mean log p(x), whatever the objective in training."""
    return model.log_evidence(*args, num_particles=50).log_prob.mean()


@pytest.mark.parametrize("name, objective", CASES)
def test_evidence_rises(name, objective):
    model, args = build(name)
    before = evidence(model, args)
    svi = SVI(model.model, model.guide, Adam({"lr": 0.02}), OBJECTIVES[objective]())
    for _ in range(STEPS):
        assert isinstance(svi.step(*args), float)
    assert evidence(model, args) > before + 1.0


@pytest.mark.parametrize("name", ["vae", "cvae", "gmvae-sample", "vrnn-filtering"])
def test_bounds_are_ordered(name):
    """ELBO <= IWAE_5 <= IWAE_50 in expectation."""
    model, args = build(name)
    values, errors = [], []
    for particles in (1, 5, 50):
        elbo = ImportanceWeightedELBO(num_particles=particles, **VECTORISED)
        with torch.no_grad():
            draws = torch.tensor([-elbo.loss(model.model, model.guide, *args) for _ in range(12)])
        values.append(draws.mean())
        errors.append(draws.std() / 12**0.5)
    for i in (0, 1):
        assert values[i] < values[i + 1] + 5 * (errors[i] ** 2 + errors[i + 1] ** 2).sqrt()
