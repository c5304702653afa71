# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""From a decoder to the list of its calls: containers are opened, a ``forward`` of one's own is traced."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, fx, nn

from .calls import Call, Late, Line, Ref, leaves, mapped
from .refusal import refuse
from .tracing import Trace, trace

__all__ = ["method", "read"]

_NO_TENSORS = ("shape", "ndim", "dtype", "device")
_IN_PLACE = {operator.iadd, operator.isub, operator.imul, operator.itruediv}


def read(
    decoder: nn.Module,
    known: Iterable[type[nn.Module]],
    identities: Iterable[type[nn.Module]],
    views: Iterable[Any],
) -> tuple[list[Call], Ref]:
    """The calls that a decoder makes, in order.

    Args:
        decoder: the module.
        known: classes whose meaning is known, which are not looked into.
        identities: classes that pass their input on unchanged in evaluation mode.
        views: functions, methods and classes whose result may share memory with their input.

    Returns:
        The calls and the output. Calls that the output does not need are among them: not all are supported.

    Raises:
        UnsupportedModule: a module cannot be read, or overwrites what is used again.
    """
    reader = _Reader(tuple(known), tuple(identities))
    output = reader.module(decoder, "decoder", (Ref(-1),), {}, None)
    if not isinstance(output, Ref):
        what = "a constant" if not any(isinstance(leaf, Ref) for leaf in leaves(output)) else "several values"
        raise refuse(
            "decoder", type(decoder).__name__, f"it must return one tensor that depends on z, not {what}"
        )
    _check_overwriting(reader.calls, output, frozenset(views))
    return reader.calls, output


class _Reader:
    def __init__(self, known: Sequence[type[nn.Module]], identities: Sequence[type[nn.Module]]) -> None:
        self.known, self.identities = known, identities
        self.calls: list[Call] = []

    def module(
        self, module: nn.Module, place: str, args: tuple[Any, ...], kwargs: dict[str, Any], line: Line | None
    ) -> Any:
        """Put the calls inside ``module`` on the list; returns its output."""
        name, forward = type(module).__name__, type(module).forward
        if not any(isinstance(leaf, Ref) for leaf in leaves((args, kwargs))):
            return Late(module, args, tuple(kwargs.items()))
        if module._forward_hooks or module._forward_pre_hooks:
            reason = (
                "a forward hook may change what it computes; remove the hook (weight and spectral norm: use "
                "torch.nn.utils.parametrizations)"
            )
            raise refuse(place, name, reason, line)
        kind = _inherits(module, self.known)
        if kind is None and _inherits(module, self.identities):
            if module.training and getattr(module, "p", 0) > 0:
                raise refuse(place, name, "in training mode it is random; call decoder.eval()", line)
            return args[0]
        if kind is None and _inherits(module, (nn.Sequential,)) and len(args) == 1 and not kwargs:
            value = args[0]
            for key, child in module._modules.items():  # named_children() would drop repeated modules
                if child is not None:
                    value = self.module(child, f"{place}.{key}", (value,), {}, line)
            return value
        if kind is None and not forward.__module__.startswith("torch.nn."):
            return self._traced(module, place, args, kwargs, line)
        return self._append(Call(place, (kind or type(module)).__name__, module, args, kwargs, kind, line))

    def _append(self, call: Call) -> Ref:
        self.calls.append(call)
        return Ref(len(self.calls) - 1)

    def _traced(
        self, module: nn.Module, place: str, args: tuple[Any, ...], kwargs: dict[str, Any], line: Line | None
    ) -> Any:
        try:
            found, given = trace(module, args, kwargs, lambda part: isinstance(part, Ref | Late | Tensor))
        except ValueError as error:
            reason = (
                f"its forward cannot be traced ({error}); an exact decoder takes the same steps at every z: write "
                "branches as torch.maximum, torch.abs or nn.ReLU"
            )
            raise refuse(place, type(module).__name__, reason, line) from error
        parts = iter(given)
        values: dict[fx.Node, Any] = {}
        for node in found.nodes:
            if node.op == "placeholder":
                # Those with a star stand for arguments that were not given.
                values[node] = None if str(node.target).startswith("*") else next(parts)
            elif node.op == "output":
                return mapped(lambda leaf: values.get(leaf, leaf), node.args[0])
            else:
                values[node] = self._node(module, place, node, found, values)
        raise AssertionError("a trace ends with its output")

    def _node(
        self, module: nn.Module, place: str, node: fx.Node, found: Trace, values: dict[fx.Node, Any]
    ) -> Any:
        """The result of one step of a traced ``forward``."""
        line, target = found.lines.get(node.name), node.target
        args, kwargs = mapped(
            lambda leaf: values[leaf] if isinstance(leaf, fx.Node) else leaf,
            (tuple(node.args), dict(node.kwargs)),
        )
        if node.op == "get_attr":
            constant = found.constants.get(node.name)
            return Late(_attribute, (module, target)) if constant is None else constant
        if node.op == "call_module":
            child = module.get_submodule(str(target))
            return self.module(child, f"{place}.{target}", args, kwargs, line)
        if target is operator.getitem and not isinstance(args[0], Ref | Late | Tensor):
            return operator.getitem(*args)
        if not any(isinstance(leaf, Ref) for leaf in leaves((args, kwargs))):
            function = target if callable(target) else functools.partial(method, target)
            return Late(function, args, tuple(kwargs.items()))
        name = str(target) if isinstance(target, str) else getattr(target, "__name__", str(target))
        if name == "fn":  # functions of torch.nn.functional that choose between two others
            name = node.name.rstrip("_0123456789")
        return self._append(Call(f"{place}.forward", name, target, args, kwargs, None, line))


