# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""From calls to layers: shapes are followed, and each call becomes some of the few kinds of layer that there are.

Values have a first dimension for rows (data), as in the decoder; it is left out of all shapes here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModule
from . import elements
from .calls import Call
from .graph import Graph
from .layers import Gather, Layer, Sum
from .refusal import Unreadable, refuse
from .values import ROWS, Value, common_shape, constant

__all__ = ["Builder", "Step"]


@dataclass(frozen=True)
class Step:
    """A layer of the network, and how to read it off the live parameters."""

    call: Call
    inputs: tuple[int, ...]
    size: int
    read: Callable[[], Layer]
    module: nn.Module | None
    work: int
    switches: bool

    def __str__(self) -> str:
        return f"{self.call.place}: {self.call.name}"

    def layer(self) -> Layer:
        """The layer as the parameters are now."""
        try:
            return self.read()
        except Unreadable as error:
            raise refuse(self.call.place, self.call.name, str(error), self.call.line) from None


class Builder:
    """Puts steps one after the other.

    Args:
        like: any tensor of the decoder; its device is where tables are made.
        latent_dim_given: whether the latent dimension was the user's word.
    """

    def __init__(self, like: Tensor, latent_dim_given: bool = False) -> None:
        self.like = like
        self.latent_dim_given = latent_dim_given
        self.steps: list[Step] = []
        self.call = Call("decoder", "", "", (), {})

    def refuse(self, reason: str | None = None) -> UnsupportedModule:
        """The error that names the present call."""
        return refuse(self.call.place, self.call.name, reason, self.call.line)

    def misfit(self, reason: str) -> UnsupportedModule:
        """The error for a call that gets what it cannot take."""
        told = f"{self.call.place}: {self.call.name} {reason}."
        return UnsupportedModule(told if self.call.line is None else f"{told} ({self.call.line})")

    def add(
        self,
        inputs: Sequence[Value],
        shape: Sequence[int],
        read: Callable[[], Layer],
        module: nn.Module | None = None,
        work: int = 0,
        switches: bool = False,
    ) -> Value:
        """A step of the network.

        Args:
            inputs: what it takes.
            shape: of its result.
            read: the layer.
            module: the ``nn.Linear`` that it is.
            work: the numbers it needs at once for one row, where that is more than it takes or returns.
            switches: whether it has units.
        """
        size = math.prod(shape)
        work = max(work, size, *(value.size for value in inputs))
        numbers = tuple(value.index for value in inputs)
        self.steps.append(Step(self.call, numbers, size, read, module, work, switches))
        return Value(len(self.steps), tuple(shape))

    def finish(self, output: Value, latent_dim: int) -> tuple[tuple[Step, ...], Graph]:
        """The steps that the output needs, renumbered, and their wiring."""
        needed, kept = {output.index}, []
        for index in reversed(range(output.index)):
            if index + 1 in needed:
                kept.append(index)
                needed.update(self.steps[index].inputs)
        kept.reverse()
        number = {0: 0} | {index + 1: new + 1 for new, index in enumerate(kept)}
        steps = tuple(
            replace(self.steps[i], inputs=tuple(number[v] for v in self.steps[i].inputs)) for i in kept
        )
        graph = Graph(
            inputs=tuple(step.inputs for step in steps),
            switches=tuple(step.switches for step in steps),
            widths=(latent_dim, *(step.size for step in steps)),
            work=tuple(step.work for step in steps),
        )
        return steps, graph

    # -- units ------------------------------------------------------------------------------------------------

    def units(self, x: Value, knots: list[float], slopes: list[float], intercepts: list[float]) -> Value:
        """One piecewise-linear function for all entries; see :class:`Elementwise`."""
        layer = elements.piecewise(knots, slopes, intercepts, self.like.device)
        return self.add((x,), x.shape, partial(elements.same, layer), switches=True)

    def bound(self, x: Value, limit: Any, below: bool) -> Value:
        """max(x, limit), or min(x, limit) where ``below``, for a constant ``limit``."""
        x = self.broadcast(x, self._shape_with(x, limit))
        read = partial(elements.bound, limit, x.shape, below, self.like.device)
        return self.add((x,), x.shape, read, switches=True)

    def maximum(self, a: Value, b: Value, least: bool = False) -> Value:
        """max(a, b), or min(a, b) where ``least``."""
        a, b = self._alike(a, b)
        difference = self._sum(b, a, -1.0) if least else self._sum(a, b, -1.0)
        read = partial(elements.same, elements.hinge(self.like.device))
        return self.add((difference, a, b), a.shape, read, switches=True)

    def greatest(self, x: Value, table: Tensor, shape: Sequence[int], least: bool = False) -> Value:
        """The maximum of groups of entries, as a tournament.

        Args:
            x: entries.
            table: (G, k) for each group its entries, counted from 1; 0 where a group has fewer.
            shape: of the result, of size G.
        """
        present = table > 0
        first = table.gather(1, present.int().argmax(1, keepdim=True))
        table = torch.where(present, table, first) - 1
        while table.shape[1] > 1:
            if table.shape[1] % 2:
                # The last entry meets itself: their difference is zero and makes no wall.
                table = torch.cat([table, table[:, -1:]], dim=1)
            pairs = table.shape[0], table.shape[1] // 2
            left, right = (self.take((x,), table[:, side::2].flatten(), pairs) for side in (0, 1))
            x = self.maximum(left, right, least)
            table = torch.arange(x.size, device=table.device).reshape(pairs)
        return self.take((x,), table[:, 0], shape)

    # -- affine maps ------------------------------------------------------------------------------------------

    def take(self, inputs: Sequence[Value], index: Tensor, shape: Sequence[int]) -> Value:
        """Entries of the inputs laid end to end; one past the last stands for zero."""
        used: list[Value] = []
        start = 0
        total = sum(value.size for value in inputs)
        table = index.to(self.like.device)
        shifted = torch.full_like(table, -1)
        for value in inputs:
            inside = (table >= start) & (table < start + value.size)
            if bool(inside.any()):
                shifted = torch.where(inside, table - start + sum(v.size for v in used), shifted)
                used.append(value)
            start += value.size
        used = used or list(inputs[:1])
        width = sum(value.size for value in used)
        shifted = torch.where((table == total) | (shifted < 0), width, shifted)
        ordered = torch.equal(shifted, torch.arange(width, device=table.device))
        if ordered and len(used) == 1:
            return Value(used[0].index, tuple(shape))
        gather = Gather(tuple(value.size for value in used), None if ordered else shifted)
        return self.add(used, shape, partial(elements.same, gather))

    def broadcast(self, x: Value, shape: Sequence[int]) -> Value:
        """x repeated along dimensions of size 1."""
        if tuple(shape) == x.shape:
            return x
        if len(shape) != len(x.shape):
            raise self.refuse("it lines up rows of data with another dimension")
        entries = torch.arange(x.size, device=self.like.device).reshape(1, *x.shape)
        return self.take((x,), self.tried(torch.broadcast_to, entries, (1, *shape)).flatten(), shape)

    def _alike(self, a: Value, b: Value) -> tuple[Value, Value]:
        if a.shape == b.shape:
            return a, b
        shape = self.tried(common_shape, (ROWS, *a.shape), (ROWS, *b.shape))[1:]
        return self.broadcast(a, shape), self.broadcast(b, shape)

    def _shape_with(self, x: Value, *constants: Any) -> tuple[int, ...]:
        """The shape of x together with constants."""
        shapes = [tuple(t.shape) for t in map(constant, constants) if isinstance(t, Tensor)]
        return self.tried(common_shape, (ROWS, *x.shape), *shapes)[1:]

    def _sum(self, a: Value, b: Value, factor: float) -> Value:
        return self.add((a, b), a.shape, partial(Sum, factor))

    def sum(self, a: Value, b: Value, factor: float = 1.0) -> Value:
        """a + factor b."""
        return self._sum(*self._alike(a, b), factor)

    def affine(self, x: Value, scale: Any, shift: Any) -> Value:
        """scale x + shift, entry by entry, for constants; None stands for 1 and 0."""
        x = self.broadcast(x, self._shape_with(x, scale, shift))
        read = partial(elements.affine, scale, shift, x.shape, self.like.device)
        self.tried(read)
        return self.add((x,), x.shape, read)

    def operator(
        self,
        x: Value,
        function: Callable[..., Tensor],
        weights: Sequence[Any] = (),
        bias: Any = None,
        work: Callable[[Sequence[int]], int] = math.prod,
    ) -> Value:
        """A linear function of a batch and of weights; see :class:`Operator`. ``bias`` is one number a channel."""
        with torch.no_grad():
            trial = torch.zeros(ROWS, *x.shape, dtype=torch.float64, device=self.like.device)
            shape = self.tried(function, trial, *(constant(w).double() for w in weights)).shape
        if not shape or shape[0] != ROWS:
            raise self.refuse("it does not keep the first dimension, which is that of the data")
        read = partial(elements.operator, function, x.shape, tuple(weights), bias, math.prod(shape[2:]))
        return self.add((x,), shape[1:], read, work=work(shape[1:]))

    def tried(self, function: Callable[..., Any], *args: Any) -> Any:
        """The result of a function; what it raises is said of the present call."""
        try:
            return function(*args)
        except UnsupportedModule:
            raise
        except Unreadable as error:
            raise self.refuse(str(error)) from None
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            first_line = str(error).partition("\n")[0]
            raise self.refuse(f"it does not take what arrives there ({first_line})") from error
