# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""The slices of polygons compiled by numba: the same steps as ``polygon_frame`` and ``polygon_slices``, a pair at a time.

Why each step is as it is stands there. Here a pair stops where its own work ends, instead of where that of the
largest pair of a chunk does. Imported only if numba is installed.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from pyro_cpa.integrals.normal import HALF_LOG_2PI, gauss_legendre
from pyro_cpa.integrals.polygon_frame import STEEP, THIN, WINDOW
from pyro_cpa.integrals.polygon_slices import DECAY, SMOOTH, SPREAD

__all__ = ["bounds", "moments"]

_SQRT_HALF = math.sqrt(0.5)
_SQRT_HALF_PI = math.sqrt(0.5 * math.pi)
# Gauss-Legendre rules, one after the other, that do panels up to these sizes (in units of ``polygon_slices``) to 1e-12.
# Several nodes are worked on at a time, hence the multiples of four.
_SIZES, _PANEL_NODES = np.array([0.12, 0.4, np.inf]), (8, 12, 16)
_PANEL_RULES = np.array([node for count in _PANEL_NODES for node in gauss_legendre(count)])
_PANEL_STARTS = np.cumsum([0, *_PANEL_NODES])
# Changes that 4 and 6 nodes across a slice take to 1e-12; 12 nodes take what is left of thin cells, and wide slices to 5.
_FLAT, _WIDE = 0.03, 5.0
# Rows of the table of one cell's edges.
_NX, _NY, _OFFSET, _START, _END, _UX, _UY, _SHRINK, _STRETCH, _GX, _GY, _H, _BASE, _FIRST, _LAST = range(15)
_UP, _UP_RATE, _DOWN, _DOWN_RATE = range(15, 19)
_ROWS = 19

_compile = njit(nogil=True, cache=True, error_model="numpy")


@_compile
def _sight(normals, offsets, starts, ends, mx, my, c11, c21, c22, edge):
    """Fills the whitened edges; their number, the nearest, its squared distance, whether the mean is inside."""
    count, nearest, least, inside = 0, -1, np.inf, True
    for k in range(offsets.shape[0]):
        if not math.isfinite(offsets[k]):  # padding
            continue
        nx, ny, offset = normals[k, 0], normals[k, 1], offsets[k]
        vx, vy = c11 * nx + c21 * ny, c22 * ny
        shrink = 1.0 / math.sqrt(vx * vx + vy * vy)
        ux, uy = vx * shrink, vy * shrink
        gy = ux / c22
        gx = (-uy - c21 * gy) / c11
        stretch = 1.0 / (shrink * c11 * c22)
        h = ((offset - nx * mx) - ny * my) * shrink
        base = gx * (offset * nx - mx) + gy * (offset * ny - my)
        first, last = base + starts[k] * stretch, base + ends[k] * stretch
        e = count
        edge[_NX, e], edge[_NY, e], edge[_OFFSET, e], edge[_START, e], edge[_END, e] = (
            nx,
            ny,
            offset,
            starts[k],
            ends[k],
        )
        edge[_UX, e], edge[_UY, e], edge[_SHRINK, e], edge[_STRETCH, e] = ux, uy, shrink, stretch
        edge[_GX, e], edge[_GY, e], edge[_H, e], edge[_BASE, e] = gx, gy, h, base
        edge[_FIRST, e], edge[_LAST, e] = first, last
        foot = min(max(first, 0.0), last)
        square = h * h + foot * foot
        inside &= h >= 0.0
        if square < least:
            nearest, least = e, square
        count += 1
    return count, nearest, least, inside


