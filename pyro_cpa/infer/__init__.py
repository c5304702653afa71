# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Inference: the exact posterior and EM, and every bound that swaps into ``SVI``."""

from pyro_cpa.infer.alternating import AlternatingTrainer
from pyro_cpa.infer.analytic import AnalyticELBO
from pyro_cpa.infer.auto_local_affine import AutoLocalAffine
from pyro_cpa.infer.autoguide import AutoCPAPosterior
from pyro_cpa.infer.checkpoint import load_checkpoint, save_checkpoint
from pyro_cpa.infer.draws import Draws
from pyro_cpa.infer.em import EM
from pyro_cpa.infer.evidence import Evidence, log_evidence, pointwise_log_likelihood
from pyro_cpa.infer.exact_ml import ExactML
from pyro_cpa.infer.helmholtz import BiHelmholtzELBO
from pyro_cpa.infer.importance_weighted import ImportanceWeightedELBO
from pyro_cpa.infer.log_weights import LogWeights
from pyro_cpa.infer.multi_sample import AbstractMultiSampleELBO
from pyro_cpa.infer.schedules import CoarseGrained, Fixed, Linear, LogUniform, Moments, OptimalLeft, Schedule
from pyro_cpa.infer.thermodynamic import TVO
from pyro_cpa.infer.wake_sleep import ReweightedWakeSleepELBO

__all__ = [
    "AbstractMultiSampleELBO",
    "AlternatingTrainer",
    "AnalyticELBO",
    "AutoCPAPosterior",
    "AutoLocalAffine",
    "BiHelmholtzELBO",
    "CoarseGrained",
    "Draws",
    "EM",
    "Evidence",
    "ExactML",
    "Fixed",
    "ImportanceWeightedELBO",
    "Linear",
    "LogWeights",
    "LogUniform",
    "Moments",
    "OptimalLeft",
    "ReweightedWakeSleepELBO",
    "Schedule",
    "TVO",
    "load_checkpoint",
    "log_evidence",
    "pointwise_log_likelihood",
    "save_checkpoint",
]
