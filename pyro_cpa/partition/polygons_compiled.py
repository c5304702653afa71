# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Polygons cut by walls, compiled by numba. Imported only if it is installed.

One cell after the other is cut into all its parts, which meanwhile stay in the cache nearest to the processor. The
arithmetic, and the order of the parts, are those of :class:`~pyro_cpa.partition.polygons.Polygons`.

Edges are rows (n_1, n_2, c, start, end), walls rows (n_1, n_2, offset, tilt, shift).
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

__all__ = ["cut"]

_compile = njit(nogil=True, cache=True, error_model="numpy")


@_compile
def cut(normals, offsets, starts, ends, walls, first, slots, size, most):
    """All parts of all cells.

    Args:
        normals, offsets, starts, ends: of the cells, padding last.
        walls: (P, 5) by their cells, in the order in which they are to be tried.
        first: (R + 1,) where the walls of each cell begin.
        slots: (R,) of the cells in the tree of cuts.
        size: nodes that the tree has.
        most: stop when there are more parts.

    Returns:
        The edges of all parts (their sum, 5), where those of each part begin (R' + 1,), its cell (R',) and slot (R',);
        of each new node of the tree its slot and its wall; and the number of parts, more than ``most`` where some are
        missing.
    """
    R = len(offsets)
    edges, begin = np.empty((8 * (R + len(walls)), 5)), np.zeros(2 * (R + len(walls)) + 1, np.int64)
    parent, slot = np.empty(len(begin), np.int64), np.empty(len(begin), np.int64)
    node_slot, node_wall = np.empty(len(begin), np.int64), np.empty(len(begin), np.int64)
    parts, nodes, found = 0, 0, R
    # The parts of one cell in this round and in the next: their edges and walls, and where these begin.
    now, then = _round(), _round()
    for r in range(R):
        now = _whole(now, normals[r], offsets[r], starts[r], ends[r], first[r], first[r + 1], slots[r])
        count = 1
        while count:
            found = parts + count + R - r - 1
            if found > most:
                break
            now_edges, now_first, now_walls, now_wall, now_slot = now
            pending = 0
            for i in range(count):
                if now_wall[i] < now_wall[i + 1]:
                    pending += 1
                    continue
                a, b = now_first[i], now_first[i + 1]
                edges = _with_room(edges, begin[parts], b - a)
                edges[begin[parts] : begin[parts] + b - a] = now_edges[a:b]
                begin = _with_room(begin, parts + 1, 1)
                parent, slot = _with_room(parent, parts, 1), _with_room(slot, parts, 1)
                begin[parts + 1], parent[parts], slot[parts] = begin[parts] + b - a, r, now_slot[i]
                parts += 1
            node_slot = _with_room(node_slot, nodes, pending)
            node_wall = _with_room(node_wall, nodes, pending)
            then = _halves(now, count, then, walls, size + nodes)
            for i in range(count):
                if now_wall[i] < now_wall[i + 1]:
                    node_slot[nodes], node_wall[nodes] = now_slot[i], now_walls[now_wall[i]]
                    nodes += 1
            now, then = then, now
            count = 2 * pending
        if found > most:
            break
    return (
        edges[: begin[parts]],
        begin[: parts + 1],
        parent[:parts],
        slot[:parts],
        node_slot[:nodes],
        node_wall[:nodes],
        found,
    )


@_compile
def _round():
    """Room for a few parts."""
    return (
        np.empty((64, 5)),
        np.zeros(8, np.int64),
        np.empty(64, np.int64),
        np.zeros(8, np.int64),
        np.empty(8, np.int64),
    )


@_compile
def _whole(now, normals, offsets, starts, ends, first, last, slot):
    """The round in which there is the cell alone, with all its walls."""
    edges, first_edge, walls, first_wall, slots = now
    edges, walls = _with_room(edges, 0, len(offsets)), _with_room(walls, 0, last - first)
    count = 0
    while count < len(offsets) and offsets[count] < np.inf:
        n = normals[count]
        _put(edges, count, n[0], n[1], offsets[count], starts[count], ends[count])
        count += 1
    for k in range(last - first):
        walls[k] = first + k
    first_edge[0], first_edge[1], first_wall[0], first_wall[1], slots[0] = 0, count, 0, last - first, slot
    return edges, first_edge, walls, first_wall, slots


