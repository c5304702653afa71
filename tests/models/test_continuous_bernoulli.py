# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""The logit form against mpmath at 40 digits, and against torch's class where that is good."""

import math

import mpmath as mp
import pytest
import torch
from torch.distributions import ContinuousBernoulli

from pyro_cpa.models.continuous_bernoulli import LogitContinuousBernoulli

LOGITS = [-2000.0, -500.0, -30.0, -3.0, -0.21, -0.19, -1e-3, -1e-9, 0.0, 1e-9, 0.15, 0.3, 2.0, 40.0, 900.0]


def exact(t: float) -> dict[str, mp.mpf]:
    """log normaliser, mean and variance of the density exp(t x) / Z on [0, 1]."""
    with mp.workdps(60):
        t = mp.mpf(t)
        if t == 0:
            return {"log_z": mp.mpf(0), "mean": mp.mpf(1) / 2, "variance": mp.mpf(1) / 12}
        return {
            "log_z": mp.log(mp.expm1(t) / t),
            "mean": 1 + 1 / mp.expm1(t) - 1 / t,
            "variance": 1 / t**2 - 1 / (4 * mp.sinh(t / 2) ** 2),
        }


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 2e-13), (torch.float32, 2e-5)])
@pytest.mark.parametrize("t", LOGITS)
def test_density_and_moments_against_mpmath(t, dtype, tolerance):
    logit = torch.tensor(t, dtype=dtype)
    truth = exact(logit.item())
    d = LogitContinuousBernoulli(logits=logit)
    for x in (0.0, 0.002, 0.4, 1.0):
        x = torch.tensor(x, dtype=dtype)
        expected = float(mp.mpf(logit.item()) * x.item() - truth["log_z"])
        assert d.log_prob(x).item() == pytest.approx(expected, rel=tolerance, abs=tolerance)
    assert d.mean.item() == pytest.approx(float(truth["mean"]), rel=10 * tolerance)
    assert d.variance.item() == pytest.approx(float(truth["variance"]), rel=100 * tolerance)
    entropy = float(truth["log_z"] - mp.mpf(logit.item()) * truth["mean"])
    assert d.entropy().item() == pytest.approx(entropy, rel=10 * tolerance, abs=10 * tolerance)
    assert d.stddev.item() == pytest.approx(float(mp.sqrt(truth["variance"])), rel=100 * tolerance)


@pytest.mark.parametrize("t", [-500.0, -3.0, -1e-9, 0.0, 1e-9, 2.0, 500.0])
def test_distribution_function_and_its_inverse(t):
    d = LogitContinuousBernoulli(logits=torch.tensor(t))
    x = torch.tensor([0.0, 1e-4, 0.3, 0.9999, 1.0])
    with mp.workdps(60):
        truth = [float(mp.expm1(t * mp.mpf(v)) / mp.expm1(t)) if t else v for v in x.tolist()]
    torch.testing.assert_close(d.cdf(x), torch.tensor(truth), rtol=1e-12, atol=1e-14)
    level = torch.tensor([0.0, 1e-12, 0.1, 0.5, 0.99, 1.0])
    torch.testing.assert_close(d.cdf(d.icdf(level)), level, rtol=1e-12, atol=1e-14)


def test_agrees_with_torch_away_from_saturation_and_is_right_beyond():
    logits = torch.linspace(-9.0, 9.0, 19) + 0.05
    x = torch.rand(19)
    ours, theirs = LogitContinuousBernoulli(logits=logits), ContinuousBernoulli(logits=logits)
    torch.testing.assert_close(ours.log_prob(x), theirs.log_prob(x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ours.mean, theirs.mean, rtol=1e-7, atol=1e-9)
    black = torch.tensor(-500.0, dtype=torch.float32)
    nearly_zero = torch.tensor(0.002, dtype=torch.float32)
    assert ContinuousBernoulli(logits=black).log_prob(nearly_zero).item() == pytest.approx(1.769, abs=1e-3)
    right = LogitContinuousBernoulli(logits=black).log_prob(nearly_zero).item()
    assert right == pytest.approx(math.log(500) - 1, rel=1e-5)


@pytest.mark.parametrize("t", [-800.0, -5.0, -0.2, 0.0, 0.19, 7.0])
def test_gradients(t):
    logits = torch.tensor([t], requires_grad=True)
    x = torch.tensor([0.3])
    assert torch.autograd.gradcheck(lambda v: LogitContinuousBernoulli(logits=v).log_prob(x), logits)
    level = torch.tensor([0.7])
    assert torch.autograd.gradcheck(lambda v: LogitContinuousBernoulli(logits=v).icdf(level), logits)


def test_samples_have_the_moments_and_expand_keeps_the_class():
    d = LogitContinuousBernoulli(logits=torch.tensor([-40.0, 0.0, 3.0])).expand((2, 3))
    assert isinstance(d, LogitContinuousBernoulli) and d.batch_shape == (2, 3)
    x = d.sample((20_000,))
    assert ((x.mean(0) - d.mean).abs() < 5 * d.stddev / 20_000**0.5).all()
    assert d.rsample().shape == (2, 3)
    with pytest.raises(ValueError, match="support"):
        d.log_prob(torch.tensor(1.5))


def test_float32_draws_have_no_wild_tail():
    """At t = 500 a uniform draw of 0 is x = 1 - 0.2 or so in float32, not x = 0."""
    d = LogitContinuousBernoulli(logits=torch.tensor([500.0, -500.0], dtype=torch.float32))
    x = d.icdf(torch.tensor([1e-30, 1 - 6e-8], dtype=torch.float32))
    assert x.tolist() == pytest.approx([1 - math.log(1e30) / 500, -math.log(6e-8) / 500], rel=1e-3)
