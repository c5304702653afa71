# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Split-conformal calibration: false-alarm rates that are guaranteed at any sample size."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ..errors import InvalidData

__all__ = ["ConformalDetector"]


class ConformalDetector:
    r"""Turns any anomaly score into p-values that are valid without trusting the model.

    With calibration data :math:`x_1..x_n` that were **not** used for training,

    .. math:: p(x) = \frac{1 + \#\{i : s(x_i) \ge s(x)\}}{n + 1}, \qquad P(p(x) \le \alpha) \le \alpha

    for every x exchangeable with them, whatever the score, the model and n.

    Args:
        score: maps data to (N,) numbers, higher is stranger; e.g. ``functools.partial(surprise, marginal)``.
        calibration: held-out normal data, as ``score`` takes it. Rows may miss cells, as long as they miss
            them in the way the data to be judged do.

    Raises:
        InvalidData: no calibration data, or a score that is NaN.

    Note:
        The guarantee is over the draw of the calibration data and the new datum together. Given one
        calibration set the rate varies around it; :meth:`false_alarm_bound` says by how much.

    References:
        Vovk, Gammerman, Shafer 2005, Algorithmic Learning in a Random World. Laxhammar, Falkman 2015,
        Inductive conformal anomaly detection for sequential detection of anomalous sub-trajectories.

    Example:
        >>> detector = ConformalDetector(np.abs, np.arange(-49.0, 50.0))
        >>> detector.p_values([0.0, 49.5]).tolist()
        [1.0, 0.01]
        >>> detector.threshold(0.05)
        47.0
    """

    def __init__(self, score: Callable[[Any], Any], calibration: Any) -> None:
        self._score = score
        self.calibration_scores = np.sort(self._scores(calibration))
        if self.calibration_scores.size == 0:
            raise InvalidData("expected held-out calibration data, got none")

    def _scores(self, x: Any) -> np.ndarray:
        scores = np.asarray(self._score(x), dtype=float).ravel()
        if np.isnan(scores).any():
            raise InvalidData(f"the score of {int(np.isnan(scores).sum())} of {scores.size} rows is NaN")
        return scores

    @property
    def smallest_level(self) -> float:
        """The level 1 / (n + 1), below which nothing can be flagged."""
        return 1.0 / (self.calibration_scores.size + 1)

    def p_values(self, x: Any) -> np.ndarray:
        """(N,) conformal p-values; ties count against the datum, which keeps the guarantee."""
        below = np.searchsorted(self.calibration_scores, self._scores(x), side="left")
        n = self.calibration_scores.size
        return (1.0 + n - below) / (n + 1.0)

    def threshold(self, level: float) -> float:
        """The score above which a datum is flagged at ``level``: ``score > threshold`` iff ``p <= level``.

        Infinite where ``level < 1 / (n + 1)``.
        """
        flagged = self._num_flagged(level)
        return math.inf if flagged == 0 else float(self.calibration_scores[-flagged])

    def flags(self, x: Any, level: float = 0.05) -> np.ndarray:
        """(N,) True where the p-value is at most ``level``, as a normal datum's is that often or less."""
        return self._scores(x) > self.threshold(level)

    def false_alarm_bound(self, level: float, confidence: float = 0.95) -> float:
        r"""Upper bound on the false-alarm rate of **this** calibration set.

        Given the calibration data, the rate of a continuous score follows Beta(l, n + 1 - l) with
        :math:`l = \lfloor \mathrm{level}\,(n + 1) \rfloor`; its ``confidence`` quantile is returned.
        """
        if not 0 < confidence < 1:
            raise InvalidData(f"confidence must lie strictly between 0 and 1, got {confidence}")
        flagged, n = self._num_flagged(level), self.calibration_scores.size
        if flagged == 0:
            return 0.0
        lower, upper = 0.0, 1.0
        while upper - lower > 1e-12:
            middle = (lower + upper) / 2
            # P(Beta(l, n + 1 - l) <= t) = P(Binomial(n, t) >= l)
            lower, upper = (
                (lower, middle) if _binomial_tail(n, middle, flagged) > confidence else (middle, upper)
            )
        return upper

    def _num_flagged(self, level: float) -> int:
        if not 0 < level < 1:
            raise InvalidData(f"level must lie strictly between 0 and 1, got {level}")
        # 1e-9 forgives the rounding of products such as 0.1 * 30.
        return math.floor(level * (self.calibration_scores.size + 1) + 1e-9)


def _binomial_tail(n: int, probability: float, at_least: int) -> float:
    log_p, log_q = math.log(probability), math.log1p(-probability)
    terms = (
        math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) + k * log_p + (n - k) * log_q
        for k in range(at_least, n + 1)
    )
    return math.fsum(map(math.exp, terms))
