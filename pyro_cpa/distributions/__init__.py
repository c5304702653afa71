# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Exact distributions of piecewise-affine decoders, as Pyro distributions."""

from .conditional import CPAConditional
from .marginal import CPAMarginal
from .posterior import CPAPosterior

__all__ = ["CPAConditional", "CPAMarginal", "CPAPosterior"]
