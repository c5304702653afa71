# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Log-weights of traces: the ELBO at one particle in every variant, shapes, scales, sharing, refusals."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact_bounds import LinearGaussianPlate
from pairs import SAME_GRADIENT, VARIANTS
from plate_pairs import Pair, weights_of
from pyro import poutine
from pyro.distributions.testing.rejection_gamma import RejectionStandardGamma
from pyro.infer import RenyiELBO, Trace_ELBO
from pyro.infer.autoguide import AutoNormal

from pyro_cpa.errors import UnsupportedModel
from pyro_cpa.infer.importance_weighted import ImportanceWeightedELBO
from pyro_cpa.infer.particles import sample_log_weights


def value_and_gradient(elbo, pair: Pair, seed: int) -> tuple[float, dict[str, torch.Tensor]]:
    pyro.set_rng_seed(seed)
    loss = elbo.loss_and_grads(pair.model, pair.guide, *pair.args)
    params = {name: pyro.param(name).unconstrained() for name in pyro.get_param_store()}
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in params.items()}
    for p in params.values():
        p.grad = None
    return loss, grads


# --- K = 1 and alpha = 1: Trace_ELBO ---


@pytest.mark.parametrize("name", VARIANTS)
def test_one_particle_is_trace_elbo(name):
    pair = VARIANTS[name]()
    for seed in range(5):
        expected, expected_grads = value_and_gradient(Trace_ELBO(), pair, seed)
        for options in ({}, {"vectorize_particles": True}, {"alpha": 0.5}):
            loss, grads = value_and_gradient(ImportanceWeightedELBO(1, "score", **options), pair, seed)
            assert loss == pytest.approx(expected, rel=1e-12, abs=1e-12)
            assert len(grads) > 0
            if name in SAME_GRADIENT:
                for key, grad in grads.items():
                    torch.testing.assert_close(grad, expected_grads[key], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in VARIANTS if "subsampled" not in name])
def test_alpha_one_is_trace_elbo_with_looped_particles(name):
    """Without subsampling Trace_ELBO's particles see the same data, so that K of them agree too."""
    pair = VARIANTS[name]()
    expected, _ = value_and_gradient(Trace_ELBO(num_particles=3), pair, 0)
    loss, _ = value_and_gradient(ImportanceWeightedELBO(3, "score", alpha=1.0), pair, 0)
    assert loss == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    "name", ["plain", "subsampled", "nested, both subsampled", "two plates subsampled", "crossed"]
)
def test_alpha_one_is_trace_elbo_with_vectorised_particles(name):
    pair = VARIANTS[name]()
    options = {"vectorize_particles": True, "max_plate_nesting": 2}
    expected, grads = value_and_gradient(Trace_ELBO(num_particles=4, **options), pair, 0)
    loss, same = value_and_gradient(ImportanceWeightedELBO(4, "reparam", alpha=1.0, **options), pair, 0)
    assert loss == pytest.approx(expected, rel=1e-12)
    for key, grad in grads.items():
        torch.testing.assert_close(same[key], grad, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 2.0])
def test_renyi_elbo_where_it_is_right(alpha):
    """One plate around all sites, no subsampling, no scale: Pyro's weights are per datum too."""
    options = {"vectorize_particles": True, "max_plate_nesting": 1}
    for name in ("plain", "hierarchical", "masked"):
        pair = VARIANTS[name]()
        expected, _ = value_and_gradient(RenyiELBO(alpha=alpha, num_particles=6, **options), pair, 0)
        loss, _ = value_and_gradient(ImportanceWeightedELBO(6, "reparam", alpha, **options), pair, 0)
        assert loss == pytest.approx(expected, rel=1e-12)


# --- shapes, scales, plates ---