def _inherits(module: nn.Module, classes: Sequence[type[nn.Module]]) -> type[nn.Module] | None:
    """The class in ``classes`` that ``module`` is of, unless its ``forward`` is another one."""
    if type(module) in classes:
        return type(module)
    found = [cls for cls in classes if isinstance(module, cls) and type(module).forward is cls.forward]
    # The most special one: nn.ReLU6 is an nn.Hardtanh.
    return max(found, key=lambda cls: len(cls.__mro__), default=None)


def _attribute(module: nn.Module, path: str) -> Any:
    return functools.reduce(getattr, path.split("."), module)


def method(name: str, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The result of a method of ``tensor``."""
    return getattr(tensor, name)(*args, **kwargs)


def _overwrites(call: Call) -> bool:
    if isinstance(call.target, nn.Module):
        return bool(getattr(call.target, "inplace", False))
    return call.target in _IN_PLACE or call.name.endswith("_") or bool(call.kwargs.get("inplace"))


def _check_overwriting(calls: list[Call], output: Ref, views: frozenset[Any]) -> None:
    """Refuse calls that change their input in place where it is used again: a list of calls has no memory."""
    needed, users = {output.index}, {}
    for index in reversed(range(len(calls))):
        users[index] = calls[index].refs
        if index in needed:
            needed.update(users[index])
    # Values that may be the same memory: a view and what it is a view of.
    owner = {-1: -1}
    for index, call in enumerate(calls):
        first = users[index][0]
        same = (call.kind or call.target) in views or _overwrites(call)
        if call.target is getattr and call.args[1] in _NO_TENSORS:
            same = False
        owner[index] = owner[first] if same else index
    for index, call in enumerate(calls):
        if not _overwrites(call):
            continue
        # What is made from the overwritten value itself sees the new one, as it does here.
        after = {index}
        later_uses = [(i, users[i]) for i in range(index + 1, len(calls)) if i in needed]
        for later, used in [*later_uses, (len(calls), [output.index])]:
            if any(owner[v] == owner[index] and v not in after for v in used):
                reason = (
                    "it overwrites a value that is used again later; use it without inplace=True, or h = h + x "
                    "for h += x"
                )
                raise refuse(call.place, call.name, reason, call.line)
            if owner.get(later) == owner[index]:
                after.add(later)
