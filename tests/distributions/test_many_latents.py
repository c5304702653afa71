# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Four latents and more: estimates within their standard errors, and draws, of decoders whose evidence is known."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from latent_products import product
from torch import nn

from pyro_cpa.criticism import compare
from pyro_cpa.distributions import CPAMarginal
from pyro_cpa.infer import EM, AutoCPAPosterior, log_evidence
from pyro_cpa.integrals import EstimatedPolytopes
from pyro_cpa.models import ConditionalCPAGenerator, CPAGenerator

pytestmark = pytest.mark.filterwarnings("ignore:the normal matrix")


@pytest.fixture(scope="module")
def case():
    torch.set_default_dtype(torch.float64)
    return product((3, 1))


def data(case, far=False):
    torch.manual_seed(5)
    x = case.joint.sample((4,)).detach()
    if far:
        x = x + 10 * torch.randn_like(x)
    x[0, 1], x[1, :3] = torch.nan, torch.nan
    return x


@pytest.mark.parametrize("far", [False, True])
def test_evidence_lies_within_its_standard_error(case, far):
    x = data(case, far)
    truth = case.sum(lambda px, block: px.log_prob(block), x).detach()
    found, error = case.joint.log_prob(x, return_error=True)
    assert (far or (error > 0).all()) and error.max() < 0.05
    # What happens to fewer than one in 1024 points may be seen by none, and not by the standard error either.
    assert ((found - truth).abs() < 6 * error + 1e-4).all()
    if far:
        assert truth.min() < -300
    with torch.no_grad():
        torch.testing.assert_close(case.joint.log_prob(x[1:3]), found[1:3], rtol=1e-12, atol=1e-10)
    torch.testing.assert_close(case.joint.log_prob(x[1:3]).detach(), found[1:3], rtol=1e-12, atol=1e-10)


def test_the_standard_error_falls_with_the_points(case):
    x = data(case)
    truth = case.sum(lambda px, block: px.log_prob(block), x).detach()
    errors = []
    for num_points in (256, 4096):
        px = CPAMarginal(
            case.joint.partition,
            case.noise,
            loc=case.shift,
            prior_covariance=case.turn @ case.turn.mT,
            num_points=num_points,
        )
        found, error = px.log_prob(x, return_error=True)
        assert ((found - truth).abs() < 6 * error + 0.1 / num_points).all()
        errors.append(error.mean().item())
    assert errors[1] < 0.4 * errors[0]


def test_exact_evidence_has_no_error():
    px = CPAMarginal(nn.Sequential(nn.Linear(1, 3), nn.ReLU(), nn.Linear(3, 2)), 0.5)
    x = px.sample((3, 2)).detach()
    found, error = px.log_prob(x, return_error=True)
    assert torch.equal(found, px.log_prob(x).detach()) and torch.equal(error, torch.zeros(3, 2))
    affine = CPAMarginal(nn.Linear(5, 3), 0.5)
    assert affine.log_prob(torch.zeros(2, 3), return_error=True)[1].eq(0).all()


def test_a_product_of_lines_has_no_error():
    """Cells are boxes for the whitened Gaussians then, for which every point has the same weight."""
    lines = product(4)
    x = data(lines)
    found, error = lines.joint.log_prob(x, return_error=True)
    truth = lines.sum(lambda px, block: px.log_prob(block), x).detach()
    torch.testing.assert_close(found, truth, rtol=1e-7, atol=1e-7)
    assert error.max() < 1e-7


def test_same_values_every_time_and_no_global_generator(case):
    x = data(case)[:2]
    state = torch.get_rng_state()
    first = case.joint.log_prob(x)
    assert torch.equal(first, case.joint.log_prob(x)) and torch.equal(state, torch.get_rng_state())


