# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""A decoder read as a network of affine maps and piecewise-linear units."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InvalidData
from .building import Step
from .layers import Layer
from .lowering import lower

__all__ = ["Network"]


class Network:
    """The layers of a piecewise-affine ``torch.nn.Module`` and their wiring, bound to its live parameters.

    Whatever ``torch.fx`` can trace is read, if it is made of

    - linear layers and convolutions: ``nn.Linear``, ``Conv1d`` to ``Conv3d``, ``ConvTranspose1d`` to ``ConvTranspose3d``;
    - units: ``ReLU``, ``LeakyReLU``, ``PReLU``, ``Hardtanh``, ``ReLU6``, ``Hardsigmoid``, ``Softshrink``, ``Abs``;
    - maxima: ``MaxPool1d`` to ``MaxPool3d``, ``Maxout``, ``torch.maximum``, ``minimum``, ``clamp``, ``amax``, ``amin``;
    - ``BatchNorm1d`` to ``BatchNorm3d`` and dropout in evaluation mode;
    - average pooling, fixed and adaptive; upsampling, nearest and (bi)linear; padding; pixel shuffle;
    - sums, differences, multiples by constants, concatenation, slices, reshaping, and products with constants.

    Modules may be called as modules or as functions, nested at will, and share weights.

    Args:
        decoder: module R^L -> R^D. It is called with rows (N, L); images that it returns count as flattened.
        latent_dim: L, where no layer of the decoder tells it.

    Raises:
        UnsupportedModule: something is not continuous piecewise affine, or does not fit what comes before it.

    Example:
        >>> network = Network(nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 3)))
        >>> network.latent_dim, network.data_dim, len(network.linears)
        (2, 3, 2)
        >>> up = nn.Sequential(nn.Linear(1, 4), nn.ReLU(), nn.Unflatten(1, (4, 1, 1)), nn.ConvTranspose2d(4, 1, 3))
        >>> Network(up).data_dim
        9
    """

    def __init__(self, decoder: nn.Module, latent_dim: int | None = None) -> None:
        self.decoder = decoder
        self._read_from = _structure(decoder)
        tensors = [*decoder.parameters(), *decoder.buffers()]
        self._like = next((t for t in tensors if t.is_floating_point()), torch.zeros(()))
        self.steps, self.graph = lower(decoder, latent_dim, self._like)
        self.latent_dim, self.data_dim = self.graph.widths[0], self.graph.widths[-1]

    @property
    def is_current(self) -> bool:
        """Whether the decoder is made of the modules, settings and shapes that were read; values may have changed."""
        (parts, shapes), (parts_now, shapes_now) = self._read_from, _structure(self.decoder)
        same = len(parts) == len(parts_now) and all(map(operator.is_, parts, parts_now))
        return same and shapes == shapes_now

    @property
    def is_plain(self) -> bool:
        """Whether PyTorch wrote every ``forward``: one of the user's own may hang on things that are in no module."""
        return all(map(_is_of_torch, self.decoder.modules()))

    @property
    def dtype(self) -> torch.dtype:
        """The decoder's own dtype; all geometry is in float64."""
        return self._like.dtype

    @property
    def device(self) -> torch.device:
        return self._like.device

    @property
    def linears(self) -> tuple[nn.Linear, ...]:
        """The ``nn.Linear`` modules that take vectors, in order."""
        return tuple(step.module for step in self.steps if isinstance(step.module, nn.Linear))

    @property
    def linear_steps(self) -> tuple[int, ...]:
        """Where the ``linears`` are among the layers."""
        return tuple(i for i, step in enumerate(self.steps) if isinstance(step.module, nn.Linear))

    @property
    def kernels(self) -> tuple[Tensor, ...]:
        """The weights of convolutions, and of ``nn.Linear`` modules that take more than vectors."""
        others = dict.fromkeys(step.call.target for step in self.steps if step.module is None)
        return tuple(m.weight for m in others if isinstance(m, nn.Linear | nn.modules.conv._ConvNd))

    @property
    def ends_linear(self) -> bool:
        """Whether the last module is an ``nn.Linear``, so that all affine maps share it."""
        return bool(self.steps) and isinstance(self.steps[-1].module, nn.Linear)

    @property
    def places(self) -> tuple[str, ...]:
        """Place and class of every layer, such as ``decoder.1: ReLU``."""
        return tuple(map(str, self.steps))

    def layers(self) -> tuple[Layer, ...]:
        """The layers in float64, differentiable in the decoder's parameters as they are now."""
        return tuple(step.layer() for step in self.steps)

    def snapshot(self) -> tuple[Layer, ...]:
        """The layers as they are now, as detached copies, checked to be finite.

        Raises:
            InvalidData: a parameter is NaN or infinite.
        """
        with torch.no_grad():
            layers = tuple(layer.detach() for layer in self.layers())
        # An infinite running variance would give a finite layer: buffers are looked at themselves.
        values = [
            [
                *layer.tensors(),
                *(step.call.target.buffers() if isinstance(step.call.target, nn.Module) else ()),
            ]
            for step, layer in zip(self.steps, layers, strict=True)
        ]
        # Mostly all is well, and one look at all of them costs less than one at each.
        if not _finite([t for found in values for t in found]):
            broken = next(i for i, found in enumerate(values) if not _finite(found))
            raise InvalidData(_not_finite(self.steps[broken]))
        return layers


def _structure(decoder: nn.Module) -> tuple[list[Any], list[Any]]:
    """Modules, their settings, hooks and tensors, to be compared by identity, and the tensors' shapes and devices."""
    parts: list[Any] = []
    for module in decoder.modules():
        # A module of the user's own may keep whatever it computed last.
        settings = vars(module).values() if _is_of_torch(module) else (module.training,)
        hooks = *module._forward_hooks.values(), *module._forward_pre_hooks.values()
        tensors = *module._parameters.values(), *module._buffers.values()
        parts += [module, type(module), *settings, *hooks, *tensors]
    return parts, [(t.shape, t.device) for t in parts if isinstance(t, Tensor)]


def _is_of_torch(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.")


def _finite(tensors: list[Tensor]) -> bool:
    flat = [t.flatten() for t in tensors if t.is_floating_point()]
    return not flat or bool((torch.cat(flat).abs() < torch.inf).all())


def _not_finite(step: Step) -> str:
    target = step.call.target
    tensors = (*target.named_parameters(), *target.named_buffers()) if isinstance(target, nn.Module) else ()
    names = [name for name, t in tensors if not bool(torch.isfinite(t).all())]
    what = " and ".join(f"{step.call.place}.{name}" for name in names) or f"the value of {step}"
    return f"{what} must be finite, but holds NaN or infinity; check the training step that wrote it."
