# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""From calls to layers: shapes are followed, and each call becomes the few kinds of layer that there are.

Functions that only move numbers about are run once on numbered entries, to see where each goes. Values have
a first dimension for rows (data), as in the decoder; it is left out of all shapes here.
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
from .calls import Call, Late, leaves, mapped
from .graph import Graph
from .layers import Elementwise, Gather, Layer, Maximum, Sum
from .operators import Operator
from .refusal import Unreadable, refuse

__all__ = ["ROWS", "Builder", "Rows", "Step", "Value", "constant", "piecewise"]

ROWS = 3
"""Rows of a trial batch: enough to see that no row depends on another."""


@dataclass(frozen=True)
class Value:
    """A value of the network: 0 is the latent, i + 1 the result of step i; ``shape`` is that of one row."""

    index: int
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Rows:
    """Something computed from the number of rows, as it is for ``ROWS`` rows."""

    value: Any


@dataclass(frozen=True)
class Step:
    """A layer of the network, and how to read it off the live parameters."""

    call: Call
    inputs: tuple[int, ...]
    size: int
    read: Callable[[], Layer]
    module: nn.Module | None
    work: int

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
    ) -> Value:
        """A step with its result's shape; ``work`` is the numbers it needs at once for one row, if many."""
        size = math.prod(shape)
        work = max(work, size, *(value.size for value in inputs))
        numbers = tuple(value.index for value in inputs)
        self.steps.append(Step(self.call, numbers, size, read, module, work))
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
            switches=tuple(step.layer().switches for step in steps),
            widths=(latent_dim, *(step.size for step in steps)),
            work=tuple(step.work for step in steps),
        )
        return steps, graph

    # -- units ------------------------------------------------------------------------------------------------

    def units(self, x: Value, knots: list[float], slopes: list[float], intercepts: list[float]) -> Value:
        """One piecewise-linear function for all entries; see :class:`Elementwise`."""
        return self.add((x,), x.shape, partial(piecewise, knots, slopes, intercepts, self.like.device))

    def bound(self, x: Value, limit: Any, below: bool) -> Value:
        """max(x, limit), or min(x, limit) where ``below``, for a constant ``limit``."""
        x = self.broadcast(x, self._shape_with(x, limit))
        return self.add((x,), x.shape, partial(_bound, limit, x.shape, below, self.like.device))

    def maximum(self, a: Value, b: Value, least: bool = False) -> Value:
        """max(a, b), or min(a, b) where ``least``."""
        a, b = self._alike(a, b)
        difference = self._sum(b, a, -1.0) if least else self._sum(a, b, -1.0)
        return self.add((difference, a, b), a.shape, partial(_hinge, self.like.device))

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
        return self.add(used, shape, partial(_same, gather))

    def rearrange(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The result of a function that only moves entries of its values about, or leaves them out.

        Constants among the arguments may take places too. A function that does anything else is refused.
        """
        given = [leaf for leaf in leaves((args, kwargs)) if isinstance(leaf, Value)]
        values = list(dict.fromkeys(given))
        total = sum(value.size for value in values)
        device = self.like.device
        numbered, start = {}, 1
        for value in values:
            rows = start + total * torch.arange(ROWS, device=device, dtype=torch.float64)[:, None]
            entries = rows + torch.arange(value.size, device=device, dtype=torch.float64)
            numbered[value] = entries.reshape(ROWS, *value.shape)
            start += value.size
        blank = {value: torch.zeros_like(entries) for value, entries in numbered.items()}
        places = self.tried(_run, function, args, kwargs, numbered, 0.0)
        several = isinstance(places, tuple | list)
        numbers = [constant(leaf) for leaf in leaves((args, kwargs)) if isinstance(leaf, Late | Tensor)]
        has_constants = any(isinstance(t, Tensor) and t.is_floating_point() for t in numbers)
        results = []
        for part, found in enumerate(places if several else (places,)):
            value = self._take_numbered(values, found, total)
            if has_constants:
                box = _Box(args, kwargs, blank)
                value = self.affine(
                    value, None, Late(_constant_part, (function, box, part if several else None))
                )
            results.append(value)
        return tuple(results) if several else results[0]

    def _take_numbered(self, values: Sequence[Value], found: Any, total: int) -> Value:
        if not isinstance(found, Tensor) or found.dim() == 0 or found.shape[0] != ROWS:
            raise self.refuse("it does not keep the first dimension, which is that of the data")
        flat = found.reshape(ROWS, -1)
        step = total * torch.arange(ROWS, device=flat.device)[:, None]
        if not torch.equal(torch.where(flat > 0, flat - step, 0.0), flat[:1].expand_as(flat)):
            raise self.refuse("it mixes rows of data, or does more than move entries about")
        index = flat[0].round().long() - 1
        return self.take(values, torch.where(index < 0, total, index), found.shape[1:])

    def broadcast(self, x: Value, shape: Sequence[int]) -> Value:
        if tuple(shape) == x.shape:
            return x
        return self.rearrange(torch.broadcast_to, x, (ROWS, *shape))

    def _alike(self, a: Value, b: Value) -> tuple[Value, Value]:
        if a.shape == b.shape:
            return a, b
        shape = self.tried(_common_shape, (ROWS, *a.shape), (ROWS, *b.shape))[1:]
        return self.broadcast(a, shape), self.broadcast(b, shape)

    def _shape_with(self, x: Value, *constants: Any) -> tuple[int, ...]:
        """The shape of x together with constants."""
        shapes = [tuple(t.shape) for t in map(constant, constants) if isinstance(t, Tensor)]
        return self.tried(_common_shape, (ROWS, *x.shape), *shapes)[1:]

    def _sum(self, a: Value, b: Value, factor: float) -> Value:
        return self.add((a, b), a.shape, partial(Sum, factor))

    def sum(self, a: Value, b: Value, factor: float = 1.0) -> Value:
        """a + factor b."""
        return self._sum(*self._alike(a, b), factor)

    def affine(self, x: Value, scale: Any, shift: Any) -> Value:
        """scale x + shift, entry by entry, for constants; None stands for 1 and 0."""
        x = self.broadcast(x, self._shape_with(x, scale, shift))
        read = partial(_affine, scale, shift, x.shape, self.like.device)
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
        read = partial(_operator, function, x.shape, tuple(weights), bias, math.prod(shape[2:]))
        return self.add((x,), shape[1:], read, work=work(shape[1:]))

    def tried(self, function: Callable[..., Any], *args: Any) -> Any:
        try:
            return function(*args)
        except UnsupportedModule:
            raise
        except Unreadable as error:
            raise self.refuse(str(error)) from None
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            first_line = str(error).partition("\n")[0]
            raise self.refuse(f"it does not take what arrives there ({first_line})") from error


class _Box:
    """Arguments, and what stands for the values among them; no tuple, so that it is passed on as it is."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], values: dict[Value, Tensor]) -> None:
        self.args, self.kwargs, self.values = args, kwargs, values


def constant(leaf: Any) -> Any:
    """The present value of something that the latent does not reach."""
    return leaf() if isinstance(leaf, Late) else leaf


def _common_shape(*shapes: Sequence[int]) -> tuple[int, ...]:
    """As ``torch.broadcast_shapes``, which loads half of PyTorch when it is first called."""
    return tuple(torch.broadcast_tensors(*(torch.empty(()).expand(shape) for shape in shapes))[0].shape)


def _run(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    values: dict[Value, Tensor],
    factor: float,
) -> Any:
    """``function`` with tensors for its values, and constants times ``factor``."""

    def given(leaf: Any) -> Any:
        if isinstance(leaf, Value):
            return values[leaf]
        leaf = constant(leaf.value if isinstance(leaf, Rows) else leaf)
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            return factor * leaf.double()
        return leaf

    args, kwargs = mapped(given, (args, kwargs))
    return function(*args, **kwargs)


def _constant_part(function: Callable[..., Any], box: _Box, part: int | None) -> Tensor:
    found = _run(function, box.args, box.kwargs, box.values, 1.0)
    return found if part is None else found[part]


def flat(value: Any, shape: Sequence[int], device: torch.device) -> Tensor:
    """A constant as (H,) float64, or (1,) for a number; it must be the same for every row."""
    if not isinstance(value, Tensor):
        return torch.tensor([float(value)], dtype=torch.float64, device=device)
    rows = torch.broadcast_to(value.double(), (ROWS, *shape)).reshape(ROWS, -1)
    if not torch.equal(rows, rows[:1].expand_as(rows)):
        raise Unreadable("a constant has other values for other rows of data")
    return rows[0]


def piecewise(
    knots: list[float], slopes: list[float], intercepts: list[float], device: torch.device
) -> Elementwise:
    lists = (knots, slopes, intercepts)
    return Elementwise(*(torch.tensor(v, dtype=torch.float64, device=device)[:, None] for v in lists))


def _hinge(device: torch.device) -> Maximum:
    return Maximum(**vars(piecewise([0.0], [0.0, 1.0], [0.0, 0.0], device)))


def _bound(limit: Any, shape: Sequence[int], below: bool, device: torch.device) -> Elementwise:
    knot = flat(constant(limit), shape, device)
    zero, one = torch.zeros_like(knot), torch.ones_like(knot)
    if below:
        return Elementwise(knot[None], torch.stack([one, zero]), torch.stack([zero, knot]))
    return Elementwise(knot[None], torch.stack([zero, one]), torch.stack([knot, zero]))


def _affine(scale: Any, shift: Any, shape: Sequence[int], device: torch.device) -> Elementwise:
    slopes, intercepts = (
        flat(default if given is None else constant(given), shape, device)
        for given, default in ((scale, 1.0), (shift, 0.0))
    )
    return Elementwise(slopes.new_zeros(0, 1), slopes[None], intercepts[None])


def _operator(
    function: Callable[..., Tensor], shape: Sequence[int], weights: Sequence[Any], bias: Any, inner: int
) -> Operator:
    shift = None if bias is None else constant(bias).double().repeat_interleave(inner)
    return Operator(function, torch.Size(shape), tuple(constant(w).double() for w in weights), shift)


def _same(layer: Layer) -> Layer:
    return layer
