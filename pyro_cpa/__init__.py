# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Exact inference for piecewise-affine decoders, and the variational bounds measured against it.

Symbols, the same in every file::

    z  latent, dimension L        x  data, dimension D         R  regions of the decoder
    A, b  affine piece: decoder(z) = A_r z + b_r on cell r     K  particles
    V  prior covariance           Sx noise covariance          beta  temperature
"""

__all__ = ["__version__"]

__version__ = "0.1.0"
