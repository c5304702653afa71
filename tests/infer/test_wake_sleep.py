# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Reweighted wake-sleep: its three gradients against exact ones, training, refusals."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact_bounds import LinearGaussianPlate, TwoLatents
from pairs import VARIANTS, auto, global_and_local
from plate_pairs import hierarchical
from pyro.infer import SVI, ReweightedWakeSleep
from pyro.infer.autoguide import AutoNormal, AutoNormalMessenger

from pyro_cpa.errors import InvalidData, UnsupportedModel
from pyro_cpa.infer.importance_weighted import ImportanceWeightedELBO, renyi_bound
from pyro_cpa.infer.wake_sleep import ReweightedWakeSleepELBO


def wake(log_p, log_q):
    """What a step ascends, for given latents: wake-theta and centred wake-phi."""
    v = torch.softmax((log_p - log_q).detach(), 0)
    return (v * log_p).sum(0) + ((v - 1 / len(v)) * log_q).sum(0)


# --- wake ---


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("second", ["normal", "bernoulli"])
def test_wake_gradients_of_two_particles(second, masked):
    """Quadrature and enumeration with the latents held fixed: nothing leaks through the second site."""
    pair = TwoLatents(second, masked, copies=2000)
    exact = pair.gradient(pair.expected(wake, K=2, detached=True))
    elbo = ReweightedWakeSleepELBO(2, vectorize_particles=True, max_plate_nesting=1)
    grads = torch.stack(
        [pair.gradient(-elbo.differentiable_loss(pair.model, pair.guide)) / pair.copies for _ in range(30)]
    )
    error = grads.std(0) / math.sqrt(30)
    assert ((grads.mean(0) - exact).abs() <= 5 * error).all()
    bound = pair.expected(lambda log_p, log_q: renyi_bound(log_p - log_q, 0.0), K=2)
    torch.testing.assert_close(exact[:2], pair.gradient(bound)[:2])  # wake-theta is the bound's own gradient


@pytest.mark.parametrize(
    "name", ["plain", "subsampled", "nested", "masked", "scale", "annealed", "sequential"]
)
@pytest.mark.parametrize("vectorize", [False, True])
def test_value_is_the_importance_weighted_bound_per_datum(name, vectorize):
    pair = VARIANTS[name]()
    losses = []
    for kind in (ReweightedWakeSleepELBO, ImportanceWeightedELBO):
        pyro.set_rng_seed(4)
        losses.append(kind(5, vectorize_particles=vectorize).loss(pair.model, pair.guide))
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


def test_parts_equal_pyros_for_a_single_datum():
    """Pyro has one weight for all data: with one datum its two losses are ours."""
    x = torch.tensor([0.7])

    def model():
        with pyro.plate("data", 1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.8), obs=x)

    def guide():
        with pyro.plate("data", 1):
            pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.1)), 0.9))

    options = {"num_particles": 6, "vectorize_particles": True, "max_plate_nesting": 1}
    pyro.set_rng_seed(2)
    theta, phi = ReweightedWakeSleep(**options).loss(model, guide)
    pyro.set_rng_seed(2)
    elbo = ReweightedWakeSleepELBO(**options)
    assert elbo.loss(model, guide) == pytest.approx(theta.item(), rel=1e-12)
    assert elbo.theta_loss == pytest.approx(theta.item(), rel=1e-12)
    assert elbo.wake_phi_loss == pytest.approx(phi.item(), rel=1e-12)
    assert elbo.sleep_phi_loss is None


@pytest.mark.parametrize("options", [{}, {"vectorize_particles": True}, {"chunk_size": 2}])
def test_at_the_posterior_the_guide_rests(options):
    pair = LinearGaussianPlate(torch.randn(40, 3))
    index = torch.tensor([1, 5, 30, 31])
    elbo = ReweightedWakeSleepELBO(5, **options)
    loss = elbo.loss_and_grads(pair.model, pair.guide, index)
    assert loss == pytest.approx(-10 * pair.log_evidence()[index].sum().item(), rel=1e-10)
    for name in ("off", "widen"):
        assert pyro.param(name).grad.abs() < 1e-8


