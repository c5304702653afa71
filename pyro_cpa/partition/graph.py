# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""How maps pass through a network of layers: forwards along all paths, and backwards for derivatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .layers import Layer

__all__ = ["Graph", "homogeneous_basis"]

Layers = Sequence[Layer]
Patterns = Sequence[Tensor]


def homogeneous_basis(dim: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Directions and origin of R^dim: rows (1, dim + 1, dim) and their homogeneous coordinate (dim + 1,)."""
    eye = torch.eye(dim + 1, dtype=like.dtype, device=like.device)
    return eye[None, :, :-1], eye[:, -1]


@dataclass(frozen=True)
class Graph:
    """The wiring of a network. Value 0 is the latent, value i + 1 the result of layer i.

    Args:
        inputs: the values that each layer takes, all of them earlier ones.
        switches: whether each layer has units; its pattern is the next of ``patterns``.
        widths: numbers of entries of all values.
        work: numbers that each layer needs at once for one row, its result included.
    """

    inputs: tuple[tuple[int, ...], ...]
    switches: tuple[bool, ...]
    widths: tuple[int, ...]
    work: tuple[int, ...]
    _paths: dict[int, tuple[tuple[int, tuple[int, ...]], ...]] = field(default_factory=dict, compare=False)

    @property
    def last(self) -> int:
        """The value that is the output."""
        return len(self.inputs)

    def path(self, value: int) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """The layers that ``value`` depends on, in order, each with the values that nobody needs after it."""
        if value not in self._paths:
            needed, path = {value}, []
            for layer in reversed(range(value)):
                if layer + 1 in needed:
                    path.append((layer, tuple(set(self.inputs[layer]) - needed)))
                    needed.update(self.inputs[layer])
            self._paths[value] = tuple(reversed(path))
        return self._paths[value]

    def has_units(self, value: int) -> bool:
        """Whether the map to ``value`` differs from region to region."""
        return any(self.switches[layer] for layer, _ in self.path(value))

    def numbers(self, value: int, kept: bool = False) -> int:
        """Numbers that one row needs on its way to ``value``: the most at once, or all if they are kept."""
        found = [self.work[layer] for layer, _ in self.path(value)] or [self.widths[0]]
        return sum(found) if kept else max(found)

    def push(
        self, layers: Layers, patterns: Patterns, rows: Tensor, constant: Tensor, value: int | None = None
    ) -> Tensor:
        """Images of homogeneous points under the affine piece of each region.

        Args:
            layers: all layers, or those up to ``value``.
            patterns: (R, H) int8 segments, one tensor for each layer with units.
            rows: (R, J, L) J points or directions a region; R may be 1.
            constant: (J,) 1 for points, 0 for directions.
            value: where to stop; by default at the output.

        Returns:
            (R, J, H) images; the first dimension stays 1 if no layer on the way has units.
        """

        def step(layer: Layer, given: list[tuple[Tensor, ...]], pattern: Tensor | None) -> tuple[Tensor, ...]:
            return (layer.push([rows for (rows,) in given], constant, pattern),)

        return self._walk(layers, patterns, (rows,), step, value)[0]

    def push_magnitude(
        self, layers: Layers, patterns: Patterns, rows: Tensor, constant: Tensor, value: int
    ) -> tuple[Tensor, Tensor]:
        """The map of each region (R, L + 1, H) and, in units of the rounding error, a bound on its own error.

        Returns:
            maps: (R, L + 1, H), as by :meth:`push`.
            magnitude: (R, 2, H): sums of absolute values of all that was added up to give the slopes (first
                row, as a sum over the latent dimensions) and the offset (second row) of each unit.
        """

        def step(layer: Layer, given: list[tuple[Tensor, ...]], pattern: Tensor | None) -> tuple[Tensor, ...]:
            maps, magnitudes = zip(*given, strict=True)
            magnitude = layer.push_magnitude(magnitudes, maps, pattern)
            return layer.push(maps, constant, pattern), magnitude

        maps, magnitude = self._walk(layers, patterns, (rows, torch.zeros_like(rows[:, :2])), step, value)
        return maps, magnitude

    def _walk(
        self,
        layers: Layers,
        patterns: Patterns,
        latent: tuple[Tensor, ...],
        step: Callable[[Layer, list[tuple[Tensor, ...]], Tensor | None], tuple[Tensor, ...]],
        value: int | None,
    ) -> tuple[Tensor, ...]:
        value = self.last if value is None else value
        alive = {0: latent}
        for index, spent in self.path(value):
            given = [alive[v] for v in self.inputs[index]]
            alive[index + 1] = step(layers[index], given, self._pattern(patterns, index))
            for v in spent:
                del alive[v]
        return alive[value]

    def _pattern(self, patterns: Patterns, index: int) -> Tensor | None:
        return patterns[sum(self.switches[:index])] if self.switches[index] else None

    def pull(self, layers: Layers, patterns: Patterns, jacobian: Tensor, value: int) -> Tensor:
        """Derivative (R, D, H) of the output in ``value``, from ``jacobian`` (R, D, H_out) in the output."""
        reached = {value}
        for index in range(value, self.last):
            if reached.intersection(self.inputs[index]):
                reached.add(index + 1)
        found: dict[int, Tensor] = {self.last: jacobian}
        for index, _ in reversed(self.path(self.last)):
            if index < value or index + 1 not in found:
                continue
            parts = layers[index].pull(found.pop(index + 1), self._pattern(patterns, index))
            for v, part in zip(self.inputs[index], parts, strict=True):
                if part is not None and v in reached:
                    found[v] = found[v] + part if v in found else part
        return found[value]
