# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Distances of data from boxes, and the search of a tree of them, compiled by numba. Imported only if it is installed."""

from __future__ import annotations

import math

import numpy as np
from numba import njit

__all__ = ["search", "squares"]

_AT_ONCE = 16  # coordinates between two looks at the sum


# Sums may be reordered: all terms are positive.
@njit(nogil=True, cache=True, fastmath={"contract", "reassoc"})
def _square(low, high, x, limit):
    """Squared distance of x (D,) from a box, or a part of it that reaches the limit."""
    total, D = 0.0, len(x)
    for start in range(0, D, _AT_ONCE):
        for d in range(start, min(start + _AT_ONCE, D)):
            outside = max(max(low[d] - x[d], x[d] - high[d]), 0.0)
            total += outside * outside
        if total >= limit:
            break
    return total


@njit(nogil=True, cache=True)
def squares(low, high, data, node, found):
    """Squared distances ``found`` (N, B) of data (N, D) from the boxes of nodes (N, B)."""
    for n in range(node.shape[0]):
        for b in range(node.shape[1]):
            found[n, b] = _square(low[node[n, b]], high[node[n, b]], data[n], np.inf)


@njit(nogil=True, cache=True)
def search(low, high, log_mass, limit, data, log_bound, kept, omitted):
    """From the root down: which leaves are ``kept`` (N, G), and what share the others have at most, ``omitted`` (N,).

    Args:
        low, high: (2G - 1, D) boxes of the nodes, level after level.
        log_mass, limit: (2G - 1,) log-probability of the nodes, and the squared distance at which they are left out.
        data, log_bound: (N, D) and (N,); minus twice the bound is a squared distance gone already.
    """
    G = kept.shape[1]
    stack = np.empty(64, np.int64)
    for n in range(data.shape[0]):
        share, gone = 0.0, 2.0 * log_bound[n]
        stack[0], pending = 0, 1
        while pending:
            pending -= 1
            i = stack[pending]
            square = gone + _square(low[i], high[i], data[n], limit[i] - gone)
            if square >= limit[i]:
                share += math.exp(log_mass[i] - 0.5 * square)
            elif i >= G - 1:
                kept[n, i - (G - 1)] = True
            else:
                stack[pending], stack[pending + 1] = 2 * i + 1, 2 * i + 2
                pending += 2
        omitted[n] = share