@_compile
def _longest(edge, count, distance):
    """The edge longest in sight of the mean, and whether the cell is thin there."""
    at, length, middle = 0, -np.inf, 0.0
    for e in range(count):
        reach = math.sqrt(max(distance * distance + WINDOW * WINDOW - edge[_H, e] * edge[_H, e], 0.0))
        first, last = max(edge[_FIRST, e], -reach), min(edge[_LAST, e], reach)
        if last - first > length:
            at, length, middle = e, last - first, 0.5 * (first + last)
    if length <= 0.0:
        return at, False
    position = (middle - edge[_BASE, at]) / edge[_STRETCH, at]
    zx = edge[_OFFSET, at] * edge[_NX, at] - position * edge[_NY, at]
    zy = edge[_OFFSET, at] * edge[_NY, at] + position * edge[_NX, at]
    limit = THIN / max(distance, 1.0)
    for e in range(count):
        closing = -(edge[_UX, e] * edge[_UX, at] + edge[_UY, e] * edge[_UY, at])
        gap = ((edge[_OFFSET, e] - edge[_NX, e] * zx) - edge[_NY, e] * zy) * edge[_SHRINK, e]
        if closing > 0.0 and gap < limit * closing:
            return at, True
    return at, False


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract", "reassoc"}, inline="always")
def _exp(y):
    """exp by its series for a 64th of the exponent: this runs on several numbers at a time, to 64 roundings."""
    # Beyond, nothing counts beside the cell's nearest point, and the series no longer holds.
    x = max(y, -150.0) / 64.0
    high = 1 / 5040 + x * (
        1 / 40320 + x * (1 / 362880 + x * (1 / 3628800 + x * (1 / 39916800 + x * (1 / 479001600))))
    )
    power = 1.0 + x * (
        1.0 + x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720 + x * high)))))
    )
    for _ in range(6):
        power *= power
    return power


def _integrals(panel_nodes, slice_nodes):
    """Compiled: the integrals of 1, x, x^2, eta, x eta, eta^2 over (-1, 1) times slices, by so many nodes on each."""
    # Sizes known to the compiler let it work on several x at a time.
    xs, x_weights = np.array(gauss_legendre(panel_nodes)).T.copy()
    ys, y_weights = np.array(gauss_legendre(slice_nodes)).T.copy()

    # Every term of the mass is positive: its sum may be reordered.
    @njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract", "reassoc"})
    def integrate(t0, s0, middle, half, center, center_rate, radius, radius_rate):
        one, x_one, xx_one, first, x_first, second = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
        for k in range(panel_nodes):
            x, weight = xs[k], x_weights[k]
            tau = middle + half * x
            c, r = center + x * center_rate, radius + x * radius_rate
            level = tau * (-0.5 * tau - t0) - (s0 + 0.5 * c) * c
            slope, curvature = -(s0 + c) * r, -0.5 * r * r
            even, odd, square = 0.0, 0.0, 0.0
            for j in range(slice_nodes):
                y = ys[j]
                term = y_weights[j] * _exp(level + y * (slope + curvature * y))
                even += term
                odd += y * term
                square += y * y * term
            even, odd, square = weight * r * even, weight * r * r * odd, weight * r * r * r * square
            eta = odd + c * even
            one += even
            x_one += x * even
            xx_one += x * x * even
            first += eta
            x_first += x * eta
            second += square + c * (odd + eta)
        return one, x_one, xx_one, first, x_first, second

    return integrate


def _quadrature_of_slices(slice_nodes):
    """Compiled: the same by the panel's rule of a given index."""
    small, middling, large = (_integrals(panel_nodes, slice_nodes) for panel_nodes in _PANEL_NODES)

    @_compile
    def integrate(rule, t0, s0, middle, half, center, center_rate, radius, radius_rate):
        if rule == 0:
            return small(t0, s0, middle, half, center, center_rate, radius, radius_rate)
        if rule == 1:
            return middling(t0, s0, middle, half, center, center_rate, radius, radius_rate)
        return large(t0, s0, middle, half, center, center_rate, radius, radius_rate)

    return integrate


_flat, _smooth, _curved = (_quadrature_of_slices(count) for count in (4, 6, 12))


