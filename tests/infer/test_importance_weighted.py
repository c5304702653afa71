# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""The importance-weighted objective: estimators against exact gradients, the host's contracts, chunks."""

from __future__ import annotations

import itertools
import logging
import math
import warnings
from functools import partial

import pairs
import pyro
import pyro.distributions as dist
import pytest
import torch
from pairs import VARIANTS, LinearGaussianPlate, TwoLatents
from pyro import poutine
from pyro.infer import SVI, RenyiELBO, Trace_ELBO
from pyro.infer.autoguide import AutoNormal, AutoNormalMessenger
from pyro.nn import PyroModule
from torch import nn

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


def test_dreg_with_point_estimates_and_outer_latents():
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
            4, estimator, plates=("data",), vectorize_particles=True, max_plate_nesting=1
        )
        grads = []
        for _ in range(400):
            loss = elbo.differentiable_loss(model, guide)
            grads.append(torch.stack(torch.autograd.grad(loss, list(params.values()))))
        grads = torch.stack(grads)
        return grads.mean(0), grads.std(0) / math.sqrt(len(grads))

    (plain, plain_error), (dreg, dreg_error) = mean_and_error("reparam"), mean_and_error("dreg")
    assert ((plain - dreg).abs() < 5 * (plain_error**2 + dreg_error**2).sqrt()).all()
    assert (dreg_error < 1.2 * plain_error).all()


def test_dreg_with_an_autoguide_that_transforms():
    """AutoNormal draws auxiliary normals and passes them on through Delta sites with a Jacobian."""
    pair = pairs.auto(partial(AutoNormal, init_scale=0.7), pairs._positive_latent)
    parameters = [p for p in pair.guide.parameters()]

    def grads(estimator):
        elbo = ImportanceWeightedELBO(5, estimator, vectorize_particles=True, max_plate_nesting=1)
        found = []
        for _ in range(300):
            loss = elbo.differentiable_loss(pair.model, pair.guide)
            found.append(torch.cat(torch.autograd.grad(loss, parameters)))
        found = torch.stack(found)
        return found.mean(0), found.std(0) / math.sqrt(len(found))

    (plain, plain_error), (dreg, dreg_error) = grads("reparam"), grads("dreg")
    assert ((plain - dreg).abs() < 5 * (plain_error**2 + dreg_error**2).sqrt()).all()
    assert dreg_error.sum() < plain_error.sum()


def test_outer_score_answers_for_the_whole_bound():
    """A Bernoulli latent outside the named plate: enumerate it, and the normal ones by quadrature (K = 1)."""
    logit = torch.tensor(0.4, requires_grad=True)
    x = torch.tensor([0.5, -1.0])

    def model():
        d = pyro.sample("d", dist.Bernoulli(0.3))
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(d + z, 1.0), obs=x)

    def guide():
        pyro.sample("d", dist.Bernoulli(logits=logit))
        with pyro.plate("data", 2):
            pyro.sample("z", dist.Bernoulli(0.6))

    def bound(d):  # E over pairs of z of log mean w, summed over data
        states = torch.tensor([0.0, 1.0])
        log_q = dist.Bernoulli(0.6).log_prob(states)
        log_w = (
            math.log(0.5) - log_q + dist.Normal(d + states, 1.0).log_prob(x[:, None])
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
        reps = 500
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


# --- the host's contracts ---


class Model(PyroModule):
    def __init__(self):
        super().__init__()
        self.noise = nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, self.noise), obs=x)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("options", [{}, {"vectorize_particles": True}, {"chunk_size": 2}])
def test_module_svi_and_evaluation_agree(estimator, options):
    x = torch.linspace(-1.0, 1.0, 5)
    model = Model()
    guide = AutoNormal(model)
    elbo = ImportanceWeightedELBO(4, estimator, **options)
    module = elbo(model, guide)
    module(x)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    pyro.set_rng_seed(3)
    loss = module(x)
    loss.backward()
    grads = [p.grad.clone() for p in module.parameters()]
    assert len(grads) == 3 and all(g.abs().max() > 0 for g in grads)
    optimizer.zero_grad()
    pyro.set_rng_seed(3)
    assert elbo.loss_and_grads(model, guide, x) == pytest.approx(loss.item(), rel=1e-12)
    for p, g in zip(module.parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad, g)
    pyro.set_rng_seed(3)
    assert elbo.loss(model, guide, x) == pytest.approx(loss.item(), rel=1e-12)
    for context in (torch.no_grad, torch.inference_mode):
        pyro.set_rng_seed(3)
        with context():
            assert module(x).item() == pytest.approx(loss.item(), rel=1e-12)
    optimizer.zero_grad()
    before = model.noise.item()
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), elbo)
    assert isinstance(svi.step(x), float) and isinstance(svi.evaluate_loss(x), float)
    assert model.noise.item() != before


def test_gradients_accumulate_and_graphs_can_be_kept():
    model, guide, _ = VARIANTS["hierarchical"]()
    for chunk_size in (None, 2):
        elbo = ImportanceWeightedELBO(4, retain_graph=True, chunk_size=chunk_size)
        pyro.clear_param_store()
        loss = elbo.differentiable_loss(model, guide)
        param = pyro.param("loc").unconstrained()
        loss.backward(retain_graph=True)
        first = param.grad.clone()
        loss.backward()
        torch.testing.assert_close(param.grad, 2 * first)


def test_base_options_arrive_by_keyword():
    elbo = ImportanceWeightedELBO(
        3,
        max_plate_nesting=2,
        vectorize_particles=True,
        strict_enumeration_warning=False,
        ignore_jit_warnings=True,
        jit_options={"check_trace": False},
        retain_graph=True,
    )
    assert elbo.retain_graph is True and elbo.jit_options == {"check_trace": False}
    assert elbo.ignore_jit_warnings is True and elbo.strict_enumeration_warning is False
    assert elbo.max_plate_nesting == 3


