# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Functions and properties return the public classes that their pages lead to, and objectives share one base."""

from __future__ import annotations

import pyro.distributions as dist
import pytest
import torch

from pyro_cpa.criticism import Comparison, NearestPoint, RocCurve, compare, manifold_distance, roc_curve
from pyro_cpa.datasets import Dataset, FactorAnalysisToy, factor_analysis_toy, load_digits
from pyro_cpa.distributions import CPAConditional, CPAMarginal, CPAPosterior
from pyro_cpa.infer import (
    TVO,
    AbstractMultiSampleELBO,
    BiHelmholtzELBO,
    Evidence,
    ImportanceWeightedELBO,
    ReweightedWakeSleepELBO,
    log_evidence,
)
from pyro_cpa.models import BidirectionalHelmholtzMachine, CPAGenerator, GaussianNoise, HelmholtzChain


def marginal():
    return CPAMarginal(torch.nn.Linear(1, 2), 0.5)


def evidence():
    generator = CPAGenerator(data_dim=2, hidden_dims=(3,))
    return log_evidence(generator.model, generator.guide, torch.zeros(3, 2))


RETURNED = {
    CPAPosterior: lambda: marginal().posterior(torch.zeros(3, 2)),
    CPAConditional: lambda: marginal().conditional(torch.zeros(3, 2)),
    Comparison: lambda: compare({"one": dist.Normal(torch.zeros(1), 1.0).to_event(1)}, torch.ones(3, 1)),
    Dataset: load_digits,
    Evidence: evidence,
    FactorAnalysisToy: factor_analysis_toy,
    GaussianNoise: lambda: CPAGenerator(data_dim=2, hidden_dims=(3,)).likelihood,
    HelmholtzChain: lambda: BidirectionalHelmholtzMachine(6, (3,)).chain(torch.zeros(4, 6)),
    NearestPoint: lambda: manifold_distance(marginal(), torch.zeros(3, 2)),
    RocCurve: lambda: roc_curve([True, False], [1.0, 0.0]),
}


@pytest.mark.parametrize("expected", RETURNED, ids=lambda expected: expected.__name__)
def test_what_is_returned(expected):
    assert isinstance(RETURNED[expected](), expected)


@pytest.mark.parametrize(
    "objective",
    [BiHelmholtzELBO, ImportanceWeightedELBO, ReweightedWakeSleepELBO, TVO],
    ids=lambda c: c.__name__,
)
def test_objectives_of_particles_share_their_base(objective):
    assert isinstance(objective(2), AbstractMultiSampleELBO)
