# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0

from pyro_cpa.models.likelihoods import Bernoulli, Categorical, ContinuousBernoulli, Normal
from pyro_cpa.models.vae import VAE

__all__ = ["Bernoulli", "Categorical", "ContinuousBernoulli", "Normal", "VAE"]
