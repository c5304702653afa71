# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Densities written out by hand, support checks, summaries."""

import math

import pytest
import torch

from pyro_cpa.errors import InvalidData
from pyro_cpa.models.likelihoods import Bernoulli, Categorical, ContinuousBernoulli, Normal

OUTPUTS = torch.tensor([[0.3, -1.2, 2.0], [0.0, 4.0, -0.7]], dtype=torch.float64)


def test_normal():
    scale = torch.tensor([0.5, 1.0, 2.0])
    x = torch.tensor([[0.0, 1.0, -1.0], [3.0, 2.0, 1.0]])
    by_hand = (-((x - OUTPUTS) ** 2) / (2 * scale**2) - scale.log() - math.log(2 * math.pi) / 2).sum(-1)
    likelihood = Normal(scale)
    torch.testing.assert_close(likelihood(OUTPUTS).log_prob(x), by_hand, rtol=1e-12, atol=0)
    assert torch.equal(likelihood.summary(OUTPUTS, "param"), OUTPUTS)
    assert [p.requires_grad for p in Normal(learn_scale=False).parameters()] == [False]
    (-likelihood(OUTPUTS).log_prob(x).sum()).backward()
    assert likelihood.log_scale.grad.shape == (3,)


def test_bernoulli():
    x = torch.tensor([[0.0, 1.0, 1.0], [1.0, 1.0, 0.0]])
    p = 1 / (1 + torch.exp(-OUTPUTS))
    by_hand = (x * p.log() + (1 - x) * (1 - p).log()).sum(-1)
    torch.testing.assert_close(Bernoulli()(OUTPUTS).log_prob(x), by_hand, rtol=1e-12, atol=0)
    torch.testing.assert_close(Bernoulli().summary(OUTPUTS, "param"), p)
    torch.testing.assert_close(Bernoulli().summary(OUTPUTS, "mean"), p)


def test_continuous_bernoulli_and_its_parameter_which_is_not_the_mean():
    x = torch.tensor([[0.1, 0.9, 0.5], [1.0, 0.7, 0.0]])
    lam = OUTPUTS.sigmoid()
    log_c = torch.where(lam == 0.5, math.log(2), (2 * torch.atanh(1 - 2 * lam) / (1 - 2 * lam)).log())
    by_hand = (x * lam.log() + (1 - x) * (1 - lam).log() + log_c).sum(-1)
    likelihood = ContinuousBernoulli()
    torch.testing.assert_close(likelihood(OUTPUTS).log_prob(x), by_hand, rtol=1e-12, atol=0)
    logits = torch.logit(torch.tensor([0.1, 0.9]))
    torch.testing.assert_close(likelihood.summary(logits, "param"), torch.tensor([0.1, 0.9]))
    assert likelihood.summary(logits, "mean").tolist() == pytest.approx([0.330, 0.670], abs=5e-4)


def test_categorical():
    likelihood = Categorical(3)
    outputs = torch.randn(4, 2 * 3)
    x = torch.tensor([[0, 2], [1, 1], [2, 0], [0, 0]]).to(outputs)
    table = outputs.reshape(4, 2, 3).log_softmax(-1)
    by_hand = table.gather(-1, x.long()[..., None]).sum((-1, -2))
    torch.testing.assert_close(likelihood(outputs).log_prob(x), by_hand)
    assert likelihood.features(x)[0].tolist() == [1, 0, 0, 0, 0, 1]
    assert likelihood.summary(outputs, "param").shape == (4, 2, 3)
    draw = likelihood.summary(outputs, "sample")
    assert draw.dtype == outputs.dtype
    likelihood.check(draw)
    with pytest.raises(InvalidData, match="categories have none"):
        likelihood.summary(outputs, "mean")


@pytest.mark.parametrize(
    "likelihood, good, bad, message",
    [
        (Bernoulli(), [0.0, 1.0], 0.5, r"x\[1, 0\] is 0.5; expected only 0 and 1. Binarise"),
        (ContinuousBernoulli(), [0.0, 1.0], 255.0, "255; expected a number in .0, 1.. Rescale"),
        (Normal(), [-3.0, 1e9], math.inf, "inf; expected a finite number"),
        (Categorical(4), [0.0, 3.0], 4.0, "expected an integer from 0 to 3. Recode"),
        (Categorical(4), [0.0, 3.0], 1.5, "expected an integer from 0 to 3"),
    ],
)
def test_support(likelihood, good, bad, message):
    likelihood.check(torch.tensor([good]))
    with pytest.raises(InvalidData, match=message):
        likelihood.check(torch.tensor([good, [bad, 0.0]]))
    with pytest.raises(InvalidData, match="nan.*no missing-data path"):
        likelihood.check(torch.tensor([[0.0, math.nan]]))


def test_bad_settings():
    with pytest.raises(InvalidData, match="positive number"):
        Normal(0.0)
    with pytest.raises(InvalidData, match="positive number"):
        Normal(torch.tensor([1.0, math.nan]))
    with pytest.raises(InvalidData, match="at least 2"):
        Categorical(1)
    with pytest.raises(InvalidData, match="choose 'sample', 'mean' or 'param'"):
        Bernoulli().summary(OUTPUTS, "mode")