@_compile
def _wide(rule, t0, middle, half, center, center_rate, radius, radius_rate):
    """The same for s0 = 0 over slices of any width, from the side of the smaller tail."""
    one, x_one, xx_one, first, x_first, second = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    for k in range(_PANEL_STARTS[rule], _PANEL_STARTS[rule + 1]):
        x, weight = _PANEL_RULES[k, 0], _PANEL_RULES[k, 1]
        tau = middle + half * x
        c, r = center + x * center_rate, radius + x * radius_rate
        scale = weight * math.exp(tau * (-0.5 * tau - t0))
        low, high = c - r, c + r
        low_density, high_density = scale * math.exp(-0.5 * low * low), scale * math.exp(-0.5 * high * high)
        tail = math.erfc((abs(c) - r) * _SQRT_HALF) - math.erfc((abs(c) + r) * _SQRT_HALF)
        even = tail * scale * _SQRT_HALF_PI
        eta = low_density - high_density
        one += even
        x_one += x * even
        xx_one += x * x * even
        first += eta
        x_first += x * eta
        second += even + low * low_density - high * high_density
    return one, x_one, xx_one, first, x_first, second


@_compile
def _panel(t0, s0, middle, half, center, center_rate, radius, radius_rate, sums):
    """Adds the six integrals over a panel, cut into pieces that the quadrature takes in one go."""
    slope = abs(center_rate) + abs(radius_rate)
    decay = 2.0 * half * t0 + 2.0 * slope * abs(s0)
    size = decay / DECAY + 2.0 * max(half, slope) / SPREAD
    pieces = max(math.ceil(size), 1)
    share = 1.0 / pieces
    rule = 0
    while _SIZES[rule] < share * size:
        rule += 1
    small, c_rate, r_rate = share * half, share * center_rate, share * radius_rate
    for piece in range(pieces):
        shift = 2.0 * piece + 1.0 - pieces
        at, c, r = middle + shift * small, center + shift * c_rate, radius + shift * r_rate
        widest = r + abs(r_rate)
        change = widest * max(abs(s0 + c) + abs(c_rate), 2.0 * widest)
        if change <= _FLAT:
            found = _flat(rule, t0, s0, at, small, c, c_rate, r, r_rate)
        elif change <= SMOOTH:
            found = _smooth(rule, t0, s0, at, small, c, c_rate, r, r_rate)
        elif s0 != 0.0 or change <= _WIDE:
            found = _curved(rule, t0, s0, at, small, c, c_rate, r, r_rate)
        else:
            found = _wide(rule, t0, at, small, c, c_rate, r, r_rate)
        one, x_one, xx_one, first, x_first, second = found
        tau_1 = at * one + small * x_one
        sums[0] += small * one
        sums[1] += small * tau_1
        sums[2] += small * first
        sums[3] += small * (at * tau_1 + small * (at * x_one + small * xx_one))
        sums[4] += small * (at * first + small * x_first)
        sums[5] += small * second


@_compile
def _panels(edge, count, t0, s0, breaks, number, sums):
    """The six integrals of the cell, panel by panel between ascending breaks."""
    sums[:] = 0.0
    for k in range(number - 1):
        half = 0.5 * (breaks[k + 1] - breaks[k])
        if half <= 0.0:
            continue
        middle = breaks[k] + half
        # The boundary is straight on each panel: two inner points tell it, whichever edges it belongs to.
        tau_1, tau_2 = middle - 0.5 * half, middle + 0.5 * half
        up_1, up_2, down_1, down_2 = WINDOW, WINDOW, WINDOW, WINDOW
        for e in range(count):
            up, up_rate, down, down_rate = (
                edge[_UP, e],
                edge[_UP_RATE, e],
                edge[_DOWN, e],
                edge[_DOWN_RATE, e],
            )
            up_1, up_2 = min(up_1, up - up_rate * tau_1), min(up_2, up - up_rate * tau_2)
            down_1, down_2 = min(down_1, down - down_rate * tau_1), min(down_2, down - down_rate * tau_2)
        radius = 0.25 * ((up_1 + down_1) + (up_2 + down_2))
        if radius > 0.0:
            radius_rate = 0.5 * ((up_2 - up_1) + (down_2 - down_1))
            center = 0.25 * ((up_1 - down_1) + (up_2 - down_2))
            center_rate = 0.5 * ((up_2 - up_1) - (down_2 - down_1))
            _panel(t0, s0, middle, half, center, center_rate, radius, radius_rate, sums)


