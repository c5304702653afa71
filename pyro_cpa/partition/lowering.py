# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""From the calls of a decoder to its steps."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..errors import UnsupportedModule
from .building import Builder, Step
from .calls import Call, Late, Ref, leaves, mapped
from .functions import FUNCTIONS, UNITS, VIEWS
from .graph import Graph
from .modules import ELEMENTWISE, IDENTITIES, MODULES, REARRANGING
from .reading import method, read
from .values import Rows, Value, constant

__all__ = ["lower"]


def lower(decoder: nn.Module, latent_dim: int | None, like: Tensor) -> tuple[tuple[Step, ...], Graph]:
    """The steps of a decoder and their wiring.

    Args:
        decoder: the module.
        latent_dim: L, or None to find it out.
        like: any tensor of the decoder.

    Raises:
        UnsupportedModule: at the first thing that is not continuous piecewise affine.
    """
    calls, output = read(decoder, MODULES, IDENTITIES, (*VIEWS, *REARRANGING))
    L = _latent_dim(calls) if latent_dim is None else latent_dim
    builder = Builder(like, latent_dim is not None)
    needed = {output.index}
    for index in reversed(range(len(calls))):
        if index in needed:
            needed.update(calls[index].refs)
    results: dict[int, Any] = {-1: Value(0, (L,))}
    for index, call in enumerate(calls):
        if index in needed:
            builder.call = call
            args, kwargs = mapped(
                lambda leaf: results[leaf.index] if isinstance(leaf, Ref) else leaf, (call.args, call.kwargs)
            )
            results[index] = builder.tried(partial(_result, builder, call, args, kwargs))
    found = results[output.index]
    if not isinstance(found, Value):
        raise builder.refuse("the decoder must return one tensor that depends on z")
    return builder.finish(found, L)


def _result(builder: Builder, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    inside = leaves((args, kwargs))
    if any(isinstance(leaf, Rows) for leaf in inside) and any(
        isinstance(leaf, Value | Late | Tensor) for leaf in inside
    ):
        if not (call.target in VIEWS or call.name.startswith("new_")):
            raise builder.refuse("it depends on how many rows of data there are")
    if not any(isinstance(leaf, Value) for leaf in inside):
        return _constant(call, args, kwargs)
    if isinstance(call.target, nn.Module):
        if call.kind is None:
            raise builder.refuse()
        return MODULES[call.kind](builder, call.target, *args, **kwargs)
    build = FUNCTIONS.get(call.target)
    if build is None:
        raise builder.refuse()
    return build(builder, *args, **kwargs)


def _constant(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A call that the latent does not reach: shapes, numbers of rows, parameters."""
    function: Any = partial(method, call.target) if isinstance(call.target, str) else call.target
    inside = leaves((args, kwargs))
    args, kwargs = mapped(lambda leaf: leaf.value if isinstance(leaf, Rows) else leaf, (args, kwargs))
    if any(isinstance(leaf, Late | Tensor) for leaf in inside):
        return Late(function, args, tuple(kwargs.items()))
    found = function(*args, **kwargs)
    return Rows(found) if any(isinstance(leaf, Rows) for leaf in inside) else found


def _latent_dim(calls: list[Call]) -> int:
    """L, from the first layer that tells how many inputs it takes."""
    latents = {-1}
    for index, call in enumerate(calls):
        first = call.args[0] if call.args else None
        if isinstance(first, list) and len(first) == 1:  # a list that grows, before it does
            first = first[0]
        if not isinstance(first, Ref) or first.index not in latents:
            continue
        told = _inputs(call)
        if told is not None:
            return told
        if call.kind in ELEMENTWISE or call.target in UNITS or call.name == "cat":
            latents.add(index)
    raise UnsupportedModule("no layer of the decoder tells the latent dimension: give latent_dim=.")


def _inputs(call: Call) -> int | None:
    """How many inputs the module or function of a call takes, where it tells."""
    target: Any = call.target
    if call.kind is nn.Linear:
        return int(target.in_features)
    if call.kind is not None and call.kind.__name__.startswith("BatchNorm"):
        return int(target.num_features)
    if call.kind is nn.PReLU and target.num_parameters > 1:
        return int(target.num_parameters)
    if call.kind is nn.Unflatten:
        return _product(target.unflattened_size)
    if call.name in ("view", "reshape", "unflatten"):
        return _product(call.args[2:] or call.args[-1][1:])
    weight = constant(call.args[1]) if call.name in ("linear", "matmul") and len(call.args) > 1 else None
    if isinstance(weight, Tensor) and weight.dim() == 2:
        return weight.shape[call.name == "linear"]
    return None


def _product(sizes: Any) -> int | None:
    known = isinstance(sizes, tuple | list) and all(isinstance(size, int) and size > 0 for size in sizes)
    return math.prod(sizes) if known else None
