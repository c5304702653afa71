# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Slices of three-dimensional polytopes, compiled by numba. Imported only if numba is installed."""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from pyro_cpa.integrals.polytope_frame import WINDOW

__all__ = ["slices"]


@njit(nogil=True, cache=True, error_model="numpy")
def slices(
    pivots, along, across, slack, along_gap, across_gap, slack_gap, steep, rounding, beside,
    pair, tau, normals, offsets, starts, ends, count, origin, empty,
):  # fmt: skip
    """Edges, their ``count`` (Q,), ``origin`` (Q, 2) and whether there are none: as ``polytope_slices`` has them.

    Args:
        pivots, along, across, slack, along_gap, across_gap, slack_gap: of a frame.
        steep, rounding, beside: the constants of ``polytope_slices``.
        pair, tau: (Q,) cells and positions.
        normals, offsets, starts, ends: (Q, F, 2) and (Q, F) of the polygons, full of padding.
    """
    F = slack.shape[1]
    nx, ny, c = np.empty(F), np.empty(F), np.empty(F)
    for q in range(pair.shape[0]):
        p, t = pair[q], tau[q]
        pivot = pivots[p]
        # The point on the pivot's line nearest the axis; or the axis, if that line is not in sight.
        bx, by = across[p, pivot, 0], across[p, pivot, 1]
        square = bx * bx + by * by
        share = (slack[p, pivot] - along[p, pivot] * t) / max(square, beside * beside)
        ox, oy = bx * share, by * share
        at_pivot = square > beside * beside and ox * ox + oy * oy < WINDOW * WINDOW
        if not at_pivot:
            ox, oy = 0.0, 0.0
        origin[q, 0], origin[q, 1] = ox, oy
        lines, outside = 0, False
        for f in range(F):
            ax, ay = across[p, f, 0], across[p, f, 1]
            if at_pivot:
                left = slack_gap[p, f] - along_gap[p, f] * t
                left = left - (across_gap[p, f, 0] * ox + across_gap[p, f, 1] * oy)
            else:
                left = slack[p, f] - along[p, f] * t
            size = math.sqrt(ax * ax + ay * ay)
            if size > steep and math.isfinite(slack[p, f]):
                nx[lines], ny[lines], c[lines] = ax / size, ay / size, left / size
                # Lines that are farther from the mean than all that counts of the cell bound nothing.
                if c[lines] + nx[lines] * ox + ny[lines] * oy < WINDOW:
                    lines += 1
            elif left < 0.0:
                outside = True
        edges, needed = 0, 3
        for e in range(lines):
            start, end, blur_start, blur_end, beyond = -np.inf, np.inf, 0.0, 0.0, False
            for j in range(lines):
                if j == e:
                    continue
                # On line e the line j is where  s rate = room.
                rate = nx[e] * ny[j] - ny[e] * nx[j]
                room = c[j] - c[e] * (nx[e] * nx[j] + ny[e] * ny[j])
                if abs(rate) > steep:
                    meets = room / rate
                    if rate > 0.0 and meets < end:
                        end = meets
                        blur_end = (abs(meets) + abs(c[j]) + abs(c[e])) * (rounding / rate)
                    elif rate < 0.0 and meets > start:
                        start = meets
                        blur_start = (abs(meets) + abs(c[j]) + abs(c[e])) * (rounding / -rate)
                elif room < 0.0:
                    beyond = True
            if beyond or not end - start > blur_start + blur_end:
                continue
            if math.isinf(start) and math.isinf(end):
                needed = 1
            elif math.isinf(start) or math.isinf(end):
                needed = min(needed, 2)
            normals[q, edges, 0], normals[q, edges, 1], offsets[q, edges] = nx[e], ny[e], c[e]
            starts[q, edges], ends[q, edges] = start, end
            edges += 1
        count[q] = edges
        empty[q] = outside or (lines > 0 and edges < needed)
