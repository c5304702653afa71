# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""The importance-weighted objective: estimators against exact gradients, the host's contracts, chunks."""

from __future__ import annotations

import itertools
import logging
import math
from functools import partial

import pairs
import pyro
import pyro.distributions as dist
import pytest
import torch
from exact_bounds import TwoLatents
from pairs import VARIANTS
from pyro.infer import SVI, RenyiELBO, Trace_ELBO
from pyro.infer.autoguide import AutoNormal, AutoNormalMessenger

from pyro_cpa.errors import InvalidData, UnsupportedModel
from pyro_cpa.infer.importance_weighted import ImportanceWeightedELBO, leave_one_out, renyi_bound
from pyro_cpa.infer.log_weights import LogWeights

ESTIMATORS = ["reparam", "stl", "dreg", "vimco", "score", "auto"]


def gradient_of(elbo, pair: TwoLatents) -> torch.Tensor:
    """(6,) gradient of the bound per copy of the datum."""
    return pair.gradient(-elbo.differentiable_loss(pair.model, pair.guide)) / pair.copies


def assert_unbiased(elbo, pair: TwoLatents, exact: torch.Tensor, batches: int = 30) -> None:
    """The mean over batches of independent copies lies within 5 of its standard errors."""
    grads = torch.stack([gradient_of(elbo, pair) for _ in range(batches)])
    error = grads.std(0) / math.sqrt(batches)
    assert ((grads.mean(0) - exact).abs() <= 5 * error + 1e-12).all(), (grads.mean(0), exact, error)


# --- gradients ---


@pytest.mark.parametrize("alpha", [0.0, 0.5])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "second, estimator",
    [
        ("normal", "reparam"),
        ("normal", "dreg"),
        ("normal", "score"),
        ("bernoulli", "vimco"),
        ("bernoulli", "score"),
        ("bernoulli", "auto"),
    ],
)
def test_gradient_of_two_particles_is_unbiased(second, estimator, masked, alpha):
    """Hierarchical normal pair by quadrature; normal and Bernoulli by quadrature and enumeration."""
    pair = TwoLatents(second, masked, copies=2000)
    exact = pair.gradient(pair.expected(lambda log_p, log_q: renyi_bound(log_p - log_q, alpha), K=2))
    elbo = ImportanceWeightedELBO(2, estimator, alpha, vectorize_particles=True, max_plate_nesting=1)
    assert_unbiased(elbo, pair, exact)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradient_of_the_elbo_is_unbiased(estimator):
    """alpha = 1 with K = 2, where sticking the landing is unbiased too."""
    pair = TwoLatents("normal", copies=2000)
    exact = pair.gradient(pair.expected(lambda log_p, log_q: (log_p - log_q).mean(0), K=1, nodes=32))
    assert_unbiased(
        ImportanceWeightedELBO(2, estimator, 1.0, vectorize_particles=True, max_plate_nesting=1), pair, exact
    )


def test_stl_is_biased_beyond_one_particle_and_right_at_one():
    pair = TwoLatents("normal", copies=2000)
    exact = pair.gradient(pair.expected(lambda log_p, log_q: renyi_bound(log_p - log_q, 0.0), K=2))
    elbo = ImportanceWeightedELBO(2, "stl", vectorize_particles=True, max_plate_nesting=1)
    grads = torch.stack([gradient_of(elbo, pair) for _ in range(30)])
    error = grads.std(0) / math.sqrt(30)
    off = (grads.mean(0) - exact).abs() / error
    assert (off[:2] < 5).all()  # the model's parameters
    assert off[2:].max() > 5
    single = pair.gradient(pair.expected(lambda log_p, log_q: (log_p - log_q).mean(0), K=1, nodes=32))
    assert_unbiased(ImportanceWeightedELBO(1, "stl"), pair, single)


