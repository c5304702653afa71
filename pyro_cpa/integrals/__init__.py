# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Gaussian integrals over the cells of a partition, exact in every tail.

==================  ======================================================================
``log_mass``        log-mass of N(loc, scale_tril scale_tril') in every cell
``moments``         the same with mean and covariance of the truncated Gaussian (``Moments``)
``log_mass_bound``  cheap upper bound on the log-mass
``sample``          exact draws of the truncated Gaussian
``nearest_point``   its mode
==================  ======================================================================

They dispatch on the kind of cells: whole space (any dimension), intervals, polygons, polytopes.
"""

from pyro_cpa.integrals import interval, polygon, polytope, whole_space
from pyro_cpa.integrals.dispatch import Moments, log_mass, log_mass_bound, moments, moments_where, sample
from pyro_cpa.integrals.nearest import nearest_point

__all__ = [
    "Moments",
    "interval",
    "log_mass",
    "log_mass_bound",
    "moments",
    "moments_where",
    "nearest_point",
    "polygon",
    "polytope",
    "sample",
    "whole_space",
]
