# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Gaussian integrals over the cells of a partition, exact in every tail.

=======================  ======================================================================
``log_mass``             log-mass of N(loc, scale_tril scale_tril') in every cell
``moments``              the same with mean and covariance of the truncated Gaussian (``Moments``)
``log_mass_bound``       cheap upper bound on the log-mass
``log_mass_replicates``  independent estimates, where the log-mass is one
``sample``               exact draws of the truncated Gaussian
``nearest_point``        its mode
=======================  ======================================================================

They dispatch on the kind of cells: whole space (any dimension), intervals, polygons, polytopes of three dimensions.
Masses and moments of polytopes of more dimensions are estimates, with a standard error (``EstimatedPolytopes``).
"""

from pyro_cpa.integrals import estimated, interval, polygon, polytope, whole_space
from pyro_cpa.integrals.dispatch import (
    Moments,
    log_mass,
    log_mass_bound,
    log_mass_replicates,
    moments,
    moments_where,
    sample,
)
from pyro_cpa.integrals.estimated_cells import EstimatedPolytopes
from pyro_cpa.integrals.nearest import nearest_point

__all__ = [
    "EstimatedPolytopes",
    "Moments",
    "estimated",
    "interval",
    "log_mass",
    "log_mass_bound",
    "log_mass_replicates",
    "moments",
    "moments_where",
    "nearest_point",
    "polygon",
    "polytope",
    "sample",
    "whole_space",
]