def test_model_without_parameters_is_left_alone():
    model, guide, _ = VARIANTS["plain"]()
    ReweightedWakeSleepELBO(3, model_has_params=False).loss_and_grads(model, guide)
    assert pyro.param("noise").unconstrained().grad is None
    assert pyro.param("loc").grad is not None
    pyro.clear_param_store()
    ReweightedWakeSleepELBO(3).loss_and_grads(model, guide)
    assert pyro.param("noise").unconstrained().grad is not None


def test_point_estimates_follow_the_model():
    """A Delta outside named plates is trained like a parameter: the weighted gradient of log p."""
    x = torch.linspace(-1.0, 2.0, 5)
    point = torch.tensor(-0.6, requires_grad=True)

    def model():
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 5):
            z = pyro.sample("z", dist.Normal(mean, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide():
        mean = pyro.sample("mean", dist.Delta(point))
        with pyro.plate("data", 5):  # the posterior given the mean: log w does not vary
            pyro.sample("z", dist.Normal((mean.detach() + 4 * x) / 5, 0.2**0.5))

    elbo = ReweightedWakeSleepELBO(400, plates=("data",), vectorize_particles=True, max_plate_nesting=1)
    grads = torch.stack(
        [torch.autograd.grad(elbo.differentiable_loss(model, guide), point)[0] for _ in range(20)]
    )
    exact = point - (x - point).sum() / 1.25  # of -log p(mean) - sum log N(x; mean, 1.25)
    assert (grads.mean() - exact).abs() < 5 * grads.std() / math.sqrt(20)


# --- sleep ---


class Amortized:
    """z ~ N(0, 1), x ~ N(z, 0.5); the guide N(slope x + shift, width) sees x by argument or observation."""

    def __init__(self, subsample_size=None):
        self.size = subsample_size
        start = {"slope": 0.3, "shift": 0.2, "width": 0.9}
        self.params = {name: torch.tensor(value, requires_grad=True) for name, value in start.items()}

    def model(self, x=None, observations=None):
        x = observations["x"] if x is None else x
        with pyro.plate("data", 4, subsample_size=self.size, dim=-1) as i:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x if self.size is None else x[i])

    def by_argument(self, x):
        with pyro.plate("data", 4, subsample_size=self.size, dim=-1):
            pyro.sample(
                "z", dist.Normal(self.params["slope"] * x + self.params["shift"], self.params["width"])
            )

    def by_observations(self, x=None, observations=None):
        x = observations["x"]
        with pyro.plate("data", 4, subsample_size=self.size, dim=-1) as i:
            x = x[i] if x.shape[-1] == 4 and self.size is not None else x  # dreams come as minibatches
            pyro.sample(
                "z", dist.Normal(self.params["slope"] * x + self.params["shift"], self.params["width"])
            )

    def exact(self):
        """Gradient of -E log q(z | x) under the model, for 4 data."""
        slope, shift, width = self.params.values()
        error = (1 - slope) ** 2 + slope**2 * 0.25 + shift**2
        loss = 4 * (width.log() + error / (2 * width**2))
        return torch.stack(torch.autograd.grad(loss, list(self.params.values())))


@pytest.mark.parametrize("vectorize", [False, True])
@pytest.mark.parametrize("way", ["argument", "observations", "subsampled"])
def test_sleep_gradient(way, vectorize):
    pair = Amortized(2 if way == "subsampled" else None)
    x = torch.linspace(-1.0, 1.0, 4)
    args, kwargs = ((x,), {}) if way == "argument" else ((), {"observations": {"x": x}})
    guide = pair.by_argument if way == "argument" else pair.by_observations
    elbo = ReweightedWakeSleepELBO(
        2,
        insomnia=0.0,
        model_has_params=False,
        num_sleep_particles=200 if vectorize else 4,
        vectorize_particles=vectorize,
        max_plate_nesting=1,
    )
    grads = []
    for _ in range(40 if vectorize else 150):
        loss = elbo.differentiable_loss(pair.model, guide, *args, **kwargs)
        grads.append(torch.stack(torch.autograd.grad(loss, list(pair.params.values()))))
    grads = torch.stack(grads)
    assert ((grads.mean(0) - pair.exact()).abs() < 5 * grads.std(0) / math.sqrt(len(grads))).all()
    assert elbo.theta_loss is None and elbo.wake_phi_loss is None
    assert elbo.sleep_phi_loss == loss.item()


def test_insomnia_mixes_the_two_guide_objectives():
    pair, x = Amortized(), torch.linspace(-1.0, 1.0, 4)
    parameters = list(pair.params.values())

    def gradient(insomnia, seed=0):
        pyro.set_rng_seed(seed)
        elbo = ReweightedWakeSleepELBO(3, insomnia, vectorize_particles=True, max_plate_nesting=1)
        loss = elbo.differentiable_loss(pair.model, pair.by_argument, x)
        assert loss.item() == elbo.theta_loss
        return torch.stack(torch.autograd.grad(loss, parameters))

    wake_only = gradient(1.0)
    mixed, more_sleep = gradient(0.7), gradient(0.2)
    sleep_only = (mixed - 0.7 * wake_only) / 0.3
    torch.testing.assert_close(more_sleep, 0.2 * wake_only + 0.8 * sleep_only)


def test_classical_wake_sleep_and_reweighted_reach_the_posterior():
    x = torch.tensor([-0.7, 0.4, 1.1, 2.5])

    def model(x):
        with pyro.plate("data", 4, dim=-1):
            z = pyro.sample("z", dist.Bernoulli(0.4))
            pyro.sample("x", dist.Normal(2.0 * z, 1.0), obs=x)

    def guide(x):
        slope, shift = pyro.param("slope", torch.tensor(0.5)), pyro.param("shift", torch.tensor(0.0))
        with pyro.plate("data", 4, dim=-1):
            pyro.sample("z", dist.Bernoulli(logits=slope * x + shift))

    for options in ({"num_particles": 20}, {"num_particles": 1, "insomnia": 0.0, "num_sleep_particles": 20}):
        pyro.clear_param_store()
        elbo = ReweightedWakeSleepELBO(vectorize_particles=True, max_plate_nesting=1, **options)
        svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.993}), elbo)
        for _ in range(500):
            assert isinstance(svi.step(x), float)
        # log-odds of z: 2 x - 2 + log(0.4 / 0.6)
        assert pyro.param("slope").item() == pytest.approx(2.0, abs=0.3)
        assert pyro.param("shift").item() == pytest.approx(-2.0 + math.log(2 / 3), abs=0.4)


