# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Operations with weights of their own, as modules and functions alike use them.

Weights are given as constants (:class:`Late` ones follow the live parameters).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .building import Builder
from .layers import Dense, Elementwise
from .values import Value, constant

__all__ = ["batch_norm", "check_channels", "convolution", "linear", "prelu"]


def check_channels(b: Builder, x: Value, expected: int, dim: int = 0) -> None:
    """Refuse x unless it has ``expected`` entries along ``dim``."""
    arrive = x.shape[dim] if x.shape else 1
    if arrive != expected:
        given = f" (latent_dim={arrive})" if x.index == 0 and b.latent_dim_given else ""
        raise b.misfit(f"takes {expected} inputs, but {arrive} arrive there{given}")


def linear(b: Builder, input: Value, weight: Any, bias: Any = None, module: nn.Linear | None = None) -> Value:
    """W h + v for the rows h of the last dimension of x."""
    H_out, H_in = constant(weight).shape
    check_channels(b, input, H_in, -1)
    if len(input.shape) == 1:
        return b.add((input,), (H_out,), partial(_dense, weight, bias), module)
    image = b.operator(input, F.linear, (weight,))
    return image if bias is None else b.affine(image, None, bias)


def _dense(weight: Any, bias: Any) -> Dense:
    W = constant(weight).double()
    return Dense(W, W.new_zeros(W.shape[0]) if bias is None else constant(bias).double())


def convolution(
    b: Builder,
    x: Value,
    function: Callable[..., Tensor],
    weight: Any,
    bias: Any,
    options: dict[str, Any],
    transposed: bool = False,
) -> Value:
    """A convolution of any dimension; ``options`` are those of ``function``."""
    kernel = constant(weight).shape
    if len(x.shape) != len(kernel) - 1:
        sizes = ", ".join(["channels", "height", "width", "depth"][: len(kernel) - 1])
        raise b.misfit(f"takes inputs (rows, {sizes}), but (rows, {_listed(x.shape)}) arrive there")
    check_channels(b, x, kernel[0] if transposed else kernel[1] * options["groups"])

    def columns(shape: Sequence[int]) -> int:
        # PyTorch lays out a column of the kernel's size for every place of the image it runs over.
        image = x.shape if transposed else shape
        channels = shape[0] if transposed else x.shape[0]
        return math.prod(kernel[2:]) * channels * math.prod(image[1:])

    return b.operator(x, partial(function, **options), (weight,), bias, columns)


def _listed(shape: Sequence[int]) -> str:
    return ", ".join(map(str, shape))


def batch_norm(b: Builder, x: Value, read: Callable[[int], Elementwise], channels: int) -> Value:
    """An affine map of each channel; ``read`` is told how many entries a channel has."""
    check_channels(b, x, channels)
    layer = partial(read, math.prod(x.shape[1:]))
    b.tried(layer)
    return b.add((x,), x.shape, layer)


def prelu(b: Builder, input: Value, weight: Any) -> Value:
    """A slope for each channel, or one for all, where the input is negative."""
    count = constant(weight).numel()
    if count > 1:
        check_channels(b, input, count)
    read = partial(_prelu, weight, 1 if count == 1 else math.prod(input.shape[1:]))
    return b.add((input,), input.shape, read, switches=True)


def _prelu(weight: Any, inner: int) -> Elementwise:
    slope = constant(weight).double().flatten().repeat_interleave(inner)
    return Elementwise(
        slope.new_zeros(1, 1),
        torch.stack([slope, torch.ones_like(slope)]),
        torch.zeros_like(slope).expand(2, -1),
    )