@_compile
def _halves(now, count, then, wall, size):
    """The next round: the lower halves of all parts that have walls, then the upper halves."""
    now_edges, now_first, now_walls, now_wall, _ = now
    edges, first_edge, walls, first_wall, slots = then
    generators = np.empty((16, 3))
    half = 0
    for side in range(2):
        node = size
        for i in range(count):
            mine, stop = now_wall[i], now_wall[i + 1]
            if mine == stop:
                continue
            a, b = now_first[i], now_first[i + 1]
            first_edge = _with_room(first_edge, half + 1, 1)
            first_wall = _with_room(first_wall, half + 1, 1)
            slots = _with_room(slots, half, 1)
            edges = _with_room(edges, first_edge[half], b - a + 1)
            generators = _with_room(generators, 0, b - a + 4)
            end = _half(now_edges[a:b], wall[now_walls[mine]], side, edges, first_edge[half])
            some = _generators(edges[first_edge[half] : end], generators)
            free = first_wall[half]
            walls = _with_room(walls, free, stop - mine)
            for k in range(mine + 1, stop):
                if _crosses(wall[now_walls[k]], generators[:some]):
                    walls[free] = now_walls[k]
                    free += 1
            first_edge[half + 1], first_wall[half + 1], slots[half] = end, free, 1 + 2 * node + side
            half += 1
            node += 1
    return edges, first_edge, walls, first_wall, slots


@_compile
def _half(cell, wall, side, edges, end):
    """Writes the edges of one half from row ``end`` on, and returns where they end."""
    n1, n2, offset, tilt = wall[0], wall[1], wall[2], wall[3]
    low, high = -np.inf, np.inf
    for e in range(len(cell)):
        m1, m2, c, start, stop = cell[e]
        slope = -m2 * n1 + m1 * n2
        cosine = m1 * n1 + m2 * n2
        gap, room = offset - c * cosine, c - offset * cosine
        rising = True
        if abs(slope) <= 2 * tilt:
            crossing = np.inf if gap >= 0 else -np.inf
        else:
            crossing = gap / slope
            rising = slope > 0
            if rising:
                low = max(low, -room / slope)
            else:
                high = min(high, -room / slope)
        if rising == (side == 0):
            stop = min(stop, crossing)
        else:
            start = max(start, crossing)
        if start < stop:
            _put(edges, end, m1, m2, c, start, stop)
            end += 1
    if low < high:
        if side == 0:
            _put(edges, end, n1, n2, offset, low, high)
        else:
            _put(edges, end, -n1, -n2, -offset, -high, -low)
        end += 1
    return end


@_compile
def _generators(cell, found):
    """Weighted corners and rays of a cell with edges; returns how many."""
    count, scale, coming, going = len(cell), 0.0, -1, -1
    for e in range(count):
        n1, n2, c, start, stop = cell[e]
        along = start
        if start == -np.inf:
            along = 0.0 if stop == np.inf else stop
            if coming < 0:
                coming = e
        if stop == np.inf and going < 0:
            going = e
        found[e, 0], found[e, 1] = c * n1 - along * n2, c * n2 + along * n1
        distance = math.sqrt(found[e, 0] * found[e, 0] + found[e, 1] * found[e, 1])
        found[e, 2] = distance
        scale = max(scale, distance)
    scale = min(max(scale, 1e-8), 1.0)  # see weighted_points
    for e in range(count):
        weight = 1.0 / (scale + found[e, 2])
        found[e, 0], found[e, 1], found[e, 2] = found[e, 0] * weight, found[e, 1] * weight, weight
    some = count
    if coming >= 0:
        found[some, 0], found[some, 1], found[some, 2] = cell[coming, 1], -cell[coming, 0], 0.0
        some += 1
    if going >= 0:
        found[some, 0], found[some, 1], found[some, 2] = -cell[going, 1], cell[going, 0], 0.0
        some += 1
    if count == 1:  # a half-plane
        found[some, 0], found[some, 1], found[some, 2] = -cell[0, 0], -cell[0, 1], 0.0
        some += 1
    return some


@_compile
def _crosses(wall, generators):
    """Whether the wall has points of the cell, deeper than rounding, on both sides."""
    above, below = False, False
    for g in range(len(generators)):
        x, y, weight = generators[g]
        depth = x * wall[0] + y * wall[1] - weight * wall[2]
        noise = wall[3] * (abs(x) + abs(y)) + wall[4] * weight
        above |= depth > noise
        below |= depth < -noise
        if above and below:
            return True
    return False


@_compile
def _put(edges, e, n1, n2, c, start, stop):
    edges[e, 0], edges[e, 1], edges[e, 2], edges[e, 3], edges[e, 4] = n1, n2, c, start, stop


@_compile
def _with_room(array, used, more):
    """The array, or a longer copy if ``more`` rows would not fit behind those that are ``used``."""
    if used + more <= len(array):
        return array
    longer = np.empty((2 * (used + more),) + array.shape[1:], array.dtype)
    longer[:used] = array[:used]
    return longer
