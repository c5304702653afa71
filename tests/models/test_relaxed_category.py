# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0

import pyro.distributions as dist
import torch
from torch.distributions import Categorical, kl_divergence

from pyro_cpa.models.relaxed_category import RelaxedCategory

LOGITS = torch.tensor([[0.3, -1.0, 0.8], [2.0, 0.0, -3.0]], dtype=torch.float64)


def test_divergence_is_the_categorical_one():
    q, p = (
        RelaxedCategory(torch.tensor(0.5), logits=LOGITS),
        RelaxedCategory(torch.tensor(0.5), torch.ones(2, 3)),
    )
    expected = kl_divergence(Categorical(logits=LOGITS), Categorical(torch.ones(2, 3)))
    torch.testing.assert_close(kl_divergence(q, p), expected)
    wider = q.expand((4, 2))
    assert isinstance(wider, RelaxedCategory)
    torch.testing.assert_close(kl_divergence(wider, p.expand((4, 2))), expected.expand(4, 2))


def test_density_is_the_relaxed_one():
    q = RelaxedCategory(torch.tensor(0.5), logits=LOGITS)
    y = q.rsample((5,))
    theirs = dist.RelaxedOneHotCategorical(torch.tensor(0.5), logits=LOGITS)
    torch.testing.assert_close(q.log_prob(y), theirs.log_prob(y))


def test_low_temperature_draws_keep_a_finite_density_and_the_right_frequencies():
    logits = LOGITS.float()
    q = RelaxedCategory(torch.tensor(0.01, dtype=torch.float32), logits=logits)
    y = q.rsample((4000,))
    assert torch.isfinite(q.log_prob(y)).all()
    probs = logits.softmax(-1)
    frequency = torch.nn.functional.one_hot(y.argmax(-1), 3).float().mean(0)
    assert ((frequency - probs).abs() < 5 * (probs * (1 - probs) / 4000).sqrt()).all()
