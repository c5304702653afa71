# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""What an exact evidence opens: comparison, anomaly detection, imputation, and a way into ArviZ."""

from .anomaly import feature_surprise, posterior_region, surprise, tail_probability
from .arviz import to_arviz
from .compare import Comparison, compare
from .conformal import ConformalDetector
from .parameter_count import count_parameters
from .ranking import RocCurve, average_precision, roc_auc, roc_curve
from .stacking import stacking_weights

__all__ = [
    "Comparison",
    "ConformalDetector",
    "RocCurve",
    "average_precision",
    "compare",
    "count_parameters",
    "feature_surprise",
    "posterior_region",
    "roc_auc",
    "roc_curve",
    "stacking_weights",
    "surprise",
    "tail_probability",
    "to_arviz",
]
