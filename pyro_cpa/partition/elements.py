# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Layers as they are read off constants: piecewise-linear units, bounds, affine maps of entries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .layers import Elementwise, Layer, Maximum
from .operators import Operator
from .values import constant, flat

__all__ = ["affine", "bound", "hinge", "operator", "piecewise", "same"]


def piecewise(
    knots: list[float], slopes: list[float], intercepts: list[float], device: torch.device
) -> Elementwise:
    lists = (knots, slopes, intercepts)
    return Elementwise(*(torch.tensor(v, dtype=torch.float64, device=device)[:, None] for v in lists))


def hinge(device: torch.device) -> Maximum:
    return Maximum(**vars(piecewise([0.0], [0.0, 1.0], [0.0, 0.0], device)))


def bound(limit: Any, shape: Sequence[int], below: bool, device: torch.device) -> Elementwise:
    knot = flat(constant(limit), shape, device)
    zero, one = torch.zeros_like(knot), torch.ones_like(knot)
    if below:
        return Elementwise(knot[None], torch.stack([one, zero]), torch.stack([zero, knot]))
    return Elementwise(knot[None], torch.stack([zero, one]), torch.stack([knot, zero]))


def affine(scale: Any, shift: Any, shape: Sequence[int], device: torch.device) -> Elementwise:
    slopes, intercepts = (
        flat(default if given is None else constant(given), shape, device)
        for given, default in ((scale, 1.0), (shift, 0.0))
    )
    return Elementwise(slopes.new_zeros(0, 1), slopes[None], intercepts[None])


def operator(
    function: Callable[..., Tensor], shape: Sequence[int], weights: Sequence[Any], bias: Any, inner: int
) -> Operator:
    shift = None if bias is None else constant(bias).double().repeat_interleave(inner)
    return Operator(function, torch.Size(shape), tuple(constant(w).double() for w in weights), shift)


def same(layer: Layer) -> Layer:
    return layer
