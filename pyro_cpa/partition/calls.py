# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""A decoder as a list of calls: what the calls and their arguments are."""

from __future__ import annotations

import linecache
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from torch import nn

__all__ = ["Call", "Late", "Line", "Ref", "leaves", "mapped"]


class Line(NamedTuple):
    """A line of source."""

    file: str
    number: int

    def __str__(self) -> str:
        text = linecache.getline(self.file, self.number).strip()
        where = f"{self.file}, line {self.number}"
        return f"{where}: {text}" if text else where


@dataclass(frozen=True)
class Ref:
    """The result of call ``index``; -1 is the latent."""

    index: int


@dataclass(frozen=True)
class Late:
    """Something that the latent does not reach, computed from the parameters as they are when it is called."""

    function: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: tuple[tuple[str, Any], ...] = ()

    def __call__(self) -> Any:
        args, kwargs = mapped(_value, (self.args, dict(self.kwargs)))
        return self.function(*args, **kwargs)


def _value(leaf: Any) -> Any:
    return leaf() if isinstance(leaf, Late) else leaf


@dataclass(frozen=True)
class Call:
    """One step of the decoder.

    Args:
        place: where it is in the tree of modules.
        name: of the module's class or the function.
        target: a module, a function, or the name of a tensor's method.
        args, kwargs: with :class:`Ref` and :class:`Late` among them, in tuples, lists, dicts and slices.
        kind: for a module the class whose meaning it has; None if it is not known.
        line: of the call, where it stands in a ``forward`` of the user's own.
    """

    place: str
    name: str
    target: nn.Module | Callable[..., Any] | str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    kind: type[nn.Module] | None = None
    line: Line | None = None

    @cached_property
    def refs(self) -> list[int]:
        """The calls whose results it takes, in order."""
        return [leaf.index for leaf in leaves((self.args, self.kwargs)) if isinstance(leaf, Ref)]


def mapped(function: Callable[[Any], Any], structure: Any) -> Any:
    """``structure`` with ``function`` applied to whatever is inside its tuples, lists, dicts and slices."""
    if not isinstance(structure, (tuple, list, dict, slice)):
        return function(structure)
    if isinstance(structure, (tuple, list)):
        items = [mapped(function, item) for item in structure]
        return items if isinstance(structure, list) else tuple(items)
    if isinstance(structure, dict):
        return {key: mapped(function, item) for key, item in structure.items()}
    ends = (structure.start, structure.stop, structure.step)
    return slice(*(mapped(function, end) for end in ends))


def leaves(structure: Any) -> list[Any]:
    """Whatever is inside the tuples, lists, dicts and slices of ``structure``."""
    found: list[Any] = []
    mapped(found.append, structure)
    return found
