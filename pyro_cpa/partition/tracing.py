# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""A ``forward`` of the user's own, run once on symbols to see which steps it takes."""

from __future__ import annotations

import inspect
import operator
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from .calls import Line, leaves, mapped

__all__ = ["Trace", "trace"]

_TORCH = str(Path(torch.__file__).parent)
_READING = str(Path(__file__).with_name("reading.py"))
_PYRO_NN = str(Path("pyro", "nn", "module.py"))


class Trace:
    """The steps of one module.

    Attributes:
        nodes: as torch.fx records them, every submodule being one step.
        lines: for each node the line that it comes from.
        constants: tensors made in or around the ``forward``, by the name of the node that stands for each.
    """

    def __init__(self, nodes: list[fx.Node], lines: dict[str, Line], constants: dict[str, Tensor]) -> None:
        self.nodes, self.lines, self.constants = nodes, lines, constants


class _Proxy(fx.Proxy):
    """Keeps ``h += x`` apart from ``h = h + x``: the first also changes other names of h."""

    def __iadd__(self, other: Any) -> Any:
        return self._in_place(operator.iadd, other)

    def __isub__(self, other: Any) -> Any:
        return self._in_place(operator.isub, other)

    def __imul__(self, other: Any) -> Any:
        return self._in_place(operator.imul, other)

    def __itruediv__(self, other: Any) -> Any:
        return self._in_place(operator.itruediv, other)

    def _in_place(self, function: Any, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})


class _OneLevel(fx.Tracer):
    """Every module is a leaf (the recursion over modules is ours), and the module traced is left as it is."""

    proxy_buffer_attributes = True

    def __init__(self) -> None:
        super().__init__()
        self.lines: dict[str, Line] = {}
        self.constants: dict[str, Tensor] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        frame = sys._getframe(1)
        while frame.f_back is not None and _is_library(frame.f_code.co_filename):
            frame = frame.f_back
        if frame.f_code.co_filename != _READING:  # steps that fx adds when the forward is over
            self.lines[node.name] = Line(frame.f_code.co_filename, frame.f_lineno)
        return node

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor) and not isinstance(a, nn.Parameter):
            if a.requires_grad:
                raise ValueError("it uses a tensor with a gradient that is no parameter of its own")
            # fx would store the tensor in the module itself.
            node = self.create_node("get_attr", f"constant{len(self.constants)}", (), {})
            self.constants[node.name] = a
            return node
        return super().create_arg(a)


def _is_library(file: str) -> bool:
    return file == __file__ or file.startswith(_TORCH) or file.endswith(_PYRO_NN)


def trace(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], symbolic: Any
) -> tuple[Trace, list[Any]]:
    """Run ``module.forward`` on symbols.

    Args:
        module: whose ``forward`` is run.
        args, kwargs: what it is called with.
        symbolic: of an argument (or a part of one): whether a symbol stands for it.

    Returns:
        The trace, and the parts of the arguments in the order of its placeholders.

    Raises:
        ValueError: it cannot be run on symbols; the message says why and where.
    """
    try:
        named = _named(module, args, kwargs)
        concrete = mapped(lambda part: fx.PH if symbolic(part) else part, named)
        tracer, random = _OneLevel(), torch.get_rng_state()
        with warnings.catch_warnings():
            # fx has remarks about arguments that are no symbols.
            warnings.simplefilter("ignore")
            graph = tracer.trace(module, concrete_args=concrete)
    except Exception as error:  # whatever the user's own forward raises when it is given a symbol
        first_line = str(error).partition("\n")[0]
        raise ValueError(first_line + _raised_at(error)) from error
    if not torch.equal(random, torch.get_rng_state()):
        torch.set_rng_state(random)
        raise ValueError("it draws random numbers")
    return Trace(list(graph.nodes), tracer.lines, tracer.constants), leaves(named)


def _named(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of ``forward`` by name, in its order."""
    signature = inspect.signature(module.forward)
    bound = signature.bind(*args, **kwargs)
    for name, parameter in signature.parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) and bound.arguments.pop(
            name, None
        ):
            raise ValueError(f"its forward gathers arguments in {parameter}: name them")
    bound.apply_defaults()
    gathered = {n for n, p in signature.parameters.items() if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    return {name: value for name, value in bound.arguments.items() if name not in gathered}


def _raised_at(error: Exception) -> str:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not _is_library(f.filename)]
    return f"; {Line(frames[-1].filename, frames[-1].lineno or 0)}" if frames else ""
