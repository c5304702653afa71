# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Maxima over groups of entries: pooling windows, dimensions, maxout groups."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .building import Builder
from .values import Value

__all__ = ["extremum", "max_pool", "maxout"]


def max_pool(
    b: Builder, x: Value, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool, dims: int
) -> Value:
    """The maximum of each window of an image; arguments as those of ``F.max_pool2d``, ``dims`` of the image."""
    if len(x.shape) not in (dims, dims + 1):
        raise b.misfit(f"takes images of {dims} dimensions, but entries of shape {x.shape} arrive there")
    lead, image = x.shape[: len(x.shape) - dims], x.shape[-dims:]
    table, shape = _windows(b, image, kernel, stride, padding, dilation, ceil_mode)
    channels = math.prod(image) * torch.arange(math.prod(lead), device=table.device)[:, None, None]
    table = torch.where(table > 0, table + channels, 0).flatten(0, 1)
    return b.greatest(x, table, (*lead, *shape))


def _windows(
    b: Builder, image: Sequence[int], kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool
) -> tuple[Tensor, tuple[int, ...]]:
    """(windows, k) the entries of every window, counted from 1, 0 for padding; and the shape of the windows."""
    dims = len(image)
    pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[dims - 1]
    trial = torch.zeros(1, 1, *image)
    shape = tuple(b.tried(pool, trial, kernel, stride, padding, dilation, ceil_mode).shape[2:])
    spans = [_each(v, dims) for v in (kernel, kernel if stride is None else stride, padding, dilation)]
    table = torch.arange(1, 1 + math.prod(image), device=b.like.device).reshape(image)
    for axis, (size, step, margin, spread) in enumerate(zip(*spans, strict=True)):
        reach = (shape[axis] - 1) * step + spread * (size - 1) + 1
        ends = [0, 0] * (dims - 1 - axis) + [margin, max(0, reach - margin - image[axis])]
        # The windows of an earlier axis are further dimensions behind those of the image.
        table = F.pad(table.movedim(tuple(range(dims)), tuple(range(-dims, 0))), ends)
        table = table.movedim(tuple(range(-dims, 0)), tuple(range(dims)))
        table = table.unfold(axis, spread * (size - 1) + 1, step)[..., ::spread]
        table = table.narrow(axis, 0, shape[axis])
    return table.reshape(math.prod(shape), -1), shape


def _each(value: Any, dims: int) -> Sequence[int]:
    values = tuple(value) if isinstance(value, tuple | list) else (value,)
    return values * dims if len(values) == 1 else values


def extremum(b: Builder, x: Value, dims: Sequence[int], keepdim: bool, least: bool) -> Value:
    """The maximum over dimensions, or the minimum where ``least``."""
    count = len(x.shape) + 1
    axes = sorted({dim % count for dim in dims})
    if not axes or axes[0] == 0:
        raise b.refuse("it takes the extremum over the first dimension, which is that of the data")
    kept = [axis for axis in range(1, count) if axis not in axes]
    table = torch.arange(1, 1 + x.size, device=b.like.device).reshape(1, *x.shape).permute(0, *kept, *axes)
    shape = [1 if axis in axes else x.shape[axis - 1] for axis in range(1, count) if keepdim or axis in kept]
    return b.greatest(x, table.reshape(math.prod(shape), -1), shape, least)


def maxout(b: Builder, x: Value, pieces: int, dim: int) -> Value:
    """The maximum of each group of ``pieces`` neighbours along a dimension."""
    axis = dim % (len(x.shape) + 1)
    if axis == 0:
        raise b.refuse("it takes the maximum over the first dimension, which is that of the data")
    if x.shape[axis - 1] % pieces:
        raise b.misfit(f"takes groups of {pieces}, but {x.shape[axis - 1]} features arrive there")
    shape = (*x.shape[: axis - 1], x.shape[axis - 1] // pieces, pieces, *x.shape[axis:])
    return extremum(b, Value(x.index, shape), (axis + 1,), False, False)
