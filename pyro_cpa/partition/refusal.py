# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""What is said about modules and functions that are not continuous piecewise affine."""

from __future__ import annotations

from ..errors import UnsupportedModule
from .calls import Line

__all__ = ["Unreadable", "refuse"]

_SMOOTH = "it is not piecewise affine; use nn.ReLU or nn.LeakyReLU"
_SATURATES = "it is not piecewise affine; use nn.Hardtanh"
_SIGMOID = "it is not piecewise affine; use nn.Hardsigmoid, or leave the last layer linear"
_SOFTMAX = "it is not piecewise affine; leave the last layer linear"
_NORM = "it normalises by the datum's own statistics, which is not piecewise affine; use nn.BatchNorm{} in evaluation mode"
_JUMPS = "it is not continuous; use nn.ReLU or nn.Hardtanh"
_GATE = "it multiplies what depends on z, which is not piecewise affine; use a Maxout or nn.ReLU"
_DRAWS = "it is random; leave it out of the decoder"
_REASONS = {
    "tanh": _SATURATES,
    "tanhshrink": _SATURATES,
    "softsign": _SATURATES,
    "sigmoid": _SIGMOID,
    "hardswish": "it is piecewise quadratic; use nn.ReLU6 or nn.LeakyReLU",
    "threshold": "it is not continuous in general; use nn.ReLU",
    "rrelu": "it is random in training mode; use nn.LeakyReLU",
    "fractionalmaxpool2d": _DRAWS,
    "detach": "it would cut the evidence off from the parameters before it; leave it out",
    **dict.fromkeys(["softmax", "softmin", "softmax2d", "logsoftmax"], _SOFTMAX),
    **dict.fromkeys(["layernorm", "groupnorm", "rmsnorm", "instancenorm1d", "batchnorm"], _NORM.format("1d")),
    **dict.fromkeys(["instancenorm2d", "localresponsenorm", "crossmapLRN2d"], _NORM.format("2d")),
    **dict.fromkeys(["hardshrink", "sign", "heaviside", "floor", "ceil", "round", "where"], _JUMPS),
    **dict.fromkeys(["maskedfill", "gt", "ge", "lt", "le", "eq", "ne"], _JUMPS),
    **dict.fromkeys(["glu", "bilinear", "multiheadattention", "scaleddotproductattention"], _GATE),
    **dict.fromkeys(["gelu", "silu", "elu", "celu", "selu", "softplus", "mish", "logsigmoid"], _SMOOTH),
    **dict.fromkeys(["exp", "log", "pow", "square", "sqrt", "rsqrt", "reciprocal", "norm"], _SMOOTH),
    **dict.fromkeys(
        ["adaptivemaxpool1d", "adaptivemaxpool2d"], "its windows differ in size; use nn.MaxPool2d"
    ),
}


class Unreadable(ValueError):
    """Why a layer cannot be read, before it is said where."""


def refuse(place: str, name: str, reason: str | None = None, line: Line | None = None) -> UnsupportedModule:
    """The error for a module or function that is not understood: place, name, what to use instead, and line."""
    if reason is None:
        # torch.tanh and Tensor.tanh_ are refused as nn.Tanh is.
        plain = name.lower().replace("_", "")
        reason = _REASONS.get(
            plain, "it is not known to be piecewise affine; see pyro_cpa.partition.Network for what is"
        )
    told = f"{place}: {name} cannot be part of an exact decoder: {reason}."
    return UnsupportedModule(told if line is None else f"{told} ({line})")
