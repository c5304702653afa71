# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Under the exact posterior every bound is the evidence, at every draw."""

from itertools import combinations

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact_pairs import Exact, circle

from pyro_cpa.distributions import CPAMarginal
from pyro_cpa.infer import (
    TVO,
    AutoCPAPosterior,
    BiHelmholtzELBO,
    ImportanceWeightedELBO,
    Linear,
    LogUniform,
    ReweightedWakeSleepELBO,
)

OBJECTIVES = {
    "iwae score": lambda **k: ImportanceWeightedELBO(num_particles=4, estimator="score", **k),
    "iwae vimco": lambda **k: ImportanceWeightedELBO(num_particles=4, estimator="vimco", **k),
    "renyi 0.3": lambda **k: ImportanceWeightedELBO(num_particles=4, estimator="vimco", alpha=0.3, **k),
    "wake-sleep": lambda **k: ReweightedWakeSleepELBO(num_particles=4, insomnia=1.0, **k),
    "tvo left": lambda **k: TVO(num_particles=4, schedule=LogUniform(5, beta_1=0.025), rule="left", **k),
    "tvo trapezoid": lambda **k: TVO(num_particles=4, schedule=Linear(3), rule="trapezoid", **k),
    "bihm": lambda **k: BiHelmholtzELBO(num_particles=4, **k),
}


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("vectorize", [False, True])
@pytest.mark.parametrize("subsample_size", [None, 3])
def test_value_is_the_evidence_at_every_draw(name, vectorize, subsample_size):
    model = Exact(1, 5, 2, subsample_size=subsample_size)
    x = circle(9)
    guide = AutoCPAPosterior(model, decoder=model.decoder)
    objective = OBJECTIVES[name](vectorize_particles=vectorize)
    nll = -CPAMarginal(model.decoder, model.noise).log_prob(x).detach()
    for seed in range(3):
        pyro.set_rng_seed(seed)
        loss = objective.loss(model, guide, x)
        if subsample_size is None:
            assert loss == pytest.approx(nll.sum().item(), rel=1e-10)
            continue
        # Some minibatch of three, scaled to nine, with nothing added by the draws of z.
        values = {round(3 * nll[list(c)].sum().item(), 8) for c in combinations(range(9), 3)}
        assert round(loss, 8) in values


@pytest.mark.parametrize("name", OBJECTIVES)
def test_model_gradient_is_that_of_the_evidence(name):
    model = Exact(1, 4, 2)
    x = circle(5).repeat(8, 1)  # eight draws of each row in one
    guide = AutoCPAPosterior(model, decoder=model.decoder)
    CPAMarginal(model.decoder, model.noise).log_prob(x).sum().neg().backward()
    target = torch.cat([p.grad.flatten() for p in model.parameters()])
    objective = OBJECTIVES[name](vectorize_particles=True)
    draws = []
    for _ in range(25):
        model.zero_grad()
        objective.loss_and_grads(model, guide, x)
        draws.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    draws = torch.stack(draws)
    error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - target).abs() <= 5 * error + 1e-10).all()


class ExactByHand(pyro.nn.PyroModule):
    """The same posterior with parameters: a linear-Gaussian guide at its optimum."""

    def __init__(self, weight, variance):
        super().__init__()
        self.slope = pyro.nn.PyroParam(variance * weight / 0.25)
        self.scale = pyro.nn.PyroParam(variance.sqrt(), constraint=dist.constraints.positive)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.slope * x, self.scale))


@pytest.mark.parametrize("name", ["tvo left", "tvo trapezoid", "bihm", "wake-sleep"])
def test_guide_gradient_vanishes_where_it_is_exact(name):
    weight = torch.tensor(0.8)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(weight * z, 0.5), obs=x)

    guide = ExactByHand(weight, 1 / (1 + weight**2 / 0.25))
    OBJECTIVES[name](vectorize_particles=True).loss_and_grads(model, guide, torch.randn(6))
    assert all(p.grad.abs().max() < 1e-12 for p in guide.parameters())
