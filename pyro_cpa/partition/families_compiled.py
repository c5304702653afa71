# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Maps of families of cells, and the segments of their units, compiled by numba. Imported only if it is installed.

All loops are over the units of one cell, whose map stays in the cache nearest to the processor.
"""

from __future__ import annotations

import numpy as np
from numba import njit

__all__ = ["expand", "planes", "segments"]

_compile = njit(nogil=True, cache=True, error_model="numpy")


@_compile
def _cell(maps, unit, unit_map, weight, start, stop, row):
    """The map (J, H) of one cell."""
    for j in range(maps.shape[0]):
        shared, own = maps[j], row[j]
        for h in range(own.shape[0]):
            own[h] = shared[h]
        for t in range(start, stop):
            factor, column = unit_map[t, j], weight[unit[t]]
            for h in range(own.shape[0]):
                own[h] += factor * column[h]


@_compile
def expand(
    maps, magnitude, unit, unit_map, unit_magnitude, weight, size, parent, start, stop, found, found_magnitude
):
    """Maps and magnitudes of all cells; ``size`` holds the absolute values of ``weight``."""
    for c in range(parent.shape[0]):
        p = parent[c]
        _cell(maps[p], unit, unit_map, weight, start[c], stop[c], found[c])
        _cell(magnitude[p], unit, unit_magnitude, size, start[c], stop[c], found_magnitude[c])


@_compile
def segments(maps, unit, unit_map, weight, knots, parent, start, stop, generators, found, finite):
    """Segments ``found`` (n, H) of the units on all cells, -1 where a unit changes; whether the maps are ``finite``."""
    J, H = maps.shape[1:]
    row, low, high = np.empty((J, H)), np.empty(H), np.empty(H)
    for c in range(parent.shape[0]):
        _cell(maps[parent[c]], unit, unit_map, weight, start[c], stop[c], row)
        total = 0.0
        for j in range(J):
            for h in range(H):
                total += 0.0 * row[j, h]
        finite[c] = total == 0.0
        own = found[c]
        for k in range(knots.shape[0]):
            low[:], high[:] = np.inf, -np.inf
            for g in range(generators.shape[1]):
                generator = generators[c, g]
                reach = 0.0
                for j in range(J):
                    reach += abs(generator[j])
                if reach == 0.0:  # padding
                    continue
                _extend(row, generator, knots[k], low, high)
            for h in range(H):
                if low[h] < 0.0 < high[h]:
                    own[h] = -1
                elif high[h] > 0.0 and own[h] >= 0:
                    own[h] += 1


@_compile
def _extend(row, generator, knot, low, high):
    """Extends the ranges of all units to their values at a generator."""
    last = row.shape[0] - 1
    weight, offsets = generator[last], row[last]
    if last == 2:
        x, y, xs, ys = generator[0], generator[1], row[0], row[1]
        for h in range(low.shape[0]):
            value = x * xs[h] + y * ys[h] + weight * (offsets[h] - knot[h])
            low[h] = min(low[h], value)
            high[h] = max(high[h], value)
        return
    for h in range(low.shape[0]):
        value = weight * (offsets[h] - knot[h])
        for j in range(last):
            value += generator[j] * row[j, h]
        low[h] = min(low[h], value)
        high[h] = max(high[h], value)


@_compile
def planes(
    maps,
    magnitude,
    unit,
    unit_map,
    unit_magnitude,
    weight,
    parent,
    first,
    cell,
    which,
    plane,
    plane_magnitude,
):
    """Column ``which`` (P,) of the map and the magnitude of ``cell`` (P,)."""
    for i in range(cell.shape[0]):
        c, h = cell[i], which[i]
        p = parent[c]
        plane[i] = maps[p, :, h]
        plane_magnitude[i] = magnitude[p, :, h]
        for t in range(first[c], first[c + 1]):
            factor = weight[unit[t], h]
            for j in range(plane.shape[1]):
                plane[i, j] += factor * unit_map[t, j]
            for j in range(2):
                plane_magnitude[i, j] += abs(factor) * unit_magnitude[t, j]
