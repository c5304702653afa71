# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Bayesian decoders: NUTS over weights with the latents integrated out exactly."""

import math

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS
from torch import nn

from pyro_cpa.distributions import CPAMarginal


class TwoWeights(nn.Module):
    """A decoder of one latent whose two output slopes are free."""

    def __init__(self, a, b):
        super().__init__()
        first, last = nn.Linear(1, 2), nn.Linear(2, 1, bias=False)
        first.weight.data = torch.tensor([[1.0], [-1.0]])
        first.bias.data = torch.tensor([0.2, 0.1])
        del last.weight
        last.weight = torch.stack([a, b])[None]
        self.body = nn.Sequential(first, nn.ReLU(), last)


def log_evidence(w, x):
    """log p(x) (M,) for M pairs of slopes w (M, 2) and data x (N, 1), by sums over a grid of the latent."""
    z = torch.linspace(-8, 8, 801)
    means = w[:, :1] * (z + 0.2).relu() + w[:, 1:] * (0.1 - z).relu()
    log_joint = dist.Normal(means[:, None], 0.3).log_prob(x) + dist.Normal(0.0, 1.0).log_prob(z)
    return (log_joint.logsumexp(-1) + math.log(0.02)).sum(-1)


def test_nuts_over_two_weights_recovers_a_grid_posterior():
    truth = torch.tensor([1.5, -0.7])
    x = CPAMarginal(TwoWeights(*truth).body, 0.3).sample((20,)).detach()
    torch.testing.assert_close(
        CPAMarginal(TwoWeights(*truth).body, 0.3).log_prob(x).sum()[None],
        log_evidence(truth[None], x),
        rtol=0,
        atol=1e-3,
    )
    centre = torch.tensor([1.3, -0.5])
    # z -> -z all but exchanges the two slopes: the prior tells them apart.
    prior = dist.Normal(centre, 0.25).to_event(1)

    def model():
        w = pyro.sample("w", prior)
        with pyro.plate("data", len(x)):
            pyro.sample("x", CPAMarginal(TwoWeights(w[0], w[1]).body, 0.3), obs=x)

    # Steps of one deviation of the posterior: sums over the grid are off by less than a thousandth of it.
    points = torch.cartesian_prod(torch.linspace(0.1, 2.5, 17), torch.linspace(-1.7, 0.7, 17))
    weights = (log_evidence(points, x) + prior.log_prob(points)).softmax(0)
    mean = weights @ points
    spread = (weights @ (points - mean) ** 2).sqrt()

    # A step of about one deviation of the posterior needs no adaptation, and a start amid the prior little warm-up.
    kernel = NUTS(model, step_size=0.15, adapt_step_size=False, adapt_mass_matrix=False, max_tree_depth=3)
    mcmc = MCMC(kernel, num_samples=120, warmup_steps=5, initial_params={"w": centre}, disable_progbar=True)
    mcmc.run()
    found = mcmc.get_samples()["w"]
    ess = mcmc.diagnostics()["w"]["n_eff"].clamp(max=120)
    assert (ess > 50).all()
    assert ((found.mean(0) - mean).abs() < 5 * spread / ess.sqrt()).all()
    assert ((found.std(0) / spread - 1).abs() < 5 / (2 * ess).sqrt()).all()
