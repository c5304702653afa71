# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""The common part of all objectives: the host's contracts, modules, chunks of particles, recipes of users."""

from __future__ import annotations

import math
import warnings

import pairs
import pyro
import pyro.distributions as dist
import pytest
import torch
from exact_bounds import LinearGaussianPlate
from pairs import VARIANTS
from pyro import poutine
from pyro.infer import SVI
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule
from torch import nn

from pyro_cpa.infer.importance_weighted import ImportanceWeightedELBO

ESTIMATORS = ["reparam", "stl", "dreg", "vimco", "score", "auto"]


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
    plates = {"plain": ("data",), "two plates": ("rows", "columns"), "nested": ("groups",), "crossed": ()}
    for name in ("plain", "two plates", "plain", "nested", "crossed"):
        assert math.isfinite(elbo.loss(*VARIANTS[name]()[:2]))
        assert elbo.weight_plates == plates[name]


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
    for chunk_size in (None, 1, 3, 4, 100):
        pyro.set_rng_seed(5)
        elbo = ImportanceWeightedELBO(4, estimator, chunk_size=chunk_size)
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
