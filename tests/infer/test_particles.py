# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Drawing particles: one minibatch, one draw of outer latents, sites that differ between particles."""

from __future__ import annotations

import math

import pairs
import plate_pairs
import pyro
import pyro.distributions as dist
import pytest
import torch
from exact_bounds import LinearGaussianPlate
from plate_pairs import Pair, weights_of
from pyro import poutine

from pyro_cpa.errors import UnsupportedModel
from pyro_cpa.infer.draws import Draws
from pyro_cpa.infer.importance_weighted import ImportanceWeightedELBO
from pyro_cpa.infer.particles import sample_log_weights


def test_looped_particles_share_one_minibatch():
    pair = LinearGaussianPlate(torch.randn(100, 2))

    def model():
        with pyro.plate("data", 100, subsample_size=5, dim=-1) as i:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            mean = z[..., None].expand(*z.shape, 2)
            pyro.sample("x", dist.Normal(mean, pair.noise).to_event(1), obs=pair.data[i])
            seen.append(i)

    def guide(knows_plate=True):
        with pyro.plate("data", 100, subsample_size=5, dim=-1) as i:
            mean = pair.data[i].sum(-1) / pair.noise**2 / pair.precision
            pyro.sample("z", dist.Normal(mean, pair.precision**-0.5))
            seen.append(i)

    for draws in Draws:
        seen: list[torch.Tensor] = []
        weights = weights_of(Pair(model, guide), num_particles=4, draws=draws)
        assert all(torch.equal(i, seen[0]) for i in seen)
        exact = pair.log_evidence()[seen[0]].expand(4, 5)
        torch.testing.assert_close(weights.log_w, exact, rtol=1e-10, atol=1e-10)


def test_minibatch_that_only_the_model_draws_is_shared():
    seen = []

    def model():
        with pyro.plate("data", 50, subsample_size=3) as i:
            seen.append(i)
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=i.to(torch.get_default_dtype()))

    weights = sample_log_weights(model, lambda: None, num_particles=3)
    assert all(torch.equal(i, seen[0]) for i in seen) and len(seen) == 3
    assert weights.log_w.shape == (3, 3) and torch.equal(weights.log_w[0], weights.log_w[2])


# --- outer latents ---


@pytest.mark.parametrize("vectorize", [False, True])
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_outer_latents_are_drawn_once(vectorize, chunk_size):
    drawn = []
    base = pairs.global_and_local(2)

    def model():
        base.model()

    def guide():
        with poutine.trace() as tr:
            base.guide()
        drawn.append(tr.trace.nodes["g"]["value"])

    options = {"num_particles": 5, "vectorize": vectorize, "chunk_size": chunk_size, "plates": ("data",)}
    weights = weights_of(Pair(model, guide), max_plate_nesting=1, **options)
    assert all(torch.equal(g, drawn[0]) and g.shape == () for g in drawn)
    assert weights.log_w.shape == (5, 2) and weights.plates == ("data",)
    torch.testing.assert_close(weights.scale, torch.full((2,), 3.0))
    expected = dist.Normal(0.0, 1.0).log_prob(drawn[0]) - dist.Normal(0.3, 0.8).log_prob(drawn[0])
    torch.testing.assert_close(weights.outer, expected)


def test_named_plates_tighten_and_stay_below():
    """E[outer + sum of per-datum bounds] <= log p(x): closed form of a global and local Gaussian."""
    pair = pairs.global_and_local()
    pyro.param("width", torch.tensor(1.5))
    covariance = torch.ones(6, 6) + (1.0 + 1.1**2) * torch.eye(6)
    exact = dist.MultivariateNormal(torch.zeros(6), covariance).log_prob(plate_pairs.data(6)).item()

    def bound(**options):
        elbo = ImportanceWeightedELBO(20, vectorize_particles=True, max_plate_nesting=1, **options)
        values = torch.tensor([-elbo.loss(pair.model, pair.guide) for _ in range(300)])
        return values.mean().item(), values.std().item() / math.sqrt(300)

    (shared, shared_error), (elbo, elbo_error) = bound(plates=("data",)), bound(alpha=1.0)
    assert elbo + 5 * elbo_error < shared - 5 * shared_error
    assert shared < exact + 5 * shared_error


def test_outer_site_that_depends_on_particles_is_refused():
    def model():
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.ones(4))
        pyro.sample("total", dist.Normal(z.sum(-1, keepdim=z.dim() > 1), 1.0), obs=torch.tensor(1.0))

    def guide():
        with pyro.plate("data", 4):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    for vectorize in (False, True):
        options = {"num_particles": 3, "vectorize": vectorize}
        assert weights_of(Pair(model, guide), **options).log_w.shape == (3,)
        with pytest.raises(UnsupportedModel, match="cannot be shared by the particles"):
            weights_of(Pair(model, guide), plates=("data",), **options)


# --- dynamic structure ---


def test_particles_may_differ_in_their_sites():
    """Log-weights of a branching pair have mean weight p(x), enumerated over its two branches."""

    def model():
        with pyro.plate("one", 1):
            if pyro.sample("long", dist.Bernoulli(0.3)).item():
                z = pyro.sample("z", dist.Normal(2.0, 1.0))
            else:
                z = torch.zeros(1)
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor([1.0]))

    def guide():
        with pyro.plate("one", 1):
            if pyro.sample("long", dist.Bernoulli(0.5)).item():
                pyro.sample("z", dist.Normal(1.5, 0.9))

    weights = weights_of(Pair(model, guide), num_particles=800)
    x = torch.tensor(1.0)
    exact = 0.7 * dist.Normal(0.0, 1.0).log_prob(x).exp() + 0.3 * dist.Normal(2.0, 2**0.5).log_prob(x).exp()
    w = weights.log_w.exp()[:, 0]
    assert abs(w.mean() - exact) < 5 * w.std() / math.sqrt(800)


def test_particles_that_differ_in_their_plates_are_refused():
    calls = []

    def model():
        calls.append(1)
        with pyro.plate("data", 3 if len(calls) % 2 else 4) as i:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.zeros(len(i)))

    def guide():
        with pyro.plate("data", 4 if len(calls) % 2 else 3):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(UnsupportedModel, match=r"shape \(3,\) in one.*shape \(4,\) in another"):
        weights_of(Pair(model, guide), num_particles=2)

    def switching():
        calls.append(1)
        with pyro.plate("a" if len(calls) % 2 else "b", 3):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.zeros(3))

    with pytest.raises(UnsupportedModel, match="structure differs between particles"):
        weights_of(Pair(switching, lambda: None), num_particles=2)
