# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""The host's own kinds of tests with our objectives: valid models, gradients on a grid, conjugate fits."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from host_models import INVALID, VALID
from pyro import poutine
from pyro.distributions.testing.fakes import NonreparameterizedNormal
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoGuideList, AutoMultivariateNormal, AutoNormal
from torch.distributions import constraints

from pyro_cpa.errors import UnsupportedModel
from pyro_cpa.infer.helmholtz import BiHelmholtzELBO
from pyro_cpa.infer.importance_weighted import ImportanceWeightedELBO
from pyro_cpa.infer.thermodynamic import TVO
from pyro_cpa.infer.wake_sleep import ReweightedWakeSleepELBO

OBJECTIVES = {
    "score": lambda **options: ImportanceWeightedELBO(1, "score", **options),
    "auto": lambda **options: ImportanceWeightedELBO(1, **options),
    "alpha 1/2": lambda **options: ImportanceWeightedELBO(1, "score", alpha=0.5, **options),
}
MANY = {
    "IWAE": ImportanceWeightedELBO,
    "RWS": ReweightedWakeSleepELBO,
    "TVO": TVO,
    "BiHM": BiHelmholtzELBO,
}


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", VALID)
def test_valid_models_have_trace_elbos_value(name, objective):
    model, guide = VALID[name]
    elbo = OBJECTIVES[objective]()
    for seed in range(3):
        pyro.set_rng_seed(seed)
        expected = Trace_ELBO().loss(model, guide)
        values = []
        for method in (elbo.loss, elbo.loss_and_grads, elbo.differentiable_loss):
            pyro.set_rng_seed(seed)
            value = method(model, guide)
            values.append(value.item() if isinstance(value, torch.Tensor) else value)
        assert values == pytest.approx([expected] * 3, rel=1e-12, abs=1e-12)


# Sites whose distributions do not broadcast over particles.
LOOPED_ONLY = ("recursive", "chain, chain", "mixture", "loop in plate")


@pytest.mark.parametrize("objective", MANY)
@pytest.mark.parametrize("name", [name for name in VALID if name != "nothing"])
def test_valid_models_train_with_three_particles(name, objective):
    model, guide = VALID[name]
    elbo = MANY[objective](num_particles=3, vectorize_particles=name not in LOOPED_ONLY)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), elbo)
    if name == "nested plates":  # a minibatch of items inside the weight of a group
        with pytest.raises(UnsupportedModel, match="subsampled"):
            svi.step()
        return
    for _ in range(2):
        assert math.isfinite(svi.step())


@pytest.mark.parametrize("vectorize", [False, True])
@pytest.mark.parametrize("name", INVALID)
def test_invalid_models_raise(name, vectorize):
    model, guide = INVALID[name]
    for method in ("loss", "loss_and_grads", "differentiable_loss"):
        elbo = ImportanceWeightedELBO(2, vectorize_particles=vectorize)
        with pytest.raises((ValueError, RuntimeError)):  # ours are ValueErrors, Pyro's own are either
            getattr(elbo, method)(model, guide)


# --- gradients on a grid of scale, subsampling and reparameterisation ---

DATA = torch.tensor([-0.5, 2.0, 1.0, -1.0])


def normal_model(Normal, subsample_size):
    with pyro.plate("data", 4, subsample_size) as i:
        z = pyro.sample("z", Normal(0.0, 1.0))
        pyro.sample("x", Normal(z, 1.0), obs=DATA[i])


