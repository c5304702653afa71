# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""A decoder read as a chain of affine maps and elementwise piecewise-linear units."""

from __future__ import annotations

import torch
from torch import nn

from ..errors import InvalidData, UnsupportedModule
from .layers import Dense, Layer
from .modules import READERS, refuse
from .reading import Link, chain

__all__ = ["Network"]


class Network:
    """The chain of layers of a piecewise-affine ``torch.nn.Module``, bound to its live parameters.

    Args:
        decoder: module R^L -> R^D made of ``nn.Linear``, ``nn.ReLU``, ``nn.LeakyReLU``, ``nn.PReLU``,
            ``nn.Hardtanh``, ``nn.ReLU6``, ``nn.Hardsigmoid``, ``Abs``, ``nn.Identity``, ``nn.Dropout`` and
            ``nn.BatchNorm1d`` in evaluation mode; within ``nn.Sequential``, nested at will, or within modules
            whose ``forward`` calls them (or ``torch.relu``, ``torch.abs``, ...) one after the other.
        latent_dim: L, where no layer of the decoder tells it.

    Raises:
        UnsupportedModule: a module is not continuous piecewise affine, or does not fit the one before it.

    Example:
        >>> network = Network(nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 3)))
        >>> network.latent_dim, network.data_dim, len(network.linears)
        (2, 3, 2)
    """

    def __init__(self, decoder: nn.Module, latent_dim: int | None = None) -> None:
        self.decoder = decoder
        self._links = tuple(chain(decoder, "decoder"))
        tensors = [*decoder.parameters(), *decoder.buffers()]
        self._like = next((t for t in tensors if t.is_floating_point()), torch.zeros(()))
        layers = self.layers()
        self.latent_dim, self.data_dim = self._widths(layers, latent_dim)

    @property
    def dtype(self) -> torch.dtype:
        """The decoder's own dtype; all geometry is in float64."""
        return self._like.dtype

    @property
    def device(self) -> torch.device:
        return self._like.device

    @property
    def linears(self) -> tuple[nn.Linear, ...]:
        """The ``nn.Linear`` modules, in order."""
        return tuple(link.module for link in self._links if isinstance(link.module, nn.Linear))

    @property
    def ends_linear(self) -> bool:
        """Whether the last module is an ``nn.Linear``, so that all affine maps share it."""
        return bool(self._links) and isinstance(self._links[-1].module, nn.Linear)

    @property
    def places(self) -> tuple[str, ...]:
        """Place and class of every layer, such as ``decoder.1: ReLU``."""
        return tuple(str(link) for link in self._links)

    def layers(self) -> tuple[Layer, ...]:
        """The layers in float64, differentiable in the decoder's parameters as they are now."""
        found = []
        for link in self._links:
            try:
                found.append(READERS[link.kind](link.module, self._like))
            except UnsupportedModule as error:
                raise refuse(link.place, link.kind.__name__, str(error)) from None
        return tuple(found)

    def snapshot(self) -> tuple[Layer, ...]:
        """The layers as they are now, as detached copies, checked to be finite.

        Raises:
            InvalidData: a parameter is NaN or infinite.
        """
        with torch.no_grad():
            layers = tuple(layer.detach() for layer in self.layers())
        for link, layer in zip(self._links, layers, strict=True):
            # An infinite running variance would give a finite layer: buffers are looked at themselves.
            values = (*vars(layer).values(), *link.module.buffers())
            if not all(bool(torch.isfinite(t).all()) for t in values):
                raise InvalidData(_not_finite(link))
        return layers

    def _widths(self, layers: tuple[Layer, ...], latent_dim: int | None) -> tuple[int, int]:
        first, width = latent_dim, latent_dim
        for link, layer in zip(self._links, layers, strict=True):
            dense = isinstance(layer, Dense)
            expected = layer.weight.shape[1] if isinstance(layer, Dense) else layer.slopes.shape[1]
            if not dense and expected == 1:
                continue
            if width is None:
                first = width = expected
            if expected != width:
                raise UnsupportedModule(
                    f"{link} takes {expected} inputs, but {width} arrive there"
                    + (f" (latent_dim={latent_dim})." if width == latent_dim else ".")
                )
            if isinstance(layer, Dense):
                width = layer.weight.shape[0]
        if first is None or width is None:
            raise UnsupportedModule("no layer of the decoder tells the latent dimension: give latent_dim=.")
        return first, width


def _not_finite(link: Link) -> str:
    tensors = (*link.module.named_parameters(), *link.module.named_buffers())
    names = [name for name, t in tensors if not bool(torch.isfinite(t).all())]
    what = " and ".join(f"{link.place}.{name}" for name in names) or f"the value of {link}"
    return f"{what} must be finite, but holds NaN or infinity; check the training step that wrote it."
