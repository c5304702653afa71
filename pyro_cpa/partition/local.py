# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Affine pieces of a network where they are asked for, without enumerating regions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .graph import homogeneous_basis
from .network import Network

__all__ = ["LocalPieces", "Piece"]


class Piece(NamedTuple):
    """The affine piece that belongs to each of P activation patterns, and what bounds its region.

    Attributes:
        slopes: (P, D, L) of the output.
        offsets: (P, D) of the output.
        unit_slopes: (P, H, L) of the inputs of all units.
        unit_offsets: (P, H) of the same.
        lower: (P, H) the region is where every unit's input lies between ``lower``
        upper: (P, H) and ``upper``, which may be infinite.
    """

    slopes: Tensor
    offsets: Tensor
    unit_slopes: Tensor
    unit_offsets: Tensor
    lower: Tensor
    upper: Tensor


class LocalPieces:
    """Reads patterns, values and affine pieces of a network as it is now, detached and in float64.

    A pattern is a row (H,) int8: the segment of every unit of the network.

    Args:
        network: the decoder.
    """

    def __init__(self, network: Network) -> None:
        self.network, self.layers = network, network.snapshot()
        graph = network.graph
        self._switching = [i for i, switches in enumerate(graph.switches) if switches]
        self._inputs = [graph.inputs[i][0] for i in self._switching]
        self._widths = [graph.widths[value] for value in self._inputs]
        like = torch.empty(0, dtype=torch.float64, device=network.device)
        self._basis = homogeneous_basis(network.latent_dim, like)
        self._one = like.new_ones(1)

    @property
    def num_units(self) -> int:
        """H."""
        return sum(self._widths)

    def numbers(self) -> int:
        """Numbers that one pattern's piece needs at once, roughly."""
        graph = self.network.graph
        return (self.network.latent_dim + 1) * (max(graph.work) + self.num_units + self.network.data_dim)

    def locate(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Patterns (P, H) and values (P, D) of the network at points z (P, L)."""
        graph, rows = self.network.graph, z[:, None]
        patterns: list[Tensor] = []
        for index, value in zip(self._switching, self._inputs, strict=True):
            units = graph.push(self.layers, patterns, rows, self._one, value)[:, 0]
            patterns.append(self.layers[index].segments(units.expand(len(z), -1)))  # type: ignore[attr-defined]
        image = graph.push(self.layers, patterns, rows, self._one)[:, 0]
        found = torch.cat(patterns, dim=1) if patterns else z.new_zeros((len(z), 0), dtype=torch.int8)
        return found, image.expand(len(z), -1)

    def pieces(self, patterns: Tensor) -> Piece:
        """The piece of each of the patterns (P, H)."""
        P, L = len(patterns), self.network.latent_dim
        parts = list(patterns.split(self._widths, dim=1)) if self._widths else []
        values = (*self._inputs, self.network.graph.last)
        maps = self.network.graph.push(self.layers, parts, *self._basis, *values).expand(P, -1, -1)
        units, output = maps.split([self.num_units, self.network.data_dim], dim=-1)
        lower, upper = [], []
        for index, part in zip(self._switching, parts, strict=True):
            knots = self.layers[index].knots.expand(-1, part.shape[1])  # type: ignore[attr-defined]
            ends = torch.full_like(knots[:1], torch.inf)
            table = torch.cat([-ends, knots, ends])
            lower.append(table.gather(0, part.long()))
            upper.append(table.gather(0, part.long() + 1))
        none = maps.new_zeros(P, 0)
        return Piece(
            output[:, :L].mT,
            output[:, L],
            units[:, :L].mT,
            units[:, L],
            torch.cat(lower, dim=1) if lower else none,
            torch.cat(upper, dim=1) if upper else none,
        )
