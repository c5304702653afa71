# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Exact inference for piecewise-affine decoders, and the variational bounds measured against it.

Symbols, the same in every file::

    z  latent, dimension L        x  data, dimension D         R  regions of the decoder
    A, b  affine piece: decoder(z) = A_r z + b_r on cell r     K  particles
    V  prior covariance           Sx noise covariance          beta  temperature

Packages, in the order in which data flows; each imports only from those before it::

    partition       enumerate_regions, Partition: the regions of a decoder
    integrals       log_mass, moments, sample: Gaussians on cells
    distributions   CPAMarginal p(x), CPAPosterior p(z|x), CPAConditional p(x_mis|x_obs)
    infer           AutoCPAPosterior, AutoLocalAffine, EM, ExactML; ImportanceWeightedELBO, ReweightedWakeSleepELBO, TVO,
                    BiHelmholtzELBO, AnalyticELBO; log_evidence, AlternatingTrainer, checkpoints
    datasets        digits, MNIST and Fashion-MNIST files, binary tables, toy data
    models          FactorAnalysis, CPAGenerator, VAE and its kin, sigmoid nets, Helmholtz machines
    criticism       to_arviz, compare, anomaly scores, impute, CPADensity
    plotting        pictures of all of these
    demo            python -m pyro_cpa.demo
"""

__all__ = ["__version__"]

__version__ = "0.1.0"