@pytest.mark.parametrize("alpha", [-1.0, 0.0, 0.5, 1.0])
@pytest.mark.parametrize("estimator, K", [("vimco", 2), ("vimco", 4), ("score", 1), ("score", 3)])
def test_score_estimators_are_unbiased_term_by_term(estimator, K, alpha):
    """All K-tuples of a categorical latent of 3 states, weighted by their probability: no sampling at all."""
    logits = torch.tensor([0.3, -0.8, 0.1], requires_grad=True)
    theta = torch.tensor([0.5, -1.0, 0.2], requires_grad=True)
    tuples = torch.tensor(list(itertools.product(range(3), repeat=K))).T  # (K, 3^K), a "plate" of tuples
    log_q, log_p = logits.log_softmax(0)[tuples], 2 * theta.tanh()[tuples] - 1.0
    probability = log_q.sum(0).exp()
    exact = torch.autograd.grad(
        (probability * renyi_bound(log_p - log_q, alpha)).sum(), [logits, theta], retain_graph=True
    )
    weights = LogWeights(
        log_p, log_q, torch.ones(()), torch.zeros(()), ("tuples",), log_q, log_q, score_sites=("z",)
    )
    value, surrogate = ImportanceWeightedELBO(K, estimator, alpha).objective(weights)
    torch.testing.assert_close(value, renyi_bound(log_p - log_q, alpha))
    ours = torch.autograd.grad((probability.detach() * surrogate).sum(), [logits, theta])
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("alpha", [-1.0, 0.0, 0.5, 0.999, 1.0, 2.0])
def test_leave_one_out_equals_its_definition(alpha):
    log_w = torch.randn(7, 3) * 5
    expected = []
    for k in range(7):
        replaced = log_w.clone()
        replaced[k] = torch.cat([log_w[:k], log_w[k + 1 :]]).mean(0)
        expected.append(renyi_bound(replaced, alpha))
    torch.testing.assert_close(leave_one_out(log_w, alpha), torch.stack(expected), rtol=1e-9, atol=1e-9)


def test_leave_one_out_survives_extreme_weights():
    """One weight above all others by 800 nats: taking it out by subtraction would leave nothing."""
    log_w = torch.tensor([800.0, 0.0, 1.0, -800.0])
    rest = [renyi_bound(torch.tensor([m, *r]), 0.0) for m, r in _without(log_w)]
    torch.testing.assert_close(leave_one_out(log_w, 0.0), torch.stack(rest))
    impossible = torch.tensor([-math.inf, 0.0, 1.0])
    assert not leave_one_out(impossible, 0.0).isnan().any()


def _without(log_w):
    for k in range(len(log_w)):
        rest = [*log_w[:k].tolist(), *log_w[k + 1 :].tolist()]
        yield sum(rest) / len(rest), rest


@pytest.mark.parametrize("plates", [("data",), None])
def test_dreg_with_point_estimates_and_outer_latents(plates):
    """A Delta site and named plates: the gradient has the mean of that of 'reparam', which is autograd's."""
    x = torch.linspace(-1.0, 1.0, 4)
    params = {
        k: torch.tensor(v, requires_grad=True) for k, v in {"m": 0.2, "g": -0.3, "s": 0.7, "l": 0.4}.items()
    }

    def model():
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        shift = pyro.sample("shift", dist.Normal(0.0, 0.5))
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Normal(mean, 1.0))
            pyro.sample("x", dist.Normal(z + shift, 0.5), obs=x)

    def guide():
        pyro.sample("mean", dist.Delta(params["m"]))
        shift = pyro.sample("shift", dist.Normal(params["g"], 0.3))
        with pyro.plate("data", 4):
            pyro.sample("z", dist.Normal(params["l"] * x + shift, params["s"]))

    def mean_and_error(estimator):
        elbo = ImportanceWeightedELBO(
            4, estimator, plates=plates, vectorize_particles=True, max_plate_nesting=1
        )
        grads = []
        for _ in range(150):
            loss = elbo.differentiable_loss(model, guide)
            grads.append(torch.stack(torch.autograd.grad(loss, list(params.values()))))
        grads = torch.stack(grads)
        return grads.mean(0), grads.std(0) / math.sqrt(len(grads))

    (plain, plain_error), (dreg, dreg_error) = mean_and_error("reparam"), mean_and_error("dreg")
    assert ((plain - dreg).abs() < 5 * (plain_error**2 + dreg_error**2).sqrt()).all()
    assert (dreg_error < 1.4 * plain_error).all()


