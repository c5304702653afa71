# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Bayesian decoders: NUTS over weights with the latents integrated out exactly."""

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


def log_evidence(a, b, x):
    return CPAMarginal(TwoWeights(a, b).body, 0.3).log_prob(x).sum()


def test_nuts_over_two_weights_recovers_a_grid_posterior():
    truth = torch.tensor([1.5, -0.7])
    x = CPAMarginal(TwoWeights(*truth).body, 0.3).sample((12,)).detach()

    def model():
        w = pyro.sample("w", dist.Normal(torch.tensor([1.3, -0.5]), 0.25).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", CPAMarginal(TwoWeights(w[0], w[1]).body, 0.3), obs=x)

    # z -> -z all but exchanges the two slopes: the prior tells them apart.
    prior = dist.Normal(torch.tensor([1.3, -0.5]), 0.25).to_event(1)
    # Steps of one deviation of the posterior: sums over the grid are off by less than a thousandth of it.
    points = torch.cartesian_prod(torch.linspace(0.1, 2.5, 17), torch.linspace(-1.7, 0.7, 17))
    with torch.no_grad():
        log_post = torch.stack([log_evidence(p[0], p[1], x) for p in points]) + prior.log_prob(points)
    weights = log_post.softmax(0)
    mean = weights @ points
    spread = (weights @ (points - mean) ** 2).sqrt()

    mcmc = MCMC(
        NUTS(model, step_size=0.2, max_tree_depth=4), num_samples=300, warmup_steps=60, disable_progbar=True
    )
    mcmc.run()
    found = mcmc.get_samples()["w"]
    ess = mcmc.diagnostics()["w"]["n_eff"].clamp(max=300)
    assert (ess > 50).all()
    assert ((found.mean(0) - mean).abs() < 5 * spread / ess.sqrt()).all()
    assert ((found.std(0) / spread - 1).abs() < 5 / (2 * ess).sqrt()).all()
