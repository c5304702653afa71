# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Which PyTorch modules are continuous piecewise affine, and what each of them computes.

Supporting another module is adding one reader to ``READERS``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModule
from .layers import Dense, Elementwise, Layer

__all__ = ["IDENTITIES", "READERS", "Abs", "refuse"]


class Abs(nn.Module):
    """Elementwise absolute value, a piecewise-linear unit with slopes -1 and 1.

    Example:
        >>> Abs()(torch.tensor([-2.0, 3.0]))
        tensor([2., 3.])
    """

    def forward(self, input: Tensor) -> Tensor:
        return input.abs()


def _piecewise(knots: list[float], slopes: list[float], intercepts: list[float], like: Tensor) -> Elementwise:
    tensors = (
        torch.tensor(v, dtype=torch.float64, device=like.device)[:, None] for v in (knots, slopes, intercepts)
    )
    return Elementwise(*tensors)


def _linear(module: nn.Linear, like: Tensor) -> Dense:
    weight = module.weight.double()
    bias = weight.new_zeros(weight.shape[0]) if module.bias is None else module.bias.double()
    return Dense(weight, bias)


def _batch_norm(module: nn.BatchNorm1d, like: Tensor) -> Elementwise:
    if module.training:
        raise UnsupportedModule(
            "in training mode it normalises by the batch, which no fixed map does; call .eval()"
        )
    if module.running_mean is None or module.running_var is None:
        raise UnsupportedModule(
            "without running statistics it normalises by the batch; use track_running_stats=True"
        )
    mean, variance = module.running_mean.double(), module.running_var.double()
    scale = (variance + module.eps).rsqrt()
    if module.weight is not None:
        scale = scale * module.weight.double()
    shift = -mean * scale if module.bias is None else module.bias.double() - mean * scale
    return Elementwise(mean.new_zeros(0, 1), scale[None], shift[None])


def _prelu(module: nn.PReLU, like: Tensor) -> Elementwise:
    weight = module.weight.double()
    return Elementwise(
        weight.new_zeros(1, 1),
        torch.stack([weight, torch.ones_like(weight)]),
        weight.new_zeros(2, weight.shape[0]),
    )


def _hardtanh(module: nn.Hardtanh, like: Tensor) -> Elementwise:
    low, high = float(module.min_val), float(module.max_val)
    return _piecewise([low, high], [0.0, 1.0, 0.0], [low, 0.0, high], like)


READERS: dict[type[nn.Module], Callable[[Any, Tensor], Layer]] = {
    nn.Linear: _linear,
    nn.BatchNorm1d: _batch_norm,
    nn.ReLU: lambda module, like: _piecewise([0.0], [0.0, 1.0], [0.0, 0.0], like),
    nn.LeakyReLU: lambda module, like: _piecewise(
        [0.0], [float(module.negative_slope), 1.0], [0.0, 0.0], like
    ),
    nn.PReLU: _prelu,
    nn.Hardtanh: _hardtanh,
    nn.ReLU6: _hardtanh,
    nn.Hardsigmoid: lambda module, like: _piecewise([-3.0, 3.0], [0.0, 1 / 6, 0.0], [0.0, 0.5, 1.0], like),
    Abs: lambda module, like: _piecewise([0.0], [-1.0, 1.0], [0.0, 0.0], like),
}
"""What each supported module computes: a float64 layer that is differentiable in the module's live
parameters."""

IDENTITIES: tuple[type[nn.Module], ...] = (nn.Identity, nn.Dropout, nn.AlphaDropout, nn.FeatureAlphaDropout)
"""Modules that pass their input on unchanged (in evaluation mode)."""

_SMOOTH = "it is not piecewise affine; use nn.ReLU or nn.LeakyReLU"
_LATER = "it is not supported; write it as nn.Linear"
_REPLACEMENTS = {
    "Tanh": "it is not piecewise affine; use nn.Hardtanh",
    "Sigmoid": "it is not piecewise affine; use nn.Hardsigmoid, or leave the last layer linear",
    "Softmax": "it is not piecewise affine; leave the last layer linear",
    "LogSoftmax": "it is not piecewise affine; leave the last layer linear",
    "LayerNorm": "it is not piecewise affine; use nn.BatchNorm1d in evaluation mode",
    "Softsign": "it is not piecewise affine; use nn.Hardtanh",
    "Hardswish": "it is piecewise quadratic; use nn.ReLU6 or nn.LeakyReLU",
    "Hardshrink": "it is not continuous; use nn.ReLU or nn.Hardtanh",
    "Threshold": "it is not continuous in general; use nn.ReLU",
    "RReLU": "it is random in training mode; use nn.LeakyReLU",
    **dict.fromkeys(["GELU", "SiLU", "ELU", "CELU", "SELU", "Softplus", "Mish", "LogSigmoid"], _SMOOTH),
    **dict.fromkeys(["Conv1d", "Conv2d", "ConvTranspose1d", "ConvTranspose2d", "Bilinear"], _LATER),
}


def refuse(place: str, name: str, reason: str | None = None) -> UnsupportedModule:
    """The error for a module or function that is not understood: place, name, and what to use instead."""
    if reason is None:
        supported = ", ".join(sorted(cls.__name__ for cls in (*READERS, *IDENTITIES[:2])))
        unknown = f"it is not known to be piecewise affine; supported are {supported}"
        # torch.tanh is refused as nn.Tanh is.
        plain = name.lower().replace("_", "")
        reason = next((r for key, r in _REPLACEMENTS.items() if key.lower() == plain), unknown)
    return UnsupportedModule(f"{place}: {name} cannot be part of an exact decoder: {reason}.")
