# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""How maps pass through a network of layers: forwards along all paths, and backwards for derivatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from .layers import Layer

__all__ = ["Graph", "homogeneous_basis", "pusher_with_magnitude"]

Layers = Sequence[Layer]
Patterns = Sequence[Tensor]
Step = Callable[[Layer, list[tuple[Tensor, ...]], Tensor | None], tuple[Tensor, ...]]


def _pusher(constant: Tensor) -> Step:
    return lambda layer, given, pattern: (layer.push([rows for (rows,) in given], constant, pattern),)


def pusher_with_magnitude(constant: Tensor) -> Step:
    """Takes maps and the magnitude of what was added up to compute them through one layer."""

    def step(layer: Layer, given: list[tuple[Tensor, ...]], pattern: Tensor | None) -> tuple[Tensor, ...]:
        maps, magnitudes = zip(*given, strict=True)
        magnitude = layer.push_magnitude(magnitudes, maps, pattern)
        return layer.push(maps, constant, pattern), magnitude

    return step


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
    _paths: dict[tuple[int, ...], tuple[tuple[int, tuple[int, ...]], ...]] = field(
        default_factory=dict, compare=False
    )

    @property
    def last(self) -> int:
        """The value that is the output."""
        return len(self.inputs)

    def path(self, *values: int) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """The layers that ``values`` depend on, in order, each with the values that nobody needs after it."""
        if values not in self._paths:
            needed, path = set(values), []
            for layer in reversed(range(max(values))):
                if layer + 1 in needed:
                    path.append((layer, tuple(set(self.inputs[layer]) - needed)))
                    needed.update(self.inputs[layer])
            self._paths[values] = tuple(reversed(path))
        return self._paths[values]

    @cached_property
    def frontier(self) -> tuple[int, ...]:
        """The values behind which no units come: the output is one affine function of them on all regions."""
        before = {
            layer for i, switches in enumerate(self.switches) if switches for layer, _ in self.path(i + 1)
        }
        behind = [layer for layer, _ in self.path(self.last) if layer not in before]
        taken = {value for layer in behind for value in self.inputs[layer]} or {self.last}
        return tuple(sorted(taken - {layer + 1 for layer in behind}))

    def has_units(self, *values: int) -> bool:
        """Whether the maps to ``values`` differ from region to region."""
        return any(self.switches[layer] for layer, _ in self.path(*values))

    def numbers(self, *values: int, kept: bool = False) -> int:
        """Numbers that one row needs on its way to ``values``: the most at once, or all if they are kept."""
        found = [self.work[layer] for layer, _ in self.path(*values)] or [self.widths[0]]
        return sum(found) if kept else max(found)

    def push(
        self, layers: Layers, patterns: Patterns, rows: Tensor, constant: Tensor, *values: int
    ) -> Tensor:
        """Images of homogeneous points under the affine piece of each region.

        Args:
            layers: all layers.
            patterns: (R, H) int8 segments, one tensor for each layer with units.
            rows: (R, J, L) J points or directions a region; R may be 1.
            constant: (J,) 1 for points, 0 for directions.
            values: whose, end to end; the output's by default.

        Returns:
            (R, J, H) images; the first dimension stays 1 if no layer on the way has units.
        """
        values = values or (self.last,)
        step = _pusher(constant)
        return self._joined(self._walk(layers, patterns, {0: (rows,)}, step, self.path(*values)), values)

    def tail(self, layers: Layers) -> tuple[Tensor, Tensor]:
        """The affine map (D, H), (D,) from the values of the ``frontier``, laid end to end, to the output."""
        widths = [self.widths[value] for value in self.frontier]
        like = next((t for layer in layers for t in layer.tensors() if t.is_floating_point()), torch.empty(0))
        rows, constant = homogeneous_basis(sum(widths), like.double())
        start: dict[int, tuple[Tensor, ...]] = {
            v: (part,) for v, part in zip(self.frontier, rows.split(widths, dim=-1), strict=True)
        }
        before = {layer for layer, _ in self.path(*self.frontier)}
        path: list[tuple[int, tuple[int, ...]]] = [
            (layer, ()) for layer, _ in self.path(self.last) if layer not in before
        ]
        image = self._joined(self._walk(layers, (), start, _pusher(constant), path), (self.last,))[0]
        return image[:-1].mT, image[-1]

    def push_magnitude(
        self, layers: Layers, patterns: Patterns, rows: Tensor, constant: Tensor, value: int
    ) -> tuple[Tensor, Tensor]:
        """The map of each region (R, L + 1, H) and, in units of the rounding error, a bound on its own error.

        Returns:
            maps: (R, L + 1, H), as by :meth:`push`.
            magnitude: (R, 2, H): sums of absolute values of all that was added up to give the slopes (first
                row, as a sum over the latent dimensions) and the offset (second row) of each unit.
        """
        start: dict[int, tuple[Tensor, ...]] = {0: (rows, torch.zeros_like(rows[:, :2]))}
        step = pusher_with_magnitude(constant)
        maps, magnitude = self._walk(layers, patterns, start, step, self.path(value))[value]
        return maps, magnitude

    def _walk(
        self,
        layers: Layers,
        patterns: Patterns,
        alive: dict[int, tuple[Tensor, ...]],
        step: Step,
        path: Sequence[tuple[int, tuple[int, ...]]],
    ) -> dict[int, tuple[Tensor, ...]]:
        for index, spent in path:
            given = [alive[v] for v in self.inputs[index]]
            alive[index + 1] = step(layers[index], given, self._pattern(patterns, index))
            for v in spent:
                del alive[v]
        return alive

    def _joined(self, found: dict[int, tuple[Tensor, ...]], values: Sequence[int]) -> Tensor:
        parts = [found[value][0] for value in values]
        R = max(part.shape[0] for part in parts)
        return parts[0] if len(parts) == 1 else torch.cat([part.expand(R, -1, -1) for part in parts], dim=-1)

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
