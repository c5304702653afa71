# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""The host's own kinds of tests with our objectives: valid models, gradients on a grid, conjugate fits."""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
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


def p() -> torch.Tensor:
    return pyro.param("p", torch.tensor(0.5), constraint=constraints.unit_interval)


def nothing() -> None:
    pass


# --- valid models ---


def one_latent():
    pyro.sample("x", dist.Bernoulli(p()))


def two_latents():
    pyro.sample("x", dist.Bernoulli(p()))
    pyro.sample("y", dist.Bernoulli(p()))


def same_name_twice():
    pyro.sample("x", dist.Bernoulli(p()))
    pyro.sample("x", dist.Bernoulli(p()))


def vector_latent(size):
    def fn():
        pyro.sample("x", dist.Bernoulli(p()).expand([size]).to_event(1))

    return fn


def unplated_batch():
    pyro.sample("x", dist.Bernoulli(p()).expand([3]))


def latent_that_is_a_parameter():
    pyro.param("x", torch.tensor(0.5))


def looped(size, subsample_size=None, sites="x"):
    def fn():
        for i in pyro.plate("loop", size, subsample_size):
            pyro.sample(f"{sites}{i}", dist.Bernoulli(p()))

    return fn


def plated(size, subsample_size=None):
    def fn():
        with pyro.plate("plate", size, subsample_size) as index:
            pyro.sample("x", dist.Bernoulli(p()).expand([len(index)]))

    return fn


def broadcast(size, subsample_size=None):
    def fn():
        with pyro.plate("plate", size, subsample_size):
            pyro.sample("x", dist.Bernoulli(p()))

    return fn


def plate_of_the_wrong_size():
    with pyro.plate("plate", 10, 5) as index:
        pyro.sample("x", dist.Bernoulli(p()).expand([1 + len(index)]))


def two_loops():
    for i in pyro.plate("outer", 2):
        for j in pyro.plate(f"inner_{i}", 2):
            pyro.sample(f"x{i}{j}", dist.Bernoulli(p()))


def loop_in_plate():
    with pyro.plate("outer", 3):
        for i in pyro.plate("inner", 2):
            pyro.sample(f"x{i}", dist.Bernoulli(p()))


def plate_in_loop():
    inner = pyro.plate("inner", 3)
    for i in pyro.plate("outer", 2):
        with inner:
            pyro.sample(f"x{i}", dist.Bernoulli(p()))


def plate_entered_twice():
    plate = pyro.plate("plate", 4, 2)
    with plate:
        pyro.sample("x", dist.Bernoulli(p()))
    with plate:
        pyro.sample("y", dist.Bernoulli(p()))


def nested_plates():
    with pyro.plate("outer", 4, 3, dim=-1):
        pyro.sample("x", dist.Bernoulli(p()))
        with pyro.plate("inner", 5, 2, dim=-2):
            pyro.sample("y", dist.Bernoulli(p()))


def siblings():
    with pyro.plate("a", 2, dim=-1):
        pyro.sample("x", dist.Bernoulli(p()))
    with pyro.plate("b", 3, dim=-1):
        pyro.sample("y", dist.Bernoulli(p()))


def two_plates_on_one_dim():
    with pyro.plate("a", 2, dim=-1), pyro.plate("b", 2, dim=-1):
        pyro.sample("x", dist.Bernoulli(p()))


def latent_inside_and_outside():
    with pyro.plate("plate", 3):
        pyro.sample("x", dist.Bernoulli(p()))
    pyro.sample("y", dist.Bernoulli(p()))


def mixture():
    x = torch.tensor([-1.0, 0.5, 3.0])
    with pyro.plate("data", 3):
        z = pyro.sample("x", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))
        pyro.sample("obs", dist.Normal(torch.tensor([-1.0, 0.0, 2.0])[z], p()), obs=x)


def mixture_guide():
    logits = pyro.param("logits", torch.zeros(3, 3))
    with pyro.plate("data", 3):
        pyro.sample("x", dist.Categorical(logits=logits))


def chain():
    x = pyro.sample("x0", dist.Bernoulli(p()))
    for t in range(1, 4):
        x = pyro.sample(f"x{t}", dist.Bernoulli(torch.where(x > 0, p(), 0.3)))


def independent_chain():
    for t in range(4):
        pyro.sample(f"x{t}", dist.Bernoulli(p()))


def stop_at_heads(prob):
    def fn():
        t = 0
        while not pyro.sample(f"x{t}", dist.Bernoulli(prob())).item():
            t += 1

    return fn


def half() -> torch.Tensor:
    return torch.tensor(0.5)


def matrix_normal():
    with pyro.plate("rows", 2):
        x = pyro.sample("x", dist.MultivariateNormal(torch.zeros(3), torch.eye(3)))
        pyro.sample("obs", dist.Normal(x, 1.0).to_event(1), obs=torch.ones(2, 3))


def matrix_guide():
    scale = pyro.param("scale_tril", torch.eye(3), constraint=constraints.lower_cholesky)
    with pyro.plate("rows", 2):
        pyro.sample("x", dist.MultivariateNormal(torch.zeros(3), scale_tril=scale))