# --- refusals ---


def test_bad_arguments():
    with pytest.raises(InvalidData, match="between 0 and 1"):
        ReweightedWakeSleepELBO(3, insomnia=1.5)
    with pytest.raises(InvalidData, match="at least 2; with insomnia=0"):
        ReweightedWakeSleepELBO(1)
    with pytest.raises(InvalidData, match="num_sleep_particles=0"):
        ReweightedWakeSleepELBO(2, num_sleep_particles=0)


def test_refusals_name_the_cure():
    pair = global_and_local()
    with pytest.raises(UnsupportedModel, match="latents outside plates=.*ImportanceWeightedELBO"):
        ReweightedWakeSleepELBO(3, plates=("data",)).loss_and_grads(pair.model, pair.guide)
    model, guide, _ = auto(AutoNormal)
    assert math.isfinite(ReweightedWakeSleepELBO(3).loss_and_grads(model, guide))
    messenger = AutoNormalMessenger(hierarchical().model)
    assert math.isfinite(ReweightedWakeSleepELBO(3).loss_and_grads(messenger.model, messenger))
    with pytest.raises(UnsupportedModel, match="AutoNormalMessenger runs model and guide in one.*insomnia=1"):
        ReweightedWakeSleepELBO(3, 0.5).loss_and_grads(messenger.model, messenger)
    model, guide, _ = VARIANTS["plain"]()
    with pytest.raises(UnsupportedModel, match=r"site 'x': no argument is.*shape \(6,\).*`observations`"):
        ReweightedWakeSleepELBO(3, 0.5).loss_and_grads(model, guide)

    def observing(x):
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.zeros(3)
    pyro.clear_param_store()
    automatic = AutoNormal(observing)
    automatic(x)
    with pytest.raises(UnsupportedModel, match="not drawn by the model, or is a point"):
        ReweightedWakeSleepELBO(3, 0.5).loss_and_grads(observing, automatic, x)
