# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
r"""The kinds of layer of a piecewise-affine network, as float64 tensors, and how maps pass through them.

On a region every unit of every activation stays on one segment, so that the network is affine there. Its
map is carried as the images of L + 1 homogeneous points of the latent space: the directions :math:`(e_l, 0)`,
whose images are the columns of A, and the origin :math:`(0, 1)`, whose image is b. Points are pushed by the
same code. Whatever its shape in the decoder, a value is a flat row of H numbers here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["Dense", "Elementwise", "Gather", "Layer", "Maximum", "Sum"]


class Layer(ABC):
    """A layer of one or more inputs, affine in all of them once every unit is on a segment."""

    @property
    def switches(self) -> bool:
        """Whether there are units, that is, whether the layer has a pattern."""
        return False

    def tensors(self) -> list[Tensor]:
        """All tensors that it holds."""
        found = []
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            found += [t for t in (value if isinstance(value, tuple) else (value,)) if isinstance(t, Tensor)]
        return found

    def detach(self) -> Any:
        """A copy that changes to the decoder's parameters do not reach."""
        new = {}
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            many = isinstance(value, tuple)
            if all(isinstance(t, Tensor) for t in (value if many else (value,))):
                new[field.name] = tuple(map(_copy, value)) if many else _copy(value)
        return replace(self, **new)  # type: ignore[type-var]

    @abstractmethod
    def push(self, inputs: Sequence[Tensor], constant: Tensor, pattern: Tensor | None) -> Tensor:
        """Images of homogeneous points.

        Args:
            inputs: (R, J, H) for each input J points or directions a region; R may be 1.
            constant: (J,) 1 for points, 0 for directions.
            pattern: (R, H) int8 segments; None without units.

        Returns:
            (R, J, H_out); the first dimension stays 1 where no pattern came in.
        """

    @abstractmethod
    def push_magnitude(
        self, magnitudes: Sequence[Tensor], inputs: Sequence[Tensor], pattern: Tensor | None
    ) -> Tensor:
        """Sums (R, 2, H_out) of absolute values of all that was added up; see :meth:`Graph.push_magnitude`."""

    @abstractmethod
    def pull(self, jacobian: Tensor, pattern: Tensor | None) -> Sequence[Tensor | None]:
        """Derivative (R, D, H) in each input, None for zero, from ``jacobian`` (R, D, H_out) in the output."""


def _copy(tensor: Tensor) -> Tensor:
    # Tables of indices never change.
    return tensor.detach().clone() if tensor.is_floating_point() else tensor


def sizes(rows: Tensor) -> Tensor:
    """Absolute values (R, 2, H) of the maps (R, L + 1, H): of the slopes, summed, and of the offsets."""
    size = rows.abs()
    return torch.stack([size[:, :-1].sum(1), size[:, -1]], dim=1)


def constant_row(like: Tensor) -> Tensor:
    """(2, 1) what of a constant is slope, and what is offset."""
    return torch.tensor([[0.0], [1.0]], dtype=like.dtype, device=like.device)


@dataclass(frozen=True)
class Dense(Layer):
    """The affine map h -> W h + v.

    Args:
        weight: (H_out, H_in) W.
        bias: (H_out,) v.
    """

    weight: Tensor
    bias: Tensor

    def push(self, inputs: Sequence[Tensor], constant: Tensor, pattern: Tensor | None) -> Tensor:
        return inputs[0] @ self.weight.mT + constant[:, None] * self.bias

    def push_magnitude(
        self, magnitudes: Sequence[Tensor], inputs: Sequence[Tensor], pattern: Tensor | None
    ) -> Tensor:
        total = (magnitudes[0] + sizes(inputs[0])) @ self.weight.abs().mT
        return total + constant_row(total) * self.bias.abs()

    def pull(self, jacobian: Tensor, pattern: Tensor | None) -> Sequence[Tensor | None]:
        return (jacobian @ self.weight,)


