# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Which cell was cut from which: one generation of cells for every layer of units."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Generation", "Lineage", "children"]


def children(parents: Tensor, count: int, cells: Tensor) -> tuple[Tensor, Tensor]:
    """All parts of each of ``cells`` (P,): index (Q,) of the part, and which of the P it belongs to.

    Args:
        parents: (R',) the cell of each part, ascending.
        count: number of cells.
        cells: (P,) cells, perhaps several times.
    """
    parts = torch.bincount(parents, minlength=count)
    first = parts.cumsum(0) - parts
    many = parts[cells]
    which = torch.repeat_interleave(many)
    return ranges(first[cells], many, which), which


def ranges(first: Tensor, many: Tensor, which: Tensor) -> Tensor:
    """The numbers from ``first``, as ``many`` (P,) of them, end to end; ``which`` says whose each is."""
    return torch.arange(len(which), device=which.device) + (first - (many.cumsum(0) - many))[which]


@dataclass(frozen=True)
class Generation:
    """The cells cut at one layer of units.

    Args:
        parents: (R,) ascending: the cell of the generation before that each was cut from.
        pattern: (R, H) int8 segments of the units on them.
        first_pair: (R_before + 1,) where the pairs of each cell of the generation before begin.
        unit: (P,) the units that change their segment inside a cell of the generation before; all others are on
            the same segment on all parts of it.
    """

    parents: Tensor
    pattern: Tensor
    first_pair: Tensor
    unit: Tensor


class Lineage:
    """All generations so far; the first cell, all of space, is none."""

    def __init__(self) -> None:
        self.generations: list[Generation] = []
        self._ancestors: list[Tensor] = []

    def append(self, generation: Generation) -> None:
        """The next generation."""
        parents = generation.parents
        self.generations.append(generation)
        # Of the last generation but one the parents are the ancestors.
        before = [ancestor[parents] for ancestor in self._ancestors]
        self._ancestors = [*before, parents] if len(self.generations) > 1 else before

    def patterns(self, rows: slice = slice(None)) -> list[Tensor]:
        """Segments (R, H) of the units of every layer on cells of the last generation."""
        if not self.generations:
            return []
        *before, last = self.generations
        pairs = zip(before, self._ancestors, strict=True)
        return [*(g.pattern.index_select(0, ancestor[rows]) for g, ancestor in pairs), last.pattern[rows]]
