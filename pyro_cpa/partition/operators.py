# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Linear operations that PyTorch has a function for (convolution, average pooling, ...), as layers.

The function itself is called, on maps as it would be on images: their matrix is never formed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .layers import Layer, constant_row, sizes

__all__ = ["Operator"]


@dataclass(frozen=True)
class Operator(Layer):
    """h -> function(h, *weights) + v.

    Args:
        function: takes a batch (B, *shape) and the weights; linear in its first argument, row by row, with
            coefficients that are products of the weights, or not negative.
        shape: of one input.
        weights: what the function takes besides.
        shift: (H_out,) v; None for zero.
    """

    function: Callable[..., Tensor]
    shape: torch.Size
    weights: tuple[Tensor, ...]
    shift: Tensor | None

    def _apply(self, rows: Tensor, weights: Sequence[Tensor]) -> Tensor:
        images = self.function(rows.reshape(-1, *self.shape), *weights)
        return images.reshape(*rows.shape[:-1], -1)

    def push(self, inputs: Sequence[Tensor], constant: Tensor, pattern: Tensor | None) -> Tensor:
        images = self._apply(inputs[0], self.weights)
        return images if self.shift is None else images + constant[:, None] * self.shift

    def push_magnitude(
        self, magnitudes: Sequence[Tensor], inputs: Sequence[Tensor], pattern: Tensor | None
    ) -> Tensor:
        total = self._apply(magnitudes[0] + sizes(inputs[0]), [w.abs() for w in self.weights])
        return total if self.shift is None else total + constant_row(total) * self.shift.abs()

    def pull(self, jacobian: Tensor, pattern: Tensor | None) -> Sequence[Tensor | None]:
        with torch.enable_grad():
            lead = jacobian.shape[:-1]
            origin = jacobian.new_zeros(*lead, math.prod(self.shape)).requires_grad_()
            image = self._apply(origin, [w.detach() for w in self.weights])
        # The function is linear: its derivative is the same everywhere.
        return torch.autograd.grad(image, origin, jacobian.detach().expand_as(image))
