# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Functions that only move entries about: run once on numbered entries, to see where each goes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .building import Builder
from .calls import Late, leaves, mapped
from .values import ROWS, Rows, Value, constant

__all__ = ["rearrange"]


def rearrange(b: Builder, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The result of a function that only moves entries of its values about, or leaves them out.

    Constants among the arguments may take places too. A function that does anything else is refused.
    """
    given = [leaf for leaf in leaves((args, kwargs)) if isinstance(leaf, Value)]
    values = list(dict.fromkeys(given))
    total = sum(value.size for value in values)
    device = b.like.device
    numbered, start = {}, 1
    for value in values:
        rows = start + total * torch.arange(ROWS, device=device, dtype=torch.float64)[:, None]
        entries = rows + torch.arange(value.size, device=device, dtype=torch.float64)
        numbered[value] = entries.reshape(ROWS, *value.shape)
        start += value.size
    blank = {value: torch.zeros_like(entries) for value, entries in numbered.items()}
    places = b.tried(_run, function, args, kwargs, numbered, 0.0)
    several = isinstance(places, tuple | list)
    numbers = [constant(leaf) for leaf in leaves((args, kwargs)) if isinstance(leaf, Late | Tensor)]
    has_constants = any(isinstance(t, Tensor) and t.is_floating_point() for t in numbers)
    results = []
    for part, found in enumerate(places if several else (places,)):
        value = _take_numbered(b, values, found, total)
        if has_constants:
            box = _Box(args, kwargs, blank)
            value = b.affine(value, None, Late(_constant_part, (function, box, part if several else None)))
        results.append(value)
    return tuple(results) if several else results[0]


def _take_numbered(b: Builder, values: Sequence[Value], found: Any, total: int) -> Value:
    if not isinstance(found, Tensor) or found.dim() == 0 or found.shape[0] != ROWS:
        raise b.refuse("it does not keep the first dimension, which is that of the data")
    flat = found.reshape(ROWS, -1)
    step = total * torch.arange(ROWS, device=flat.device)[:, None]
    if not torch.equal(torch.where(flat > 0, flat - step, 0.0), flat[:1].expand_as(flat)):
        raise b.refuse("it mixes rows of data, or does more than move entries about")
    index = flat[0].round().long() - 1
    return b.take(values, torch.where(index < 0, total, index), found.shape[1:])


class _Box:
    """Arguments, and what stands for the values among them; no tuple, so that it is passed on as it is."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], values: dict[Value, Tensor]) -> None:
        self.args, self.kwargs, self.values = args, kwargs, values


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
