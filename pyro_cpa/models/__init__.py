# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0

from pyro_cpa.models.cluster_accuracy import cluster_accuracy
from pyro_cpa.models.conditional_vae import ConditionalVAE
from pyro_cpa.models.gaussian_mixture_vae import GaussianMixtureVAE
from pyro_cpa.models.likelihoods import Bernoulli, Categorical, ContinuousBernoulli, Normal
from pyro_cpa.models.vae import VAE

__all__ = [
    "Bernoulli",
    "Categorical",
    "ConditionalVAE",
    "ContinuousBernoulli",
    "GaussianMixtureVAE",
    "Normal",
    "VAE",
    "cluster_accuracy",
]
