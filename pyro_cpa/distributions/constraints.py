# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""The support of data that may be incomplete."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions.constraints import Constraint, independent

__all__ = ["real_or_missing", "real_or_missing_vector"]


class _RealOrMissing(Constraint):
    """Finite numbers, and NaN for a missing one."""

    def check(self, value: Tensor) -> Tensor:
        return ~torch.isinf(value)


real_or_missing = _RealOrMissing()
real_or_missing_vector = independent(real_or_missing, 1)