def test_one_instance_serves_models_of_different_nesting():
    elbo = ImportanceWeightedELBO(3, vectorize_particles=True)
    for name in ("plain", "two plates", "plain", "nested", "crossed"):
        assert math.isfinite(elbo.loss(*VARIANTS[name]()[:2]))


def test_probing_run_leaves_the_random_numbers_alone():
    model, guide, _ = VARIANTS["plain"]()
    losses = []
    for nesting in (1, math.inf):
        pyro.set_rng_seed(0)
        elbo = ImportanceWeightedELBO(3, vectorize_particles=True, max_plate_nesting=nesting)
        losses.append(elbo.loss(model, guide))
    assert losses[0] == losses[1]


def test_nan_is_reported():
    def model():
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0))
        pyro.factor("nan", torch.tensor(math.nan))

    with pytest.warns(UserWarning, match="loss is nan|NaN"), pyro.validation_enabled(False):
        ImportanceWeightedELBO(2).loss(model, lambda: None)


# --- chunks ---


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("name", ["plain", "subsampled", "hierarchical", "sequential", "AutoNormal"])
def test_chunks_of_looped_particles_change_nothing(name, estimator):
    pair = VARIANTS[name]()
    results = []
    for chunk_size in (None, 1, 3, 7, 100):
        pyro.set_rng_seed(5)
        elbo = ImportanceWeightedELBO(7, estimator, chunk_size=chunk_size)
        loss = elbo.loss_and_grads(pair.model, pair.guide)
        params = [pyro.param(key).unconstrained() for key in pyro.get_param_store()]
        results.append((loss, torch.cat([p.grad.flatten() for p in params]), torch.rand(1)))
        for p in params:
            p.grad = None
    for loss, grad, after in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-12)
        torch.testing.assert_close(grad, results[0][1], rtol=1e-10, atol=1e-12)
        assert torch.equal(after, results[0][2])  # backward leaves the random state as the loss left it


@pytest.mark.parametrize("estimator", ["reparam", "dreg", "vimco"])
@pytest.mark.parametrize("name, plates", [("subsampled", None), ("global and local subsampled", ("data",))])
def test_chunks_of_vectorised_particles_change_nothing(monkeypatch, name, plates, estimator):
    """The same chunks with their graphs kept are the reference."""
    pair = VARIANTS[name]()
    results = []
    for keep in (False, True):
        if keep:
            monkeypatch.setattr("pyro_cpa.infer.particles.checkpoint", lambda fn, **_: fn())
        pyro.set_rng_seed(5)
        elbo = ImportanceWeightedELBO(10, estimator, plates=plates, chunk_size=4, vectorize_particles=True)
        loss = elbo.loss_and_grads(pair.model, pair.guide)
        params = [pyro.param(key).unconstrained() for key in pyro.get_param_store()]
        results.append((loss, torch.cat([p.grad.flatten() for p in params])))
        for p in params:
            p.grad = None
    assert results[0][0] == results[1][0]
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-12, atol=1e-13)


def test_chunks_bound_the_memory_that_autograd_keeps():
    pair = LinearGaussianPlate(torch.randn(200, 20))
    guide = lambda: pair.guide(off=0.3)  # noqa: E731

    def kept(K, chunk_size):
        sizes = []
        elbo = ImportanceWeightedELBO(K, "reparam", vectorize_particles=True, chunk_size=chunk_size)
        elbo.loss(pair.model, guide)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            elbo.differentiable_loss(pair.model, guide)
        return sum(sizes)

    weights = 40 * 200  # a number per particle and datum is kept in any case
    assert kept(40, None) > 20 * weights
    assert kept(40, 5) < 12 * weights


def test_chunks_with_a_lazy_guide_repeat_its_random_numbers():
    """The first step of a fresh AutoNormal draws initial values; chunks run again must not."""
    model = VARIANTS["hierarchical"]().model
    pyro.set_rng_seed(0)
    fresh = AutoNormal(model, init_loc_fn=pyro.infer.autoguide.init_to_sample)
    elbo = ImportanceWeightedELBO(6, chunk_size=2)
    elbo.loss_and_grads(model, fresh)
    grads = [p.grad.clone() for p in fresh.parameters()]
    assert len(grads) == 4 and all(g.isfinite().all() for g in grads)


# --- recipes of users ---


def test_masked_pair_with_named_plates_and_scale_runs_vectorised_and_looped():
    model, guide, _ = pairs.global_and_local(2)
    for options in ({}, {"vectorize_particles": True}, {"chunk_size": 2}):
        elbo = ImportanceWeightedELBO(4, plates=("data",), **options)
        with poutine.scale(scale=1 / 6):
            assert math.isfinite(elbo.loss_and_grads(model, guide))


def test_lightning_trains_and_validates():
    lightning = pytest.importorskip("lightning")
    x = torch.randn(64)

    class Plan(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            model = Model()
            self.elbo = ImportanceWeightedELBO(4, vectorize_particles=True)(model, AutoNormal(model))
            self.elbo(x[:16])
            self.validated = []

        def training_step(self, batch, _):
            return self.elbo(batch[0])

        def validation_step(self, batch, _):
            self.validated.append(self.elbo(batch[0]).item())

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.05)

    plan = Plan()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=16)
    trainer = lightning.Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice on the number of loader workers
        trainer.fit(plan, loader, loader)
    assert plan.validated[-1] < plan.validated[0]
