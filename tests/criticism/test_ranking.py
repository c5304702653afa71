# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""ROC, AUC and average precision against scikit-learn and against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics

from pyro_cpa.criticism import average_precision, roc_auc, roc_curve
from pyro_cpa.errors import InvalidData


def cases():
    random = np.random.default_rng(0)
    for n, decimals in ((5, 6), (40, 1), (300, 6), (300, 0)):
        labels = random.random(n) < 0.3
        labels[:2] = True, False
        yield labels, np.round(random.normal(size=n) + labels, decimals)


@pytest.mark.parametrize(("labels", "score"), list(cases()))
def test_against_scikit_learn(labels, score):
    assert roc_auc(labels, score) == pytest.approx(metrics.roc_auc_score(labels, score), abs=1e-14)
    expected = metrics.average_precision_score(labels, score)
    assert average_precision(labels, score) == pytest.approx(expected, abs=1e-14)
    false_alarms, detections, thresholds = metrics.roc_curve(labels, score, drop_intermediate=False)
    curve = roc_curve(labels, score)
    np.testing.assert_allclose(curve.false_alarm_rate, false_alarms, atol=1e-15)
    np.testing.assert_allclose(curve.detection_rate, detections, atol=1e-15)
    np.testing.assert_array_equal(curve.thresholds, thresholds)


@pytest.mark.parametrize(("labels", "score"), list(cases()))
def test_auc_is_the_probability_of_the_right_order(labels, score):
    pairs = score[labels][:, None] - score[~labels]
    assert roc_auc(labels, score) == pytest.approx((pairs > 0).mean() + (pairs == 0).mean() / 2, abs=1e-14)


def test_infinite_scores_are_scores():
    assert roc_auc([0, 1, 1], [-np.inf, 0.0, np.inf]) == 1.0


def test_mistakes_are_named():
    with pytest.raises(InvalidData, match="1 scores are NaN"):
        roc_auc([0, 1], [0.0, np.nan])
    with pytest.raises(InvalidData, match="both classes"):
        average_precision([1, 1], [0.0, 1.0])
    with pytest.raises(InvalidData, match="one score per label"):
        roc_curve([0, 1], [0.0])
