# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Deep generative models as Pyro model/guide pairs, one model a file."""

from pyro_cpa.models.cluster_accuracy import cluster_accuracy
from pyro_cpa.models.conditional_vae import ConditionalVAE
from pyro_cpa.models.coupled_sigmoid_net import CoupledSigmoidNet
from pyro_cpa.models.cpa_generator import CPAGenerator
from pyro_cpa.models.exact_conditional import ConditionalCPAGenerator
from pyro_cpa.models.exact_mixture import MixtureCPAGenerator
from pyro_cpa.models.factor_analysis import PPCA, FactorAnalysis
from pyro_cpa.models.gaussian_mixture_vae import GaussianMixtureVAE
from pyro_cpa.models.gaussian_noise import GaussianNoise
from pyro_cpa.models.helmholtz_chain import HelmholtzChain
from pyro_cpa.models.helmholtz_machine import BidirectionalHelmholtzMachine
from pyro_cpa.models.likelihoods import Bernoulli, Categorical, ContinuousBernoulli, Normal
from pyro_cpa.models.linear_guide import LinearGuide
from pyro_cpa.models.sigmoid_belief_net import SigmoidBeliefNet
from pyro_cpa.models.vae import VAE
from pyro_cpa.models.variational_rnn import VariationalRNN

__all__ = [
    "Bernoulli",
    "BidirectionalHelmholtzMachine",
    "CPAGenerator",
    "Categorical",
    "ConditionalCPAGenerator",
    "ConditionalVAE",
    "ContinuousBernoulli",
    "CoupledSigmoidNet",
    "FactorAnalysis",
    "GaussianMixtureVAE",
    "GaussianNoise",
    "HelmholtzChain",
    "LinearGuide",
    "MixtureCPAGenerator",
    "Normal",
    "PPCA",
    "SigmoidBeliefNet",
    "VAE",
    "VariationalRNN",
    "cluster_accuracy",
]
