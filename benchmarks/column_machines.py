# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Bidirectional Helmholtz machines, and no machine at all, under each law of binary columns."""

from __future__ import annotations

import torch
from autoregressive_columns import AutoregressiveColumns, fitted_columns
from exclusive_columns import ExclusiveColumns, frequencies
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyro_cpa.models import BidirectionalHelmholtzMachine

__all__ = ["OUTPUTS", "Machine", "columns_alone"]

OUTPUTS = ("bernoulli", "exclusive", "autoregressive")


class Machine(BidirectionalHelmholtzMachine):
    """The library's machine with a choice of p(x | z_1), data biases at the training frequencies.

    Args:
        layers: latent units.
        x: (N, D) training rows.
        groups: (G, W) columns that exclude each other, or one column each.
        output: one of :data:`OUTPUTS`.
        deterministic: tanh layers between two stochastic ones.
        transposed: whether recognition starts as the transpose of generation.
    """

    groups: Tensor

    def __init__(
        self,
        layers: tuple[int, ...],
        x: Tensor,
        groups: Tensor,
        output: str,
        *,
        deterministic: int = 0,
        transposed: bool = False,
    ) -> None:
        super().__init__(x.shape[1], layers, deterministic=deterministic)
        self.register_buffer("groups", groups)
        self.columns = None
        if output == "autoregressive":
            self.columns = nn.Linear(x.shape[1], x.shape[1], bias=False)
            nn.init.zeros_(self.columns.weight)
        with torch.no_grad():
            self.generation[0][-1].bias.copy_(frequencies(x, groups))
            if transposed:
                for up, down in zip(self.recognition, self.generation, strict=True):
                    for there, back in zip(up[::2], down[::-2], strict=True):  # between them stands a tanh
                        there.weight.copy_(back.weight.T)

    def layer(self, level: int, logits: Tensor) -> TorchDistribution:
        if level > 0:
            return super().layer(level, logits)
        if self.columns is not None:
            return AutoregressiveColumns(logits, self.columns.weight)
        return ExclusiveColumns(logits, self.groups)


def columns_alone(x: Tensor, valid: Tensor, groups: Tensor, output: str) -> TorchDistribution:
    """The law of the columns without a latent, fitted to the rows ``x``; ``valid`` chooses its penalty, if any."""
    if output == "autoregressive":
        return fitted_columns(x, valid)
    return ExclusiveColumns(frequencies(x, groups), groups)
