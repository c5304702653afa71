# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0

from pyro_cpa.infer.analytic import AnalyticELBO
from pyro_cpa.infer.helmholtz import BiHelmholtzELBO
from pyro_cpa.infer.importance_weighted import ImportanceWeightedELBO
from pyro_cpa.infer.multi_sample import AbstractMultiSampleELBO
from pyro_cpa.infer.schedules import CoarseGrained, Fixed, Linear, LogUniform, Moments, OptimalLeft, Schedule
from pyro_cpa.infer.thermodynamic import TVO
from pyro_cpa.infer.wake_sleep import ReweightedWakeSleepELBO

__all__ = [
    "AbstractMultiSampleELBO",
    "AnalyticELBO",
    "BiHelmholtzELBO",
    "CoarseGrained",
    "Fixed",
    "ImportanceWeightedELBO",
    "Linear",
    "LogUniform",
    "Moments",
    "OptimalLeft",
    "ReweightedWakeSleepELBO",
    "Schedule",
    "TVO",
]
