# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""The geometry of a decoder: which regions it has, and the affine map on each. No probability here."""

from .cells import Cells, Intervals, Polygons, Polytopes, WholeSpace
from .modules import Abs
from .network import Network
from .regions import Partition, enumerate_regions

__all__ = [
    "Abs",
    "Cells",
    "Intervals",
    "Network",
    "Partition",
    "Polygons",
    "Polytopes",
    "WholeSpace",
    "enumerate_regions",
]
