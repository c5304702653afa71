# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Models and guides of the kinds in the host's own tests: valid pairs, and pairs that must be refused."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch.distributions import constraints


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
