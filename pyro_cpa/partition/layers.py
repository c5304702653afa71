# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
r"""The two kinds of layer of a piecewise-affine network, as float64 tensors, and how maps pass through them.

On a region every unit of every activation stays on one segment, so that the network is affine there. Its
map is carried as the images of L + 1 homogeneous points of the latent space: the directions :math:`(e_l, 0)`,
whose images are the columns of A, and the origin :math:`(0, 1)`, whose image is b. Points are pushed by the
same code.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Dense", "Elementwise", "Layer", "homogeneous_basis", "pull", "push", "push_magnitude"]


@dataclass(frozen=True)
class Dense:
    """The affine map h -> W h + v.

    Args:
        weight: (H_out, H_in) W.
        bias: (H_out,) v.
    """

    weight: Tensor
    bias: Tensor

    @property
    def switches(self) -> bool:
        return False

    def detach(self) -> Dense:
        return Dense(self.weight.detach().clone(), self.bias.detach().clone())

    def push(self, rows: Tensor, constant: Tensor, pattern: Tensor | None) -> Tensor:
        return rows @ self.weight.mT + constant[:, None] * self.bias

    def push_magnitude(self, magnitude: Tensor, rows: Tensor, pattern: Tensor | None) -> Tensor:
        size = rows.abs()
        size = torch.stack([size[:, :-1].sum(1), size[:, -1]], dim=1)
        constant = torch.tensor([[0.0], [1.0]], dtype=rows.dtype, device=rows.device)
        return (magnitude + size) @ self.weight.abs().mT + constant * self.bias.abs()

    def pull(self, jacobian: Tensor, pattern: Tensor | None) -> Tensor:
        return jacobian @ self.weight


@dataclass(frozen=True)
class Elementwise:
    """One continuous piecewise-linear function per unit; segment k runs from knot k-1 to knot k.

    Args:
        knots: (K, H) ascending; H may be 1 where all units share them. K = 0 is an affine map of each unit.
        slopes: (K + 1, H) or (K + 1, 1).
        intercepts: (K + 1, H) or (K + 1, 1): the value on segment k is ``slopes[k] * h + intercepts[k]``.
    """

    knots: Tensor
    slopes: Tensor
    intercepts: Tensor

    @property
    def switches(self) -> bool:
        return self.knots.shape[0] > 0

    @property
    def bends(self) -> Tensor:
        """(K, H) or (K, 1): True where the slope changes at the knot; elsewhere the knot is no wall."""
        return self.slopes[1:] != self.slopes[:-1]

    def detach(self) -> Elementwise:
        return Elementwise(*(t.detach().clone() for t in (self.knots, self.slopes, self.intercepts)))

    def segments(self, values: Tensor) -> Tensor:
        """Segment (int8) on which each of ``values`` (R, H) lies."""
        pattern = torch.zeros(values.shape, dtype=torch.int8, device=values.device)
        for knot in self.knots:
            pattern += values > knot
        return pattern

    def _on(self, table: Tensor, pattern: Tensor | None) -> Tensor:
        """Row ``pattern`` of a (K + 1, H) table: (R, 1, H), or (1, 1, H) without knots."""
        found = table[:1]
        if pattern is not None:
            for k in range(1, table.shape[0]):
                found = torch.where(pattern >= k, table[k], found)
        return found[:, None]

    def push(self, rows: Tensor, constant: Tensor, pattern: Tensor | None) -> Tensor:
        return rows * self._on(self.slopes, pattern) + constant[:, None] * self._on(self.intercepts, pattern)

    def push_magnitude(self, magnitude: Tensor, rows: Tensor, pattern: Tensor | None) -> Tensor:
        constant = torch.tensor([[0.0], [1.0]], dtype=rows.dtype, device=rows.device)
        return (
            magnitude * self._on(self.slopes, pattern).abs()
            + constant * self._on(self.intercepts, pattern).abs()
        )

    def pull(self, jacobian: Tensor, pattern: Tensor | None) -> Tensor:
        return jacobian * self._on(self.slopes, pattern)


Layer = Dense | Elementwise


def _with_patterns(
    layers: Sequence[Layer], patterns: Sequence[Tensor]
) -> Iterator[tuple[Layer, Tensor | None]]:
    """Each layer with its pattern; only layers with knots have one."""
    remaining = iter(patterns)
    for layer in layers:
        yield layer, next(remaining) if layer.switches else None


def homogeneous_basis(dim: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Directions and origin of R^dim: rows (1, dim + 1, dim) and their homogeneous coordinate (dim + 1,)."""
    eye = torch.eye(dim + 1, dtype=like.dtype, device=like.device)
    return eye[None, :, :-1], eye[:, -1]


def push(layers: Sequence[Layer], patterns: Sequence[Tensor], rows: Tensor, constant: Tensor) -> Tensor:
    """Images of homogeneous points under the affine piece of each region.

    Args:
        layers: the layers to pass, in order.
        patterns: (R, H) int8 segments, one tensor for each of the layers with knots.
        rows: (R, J, L) J points or directions a region; R may be 1.
        constant: (J,) 1 for points, 0 for directions.

    Returns:
        (R, J, H) images; the first dimension stays 1 if no layer has knots.
    """
    for layer, pattern in _with_patterns(layers, patterns):
        rows = layer.push(rows, constant, pattern)
    return rows


def push_magnitude(
    layers: Sequence[Layer], patterns: Sequence[Tensor], rows: Tensor, constant: Tensor
) -> tuple[Tensor, Tensor]:
    """The map of each region (R, L + 1, H) and, in units of the rounding error, a bound on its own error.

    Returns:
        maps: (R, L + 1, H), as by :func:`push`.
        magnitude: (R, 2, H): sums of absolute values of all that was added up to give the slopes (first
            row, as a Euclidean norm) and the offset (second row) of each unit.
    """
    magnitude = torch.zeros_like(rows[:, :2])
    for layer, pattern in _with_patterns(layers, patterns):
        magnitude = layer.push_magnitude(magnitude, rows, pattern)
        rows = layer.push(rows, constant, pattern)
    return rows, magnitude


def pull(layers: Sequence[Layer], patterns: Sequence[Tensor], jacobian: Tensor) -> Tensor:
    """Derivative (R, D, H) of the outputs in the input of the first of ``layers``, from ``jacobian`` (R,
    D, H_out)."""
    for layer, pattern in reversed(list(_with_patterns(layers, patterns))):
        jacobian = layer.pull(jacobian, pattern)
    return jacobian