@pytest.mark.parametrize("estimator", ["reparam", "dreg", "stl"])
@pytest.mark.parametrize("plates", [("data",), None])
def test_point_estimates_get_their_full_derivative(plates, estimator):
    """With the exact conditional of the rest, every bound is log p(point, x), whose derivative is known."""
    x = torch.linspace(-1.0, 2.0, 5)
    point = torch.tensor(-0.6, requires_grad=True)

    def model():
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 5):
            z = pyro.sample("z", dist.Normal(mean, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide():
        mean = pyro.sample("mean", dist.Delta(point))
        with pyro.plate("data", 5):
            pyro.sample("z", dist.Normal((mean + 4 * x) / 5, 0.2**0.5))

    elbo = ImportanceWeightedELBO(50, estimator, plates=plates, vectorize_particles=True, max_plate_nesting=1)
    grads = torch.stack(
        [torch.autograd.grad(elbo.differentiable_loss(model, guide), point)[0] for _ in range(20)]
    )
    exact = point - (x - point).sum() / 1.25
    assert (grads.mean() - exact).abs() <= 5 * grads.std() / math.sqrt(20) + 1e-10


def test_dreg_with_an_autoguide_that_transforms():
    """AutoNormal draws auxiliary normals and passes them on through Delta sites with a Jacobian."""
    pair = pairs.auto(partial(AutoNormal, init_scale=0.7), pairs.positive_latent)
    parameters = [p for p in pair.guide.parameters()]

    def grads(estimator):
        elbo = ImportanceWeightedELBO(5, estimator, vectorize_particles=True, max_plate_nesting=1)
        found = []
        for _ in range(120):
            loss = elbo.differentiable_loss(pair.model, pair.guide)
            found.append(torch.cat(torch.autograd.grad(loss, parameters)))
        found = torch.stack(found)
        return found.mean(0), found.std(0) / math.sqrt(len(found))

    (plain, plain_error), (dreg, dreg_error) = grads("reparam"), grads("dreg")
    assert ((plain - dreg).abs() < 5 * (plain_error**2 + dreg_error**2).sqrt()).all()
    assert dreg_error.sum() < plain_error.sum()


def test_outer_score_answers_for_the_whole_bound():
    """A Bernoulli latent outside the named plate: enumerate it, and the normal ones by quadrature (K = 1)."""
    # The data speak against d = 1, which the guide prefers: the exact gradient is as large as one step's noise.
    logit = torch.tensor(1.5, requires_grad=True)
    x = torch.tensor([0.0, 0.1])

    def model():
        d = pyro.sample("d", dist.Bernoulli(0.3))
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(d + z, 0.5), obs=x)

    def guide():
        pyro.sample("d", dist.Bernoulli(logits=logit))
        with pyro.plate("data", 2):
            pyro.sample("z", dist.Bernoulli(0.6))

    def bound(d):  # E over pairs of z of log mean w, summed over data
        states = torch.tensor([0.0, 1.0])
        log_q = dist.Bernoulli(0.6).log_prob(states)
        log_w = (
            math.log(0.5) - log_q + dist.Normal(d + states, 0.5).log_prob(x[:, None])
        )  # (2 data, 2 states)
        pairs_w = torch.stack([log_w[:, [0, 0, 1, 1]], log_w[:, [0, 1, 0, 1]]])
        mass = (log_q[[0, 0, 1, 1]] + log_q[[0, 1, 0, 1]]).exp()
        return (mass * renyi_bound(pairs_w, 0.0)).sum()

    q = logit.sigmoid()
    exact_bound = sum(
        p * (math.log(prior) - p.log() + bound(d)) for d, p, prior in ((0.0, 1 - q, 0.7), (1.0, q, 0.3))
    )
    exact = torch.autograd.grad(exact_bound, logit)[0]
    for vectorize in (False, True):
        elbo = ImportanceWeightedELBO(
            2, "vimco", plates=("data",), vectorize_particles=vectorize, max_plate_nesting=1
        )
        reps = 300
        grads, values = torch.zeros(reps), torch.zeros(reps)
        for r in range(reps):
            loss = elbo.differentiable_loss(model, guide)
            values[r], grads[r] = -loss.detach(), -torch.autograd.grad(loss, logit)[0]
        assert (values.mean() - exact_bound).abs() < 5 * values.std() / math.sqrt(reps)
        assert (grads.mean() - exact).abs() < 5 * grads.std() / math.sqrt(reps)


# --- what "auto" picks, and what cannot be right ---


def test_auto_says_what_it_picked(caplog):
    elbo = ImportanceWeightedELBO(3)
    assert elbo.estimator_used is None
    with caplog.at_level(logging.INFO, logger="pyro_cpa"):
        for _ in range(2):
            elbo.loss_and_grads(*VARIANTS["plain"]()[:2])
        assert elbo.estimator_used == "dreg"
        elbo.loss_and_grads(*VARIANTS["mixed"]()[:2])
        assert elbo.estimator_used == "vimco"
    assert [record.message.split()[-1] for record in caplog.records] == ["'dreg'", "'vimco'"]
    single = ImportanceWeightedELBO(1)
    single.loss_and_grads(*VARIANTS["discrete"]()[:2])
    assert single.estimator_used == "score"


def test_refusals():
    with pytest.raises(InvalidData, match="expected one of 'auto', 'reparam'"):
        ImportanceWeightedELBO(3, "pathwise")
    with pytest.raises(InvalidData, match="needs at least 2; use estimator='score'"):
        ImportanceWeightedELBO(1, "vimco")
    with pytest.raises(InvalidData, match="at least 1"):
        ImportanceWeightedELBO(0)
    with pytest.raises(InvalidData, match="chunk_size=0"):
        ImportanceWeightedELBO(2, chunk_size=0)
    with pytest.raises(InvalidData, match=r"is a string.*plates=\('data',\)"):
        ImportanceWeightedELBO(2, plates="data")
    model, guide, _ = VARIANTS["mixed"]()
    for estimator in ("dreg", "stl"):
        with pytest.raises(UnsupportedModel, match=r"guide site 'd' \(\w+\) is not reparameterised.*vimco"):
            ImportanceWeightedELBO(3, estimator).loss_and_grads(model, guide)
    with pytest.raises(UnsupportedModel, match=r"sites \['d'\], which are not reparameterised: use.*vimco"):
        ImportanceWeightedELBO(3, "reparam").loss_and_grads(model, guide)


def test_guide_messenger_works_without_replay_only():
    model = VARIANTS["hierarchical"]().model
    guide = AutoNormalMessenger(model)
    for options in ({"vectorize_particles": True}, {}):
        for estimator in ("reparam", "vimco", "score", "auto"):
            elbo = ImportanceWeightedELBO(4, estimator, **options)
            assert math.isfinite(elbo.loss_and_grads(model, guide))
            assert elbo.log_weights(model, guide).log_w.shape == (4, 5)
    assert elbo.estimator_used == "reparam"
    with pytest.raises(UnsupportedModel, match="AutoNormalMessenger runs model and guide in one"):
        ImportanceWeightedELBO(4, "dreg").loss_and_grads(model, guide)
    pyro.set_rng_seed(0)
    expected = Trace_ELBO().loss(model, guide)
    pyro.set_rng_seed(0)
    assert ImportanceWeightedELBO(1, "reparam").loss(model, guide) == pytest.approx(expected, rel=1e-12)


def test_discrete_guide_is_trained_where_renyi_elbo_leaves_it():
    """The posterior of each datum is reached; RenyiELBO(0) gives the guide a zero gradient at every step."""
    x = torch.tensor([-0.7, 0.4, 1.1, 2.5])
    exact = torch.sigmoid(
        math.log(0.4 / 0.6) + dist.Normal(2.0, 1.0).log_prob(x) - dist.Normal(0.0, 1.0).log_prob(x)
    )

    def model():
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Bernoulli(0.4))
            pyro.sample("x", dist.Normal(2.0 * z, 1.0), obs=x)

    def guide():
        logits = pyro.param("logits", torch.zeros(4))
        with pyro.plate("data", 4):
            pyro.sample("z", dist.Bernoulli(logits=logits))

    pyro.set_rng_seed(0)
    RenyiELBO(alpha=0.0, num_particles=5, vectorize_particles=True).loss_and_grads(model, guide)
    assert pyro.param("logits").grad.abs().max() < 1e-12
    pyro.param("logits").grad = None
    elbo = ImportanceWeightedELBO(5, vectorize_particles=True)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), elbo)
    for _ in range(400):
        svi.step()
    assert elbo.estimator_used == "vimco"
    assert (pyro.param("logits").sigmoid() - exact).abs().max() < 0.02
