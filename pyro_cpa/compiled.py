# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Loops compiled by numba, if it is installed (extra ``fast``), on as many threads as torch uses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["array", "in_blocks", "runs_compiled"]

_INSTALLED = find_spec("numba") is not None
_WORTH_A_THREAD = 2048  # pairs


def runs_compiled(like: Tensor) -> bool:
    """Whether loops over pairs of these tensors are compiled: on a CPU, with numba."""
    return _INSTALLED and like.device.type == "cpu"


def array(tensor: Tensor) -> np.ndarray:
    """The tensor as a contiguous array, so that every kernel is compiled once."""
    return np.ascontiguousarray(tensor.detach().numpy())


def in_blocks(
    kernel: Callable[..., None], shared: Sequence[Any], split: Sequence[tuple[np.ndarray, int]], work: int
) -> None:
    """Calls ``kernel(*shared, *arrays)`` on one block of the arrays per thread, without the interpreter's lock.

    Args:
        kernel: a compiled function that writes into its arrays.
        shared: its first arguments, the same for all blocks.
        split: its other arguments, each with the axis along which it is cut.
        work: pairs in all; a few are not worth a thread.
    """
    count = split[0][0].shape[split[0][1]]
    threads = max(1, min(torch.get_num_threads(), work // _WORTH_A_THREAD, count))
    cuts = [count * k // threads for k in range(threads + 1)]

    def block(start: int, stop: int) -> None:
        kernel(*shared, *(part[(slice(None),) * axis + (slice(start, stop),)] for part, axis in split))

    if threads == 1:
        block(0, count)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(block, cuts, cuts[1:]))
