# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""The E-step that fits keep follows whatever changes, in place too; its gradient is the evidence's."""

from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact_pairs import Exact, circle, net
from pyro.nn import PyroModule, PyroParam
from torch import nn
from torch.distributions import constraints

from pyro_cpa.distributions import CPAMarginal
from pyro_cpa.errors import InvalidData
from pyro_cpa.infer import EM, AutoCPAPosterior, ExactML, exact_fit


class Direct(PyroModule):
    """Prior mean and noise are leaves themselves: writes in place reach every view of them."""

    def __init__(self):
        super().__init__()
        self.decoder = net(1, 6, 2, seed=2)
        self.loc = nn.Parameter(torch.tensor([0.3]))
        self.noise = nn.Parameter(torch.tensor([0.6, 0.9]))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(self.loc, 1.0).to_event(1))
            pyro.sample("x", dist.NanMaskedNormal(self.decoder(z), self.noise).to_event(1), obs=x)

    def oracle(self, x):
        return CPAMarginal(self.decoder, self.noise, loc=self.loc).log_prob(x).sum()


def fit_of(model, kind=EM, **kwargs):
    return kind(model, AutoCPAPosterior(model, decoder=model.decoder), **kwargs)


def doubled(tensor):
    with torch.no_grad():
        tensor.mul_(2.0)


@pytest.mark.parametrize(
    "change",
    [
        lambda model, x: doubled(model.loc),
        lambda model, x: doubled(model.noise),
        lambda model, x: doubled(model.noise.data),
        lambda model, x: doubled(x),
        lambda model, x: doubled(model.decoder[2].bias),
        lambda model, x: model.decoder[0].weight.data.mul_(-1.0),
    ],
)
@pytest.mark.parametrize("holes", [False, True])
def test_the_kept_e_step_follows_changes_in_place(change, holes):
    model, x = Direct(), circle(30)
    if holes:
        x[::3, 1] = torch.nan
    fit = fit_of(model)
    before = fit.evaluate_loss(x)
    kept = fit._last
    assert fit.evaluate_loss(x) == before and fit._last is kept
    change(model, x)
    after = fit.evaluate_loss(x)
    assert abs(after - before) > 1e-3
    assert after == pytest.approx(-model.oracle(x).item(), rel=1e-12)


def test_a_prior_that_is_written_in_place_is_followed_by_em():
    model, x = Direct(), circle(60)
    em = fit_of(model, blocks=("prior",))
    for _ in range(3):
        em.step(x)
        assert em.history[-1].log_evidence == pytest.approx(model.oracle(x).item(), rel=1e-12)
    assert em.history[-1].gain > 0


def test_what_is_kept_holds_no_graph():
    model, x = Direct(), circle(30)
    fit = fit_of(model)
    fit._log_evidence(list(model.parameters()), lambda: fit._read(x)).backward()
    statistics = fit._last.statistics
    held = [*fit._last.given, fit._last.log_evidence, statistics.zz, statistics.xz, statistics.xx]
    assert not any(tensor.requires_grad for tensor in held)


class Full(Exact):
    """Full noise, and a prior that is learned."""

    def __init__(self, *sizes, **kwargs):
        super().__init__(*sizes, noise=[[0.6, 0.0], [0.2, 0.5]], **kwargs)
        self.loc = PyroParam(0.1 * torch.ones(sizes[0]))
        self.spread = PyroParam(1.2 * torch.ones(sizes[0]), constraint=constraints.positive)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(self.loc, self.spread).to_event(1))
            pyro.sample("x", self.likelihood(self.decoder(z)), obs=x)

    def oracle(self, x):
        prior = {"loc": self.loc, "prior_covariance": torch.diag(self.spread**2)}
        return (
            CPAMarginal(self.decoder, covariance_matrix=self.noise @ self.noise.mT, **prior).log_prob(x).sum()
        )


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("make", [Direct, lambda: Full(1, 5, 2), lambda: Full(2, 4, 2)])
def test_the_gradient_is_that_of_the_evidence(make, holes):
    model, x = make(), circle(25)
    if holes:
        x[::3, 0] = torch.nan
    fit, parameters = fit_of(model, ExactML), list(model.parameters())
    found = fit._log_evidence(parameters, lambda: fit._read(x))
    expected = model.oracle(x)
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    pairs = zip(
        torch.autograd.grad(found, parameters), torch.autograd.grad(expected, parameters), strict=True
    )
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "name, message", [("loc", "mean of the prior of site 'z'"), ("noise", "noise of site 'x'")]
)
def test_values_that_are_not_finite_are_refused_by_name(name, message):
    model, x = Direct(), circle(10)
    fit = fit_of(model)
    problem = fit._problem(x)
    field = {"loc": "prior_loc", "noise": "noise_scale"}[name]
    for bad in (torch.inf, torch.nan):
        broken = replace(problem, **{field: torch.full_like(getattr(problem, field), bad)})
        with pytest.raises(InvalidData, match=message):
            fit._expectations(broken)


