# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Every error a user can cause, under one base.

Each message says what was given, what was expected and what to do about it.
"""

from __future__ import annotations

__all__ = [
    "CPAError",
    "InvalidData",
    "RegionBudgetExceeded",
    "UnsupportedModel",
    "UnsupportedModule",
]


class CPAError(ValueError):
    """Base class of all errors raised for a user's mistake."""


class UnsupportedModule(CPAError):
    """A decoder contains a module that is not continuous piecewise affine."""


class RegionBudgetExceeded(CPAError):
    """The decoder has more regions than ``max_regions`` allows."""


class UnsupportedModel(CPAError):
    """A model/guide pair lacks the structure that the called method needs."""


class InvalidData(CPAError):
    """Data or parameters hold values that the called method cannot accept."""
