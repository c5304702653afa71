# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Which functions and tensor methods are continuous piecewise affine, and what each of them computes.

Supporting another function is adding a builder to ``FUNCTIONS``; its arguments are those of the function.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .arithmetic import add, divide, largest, linear_in_one, maximum, multiply, negate, subtract
from .building import Builder
from .modules import ELEMENTWISE, normalise
from .pooling import extremum, max_pool
from .reading import method
from .rearranging import rearrange
from .resizing import interpolate, pad
from .units import Abs
from .values import ROWS, Rows, Value, constant
from .weighted import batch_norm, convolution, linear, prelu

__all__ = ["FUNCTIONS", "UNITS", "VIEWS"]


def _called(*names: str) -> Iterator[Any]:
    """All functions and methods of these names, those that work in place too."""
    for name in names:
        for key in (name, f"{name}_"):
            yield key
            yield from (getattr(home, key) for home in (torch, F) if hasattr(home, key))
        yield from (getattr(operator, key) for key in (name, f"i{name}") if hasattr(operator, key))


def _unit(kind: type[nn.Module]) -> Callable[..., Value]:
    def build(b: Builder, input: Value, *args: Any, **kwargs: Any) -> Value:
        return ELEMENTWISE[kind](b, kind(*args, **kwargs), input)

    return build


def _rearranged(b: Builder, *args: Any, **kwargs: Any) -> Any:
    target = b.call.target
    return rearrange(b, partial(method, target) if isinstance(target, str) else target, *args, **kwargs)


def _item(b: Builder, given: Any, index: Any) -> Any:
    return given[index] if isinstance(given, tuple | list) else rearrange(b, operator.getitem, given, index)


def _attribute(b: Builder, given: Any, name: str) -> Any:
    if isinstance(given, tuple) and name == "values":
        return given[0]
    if name == "shape":
        return _size(b, given)
    if name == "ndim":
        return len(given.shape) + 1
    if name in ("dtype", "device"):
        return getattr(b.like, name)
    if name in ("T", "mT"):
        return rearrange(b, partial(_transposed, name), given)
    raise b.refuse(f"the attribute {name} of what depends on z is not supported")


def _transposed(name: str, tensor: Tensor) -> Tensor:
    return getattr(tensor, name)


def _size(b: Builder, input: Value, dim: int | None = None) -> Any:
    shape = (Rows(ROWS), *input.shape)
    return shape if dim is None else shape[dim]


def _zeros(b: Builder, input: Value, *size: Any, **kwargs: Any) -> Tensor:
    shape = [
        s.value if isinstance(s, Rows) else s
        for s in (size[0] if size and isinstance(size[0], tuple) else size)
    ]
    shape = shape if size else [ROWS, *input.shape]
    return torch.full(shape, float("ones" in b.call.name), dtype=torch.float64, device=b.like.device)


def _unchanged(b: Builder, input: Value, *args: Any, **kwargs: Any) -> Value:
    kinds = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.dtype)]
    if not all(kind.is_floating_point for kind in kinds):
        raise b.refuse("numbers without fractions are not continuous")
    return input


def _dropout(b: Builder, input: Value, p: float = 0.5, training: bool = True, inplace: bool = False) -> Value:
    if training and p > 0:
        raise b.refuse(
            "in training mode it is random; give it training=self.training and call decoder.eval()"
        )
    return input


def _convolution(function: Callable[..., Tensor], **defaults: Any) -> Callable[..., Value]:
    """``defaults`` are the options of the function, in its order."""

    def build(b: Builder, input: Value, weight: Any, bias: Any = None, *args: Any, **kwargs: Any) -> Value:
        options = defaults | dict(zip(defaults, args, strict=False)) | kwargs
        return convolution(b, input, function, weight, bias, options, "output_padding" in defaults)

    return build


