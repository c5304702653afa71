# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Padding and upsampling of images."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from .building import Builder
from .rearranging import rearrange
from .values import Value

__all__ = ["interpolate", "pad"]


def pad(
    b: Builder, input: Value, pad: Sequence[int], mode: str = "constant", value: float | None = None
) -> Value:
    """Arguments as those of ``F.pad``."""
    if mode != "constant":
        return rearrange(b, partial(F.pad, pad=tuple(pad), mode=mode), input)
    padded = rearrange(b, partial(F.pad, pad=tuple(pad)), input)
    if not value:
        return padded
    margin = torch.zeros(1, *input.shape, dtype=torch.float64, device=b.like.device)
    return b.affine(padded, None, F.pad(margin, tuple(pad), value=value))


def interpolate(
    b: Builder,
    input: Value,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Value:
    """Arguments as those of ``F.interpolate``."""
    function = partial(
        F.interpolate,
        size=size,
        scale_factor=scale_factor,
        mode=mode,
        align_corners=align_corners,
        recompute_scale_factor=recompute_scale_factor,
    )
    if antialias or mode == "bicubic":
        raise b.refuse("bicubic and antialiased sampling are not supported; use mode='bilinear' or 'nearest'")
    return rearrange(b, function, input) if mode.startswith("nearest") else b.operator(input, function)
