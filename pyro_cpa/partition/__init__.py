# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""The geometry of a decoder: which regions it has, and the affine map on each. No probability here."""

from .cells import Cells, Intervals, Polygons, Polytopes, WholeSpace
from .network import Network
from .regions import Partition, enumerate_regions
from .units import Abs, Maxout

__all__ = [
    "Abs",
    "Cells",
    "Intervals",
    "Maxout",
    "Network",
    "Partition",
    "Polygons",
    "Polytopes",
    "WholeSpace",
    "enumerate_regions",
]