def discrete_and_continuous():
    with pyro.plate("data", 3):
        k = pyro.sample("k", dist.Poisson(3.0))
        pyro.sample("w", dist.Dirichlet(torch.ones(4)))
        pyro.sample("obs", dist.Normal(k, 1.0), obs=torch.arange(3.0))


def discrete_and_continuous_guide():
    with pyro.plate("data", 3):
        pyro.sample("k", dist.Poisson(1.0 + 3.0 * p()))
        pyro.sample("w", dist.Dirichlet(torch.ones(4) + p()))


def masked_sites():
    mask = torch.tensor([True, False, True])
    with pyro.plate("data", 3):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        with poutine.mask(mask=mask):
            pyro.sample("a", dist.Normal(x, 1.0), obs=torch.ones(3))
        pyro.sample("b", dist.Normal(x, p()).mask(~mask), obs=torch.ones(3))
        pyro.sample("c", dist.Normal(x, 1.0), obs=torch.ones(3), obs_mask=mask)


def masked_guide():
    with pyro.plate("data", 3):
        x = pyro.sample("x", dist.Normal(p(), 1.0))
        pyro.sample("c_unobserved", dist.Normal(x, 1.0).mask(torch.tensor([False, True, False])))


def factors():
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.factor("model_factor", -(x**2))
    pyro.deterministic("square", x**2)


def factor_guide(has_rsample):
    def fn():
        x = pyro.sample("x", dist.Normal(p(), 1.0))
        pyro.factor("guide_factor", -0.1 * x.abs(), has_rsample=has_rsample)

    return fn


def transformed():
    pyro.sample("x", dist.TransformedDistribution(dist.Normal(0.0, p()), [dist.transforms.ExpTransform()]))


def auxiliary_guide():
    u = pyro.sample("u", dist.Normal(p(), 1.0), infer={"is_auxiliary": True})
    pyro.sample("x", dist.Delta(u.exp(), log_density=-u))


def conditioned():
    poutine.condition(two_latents, data={"y": torch.tensor(1.0)})()


def subsampled_parameter():
    data = torch.arange(6.0)
    with pyro.plate("data", 6, 2) as i:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("obs", dist.Normal(x, 1.0), obs=data[i])


def subsampled_parameter_guide():
    with pyro.plate("data", 6, 2):
        loc = pyro.param("locs", torch.linspace(-1.0, 1.0, 6), event_dim=0)
        pyro.sample("x", dist.Normal(loc, p()))


def scaled_vector_guide():
    with poutine.scale(scale=0.1):
        broadcast(3)()


VALID: dict[str, tuple[Callable[[], None], Callable[[], None]]] = {
    "nothing": (nothing, nothing),
    "one latent": (one_latent, one_latent),
    "two latents": (two_latents, two_latents),
    "vector": (vector_latent(4), vector_latent(4)),
    "loop": (looped(4), looped(4)),
    "loop subsampled": (looped(4, 2), looped(4, 2)),
    "plate": (plated(10), plated(10)),
    "plate subsampled": (plated(10, 5), plated(10, 5)),
    "broadcast": (broadcast(10), broadcast(10)),
    "broadcast subsampled": (broadcast(10, 5), plated(10, 5)),
    "two loops": (two_loops, two_loops),
    "loop in plate": (loop_in_plate, loop_in_plate),
    "plate in loop": (plate_in_loop, plate_in_loop),
    "plate twice": (plate_entered_twice, plate_entered_twice),
    "nested plates": (nested_plates, nested_plates),
    "sibling plates": (siblings, siblings),
    "inside and outside": (latent_inside_and_outside, latent_inside_and_outside),
    "mixture": (mixture, mixture_guide),
    "chain, chain": (chain, chain),
    "chain, independent": (chain, independent_chain),
    "recursive": (stop_at_heads(half), stop_at_heads(p)),
    "multivariate": (matrix_normal, matrix_guide),
    "poisson, dirichlet": (discrete_and_continuous, discrete_and_continuous_guide),
    "masks": (masked_sites, masked_guide),
    "factor": (factors, factor_guide(True)),
    "factor, score": (factors, factor_guide(False)),
    "transformed": (transformed, transformed),
    "auxiliary": (transformed, auxiliary_guide),
    "conditioned": (conditioned, one_latent),
    "subsampled parameter": (subsampled_parameter, subsampled_parameter_guide),
    "scaled guide": (broadcast(3), scaled_vector_guide),
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


INVALID: dict[str, tuple[Callable[[], None], Callable[[], None]]] = {
    "empty guide": (one_latent, nothing),
    "guide with another latent": (one_latent, two_latents),
    "same name twice": (same_name_twice, one_latent),
    "parameter of the latent's name": (one_latent, latent_that_is_a_parameter),
    "vectors of other sizes": (vector_latent(4), vector_latent(3)),
    "batch outside a plate": (unplated_batch, unplated_batch),
    "batch of another size": (plated(4), broadcast(3)),
    "plate of another size": (plate_of_the_wrong_size, plate_of_the_wrong_size),
    "other minibatch size": (plated(10, 5), plated(10, 4)),
    "loop against plate": (looped(4), plated(4)),
    "other sites": (looped(3, sites="x"), looped(3, sites="y")),
    "plates on one dim": (two_plates_on_one_dim, two_plates_on_one_dim),
    "not a guide": (mixture, mixture),
}


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
