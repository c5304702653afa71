# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Stacking weights against a general-purpose optimiser and a case solved by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import optimize

from pyro_cpa.criticism import stacking_weights
from pyro_cpa.errors import InvalidData


def score(weights, log_prob):
    return np.log(weights @ np.exp(log_prob)).mean()


@pytest.mark.parametrize("seed", range(4))
def test_against_constrained_optimisation(seed):
    random = np.random.default_rng(seed)
    log_prob = random.normal(size=(4, 60)) * 2 - 3
    found = stacking_weights(log_prob)
    reference = optimize.minimize(
        lambda w: -score(w, log_prob),
        np.full(4, 0.25),
        bounds=[(0, 1)] * 4,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
        options={"ftol": 1e-12},
    )
    assert found.sum() == pytest.approx(1.0, abs=1e-14)
    assert (found >= 0).all()
    assert score(found, log_prob) >= -reference.fun - 1e-6
    np.testing.assert_allclose(found, reference.x, atol=5e-3)


def test_two_experts_split_the_data():
    """70 data only the first explains, 30 only the second: the weights are 0.7 and 0.3."""
    p = np.full((2, 100), 1e-30)
    p[0, :70] = p[1, 70:] = 1.0
    np.testing.assert_allclose(stacking_weights(np.log(p)), [0.7, 0.3], atol=1e-6)


def test_scale_of_the_densities_does_not_matter():
    log_prob = np.random.default_rng(5).normal(size=(3, 20))
    np.testing.assert_allclose(stacking_weights(log_prob), stacking_weights(log_prob - 2000.0), atol=1e-9)


def test_a_model_may_forbid_a_datum_but_not_all_models():
    weights = stacking_weights(np.array([[0.0, -np.inf], [-1.0, -1.0]]))
    assert 0 < weights[0] < 1
    with pytest.raises(InvalidData, match="at least one model at every datum"):
        stacking_weights(np.array([[0.0, -np.inf], [-1.0, -np.inf]]))
    with pytest.raises(InvalidData, match="did not come within"):
        stacking_weights(np.array([[0.0, -3.0], [-1.0, -1.0]]), max_iter=1)
