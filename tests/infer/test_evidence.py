# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
import pyro
import pyro.distributions as dist
import pytest
import torch
from exact_pairs import Exact, circle

from pyro_cpa.distributions import CPAMarginal
from pyro_cpa.errors import InvalidData
from pyro_cpa.infer import AutoCPAPosterior, log_evidence, pointwise_log_likelihood


def model(x, subsample_size=None):
    with pyro.plate("data", len(x), subsample_size=subsample_size) as index:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(2 * z, 1.0), obs=x[index])


def guide(x, subsample_size=None):
    with pyro.plate("data", len(x), subsample_size=subsample_size) as index:
        pyro.sample("z", dist.Normal(0.3 * x[index], 0.6))


X = [0.0, 1.0, -2.0]


@pytest.mark.parametrize(
    "options", [{}, {"chunk_size": 700}, {"vectorize_particles": False, "num_particles": 300}]
)
def test_estimate_within_its_standard_error(options):
    x = torch.tensor(X)
    found = log_evidence(model, guide, x, **({"num_particles": 5000} | options))
    exact = dist.Normal(0.0, 5.0**0.5).log_prob(x)
    assert ((found.log_prob - exact).abs() < 5 * found.standard_error).all()
    assert not found.exact and (found.ess > 1).all() and found.log_prob.shape == (3,)


def test_standard_error_is_that_of_repeated_runs():
    x = torch.tensor(X)
    runs = [log_evidence(model, guide, x, num_particles=200) for _ in range(400)]
    spread = torch.stack([r.log_prob for r in runs]).std(0)
    claimed = torch.stack([r.standard_error for r in runs]).square().mean(0).sqrt()
    # The standard deviation of 400 runs is itself known to 1/sqrt(800).
    assert ((spread / claimed - 1).abs() < 5 / 800**0.5).all()


def test_subsampling_does_not_scale_and_zero_error_for_an_exact_posterior():
    def exact(x, subsample_size=None):
        with pyro.plate("data", len(x), subsample_size=subsample_size) as index:
            pyro.sample("z", dist.Normal(0.4 * x[index], 0.2**0.5))

    x = torch.zeros(10)
    found = log_evidence(model, exact, x, subsample_size=4, num_particles=7)
    torch.testing.assert_close(found.log_prob, dist.Normal(0.0, 5.0**0.5).log_prob(x[:4]))
    # Rounding of equal weights is magnified by the square root.
    assert (found.standard_error < 1e-7).all() and torch.allclose(found.ess, torch.full((4,), 7.0))


def test_exact_guides_need_no_particles():
    pair = Exact(1, 5, 2)
    x = circle(6)
    found = log_evidence(pair, AutoCPAPosterior(pair, decoder=pair.decoder), x)
    expected = CPAMarginal(pair.decoder, pair.noise).log_prob(x).detach()
    torch.testing.assert_close(found.log_prob, expected, rtol=1e-12, atol=1e-12)
    assert found.exact and (found.standard_error == 0).all() and not found.log_prob.requires_grad


def test_pointwise_log_likelihood_masks_and_shapes():
    def masked(x, keep):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3), pyro.poutine.mask(mask=keep):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        pyro.deterministic("twice", 2 * z)

    keep = torch.tensor([True, False, True])
    found = pointwise_log_likelihood(
        masked,
        lambda x, keep: pyro.sample("z", dist.Delta(torch.tensor(0.5))),
        torch.tensor(X),
        keep,
        num_samples=4,
    )
    assert set(found) == {"x"}
    expected = torch.where(keep, dist.Normal(0.5, 1.0).log_prob(torch.tensor(X)), 0.0)
    torch.testing.assert_close(found["x"], expected.expand(1, 4, 3))


def test_bad_counts():
    with pytest.raises(InvalidData, match="at least 2"):
        log_evidence(model, guide, torch.zeros(2), num_particles=1)
    with pytest.raises(InvalidData, match="at least 1"):
        pointwise_log_likelihood(model, guide, torch.zeros(2), num_samples=0)
