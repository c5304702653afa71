# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Sums, multiples, maxima and linear functions of values and constants, as builders."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .building import Builder
from .calls import Late, leaves, mapped
from .pooling import extremum
from .reading import method
from .values import ROWS, Value, constant

__all__ = ["add", "divide", "largest", "linear_in_one", "maximum", "multiply", "negate", "subtract"]

_PRODUCT = "it multiplies two things that depend on z, which is not piecewise affine; use a Maxout or nn.ReLU"


def add(b: Builder, input: Any, other: Any, alpha: Any = 1) -> Value:
    """input + alpha other."""
    if not isinstance(input, Value):
        return b.affine(other, alpha, input)
    if not isinstance(other, Value):
        return b.affine(input, None, Late(operator.mul, (other, alpha)))
    return b.sum(input, other, float(alpha))


def subtract(b: Builder, input: Any, other: Any, alpha: Any = 1) -> Value:
    """input - alpha other."""
    return add(b, input, other, Late(operator.neg, (alpha,)) if isinstance(alpha, Late) else -alpha)


def negate(b: Builder, input: Value) -> Value:
    """-input."""
    return b.affine(input, -1.0, None)


def multiply(b: Builder, input: Any, other: Any) -> Value:
    """input other, where one of them is constant."""
    if isinstance(input, Value) and isinstance(other, Value):
        raise b.refuse(_PRODUCT)
    return b.affine(input, other, None) if isinstance(input, Value) else b.affine(other, input, None)


def divide(b: Builder, input: Any, other: Any, rounding_mode: str | None = None) -> Value:
    """input / other for a constant ``other``."""
    if isinstance(other, Value) or rounding_mode is not None:
        raise b.refuse("it is not piecewise affine: divide by constants, without rounding")
    return b.affine(input, Late(operator.truediv, (1.0, other)), None)


def maximum(b: Builder, input: Any, other: Any, least: bool) -> Value:
    """max(input, other), or the minimum where ``least``."""
    if isinstance(input, Value) and isinstance(other, Value):
        return b.maximum(input, other, least)
    return b.bound(input, other, least) if isinstance(input, Value) else b.bound(other, input, least)


def largest(b: Builder, input: Any, *args: Any, least: bool, **kwargs: Any) -> Any:
    """``torch.max``, which is two functions: of two tensors, and over a dimension."""
    other = kwargs.get("other", args[0] if args else kwargs.get("dim"))
    if isinstance(other, int):
        keepdim = kwargs.get("keepdim", args[1] if len(args) > 1 else False)
        # Its second result, the indices, is not continuous and not here.
        return (extremum(b, input, (other,), keepdim, least),)
    if other is None:
        raise b.refuse("it takes the extremum over all data; give it a dimension")
    return maximum(b, input, other, least)


@dataclass(frozen=True)
class _Slot:
    """Where argument ``index`` goes."""

    index: int


@dataclass(frozen=True)
class _Filled:
    """A function of the tensors that go into the slots of its arguments."""

    function: Callable[..., Tensor]
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]

    def __call__(self, *tensors: Tensor) -> Tensor:
        args, kwargs = mapped(
            lambda leaf: tensors[leaf.index] if isinstance(leaf, _Slot) else leaf,
            (self.args, dict(self.kwargs)),
        )
        return self.function(*args, **kwargs)


def linear_in_one(b: Builder, *args: Any, **kwargs: Any) -> Value:
    """A function that is linear in each of its tensors, of which one may depend on z."""
    values = [leaf for leaf in leaves((args, kwargs)) if isinstance(leaf, Value)]
    if len(values) != 1:
        raise b.refuse(_PRODUCT)
    weights: list[Any] = []

    def slot(leaf: Any) -> Any:
        if isinstance(leaf, Value):
            return _Slot(0)
        if not isinstance(constant(leaf), Tensor):
            return constant(leaf)
        weights.append(leaf)
        return _Slot(len(weights))

    args, kwargs = mapped(slot, (args, kwargs))
    target: Any = b.call.target
    function = _Filled(
        partial(method, target) if isinstance(target, str) else target, args, tuple(kwargs.items())
    )
    image = b.operator(values[0], function, weights)
    _check_rows(b, values[0], function, [constant(w).double() for w in weights])
    return image


def _check_rows(b: Builder, x: Value, function: Callable[..., Tensor], weights: list[Tensor]) -> None:
    """Refuse a function whose result for one row of data depends on the others."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(ROWS, *x.shape, generator=generator, dtype=torch.float64).to(b.like.device)
    with torch.no_grad():
        together, alone = function(rows, *weights)[1:2], function(rows[1:2], *weights)
    if together.shape != alone.shape or not torch.allclose(together, alone, rtol=1e-10, atol=1e-10):
        raise b.refuse("it mixes rows of data")
