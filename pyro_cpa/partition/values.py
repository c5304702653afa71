# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""What calls work on while a network is built: values of the network, constants, and counts of rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .calls import Late
from .refusal import Unreadable

__all__ = ["ROWS", "Rows", "Value", "common_shape", "constant", "flat"]

ROWS = 3
"""Rows of a trial batch: enough to see that no row depends on another."""


@dataclass(frozen=True)
class Value:
    """A value of the network: 0 is the latent, i + 1 the result of step i; ``shape`` is that of one row."""

    index: int
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Rows:
    """Something computed from the number of rows, as it is for ``ROWS`` rows."""

    value: Any


def constant(leaf: Any) -> Any:
    """The present value of something that the latent does not reach."""
    return leaf() if isinstance(leaf, Late) else leaf


def common_shape(*shapes: Sequence[int]) -> tuple[int, ...]:
    """As ``torch.broadcast_shapes``, which loads half of PyTorch when it is first called."""
    return tuple(torch.broadcast_tensors(*(torch.empty(()).expand(shape) for shape in shapes))[0].shape)


def flat(value: Any, shape: Sequence[int], device: torch.device) -> Tensor:
    """A constant as (H,) float64, or (1,) for a number; it must be the same for every row."""
    if not isinstance(value, Tensor):
        return torch.tensor([float(value)], dtype=torch.float64, device=device)
    rows = torch.broadcast_to(value.double(), (ROWS, *shape)).reshape(ROWS, -1)
    if not torch.equal(rows, rows[:1].expand_as(rows)):
        raise Unreadable("a constant has other values for other rows of data")
    return rows[0]
