# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Which PyTorch modules are continuous piecewise affine, and what each of them computes.

Supporting another module is adding one builder to ``MODULES``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from .building import Builder
from .calls import Late
from .layers import Elementwise
from .pooling import max_pool, maxout
from .rearranging import rearrange
from .refusal import Unreadable
from .resizing import interpolate, pad
from .units import Abs, Maxout
from .values import Value
from .weighted import batch_norm, convolution, linear, prelu

__all__ = ["ELEMENTWISE", "IDENTITIES", "MODULES", "REARRANGING", "normalise"]

Build = Callable[..., Value]


def _attribute(module: nn.Module, name: str) -> Any:
    """A parameter or buffer as it is when it is asked for; None stays None."""
    return None if getattr(module, name) is None else Late(getattr, (module, name))


def _linear(b: Builder, module: nn.Linear, x: Value) -> Value:
    return linear(b, x, _attribute(module, "weight"), _attribute(module, "bias"), module)


def _convolution(function: Callable[..., Tensor], transposed: bool) -> Build:
    def build(b: Builder, module: Any, x: Value, output_size: Any = None) -> Value:
        options = {name: getattr(module, name) for name in ("stride", "padding", "dilation", "groups")}
        if output_size is not None:
            raise b.refuse("output_size is not supported; give output_padding to the module")
        if transposed:
            options["output_padding"] = module.output_padding
        elif module.padding_mode != "zeros":
            x = pad(b, x, module._reversed_padding_repeated_twice, module.padding_mode)
            options["padding"] = 0
        weight, bias = _attribute(module, "weight"), _attribute(module, "bias")
        return convolution(b, x, function, weight, bias, options, transposed)

    return build


def normalise(
    mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, inner: int
) -> Elementwise:
    """Batch normalisation by given statistics, for channels of ``inner`` entries."""
    mean, scale = mean.double(), (variance.double() + eps).rsqrt()
    if weight is not None:
        scale = scale * weight.double()
    shift = -mean * scale if bias is None else bias.double() - mean * scale
    return Elementwise(
        mean.new_zeros(0, 1), scale.repeat_interleave(inner)[None], shift.repeat_interleave(inner)[None]
    )


def _batch_norm(b: Builder, module: Any, x: Value) -> Value:
    return batch_norm(b, x, partial(_read_batch_norm, module), module.num_features)


def _read_batch_norm(module: Any, inner: int) -> Elementwise:
    if module.training:
        raise Unreadable("in training mode it normalises by the batch, which no fixed map does; call .eval()")
    mean, variance = module.running_mean, module.running_var
    if mean is None or variance is None:
        raise Unreadable(
            "without running statistics it normalises by the batch; use track_running_stats=True"
        )
    return normalise(mean, variance, module.weight, module.bias, module.eps, inner)


def _units(knots: list[float], slopes: list[float], intercepts: list[float]) -> Build:
    return lambda b, module, x: b.units(x, knots, slopes, intercepts)


def _leaky(b: Builder, module: nn.LeakyReLU, x: Value) -> Value:
    return b.units(x, [0.0], [float(module.negative_slope), 1.0], [0.0, 0.0])


def _rrelu(b: Builder, module: nn.RReLU, x: Value) -> Value:
    if module.training:
        raise b.refuse()
    return b.units(x, [0.0], [(module.lower + module.upper) / 2, 1.0], [0.0, 0.0])


def _hardtanh(b: Builder, module: nn.Hardtanh, x: Value) -> Value:
    low, high = float(module.min_val), float(module.max_val)
    return b.units(x, [low, high], [0.0, 1.0, 0.0], [low, 0.0, high])


def _softshrink(b: Builder, module: nn.Softshrink, x: Value) -> Value:
    margin = float(module.lambd)
    return b.units(x, [-margin, margin], [1.0, 0.0, 1.0], [margin, 0.0, -margin])


def _max_pool(b: Builder, module: Any, x: Value) -> Value:
    if module.return_indices:
        raise b.refuse("indices are not continuous; use return_indices=False")
    return max_pool(
        b,
        x,
        module.kernel_size,
        module.stride,
        module.padding,
        module.dilation,
        module.ceil_mode,
        _dims(module),
    )


def _dims(module: nn.Module) -> int:
    """How many dimensions of an image a module works on: the last digit of its class."""
    kind = next(cls for cls in type(module).__mro__ if cls.__name__[-2:] in ("1d", "2d", "3d"))
    return int(kind.__name__[-2])


def _upsample(b: Builder, module: nn.Upsample, x: Value) -> Value:
    return interpolate(
        b,
        x,
        module.size,
        module.scale_factor,
        module.mode,
        module.align_corners,
        module.recompute_scale_factor,
    )


ELEMENTWISE: dict[type[nn.Module], Build] = {
    nn.ReLU: _units([0.0], [0.0, 1.0], [0.0, 0.0]),
    nn.LeakyReLU: _leaky,
    nn.PReLU: lambda b, module, x: prelu(b, x, _attribute(module, "weight")),
    nn.RReLU: _rrelu,
    nn.Hardtanh: _hardtanh,
    nn.ReLU6: _hardtanh,
    nn.Hardsigmoid: _units([-3.0, 3.0], [0.0, 1 / 6, 0.0], [0.0, 0.5, 1.0]),
    nn.Softshrink: _softshrink,
    Abs: _units([0.0], [-1.0, 1.0], [0.0, 0.0]),
}
"""Units that work on each entry by itself."""

REARRANGING: tuple[type[nn.Module], ...] = (
    *(nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle, nn.Unfold),
    *(nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d),
    *(nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d),
    *(nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d),
)
"""Modules that only move entries about."""

MODULES: dict[type[nn.Module], Build] = {
    **ELEMENTWISE,
    **{kind: lambda b, module, x: rearrange(b, module, x) for kind in REARRANGING},
    nn.Linear: _linear,
    **{getattr(nn, f"Conv{n}d"): _convolution(getattr(F, f"conv{n}d"), False) for n in "123"},
    **{
        getattr(nn, f"ConvTranspose{n}d"): _convolution(getattr(F, f"conv_transpose{n}d"), True)
        for n in "123"
    },
    **{getattr(nn, f"BatchNorm{n}d"): _batch_norm for n in "123"},
    **{getattr(nn, f"MaxPool{n}d"): _max_pool for n in "123"},
    **{getattr(nn, f"AvgPool{n}d"): lambda b, module, x: b.operator(x, module) for n in "123"},
    **{getattr(nn, f"AdaptiveAvgPool{n}d"): lambda b, module, x: b.operator(x, module) for n in "123"},
    **{
        getattr(nn, f"ConstantPad{n}d"): lambda b, m, x: pad(b, x, m.padding, "constant", m.value)
        for n in "123"
    },
    nn.ZeroPad2d: lambda b, module, x: pad(b, x, module.padding, "constant", 0.0),
    nn.Fold: lambda b, module, x: b.operator(x, module),
    **dict.fromkeys([nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d], _upsample),
    Maxout: lambda b, module, x: maxout(b, x, module.pieces, module.dim),
}
"""What each supported module adds to a network."""

IDENTITIES: tuple[type[nn.Module], ...] = (
    *(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
    *(nn.AlphaDropout, nn.FeatureAlphaDropout),
)
"""Modules that pass their input on unchanged (in evaluation mode)."""
