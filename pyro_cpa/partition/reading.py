# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""From a decoder to the chain of its modules: containers are opened, a ``forward`` of one's own is traced."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from .modules import IDENTITIES, READERS, Abs, refuse

__all__ = ["Link", "chain"]

_FUNCTIONS: dict[Callable[..., Any] | str, type[nn.Module]] = {
    torch.abs: Abs,
    torch.relu: nn.ReLU,
    F.relu: nn.ReLU,
    F.relu6: nn.ReLU6,
    F.leaky_relu: nn.LeakyReLU,
    F.hardtanh: nn.Hardtanh,
    F.hardsigmoid: nn.Hardsigmoid,
    "abs": Abs,
    "relu": nn.ReLU,
}
"""Functions and tensor methods with the module that takes the same arguments."""


@dataclass(frozen=True)
class Link:
    """One module of the chain: where it is, and the class whose reader understands it."""

    place: str
    module: nn.Module
    kind: type[nn.Module]

    def __str__(self) -> str:
        return f"{self.place}: {self.kind.__name__}"


def chain(module: nn.Module, place: str) -> Iterator[Link]:
    """The supported modules inside ``module``, in the order in which data pass them.

    Raises:
        UnsupportedModule: at a module that is not understood, naming it and its place.
    """
    name, forward = type(module).__name__, type(module).forward
    kind = _inherits(module, READERS)
    if module._forward_hooks or module._forward_pre_hooks:
        reason = (
            "a forward hook may change what it computes; remove the hook (weight and spectral norm: use "
            "torch.nn.utils.parametrizations)"
        )
        raise refuse(place, name, reason)
    if kind is not None:
        yield Link(place, module, kind)
    elif _inherits(module, IDENTITIES):
        if module.training and getattr(module, "p", 0) > 0:
            raise refuse(place, name, "in training mode it is random; call decoder.eval()")
    elif _inherits(module, (nn.Sequential,)):
        for key, child in module._modules.items():  # named_children() would drop repeated modules
            if child is not None:
                yield from chain(child, f"{place}.{key}")
    elif forward.__module__.startswith("torch.nn."):
        raise refuse(place, name)
    else:
        yield from _traced(module, place)


def _inherits(module: nn.Module, classes: Sequence[type[nn.Module]] | dict[type[nn.Module], Any]) -> Any:
    """The class in ``classes`` that ``module`` is of, unless its ``forward`` is another one."""
    found = [cls for cls in classes if isinstance(module, cls) and type(module).forward is cls.forward]
    # The most special one: nn.ReLU6 is an nn.Hardtanh.
    return max(found, key=lambda cls: len(cls.__mro__), default=None)


class _OneLevel(fx.Tracer):
    """Every module is a leaf: the recursion over modules is ours."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _traced(module: nn.Module, place: str) -> Iterator[Link]:
    name = type(module).__name__
    try:
        nodes = list(_OneLevel().trace(module).nodes)
    except Exception as error:  # whatever the user's own forward raises when it is given a symbol
        first_line = str(error).partition("\n")[0]
        raise refuse(place, name, f"its forward is not a fixed chain of modules ({first_line})") from error
    current = nodes[0]
    for node in nodes[1:]:
        if node.op == "placeholder" and not node.users:
            continue
        where = f"{place}.{node.target}" if node.op == "call_module" else place
        label = getattr(node.target, "__name__", str(node.target))
        if node.all_input_nodes != [current]:
            reason = f"its forward is no chain in which each step takes the one before ({node.format_node()})"
            raise refuse(place, name, reason)
        current = node
        if node.op == "output" and isinstance(node.args[0], fx.Node):
            return
        if node.op == "call_module" and len(node.args) == 1 and not node.kwargs:
            yield from chain(module.get_submodule(str(node.target)), where)
        elif node.op in ("call_function", "call_method") and node.target in _FUNCTIONS:
            kind = _FUNCTIONS[node.target]
            yield Link(f"{place}.forward", kind(*node.args[1:], **node.kwargs), kind)
        else:
            raise refuse(f"{where}.forward", label)
    raise refuse(place, name, "its forward returns nothing that depends on its input alone")