class Computed(Exact):
    """The noise is some function of a parameter."""

    def likelihood(self, mean):
        return dist.Normal(mean, torch.nn.functional.softplus(2.0 * self.noise)).to_event(1)


class Detached(Exact):
    """The noise is a parameter that is trained for something else."""

    def likelihood(self, mean):
        return dist.Normal(mean, self.noise.detach()).to_event(1)


class Sliced(Exact):
    """The noise is a part of a parameter."""

    def likelihood(self, mean):
        return dist.Normal(mean, self.noise[1:]).to_event(1)


class Constant(Exact):
    def likelihood(self, mean):
        return dist.Normal(mean, 0.4).to_event(1)


def softplus_noise():
    model = Exact(1, 5, 2, seed=1)
    model.noise = PyroParam(torch.tensor([0.5, 0.6]), constraint=dist.constraints.softplus_positive)
    return model


FOLLOWED = {
    "scalar": (lambda: Exact(1, 5, 2, noise=0.6, seed=1), True),
    "diagonal": (lambda: Exact(1, 5, 2, noise=[0.6, 0.4], seed=1), True),
    "full": (lambda: Exact(1, 5, 2, noise=[[0.6, 0.0], [0.2, 0.5]], seed=1), True),
    "softplus": (softplus_noise, True),
    "constant": (lambda: Constant(1, 5, 2, seed=1), True),
    "computed": (lambda: Computed(1, 5, 2, seed=1), False),
    "detached": (lambda: Detached(1, 5, 2, seed=1), False),
    "sliced": (lambda: Sliced(1, 5, 2, noise=[0.9, 0.6, 0.4], seed=1), False),
    "learned prior": (Direct, False),
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_the_model_runs_again_only_where_it_has_to(name, monkeypatch):
    make, follows = FOLLOWED[name]
    x, found = circle(40), []
    for shortcut in (True, False):
        if not shortcut:
            pyro.clear_param_store()
            monkeypatch.setattr(exact_fit, "followed", lambda problem, model, decoder, run: run)
        model = make()
        fit, runs = fit_of(model, ExactML, warm_start=0, iterations_per_step=8), []
        model.register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        fit.step(x)
        assert (len(runs) < 4) == (follows and shortcut)
        found.append(
            [p.detach().clone() for p in model.parameters()] + [torch.tensor(fit.history[-1].objective)]
        )
        assert -fit.evaluate_loss(x) == pytest.approx(fit.history[-1].log_evidence, rel=1e-12)
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    ("make", "options", "steps"),
    [(EM, {}, 1), (EM, {"accelerate": "lbfgs", "warm_up": 3}, 4), (ExactML, {"warm_start": 3}, 4)],
)
def test_sweeps_before_l_bfgs_do_not_end_a_run(make, options, steps):
    fit = fit_of(Exact(1, 4, 2, seed=1), make, **options)
    assert len(fit.run(circle(30), num_steps=6, tol=1e9, progress=False)) == steps


@pytest.mark.parametrize("warm_start", [0, 1])
def test_l_bfgs_learns_from_its_own_steps_alone(warm_start):
    """Closed forms before a round leave no step whose change of the gradient is due to it alone."""
    fit, rounds = fit_of(Exact(1, 4, 2, seed=1), ExactML, warm_start=warm_start, iterations_per_step=5), 5
    for _ in range(warm_start + rounds):
        fit.step(circle(30))
    (state,) = fit.state_dict()["lbfgs"]["state"].values()
    # Each iteration but the first of a round follows one of the same round.
    assert (len(state["old_dirs"]) <= state["n_iter"] - rounds) == (warm_start > 0)