@dataclass(frozen=True)
class Elementwise(Layer):
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

    @cached_property
    def _shifts(self) -> bool:
        """Whether any segment has an intercept; those of the rectifiers have none."""
        return self.intercepts.requires_grad or bool((self.intercepts != 0).any())

    def at(self, units: Tensor) -> Elementwise:
        """The functions of some units, in that order."""
        tables = (self.knots, self.slopes, self.intercepts)
        return Elementwise(*(t[:, units] if t.shape[1] > 1 else t for t in tables))

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

    def push(self, inputs: Sequence[Tensor], constant: Tensor, pattern: Tensor | None) -> Tensor:
        scaled = inputs[0] * self._on(self.slopes, pattern)
        return scaled + constant[:, None] * self._on(self.intercepts, pattern) if self._shifts else scaled

    def push_magnitude(
        self, magnitudes: Sequence[Tensor], inputs: Sequence[Tensor], pattern: Tensor | None
    ) -> Tensor:
        total = magnitudes[0] * self._on(self.slopes, pattern).abs()
        if not self._shifts:
            return total
        return total + constant_row(total) * self._on(self.intercepts, pattern).abs()

    def pull(self, jacobian: Tensor, pattern: Tensor | None) -> Sequence[Tensor | None]:
        return (jacobian * self._on(self.slopes, pattern),)


@dataclass(frozen=True)
class Maximum(Elementwise):
    r"""The greater of a and b, from the inputs (d, a, b), where the units are those of d = a - b.

    As a hinge it is :math:`\max(a, b) = b + \mathrm{relu}(a - b)`; taking a or b itself loses no digits.
    With d = b - a it is the lesser of the two.
    """

    def push(self, inputs: Sequence[Tensor], constant: Tensor, pattern: Tensor | None) -> Tensor:
        return self._choose(inputs, pattern)

    def push_magnitude(
        self, magnitudes: Sequence[Tensor], inputs: Sequence[Tensor], pattern: Tensor | None
    ) -> Tensor:
        return self._choose(magnitudes, pattern)

    def pull(self, jacobian: Tensor, pattern: Tensor | None) -> Sequence[Tensor | None]:
        zero = torch.zeros_like(jacobian)
        return (
            None,
            self._choose((zero, jacobian, zero), pattern),
            self._choose((zero, zero, jacobian), pattern),
        )

    def _choose(self, triple: Sequence[Tensor], pattern: Tensor | None) -> Tensor:
        _, a, b = triple
        return a if pattern is None else torch.where((pattern > 0)[:, None], a, b)


@dataclass(frozen=True)
class Sum(Layer):
    """a + c b.

    Args:
        factor: the number c.
    """

    factor: float = 1.0

    def push(self, inputs: Sequence[Tensor], constant: Tensor, pattern: Tensor | None) -> Tensor:
        return torch.add(inputs[0], inputs[1], alpha=self.factor)

    def push_magnitude(
        self, magnitudes: Sequence[Tensor], inputs: Sequence[Tensor], pattern: Tensor | None
    ) -> Tensor:
        a, b = (m + sizes(rows) for m, rows in zip(magnitudes, inputs, strict=True))
        return torch.add(a, b, alpha=abs(self.factor))

    def pull(self, jacobian: Tensor, pattern: Tensor | None) -> Sequence[Tensor | None]:
        return jacobian, self.factor * jacobian


@dataclass(frozen=True)
class Gather(Layer):
    """Entries of all inputs laid end to end: what concatenation, permutation, padding and copying come to.

    Args:
        widths: numbers of entries of the inputs.
        index: (H_out,) which entry each output is, 0 for the first; one past the last stands for zero.
            None where the outputs are the inputs end to end.
    """

    widths: tuple[int, ...]
    index: Tensor | None

    def push(self, inputs: Sequence[Tensor], constant: Tensor, pattern: Tensor | None) -> Tensor:
        return self._gather(inputs)

    def push_magnitude(
        self, magnitudes: Sequence[Tensor], inputs: Sequence[Tensor], pattern: Tensor | None
    ) -> Tensor:
        return self._gather(magnitudes)

    def _gather(self, inputs: Sequence[Tensor]) -> Tensor:
        R = max(rows.shape[0] for rows in inputs)
        rows = inputs[0] if len(inputs) == 1 else torch.cat([t.expand(R, -1, -1) for t in inputs], dim=-1)
        return rows if self.index is None else pad(rows, (0, 1)).index_select(-1, self.index)

    def pull(self, jacobian: Tensor, pattern: Tensor | None) -> Sequence[Tensor | None]:
        if self.index is not None:
            zero = jacobian.new_zeros(*jacobian.shape[:-1], sum(self.widths) + 1)
            jacobian = zero.index_add(-1, self.index, jacobian)[..., :-1]
        return jacobian.split(self.widths, dim=-1)
