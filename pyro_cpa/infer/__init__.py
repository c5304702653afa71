# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0

from pyro_cpa.infer.analytic import AnalyticELBO
from pyro_cpa.infer.importance_weighted import ImportanceWeightedELBO
from pyro_cpa.infer.multi_sample import AbstractMultiSampleELBO
from pyro_cpa.infer.wake_sleep import ReweightedWakeSleepELBO

__all__ = ["AbstractMultiSampleELBO", "AnalyticELBO", "ImportanceWeightedELBO", "ReweightedWakeSleepELBO"]