@_compile
def _insert(breaks, number, value):
    """Inserts a value into the ascending first ``number`` breaks."""
    k = number
    while breaks[k - 1] > value:
        breaks[k] = breaks[k - 1]
        k -= 1
    breaks[k] = value


@_compile
def _pair(normals, offsets, starts, ends, mx, my, c11, c21, c22, edge, breaks, sums, out):
    count, nearest, least, inside = _sight(normals, offsets, starts, ends, mx, my, c11, c21, c22, edge)
    if count == 0:  # the whole plane
        out[0], out[1], out[2] = 0.0, mx, my
        out[3], out[4], out[5] = c11 * c11, c11 * c21, c21 * c21 + c22 * c22
        return
    # The cell's point nearest the mean, on the plane and whitened.
    near_zx, near_zy, yx, yy, distance = mx, my, 0.0, 0.0, 0.0
    n = nearest
    position = min(max(-edge[_BASE, n] / edge[_STRETCH, n], edge[_START, n]), edge[_END, n])
    if not inside:
        foot = min(max(edge[_FIRST, n], 0.0), edge[_LAST, n])
        near_zx = edge[_OFFSET, n] * edge[_NX, n] - position * edge[_NY, n]
        near_zy = edge[_OFFSET, n] * edge[_NY, n] + position * edge[_NX, n]
        yx = edge[_H, n] * edge[_UX, n] - foot * edge[_UY, n]
        yy = edge[_H, n] * edge[_UY, n] + foot * edge[_UX, n]
        distance = math.sqrt(least)

    # The slicing frame.
    longest, thin = _longest(edge, count, distance)
    at = longest if thin else nearest
    nx, ny, offset = edge[_NX, at], edge[_NY, at], edge[_OFFSET, at]
    ux, uy, h, stretch = edge[_UX, at], edge[_UY, at], edge[_H, at], edge[_STRETCH, at]
    coordinate = yy * ux - yx * uy
    t0, s0, cos, sin, zx, zy = distance, 0.0, 0.0, 1.0, near_zx, near_zy
    if thin:
        cos, sin = (-1.0 if coordinate < 0.0 else 1.0), 0.0
        t0, s0 = abs(coordinate), -h * cos
        across_nearest = edge[_GX, at] * (near_zx - offset * nx) + edge[_GY, at] * (near_zy - offset * ny)
        position = across_nearest / stretch
        zx, zy = offset * nx - position * ny, offset * ny + position * nx
    elif distance > 0.0:
        cos, sin = coordinate / distance, -h / distance
    ex, ey = -cos * uy - sin * ux, cos * ux - sin * uy
    fy = ey / c22
    fx = (ex - c21 * fy) / c11

    square = WINDOW * WINDOW + 4.0
    high = square / (t0 + math.sqrt(t0 * t0 + square))
    low = -min(4.0 / t0, WINDOW) if t0 > 0.0 else -WINDOW
    breaks[0], breaks[1], number = low, high, 2
    for e in range(count):
        dot = edge[_NX, e] * nx + edge[_NY, e] * ny
        sign = 1.0 if dot > 0.0 else (-1.0 if dot < 0.0 else 0.0)
        dx, dy = edge[_NX, e] - sign * nx, edge[_NY, e] - sign * ny
        turning = dy * nx - dx * ny
        gap = (edge[_OFFSET, e] - sign * offset) - offset * (dx * nx + dy * ny)
        slack = (gap - position * turning) * edge[_SHRINK, e]
        if inside and not thin:
            slack = edge[_H, e]
        p = turning * (edge[_SHRINK, e] / stretch)
        q = -edge[_UX, e] * ux - edge[_UY, e] * uy
        along, across = cos * p + sin * q, cos * q - sin * p
        shift = fx * (edge[_OFFSET, e] * edge[_NX, e] - zx) + fy * (edge[_OFFSET, e] * edge[_NY, e] - zy)
        if abs(across) <= STEEP:  # both ends lie at the same place
            first, last, across = shift, shift, STEEP
        else:
            heading = -across * edge[_STRETCH, e]
            first, last = edge[_START, e] * heading + shift, edge[_END, e] * heading + shift
        # How far the edge lets the slices reach up or down from the axis.
        rise, rate = slack / across, along / across
        edge[_UP, e], edge[_UP_RATE, e] = (rise, rate) if across > 0.0 else (np.inf, 0.0)
        edge[_DOWN, e], edge[_DOWN_RATE, e] = (np.inf, 0.0) if across > 0.0 else (-rise, -rate)
        # Where an edge leaves the window |eta| <= WINDOW the window bounds the slice instead.
        left, right = (slack - WINDOW * across) / along, (slack + WINDOW * across) / along
        left, right = min(left, right), max(left, right)
        start, end = min(max(first, left), right), min(max(last, left), right)
        if low < start < high:
            _insert(breaks, number, start)
            number += 1
        # A vertex is the first end of one edge and the last of another: it counts once.
        if end != last and low < end < high:
            _insert(breaks, number, end)
            number += 1
    _panels(edge, count, t0, s0, breaks, number, sums)

    total = sums[0]
    unit = total if total > 0.0 else 1.0  # a cell without interior keeps its reference point as mean
    t, s = sums[1] / unit, sums[2] / unit
    tt, ts, ss = sums[3] / unit - t * t, sums[4] / unit - t * s, sums[5] / unit - s * s
    xt, xs, yt, ys = c11 * ex, c11 * -ey, c21 * ex + c22 * ey, c22 * ex - c21 * ey
    out[0] = (math.log(total) if total > 0.0 else -np.inf) - 0.5 * (t0 * t0 + s0 * s0) - 2.0 * HALF_LOG_2PI
    out[1], out[2] = zx + xt * t + xs * s, zy + yt * t + ys * s
    out[3] = xt * xt * tt + 2.0 * xt * xs * ts + xs * xs * ss
    out[4] = xt * yt * tt + (xt * ys + xs * yt) * ts + xs * ys * ss
    out[5] = yt * yt * tt + 2.0 * yt * ys * ts + ys * ys * ss


