# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""What TVO reports: bounds at its nodes, the integrand and its picture, the sandwich on simulated data."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from binary_net import VARIANTS, BinaryNet, bits, three_x
from linear_gaussian import GaussianPair, LinearGaussian

from pyro_cpa.errors import CPAError, UnsupportedModel
from pyro_cpa.infer.schedules import Linear
from pyro_cpa.infer.thermodynamic import TVO
from pyro_cpa.infer.thermodynamic_path import riemann_weights

BETAS = [0.0, 0.1, 0.4, 1.0]


def test_the_importance_sampled_right_sum_is_no_upper_bound():
    parameters = torch.tensor([0.0, 1.0, -1.0, 4.0, -1.0])  # the guide misses the posterior
    exact, pair = LinearGaussian(parameters, x=0.9), GaussianPair(parameters)
    bounds = TVO(10, Linear(5), vectorize_particles=True).bounds(
        pair.model, pair.guide, torch.full((500,), 0.9)
    )
    assert exact.right(Linear(5).betas) > exact.evidence
    assert bounds.upper_snis / 500 < exact.evidence - 2


@pytest.mark.parametrize("variant", VARIANTS)
def test_diagnostics_describe_the_step(variant):
    net = BinaryNet()
    tvo = TVO(20, BETAS, "trapezoid", vectorize_particles=True)
    with pytest.raises(CPAError, match="no diagnostics"):
        tvo.diagnostics  # noqa: B018
    loss = tvo.loss_and_grads(net.model, net.guide, three_x(), **VARIANTS[variant])
    seen = tvo.diagnostics
    assert seen.bound == seen.trapezoid == pytest.approx(-loss, rel=1e-12)
    assert seen.elbo <= seen.lower <= seen.iwae <= seen.upper_snis
    assert (riemann_weights(seen.betas, "left") @ seen.eta).item() == pytest.approx(seen.lower, rel=1e-12)
    assert seen.eta.shape == seen.variance.shape == seen.ess.shape == (4,)
    assert seen.ess[0].item() == pytest.approx(20) and (seen.ess.diff() <= 0).all()
    assert not seen.eta.requires_grad


def test_bounds_and_integrand_approach_the_exact_curve():
    parameters = torch.tensor([0.2, 1.4, -0.3, -0.2, -0.4])
    exact, pair = LinearGaussian(parameters, x=0.9), GaussianPair(parameters)
    tvo, x = TVO(2, BETAS, vectorize_particles=True), torch.tensor([0.9])
    bounds = tvo.bounds(pair.model, pair.guide, x, num_particles=200_000)
    assert bounds.lower == pytest.approx(exact.left(torch.tensor(BETAS)).item(), abs=0.02)
    assert bounds.iwae == pytest.approx(exact.evidence.item(), abs=0.01)
    curve = tvo.integrand(pair.model, pair.guide, x, betas=21, num_particles=200_000)
    expected = torch.stack([exact.eta(b) for b in curve.betas])
    assert ((curve.eta - expected).abs() < 5 * curve.standard_error + 1e-3).all()
    assert torch.allclose(curve.variance, torch.stack([exact.var(b) for b in curve.betas]), rtol=0.05)
    assert torch.trapezoid(curve.eta, curve.betas).item() == pytest.approx(exact.evidence.item(), abs=0.02)
    assert torch.allclose(curve.node_eta[-1], curve.eta[-1]) and len(curve.nodes) == 4
    assert tvo.integrand(pair.model, pair.guide, x, betas=torch.tensor([0.0, 0.3])).eta.shape == (2,)
    with pytest.raises(CPAError, match="betas"):
        tvo.integrand(pair.model, pair.guide, x, betas=torch.tensor([0.0, 1.3]))
    assert not curve.eta.requires_grad and pair.values.grad is None


def test_curve_can_be_drawn():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    net = BinaryNet()
    curve = TVO(20, BETAS).integrand(net.model, net.guide, three_x())
    ax = curve.plot()
    assert len(ax.patches) == 3 and curve.plot(ax) is ax
    heights = [patch.get_y() + patch.get_height() for patch in ax.patches[:3]]
    assert heights == pytest.approx(curve.node_eta[:-1].tolist())
    matplotlib.pyplot.close("all")


def test_simulated_sandwich_holds_the_enumerated_evidence():
    net, rows = BinaryNet(), 4000
    x = bits(4)
    log_p, log_q = net.log_joint(x), net.log_guide(x)
    evidence = log_p.logsumexp(0)
    expected = rows * (evidence.exp() * evidence).sum().item()
    eubo = rows * (log_p.exp() * (log_p - log_q)).sum().item()
    tvo = TVO(5, Linear(1), vectorize_particles=True)
    seen = tvo.simulated_sandwich(net.model, net.guide, torch.zeros(rows, 4))
    # The lower bounds and the upper ones are on the evidence of the same simulated data.
    assert seen.elbo <= seen.lower + 1e-9 and seen.lower <= seen.iwae
    assert seen.iwae < expected + 5 * seen.lower_error
    assert expected - 5 * seen.upper_error < seen.iwae_upper <= seen.upper
    assert abs(seen.eubo - eubo) < 5 * seen.upper_error
    # The right end of the curve of the joint sample has the EUBO as its expectation.
    assert abs(seen.upper - eubo) < 5 * seen.upper_error
    many = tvo.simulated_sandwich(net.model, net.guide, torch.zeros(rows, 4), num_particles=300)
    assert many.iwae_upper - many.iwae < 0.1 * (many.eubo - many.elbo)


def test_simulation_shows_data_to_the_guide_by_keyword_or_refuses():
    def model(observations):
        with pyro.plate("data", 50):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=observations["x"])

    def guide(observations):
        with pyro.plate("data", 50):
            pyro.sample("z", dist.Normal(observations["x"] / 2, math.sqrt(0.5)))

    def closed_over():
        model(data)

    def blind():
        guide(data)

    data = {"x": torch.zeros(50)}
    seen = TVO(4, BETAS).simulated_sandwich(model, guide, observations=data)
    assert seen.eubo == pytest.approx(seen.elbo, rel=1e-10)
    with pytest.raises(UnsupportedModel, match="'x'.*observations"):
        TVO(4).simulated_sandwich(closed_over, blind)
    with pytest.raises(UnsupportedModel, match="plates"):
        TVO(4, plates=("data",)).simulated_sandwich(model, guide, observations=data)
