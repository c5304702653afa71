# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""How well a score separates two classes: ROC curve, area under it, average precision."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ..errors import InvalidData

__all__ = ["RocCurve", "average_precision", "roc_auc", "roc_curve"]


class RocCurve(NamedTuple):
    """Rates at every threshold, from "nothing flagged" to "everything flagged"; all (T + 1,)."""

    false_alarm_rate: np.ndarray
    detection_rate: np.ndarray
    thresholds: np.ndarray


def roc_curve(is_anomaly: Any, score: Any) -> RocCurve:
    r"""Detection rate against false-alarm rate of the rule "flag where score >= threshold".

    .. math:: \mathrm{detection}(t) = \frac{\#\{\text{anomalies with score} \ge t\}}{\#\text{anomalies}}

    Args:
        is_anomaly: (N,) true labels.
        score: (N,) scores, higher is stranger.

    Returns:
        One point per distinct score after the origin; ties move the curve along a diagonal.

    Raises:
        InvalidData: a score is NaN, lengths differ, or a class is empty.

    Note:
        Exact; one sort.

    Example:
        >>> roc_curve([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8]).detection_rate.tolist()
        [0.0, 0.5, 0.5, 1.0, 1.0]
    """
    labels, score = _check(is_anomaly, score)
    hits, alarms, thresholds = _counts(labels, score)
    return RocCurve(
        np.concatenate([[0.0], alarms / alarms[-1]]),
        np.concatenate([[0.0], hits / hits[-1]]),
        np.concatenate([[np.inf], thresholds]),
    )


def roc_auc(is_anomaly: Any, score: Any) -> float:
    r"""Area under the ROC curve: the probability that an anomaly scores above a normal datum, ties by half.

    .. math:: \mathrm{AUC} = P(s_1 > s_0) + \tfrac12 P(s_1 = s_0)

    Args:
        is_anomaly: (N,) true labels.
        score: (N,) scores, higher is stranger.

    Returns:
        A number in [0, 1].

    Raises:
        InvalidData: as :func:`roc_curve`.

    Example:
        >>> roc_auc([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8])
        0.75
    """
    curve = roc_curve(is_anomaly, score)
    heights = (curve.detection_rate[1:] + curve.detection_rate[:-1]) / 2
    return float(np.diff(curve.false_alarm_rate) @ heights)


def average_precision(is_anomaly: Any, score: Any) -> float:
    r"""Mean precision over the anomalies as the threshold falls, without interpolation.

    .. math:: \mathrm{AP} = \sum_t (\mathrm{recall}_t - \mathrm{recall}_{t-1}) \, \mathrm{precision}_t

    Args:
        is_anomaly: (N,) true labels.
        score: (N,) scores, higher is stranger.

    Returns:
        A number in (0, 1]; a useless score gets the share of anomalies.

    Raises:
        InvalidData: as :func:`roc_curve`.

    Example:
        >>> round(average_precision([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8]), 4)
        0.8333
    """
    labels, score = _check(is_anomaly, score)
    hits, alarms, _ = _counts(labels, score)
    recall = np.concatenate([[0.0], hits / hits[-1]])
    return float(np.diff(recall) @ (hits / (hits + alarms)))


def _check(is_anomaly: Any, score: Any) -> tuple[np.ndarray, np.ndarray]:
    labels, score = np.asarray(is_anomaly, dtype=bool).ravel(), np.asarray(score, dtype=float).ravel()
    if labels.shape != score.shape:
        raise InvalidData(f"expected one score per label, got {score.size} scores and {labels.size} labels")
    if np.isnan(score).any():
        raise InvalidData(f"{int(np.isnan(score).sum())} scores are NaN: a score must order every datum")
    if labels.all() or not labels.any():
        raise InvalidData(f"expected both classes, got {int(labels.sum())} anomalies in {labels.size} labels")
    return labels, score


def _counts(labels: np.ndarray, score: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Anomalies and normal data at or above every distinct score, from the highest down."""
    order = np.argsort(-score, kind="stable")
    labels, score = labels[order], score[order]
    last_of_tie = np.append(score[1:] != score[:-1], True)
    hits = np.cumsum(labels)[last_of_tie]
    alarms = np.cumsum(~labels)[last_of_tie]
    return hits.astype(float), alarms.astype(float), score[last_of_tie]