def normal_guide(Normal, subsample_size):
    scale = pyro.param("scale", torch.tensor(1.3))
    with pyro.plate("data", 4, subsample_size):
        loc = pyro.param("loc", torch.tensor([0.1, -0.2, 0.3, 0.0]), event_dim=0)
        pyro.sample("z", Normal(loc, scale))


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("subsample_size", [None, 2])
@pytest.mark.parametrize("Normal", [dist.Normal, NonreparameterizedNormal])
@pytest.mark.parametrize("estimator", ["auto", "score", "vimco"])
def test_gradient_grid(estimator, Normal, subsample_size, scale):
    """ELBO of normals: E loss = scale sum_n ((loc^2 + (loc - x)^2) / 2 + s^2 - log s) + const."""
    elbo = ImportanceWeightedELBO(1 if estimator == "score" else 400, estimator, alpha=1.0)
    elbo.vectorize_particles = elbo.num_particles > 1
    model, guide = poutine.scale(normal_model, scale), poutine.scale(normal_guide, scale)
    grads = []
    for _ in range(200 if estimator == "score" else 20):
        elbo.loss_and_grads(model, guide, Normal, subsample_size)
        params = [pyro.param("loc"), pyro.param("scale")]
        grads.append(torch.cat([q.grad.reshape(-1) for q in params]))
        for q in params:
            q.grad = None
    grads = torch.stack(grads)
    loc, s = pyro.param("loc").detach(), pyro.param("scale").detach()
    exact = scale * torch.cat([2 * loc - DATA, (4 * (2 * s - 1 / s)).reshape(1)])
    assert ((grads.mean(0) - exact).abs() < 5 * grads.std(0) / math.sqrt(len(grads))).all()


# --- conjugate posteriors by SVI ---


def normal_normal():
    x = torch.tensor([0.3, 1.1, 0.8])
    mean = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 3):
        pyro.sample("x", dist.Normal(mean, 1.0), obs=x)


def normal_guide_global():
    loc = pyro.param("a", torch.tensor(0.0))
    scale = pyro.param("b", torch.tensor(0.8), constraint=constraints.positive)
    pyro.sample("z", dist.Normal(loc, scale))


def beta_bernoulli():
    rate = pyro.sample("z", dist.Beta(1.2, 1.5))
    with pyro.plate("data", 5):
        pyro.sample("x", dist.Bernoulli(rate), obs=torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0]))


def beta_guide():
    a, b = (pyro.param(n, torch.tensor(2.0), constraint=constraints.positive) for n in "ab")
    pyro.sample("z", dist.Beta(a, b))


def gamma_poisson():
    rate = pyro.sample("z", dist.Gamma(2.0, 1.0))
    with pyro.plate("data", 3):
        pyro.sample("x", dist.Poisson(rate), obs=torch.tensor([2.0, 3.0, 1.0]))


def gamma_guide():
    a, b = (
        pyro.param(n, torch.tensor(v), constraint=constraints.positive) for n, v in (("a", 5.0), ("b", 2.5))
    )
    pyro.sample("z", dist.Gamma(a, b))


CONJUGATE = {
    "normal": (normal_normal, normal_guide_global, (2.2 / 4.0, 0.5)),
    "beta": (beta_bernoulli, beta_guide, (5.2, 2.5)),
    "gamma": (gamma_poisson, gamma_guide, (8.0, 4.0)),
}


@pytest.mark.parametrize("K", [1, 8])
@pytest.mark.parametrize("name", CONJUGATE)
def test_conjugate_posterior_is_found(name, K):
    model, guide, (a, b) = CONJUGATE[name]
    elbo = ImportanceWeightedELBO(K, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.1, "lrd": 0.99}), elbo)
    for _ in range(400):
        svi.step()
    assert elbo.estimator_used == "dreg"
    assert pyro.param("a").item() == pytest.approx(a, rel=0.05)
    assert pyro.param("b").item() == pytest.approx(b, rel=0.05)


def test_autoguides_train():
    def model():
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Normal(mean, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=DATA)

    def mixed_list(model):
        guides = AutoGuideList(model)
        guides.append(AutoDelta(poutine.block(model, expose=["mean"])))
        guides.append(AutoNormal(poutine.block(model, expose=["z"])))
        return guides

    for kind in (AutoNormal, AutoDelta, AutoMultivariateNormal, mixed_list):
        pyro.clear_param_store()
        guide = kind(model)
        elbo = ImportanceWeightedELBO(4, vectorize_particles=True)
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), elbo)
        losses = [svi.step() for _ in range(60)]
        assert sum(losses[-20:]) < sum(losses[:20])
