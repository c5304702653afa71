# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""What an exact evidence opens: comparison, anomaly detection, imputation, and a way into ArviZ."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .anomaly import feature_surprise, posterior_region, surprise, tail_probability
from .arviz import to_arviz
from .compare import Comparison, compare
from .conformal import ConformalDetector
from .impute import impute, impute_draws
from .manifold import NearestPoint, manifold_distance
from .parameter_count import count_parameters
from .quantiles import conditional_quantiles
from .ranking import RocCurve, average_precision, roc_auc, roc_curve
from .stacking import stacking_weights

if TYPE_CHECKING:
    from .density import CPADensity

__all__ = [
    "CPADensity",
    "Comparison",
    "ConformalDetector",
    "NearestPoint",
    "RocCurve",
    "average_precision",
    "compare",
    "conditional_quantiles",
    "count_parameters",
    "feature_surprise",
    "impute",
    "impute_draws",
    "manifold_distance",
    "posterior_region",
    "roc_auc",
    "roc_curve",
    "stacking_weights",
    "surprise",
    "tail_probability",
    "to_arviz",
]


def __getattr__(name: str) -> Any:
    # scikit-learn is optional: only its front door needs it.
    if name == "CPADensity":
        from .density import CPADensity

        return CPADensity
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