@_compile
def moments(normals, offsets, starts, ends, scale_tril, loc, kept, result):
    """Log-mass, mean, covariance (xx, xy, yy) of the pairs (n, r) that are kept, into ``result`` (N, R, 6)."""
    edges = offsets.shape[1]
    edge, breaks, sums = np.empty((_ROWS, edges)), np.empty(2 * edges + 2), np.empty(6)
    shared = scale_tril.shape[0] == 1
    for n in range(loc.shape[0]):
        for r in range(loc.shape[1]):
            if kept[n, r]:
                c = scale_tril[0 if shared else n, r]
                _pair(
                    normals[r], offsets[r], starts[r], ends[r], loc[n, r, 0], loc[n, r, 1],
                    c[0, 0], c[1, 0], c[1, 1], edge, breaks, sums, result[n, r],
                )  # fmt: skip


@_compile
def bounds(normals, offsets, starts, ends, scale_tril, loc, result):
    """Upper bounds on the log-masses of all pairs, into ``result`` (N, R)."""
    edge = np.empty((_ROWS, offsets.shape[1]))
    shared = scale_tril.shape[0] == 1
    for n in range(loc.shape[0]):
        for r in range(loc.shape[1]):
            c = scale_tril[0 if shared else n, r]
            _, _, least, inside = _sight(
                normals[r], offsets[r], starts[r], ends[r], loc[n, r, 0], loc[n, r, 1],
                c[0, 0], c[1, 0], c[1, 1], edge,
            )  # fmt: skip
            result[n, r] = 0.0 if inside else -0.5 * least