def test_posterior_factorises_within_the_error(case):
    x = data(case)
    posterior = case.joint.posterior(x)
    parts = case.each(lambda px, block: px.posterior(block), x)
    mean = case.from_parts(torch.cat([p.mean for p in parts], dim=1))
    blocks = torch.zeros(len(x), 4, 4)
    blocks[:, :3, :3], blocks[:, 3:, 3:] = (p.covariance_matrix for p in parts)
    covariance = case.turn @ blocks @ case.turn.mT
    deviation = covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    assert ((posterior.mean - mean).abs() < 0.05 * deviation).all()
    scaled = (posterior.covariance_matrix - covariance) / (deviation[:, :, None] * deviation[:, None])
    assert scaled.abs().max() < 0.1
    assert (
        posterior.entropy() - sum(p.entropy() for p in parts) - case.turn.det().abs().log()
    ).abs().max() < 0.1
    count = 2000
    draws = posterior.sample((count,))
    white = torch.linalg.solve_triangular(
        torch.linalg.cholesky(covariance), (draws - mean)[..., None], upper=False
    )[..., 0]
    # Of the draws 5 standard errors, of the regions' estimated probabilities what they may shift the mean by.
    assert white.mean(0).abs().max() < 5 / count**0.5 + 0.02
    assert (white.square().mean(0) - 1).abs().max() < 0.35


def test_gradient_is_that_of_the_exact_evidence(case):
    x = data(case)
    noise = case.noise.clone().requires_grad_()
    options = {"loc": case.shift, "prior_covariance": case.turn @ case.turn.mT, "num_points": 4096}
    (found,) = torch.autograd.grad(
        CPAMarginal(case.joint.partition, noise, **options).log_prob(x).sum(), noise
    )
    parts = []
    for px, scale, block in zip(
        case.parts, case.noise.split(case.outputs), x.split(case.outputs, dim=-1), strict=True
    ):
        leaf = scale.clone().requires_grad_()
        parts += torch.autograd.grad(CPAMarginal(px.partition, leaf).log_prob(block).sum(), leaf)
    torch.testing.assert_close(found, torch.cat(parts), rtol=0.03, atol=0.05)


def test_guide_generator_and_comparison_tell_the_error():
    pyro.set_rng_seed(1)
    model = CPAGenerator(4, latent_dim=4, hidden_dims=(5,), noise="diagonal", noise_scale=0.5)
    x = model.generate(3).detach()
    found = model.log_evidence(x)
    assert not found.exact and (found.standard_error > 0).all() and (found.ess < 100).all()
    again = log_evidence(model.model, model.guide, x, num_particles=10)
    torch.testing.assert_close(again.log_prob, found.log_prob)
    torch.testing.assert_close(again.standard_error, found.standard_error)
    assert isinstance(model.marginal().joint.cells, EstimatedPolytopes)
    x[0, 1] = torch.nan
    assert model.impute(x).isfinite().all() and model.impute(x, 2).shape == (2, 3, 4)
    normal = dist.Normal(torch.zeros(4), 1.0).to_event(1)
    assert compare({"cpa": model.marginal(), "normal": normal}, x.nan_to_num()) is not None


def test_the_estimate_never_falls_in_em():
    pyro.set_rng_seed(0)
    model = CPAGenerator(5, latent_dim=4, hidden_dims=(4,), noise="diagonal", noise_scale=0.8)
    x = torch.randn(12, 3) @ torch.randn(3, 5) + 0.3 * torch.randn(12, 5)
    em = EM(model.model, AutoCPAPosterior(model.model, decoder=model.decoder, num_points=256))
    losses = [em.step(x) for _ in range(3)] + [em.evaluate_loss(x)]
    assert all(b <= a + 1e-9 * abs(a) for a, b in zip(losses, losses[1:], strict=False))
    assert losses[-1] < losses[0] - 5


def test_quantiles_of_a_product_of_four():
    straight = product(4, turned=False)
    x = straight.joint.sample((1,)).detach()
    found = straight.joint.posterior(x).quantiles([0.5])
    parts = straight.each(lambda px, block: px.posterior(block), x)
    deviation = torch.cat([p.variance for p in parts], dim=-1).sqrt()
    expected = torch.cat([p.quantiles([0.5]) for p in parts], dim=-1)
    assert ((found - expected).abs() < 0.1 * deviation).all()


@pytest.mark.parametrize("labels", [None, torch.tensor([0, 1, 1])])
def test_mixtures_tell_an_error_too(labels):
    pyro.set_rng_seed(2)
    model = ConditionalCPAGenerator(3, 2, latent_dim=4, hidden_dims=(5,))
    x = torch.randn(3, 3)
    found = model.log_evidence(x, labels)
    assert not found.exact and (found.standard_error > 0).all() and (found.standard_error < 0.1).all()
    torch.testing.assert_close(found.log_prob, model.log_prob(x, labels).detach())
