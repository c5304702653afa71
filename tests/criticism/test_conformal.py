# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Conformal p-values: the definition, the guarantee, and the law of the rate given the calibration set."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from pyro_cpa.criticism import ConformalDetector
from pyro_cpa.errors import InvalidData


def identity(x):
    return x


def test_p_values_by_definition_with_ties():
    random = np.random.default_rng(0)
    calibration, x = random.integers(0, 6, 37), random.integers(-1, 8, 200)
    detector = ConformalDetector(identity, calibration)
    expected = (1 + (calibration >= x[:, None]).sum(1)) / 38
    np.testing.assert_allclose(detector.p_values(x), expected, rtol=1e-15)


@pytest.mark.parametrize("level", [0.01, 0.05, 0.1, 0.3, 0.99])
@pytest.mark.parametrize("n", [9, 29, 99])
def test_threshold_and_p_values_flag_the_same_data(n, level):
    random = np.random.default_rng(n)
    detector = ConformalDetector(identity, random.integers(0, 20, n))
    x = random.integers(-2, 25, 500)
    np.testing.assert_array_equal(detector.flags(x, level), detector.p_values(x) <= level + 1e-12)


@pytest.mark.parametrize("ties", [False, True])
def test_guarantee_at_small_n(ties):
    """20,000 calibration sets of 12 data: P(p <= level) <= level, within 5 standard errors."""
    random = np.random.default_rng(1)
    scores = random.standard_cauchy((20_000, 13))
    scores = np.round(scores) if ties else scores
    p = np.array([ConformalDetector(identity, row[:-1]).p_values(row[-1:])[0] for row in scores])
    for level in (1 / 13, 0.2, 0.5):
        error = math.sqrt(level * (1 - level) / len(p))
        assert (p <= level).mean() <= level + 5 * error
        if not ties:
            exact = math.floor(level * 13 + 1e-9) / 13
            assert abs((p <= level).mean() - exact) < 5 * error


@pytest.mark.parametrize(("n", "level"), [(50, 0.1), (99, 0.05), (1000, 0.01)])
def test_false_alarm_bound_is_a_beta_quantile(n, level):
    detector = ConformalDetector(identity, np.arange(n))
    flagged = math.floor(level * (n + 1) + 1e-9)
    for confidence in (0.5, 0.9, 0.999):
        expected = stats.beta.ppf(confidence, flagged, n + 1 - flagged)
        assert detector.false_alarm_bound(level, confidence) == pytest.approx(expected, abs=1e-10)


def test_levels_below_the_resolution_flag_nothing():
    detector = ConformalDetector(identity, np.arange(9))
    assert detector.smallest_level == 0.1
    assert detector.threshold(0.09) == math.inf
    assert detector.false_alarm_bound(0.09) == 0.0
    assert not detector.flags([1e9], 0.09).any()
    assert detector.flags([1e9], 0.1).all()


def test_mistakes_are_named():
    with pytest.raises(InvalidData, match="got none"):
        ConformalDetector(identity, [])
    with pytest.raises(InvalidData, match="1 of 2 rows is NaN"):
        ConformalDetector(identity, [0.0, math.nan])
    detector = ConformalDetector(identity, [0.0])
    with pytest.raises(InvalidData, match="level must lie"):
        detector.threshold(1.0)
    with pytest.raises(InvalidData, match="confidence must lie"):
        detector.false_alarm_bound(0.5, 0.0)