SHAPES = {
    "plain": ((6,), ("data",), 1.0),
    "subsampled": ((2,), ("data",), 3.0),
    "nested": ((6,), ("groups",), 1.0),
    "nested, outer subsampled": ((3,), ("groups",), 2.0),
    "two plates": ((4, 6), ("rows", "columns"), 1.0),
    "two plates subsampled": ((2, 3), ("rows", "columns"), 4.0),
    "crossed": ((), (), 1.0),
    "sequential": ((4,), ("data",), 1.0),
    "sequential ragged": ((4,), ("data",), 1.0),
    "sequential subsampled": ((2,), ("data",), 2.0),
    "sequential of vectorised": ((3, 4), ("groups", "items"), 1.0),
    "sequential of vectorised subsampled": ((2, 3), ("groups", "items"), 2.0),
    "sequential of sequential": ((6,), ("groups", "items"), 1.0),
    "two passes": ((3,), ("data",), 1.0),
    "scale": ((6,), ("data",), 10.0),
    "scale and subsampled": ((2,), ("data",), 1.5),
    "tensor scale": ((6,), ("data",), torch.linspace(0.5, 3.0, 6, dtype=torch.float64)),
    "scale of the model alone": ((6,), ("data",), 1.0),
    "annealed subsampled": ((2,), ("data",), 3.0),
    "global and local": ((), (), 1.0),
    "AutoNormal": ((5,), ("data",), 1.0),
    "AutoDiagonalNormal": ((), (), 1.0),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shape_plates_and_outside_scale(name):
    shape, plates, scale = SHAPES[name]
    weights = weights_of(VARIANTS[name](), num_particles=2)
    assert weights.log_p.shape == weights.log_q.shape == (2, *shape)
    assert weights.plates == plates
    torch.testing.assert_close(weights.scale, torch.as_tensor(scale).expand(shape))


@pytest.mark.parametrize(
    "name", ["plain", "nested", "two plates subsampled", "masked latents", "AutoNormal", "crossed"]
)
def test_vectorised_particles_have_the_looped_ones_distribution(name):
    """Same shapes, and means within 5 standard errors (the minibatch is the same: seed first, then draws)."""
    pair = VARIANTS[name]()
    with torch.no_grad():
        looped = weights_of(pair, num_particles=150, vectorize=False)
        vectorised = weights_of(pair, num_particles=3000, vectorize=True)
    axes = looped.log_p.shape[1:]
    assert looped.log_p.shape == (150, *axes) and vectorised.log_p.shape == (3000, *axes)
    error = (looped.log_w.var(0) / 150 + vectorised.log_w.var(0) / 3000).sqrt()
    assert ((looped.log_w.mean(0) - vectorised.log_w.mean(0)).abs() < 5 * error).all()


def test_guide_may_enter_plates_in_another_order_and_dims():
    x = torch.randn(3, 2)

    def model():
        with pyro.plate("a", 3, dim=-2), pyro.plate("b", 2, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide():
        with pyro.plate("b", 2, dim=-1), pyro.plate("a", 3, dim=-2):
            pyro.sample("z", dist.Normal(x, 1.0))

    weights = weights_of(Pair(model, guide), num_particles=2)
    assert weights.plates == ("a", "b") and weights.log_w.shape == (2, 3, 2)


def test_user_scale_outside_subsampling_outside_annealing_inside():
    """A common scale leaves log w alone, an annealed prior and guide change it."""
    base, scaled = weights_of(VARIANTS["plain"]()), weights_of(VARIANTS["scale"]())
    torch.testing.assert_close(base.log_w, scaled.log_w)
    annealed = weights_of(VARIANTS["annealed"]())
    torch.testing.assert_close(annealed.log_q, 0.3 * base.log_q)
    torch.testing.assert_close(annealed.scale, torch.ones(6))


def test_scale_of_the_tutorial_divides_the_loss_and_keeps_the_bound_tight():
    pair = LinearGaussianPlate(torch.randn(20, 3))
    elbo = ImportanceWeightedELBO(200, vectorize_particles=True)
    with torch.no_grad():
        pyro.set_rng_seed(1)
        loss = elbo.loss(pair.model, lambda: pair.guide(off=0.3, widen=1.5))
        for scale in (1 / 20, 1e-6, 30.0):
            pyro.set_rng_seed(1)
            scaled = elbo.loss(
                poutine.scale(pair.model, scale), poutine.scale(lambda: pair.guide(off=0.3, widen=1.5), scale)
            )
            assert scaled == pytest.approx(scale * loss, rel=1e-10)
    assert loss == pytest.approx(-pair.log_evidence().sum().item(), rel=0.01)


# --- the exact evidence, reached from below ---


@pytest.mark.parametrize("B", [1, 10, 50, 100])
@pytest.mark.parametrize("vectorize", [False, True])
def test_linear_gaussian_evidence_from_below(B, vectorize):
    pair = LinearGaussianPlate(torch.randn(100, 2))
    index = torch.randperm(100)[:B]
    exact = pair.log_evidence()[index]
    reps = 30 if vectorize else 4
    means, errors = {}, {}
    for K in (1, 10, 100) if vectorize else (1, 10):
        options = {"num_particles": K, "vectorize": vectorize, "max_plate_nesting": 1}
        with torch.no_grad():
            runs = [
                sample_log_weights(
                    pair.model, lambda i: pair.guide(i, off=0.4, widen=1.3), (index,), **options
                )
                for _ in range(reps)
            ]
        assert runs[0].log_w.shape == (K, B)
        torch.testing.assert_close(runs[0].scale, torch.full((B,), 100.0 / B))
        bounds = torch.stack([torch.logsumexp(r.log_w, 0) - math.log(K) for r in runs])
        means[K] = (100 / B) * bounds.sum(-1).mean().item()
        errors[K] = (100 / B) * bounds.sum(-1).std().item() / math.sqrt(reps)
    truth = (100 / B) * exact.sum().item()
    assert all(means[K] < truth + 5 * errors[K] for K in means)
    assert means[10] > means[1]
    gap = (100 / B) * B * 0.3  # the ELBO's gap is KL(q || posterior) = 0.3 nats or so per datum
    if vectorize:
        assert truth - means[100] < 0.05 * gap + 5 * errors[100]
        assert truth - means[1] > 0.5 * gap - 5 * errors[1]


def test_renyi_elbo_passes_the_evidence_that_ours_respects():
    """With a minibatch, Pyro raises the weights to the power N / B."""
    pair = LinearGaussianPlate(torch.randn(100, 2))
    index = torch.arange(10)
    truth = 10 * pair.log_evidence()[index].sum().item()
    options = {"num_particles": 300, "vectorize_particles": True, "max_plate_nesting": 1}
    guide = lambda i: pair.guide(i, off=0.4, widen=1.3)  # noqa: E731
    theirs = -RenyiELBO(alpha=0.0, **options).loss(pair.model, guide, index)
    ours = -ImportanceWeightedELBO(**options).loss(pair.model, guide, index)
    assert theirs > truth + 20
    assert abs(ours - truth) < 5


@pytest.mark.parametrize("alpha", [-1.0, 0.0, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("estimator", ["reparam", "stl", "dreg", "vimco", "score", "auto"])
def test_exact_posterior_has_no_variance(alpha, estimator):
    pair = LinearGaussianPlate(torch.randn(30, 3))
    index = torch.tensor([3, 7, 20])
    exact = -10 * pair.log_evidence()[index].sum().item()
    elbo = ImportanceWeightedELBO(5, estimator, alpha, vectorize_particles=True)
    for seed in range(3):
        loss, grads = value_and_gradient(elbo, Pair(pair.model, pair.guide, (index,)), seed)
        assert loss == pytest.approx(exact, rel=1e-10)
        if estimator in ("stl", "dreg", "auto"):
            assert max(g.abs().max().item() for g in grads.values()) < 1e-8


# --- refusals ---


def simple_model():
    with pyro.plate("data", 3):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.zeros(3))


def guide_without_z():
    pass


def guide_with_extra():
    with pyro.plate("data", 3):
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("u", dist.Normal(0.0, 1.0))


def guide_enumerated():
    with pyro.plate("data", 3):
        pyro.sample("z", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})


def guide_rejection():
    with pyro.plate("data", 3):
        pyro.sample("z", RejectionStandardGamma(torch.tensor(2.0)))


REFUSALS = [
    (guide_without_z, {}, r"model latent 'z' is missing from the guide.*add pyro.sample\('z'"),
    (guide_with_extra, {}, r"guide site 'u' does not exist in the model"),
    (guide_enumerated, {}, r"guide site 'z' is marked for enumeration.*TraceEnum_ELBO"),
    (simple_model, {}, r"site 'x' is observed in the guide"),
    (guide_rejection, {}, r"guide site 'z' is sampled by rejection"),
    (AutoNormal, {"plates": ("data", "batch")}, r"no plate \['batch'\].*name some of \['data'\]"),
]


@pytest.mark.parametrize("guide, options, message", REFUSALS)
def test_refusals_name_the_site_and_the_cure(guide, options, message):
    guide = guide(simple_model) if guide is AutoNormal else guide
    with pytest.raises(UnsupportedModel, match=message):
        sample_log_weights(simple_model, guide, num_particles=2, **options)


def test_enumerated_model_latent_is_refused():
    def model():
        pyro.sample("z", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})

    with pytest.raises(UnsupportedModel, match=r"'z' is missing.*TraceEnum_ELBO"):
        sample_log_weights(model, lambda: None)


@pytest.mark.parametrize(
    "name", ["nested, both subsampled", "crossed subsampled", "global and local subsampled"]
)
def test_subsampled_plate_inside_the_weight_is_refused(name):
    with pytest.raises(
        UnsupportedModel, match=r"is subsampled \(\d of \d\) but lies inside.*at site '\w+'.*plates="
    ):
        weights_of(VARIANTS[name](), num_particles=2)


def test_not_a_guide():
    for guide in (None, 3, torch.ones(2)):
        with pytest.raises(UnsupportedModel, match="the guide is .* must be callable"):
            sample_log_weights(simple_model, guide)