def _batch_norm(
    b: Builder,
    input: Value,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Value:
    if training or running_mean is None or running_var is None:
        raise b.refuse("it normalises by the batch, which no fixed map does; give it running statistics")
    read = partial(_normalise, (running_mean, running_var, weight, bias), eps)
    return batch_norm(b, input, read, constant(running_mean).numel())


def _normalise(statistics: tuple[Any, ...], eps: float, inner: int) -> Any:
    mean, variance, weight, bias = map(constant, statistics)
    return normalise(mean, variance, weight, bias, eps, inner)


def _bounded(b: Builder, input: Value, min: Any = None, max: Any = None) -> Value:
    for limit, below in ((min, False), (max, True)):
        input = input if limit is None else b.bound(input, limit, below)
    return input


def _max_pool(dims: int) -> Callable[..., Value]:
    def build(
        b: Builder,
        input: Value,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> Value:
        if return_indices:
            raise b.refuse("indices are not continuous; use return_indices=False")
        return max_pool(b, input, kernel_size, stride, padding, dilation, ceil_mode, dims)

    return build


def _over(least: bool) -> Callable[..., Value]:
    def build(b: Builder, input: Value, dim: Any = (), keepdim: bool = False) -> Value:
        return extremum(b, input, (dim,) if isinstance(dim, int) else dim, keepdim, least)

    return build


_UNITS: dict[str, type[nn.Module]] = {
    "abs": Abs,
    "absolute": Abs,
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "leaky_relu": nn.LeakyReLU,
    "hardtanh": nn.Hardtanh,
    "hardsigmoid": nn.Hardsigmoid,
    "softshrink": nn.Softshrink,
}
_VIEWS = (
    *("flatten", "unflatten", "reshape", "view", "permute", "transpose", "swapaxes", "swapdims", "movedim"),
    *("moveaxis", "squeeze", "unsqueeze", "chunk", "split", "tensor_split", "unbind", "select", "narrow"),
    *("expand", "expand_as", "view_as", "reshape_as", "broadcast_to", "diagonal", "contiguous"),
)
_MOVES = (
    *("cat", "concat", "concatenate", "stack", "hstack", "index_select", "flip", "roll", "repeat", "tile"),
    *("repeat_interleave", "clone", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "unfold", "rot90"),
)
_CASTS = ("to", "type_as", "double", "float", "type")
_LINEAR = ("matmul", "mm", "bmm", "einsum", "tensordot", "inner", "mean", "sum", "fold", "bilinear")
_AVERAGES = [f"{kind}avg_pool{n}d" for kind in ("", "adaptive_") for n in "123"]
_DROPOUTS = ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout")
_STRIDES = {"stride": 1, "padding": 0}

UNITS = {key for name in _UNITS for key in _called(name)}
"""Functions that work on each entry by itself."""

VIEWS = {*_called(*_VIEWS, *_CASTS), operator.getitem, getattr}
"""Functions whose result may be the same memory as their input."""

FUNCTIONS: dict[Any, Callable[..., Any]] = {
    **{key: _unit(kind) for name, kind in _UNITS.items() for key in _called(name)},
    **dict.fromkeys(_called(*_VIEWS, *_MOVES), _rearranged),
    **dict.fromkeys(_called(*_CASTS), _unchanged),
    **dict.fromkeys(_called(*_LINEAR, *_AVERAGES), linear_in_one),
    **dict.fromkeys(_called(*_DROPOUTS), _dropout),
    **dict.fromkeys(_called("add"), add),
    **dict.fromkeys(_called("sub", "subtract"), subtract),
    **dict.fromkeys(_called("mul", "multiply"), multiply),
    **dict.fromkeys(_called("div", "divide", "truediv", "true_divide"), divide),
    **dict.fromkeys(_called("neg", "negative"), negate),
    **dict.fromkeys(_called("clamp", "clip"), _bounded),
    **dict.fromkeys(_called("clamp_min"), lambda b, input, min: b.bound(input, min, False)),
    **dict.fromkeys(_called("clamp_max"), lambda b, input, max: b.bound(input, max, True)),
    **dict.fromkeys(_called("maximum", "fmax"), partial(maximum, least=False)),
    **dict.fromkeys(_called("minimum", "fmin"), partial(maximum, least=True)),
    **dict.fromkeys(_called("max"), partial(largest, least=False)),
    **dict.fromkeys(_called("min"), partial(largest, least=True)),
    **dict.fromkeys(_called("amax"), _over(False)),
    **dict.fromkeys(_called("amin"), _over(True)),
    **{key: _max_pool(n) for n in (1, 2, 3) for key in _called(f"max_pool{n}d")},
    **{
        key: _convolution(getattr(F, f"conv{n}d"), **_STRIDES, dilation=1, groups=1)
        for n in "123"
        for key in _called(f"conv{n}d")
    },
    **{
        key: _convolution(
            getattr(F, f"conv_transpose{n}d"), **_STRIDES, output_padding=0, groups=1, dilation=1
        )
        for n in "123"
        for key in _called(f"conv_transpose{n}d")
    },
    **dict.fromkeys(_called("prelu"), prelu),
    F.batch_norm: _batch_norm,
    F.linear: linear,
    F.interpolate: interpolate,
    F.pad: pad,
    operator.getitem: _item,
    getattr: _attribute,
    "size": _size,
    **dict.fromkeys(["dim", "ndimension"], lambda b, input: len(input.shape) + 1),
    "numel": lambda b, input: Rows(ROWS * input.size),
    **dict.fromkeys([torch.zeros_like, torch.ones_like, "new_zeros", "new_ones"], _zeros),
}
"""What each supported function or method adds to a network."""
