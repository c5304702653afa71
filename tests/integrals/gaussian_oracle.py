# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Gaussian integrals over intervals and polygons in 60 digits, sharing nothing with the library.

A polygon is a list of half-planes (normal, offset) whose floats are taken as exact. It is whitened, clipped
to a window around its point nearest the mean and integrated slice by slice.
"""

from __future__ import annotations

from functools import cache

import mpmath as mp

DIGITS = 60
NODES = 36


@cache
def _rule():
    """Gauss-Legendre nodes and weights in full precision, by Newton's iteration."""
    pairs = []
    for k in range(NODES):
        x = mp.cos(mp.pi * (k + mp.mpf(3) / 4) / (NODES + mp.mpf(1) / 2))
        for _ in range(8):
            value = mp.legendre(NODES, x)
            slope = NODES * (x * value - mp.legendre(NODES - 1, x)) / (x * x - 1)
            x -= value / slope
        pairs.append((x, 2 / ((1 - x * x) * slope * slope)))
    return pairs


def interval(lower, upper, mean, deviation):
    """Log-mass, mean and variance of a Gaussian truncated to an interval."""
    with mp.workdps(DIGITS if upper - lower > 1e-3 * deviation else 12 * DIGITS):
        lower, upper, mean, deviation = (mp.mpf(float(x)) for x in (lower, upper, mean, deviation))
        a, b, side = (lower - mean) / deviation, (upper - mean) / deviation, 1
        if a + b < 0:
            a, b, side = -b, -a, -1

        def tail(x):
            return mp.mpf(0) if x == mp.inf else mp.erfc(x / mp.sqrt(2)) / 2

        def density(x, power=0):
            return mp.mpf(0) if abs(x) == mp.inf else x**power * mp.npdf(x)

        mass = tail(a) - tail(b)
        first = (density(a) - density(b)) / mass
        second = 1 + (density(a, 1) - density(b, 1)) / mass
        return mp.log(mass), mean + side * deviation * first, deviation**2 * (second - first**2)


def _clip(points, normal, offset):
    """Sutherland-Hodgman: the part of a convex polygon with normal . y <= offset."""
    result = []
    for p, q in zip(points, points[1:] + points[:1], strict=True):
        p_slack = offset - normal[0] * p[0] - normal[1] * p[1]
        q_slack = offset - normal[0] * q[0] - normal[1] * q[1]
        if p_slack >= 0:
            result.append(p)
        if (p_slack > 0 > q_slack) or (p_slack < 0 < q_slack):
            share = p_slack / (p_slack - q_slack)
            result.append((p[0] + share * (q[0] - p[0]), p[1] + share * (q[1] - p[1])))
    return result


def _nearest(points):
    """The point of a convex polygon nearest the origin."""
    best, inside = None, True
    for p, q in zip(points, points[1:] + points[:1], strict=True):
        dx, dy = q[0] - p[0], q[1] - p[1]
        length = dx * dx + dy * dy
        inside = inside and dx * p[1] - dy * p[0] <= 0
        share = 0 if length == 0 else min(max(-(p[0] * dx + p[1] * dy) / length, mp.mpf(0)), mp.mpf(1))
        y = (p[0] + share * dx, p[1] + share * dy)
        if best is None or y[0] ** 2 + y[1] ** 2 < best[0] ** 2 + best[1] ** 2:
            best = y
    return (mp.mpf(0), mp.mpf(0)) if inside else best


def polygon(half_planes, mean, scale_tril, size=1e6):
    """Log-mass, mean and covariance (xx, xy, yy) of a Gaussian on the half-planes ``normal . z <= offset``.

    ``size``: half-planes are intersected with a square this large (whitened), around the mean.
    """
    with mp.workdps(DIGITS):
        mean = [mp.mpf(float(m)) for m in mean]
        (c11, _), (c21, c22) = [[mp.mpf(float(c)) for c in row] for row in scale_tril]
        big = mp.mpf(size)
        cell = [(-big, -big), (big, -big), (big, big), (-big, big)]
        for normal, offset in half_planes:
            n = [mp.mpf(float(x)) for x in normal]
            slack = mp.mpf(float(offset)) - n[0] * mean[0] - n[1] * mean[1]
            cell = _clip(cell, (c11 * n[0] + c21 * n[1], c22 * n[1]), slack)
        y = _nearest(cell)
        r = mp.sqrt(y[0] ** 2 + y[1] ** 2)
        axis = (y[0] / r, y[1] / r) if r > 0 else (mp.mpf("0.6"), mp.mpf("0.8"))
        window = 11
        for n, offset in (
            (
                axis,
                (y[0] * axis[0] + y[1] * axis[1]) + window * window / (r + mp.sqrt(r * r + window * window)),
            ),
            ((-axis[0], -axis[1]), window),
            ((-axis[1], axis[0]), window),
            ((axis[1], -axis[0]), window),
        ):
            cell = _clip(cell, n, offset) if r > 0 or n is not axis else _clip(cell, n, mp.mpf(window))
        turned = [(p[0] * axis[0] + p[1] * axis[1], p[1] * axis[0] - p[0] * axis[1]) for p in cell]
        sums = _slices(turned, r)
        mass, moments = sums[0], [s / sums[0] for s in sums[1:]]
        t, s = moments[0], moments[1]
        tt, ts, ss = moments[2] - t * t, moments[3] - t * s, moments[4] - s * s
        # Columns of the map from the turned axes to the plane.
        jx = (c11 * axis[0], -c11 * axis[1])
        jy = (c21 * axis[0] + c22 * axis[1], -c21 * axis[1] + c22 * axis[0])
        t += r
        center = (mean[0] + jx[0] * t + jx[1] * s, mean[1] + jy[0] * t + jy[1] * s)

        def quadratic(a, b):
            return a[0] * b[0] * tt + (a[0] * b[1] + a[1] * b[0]) * ts + a[1] * b[1] * ss

        log_mass = mp.log(mass) - r * r / 2 - mp.log(2 * mp.pi)
        return log_mass, center, (quadratic(jx, jx), quadratic(jx, jy), quadratic(jy, jy))


def _slices(points, r):
    """Integrals of 1, t - r, s, (t - r)^2, (t - r) s, s^2 under exp(-(t^2 + s^2 - r^2) / 2)."""
    chains = []
    for p, q in zip(points, points[1:] + points[:1], strict=True):
        if p[0] != q[0]:
            chains.append((min(p[0], q[0]), max(p[0], q[0]), p, (q[1] - p[1]) / (q[0] - p[0])))
    breaks = sorted({p[0] for p in points})
    sums = [mp.mpf(0)] * 6
    for left, right in zip(breaks, breaks[1:], strict=False):
        half = (left + right) / 2
        lines = [(p, k) for low, high, p, k in chains if low <= half <= high]
        if len(lines) < 2:
            continue
        lines.sort(key=lambda line: line[0][1] + line[1] * (half - line[0][0]))
        (pl, kl), (pu, ku) = lines[0], lines[-1]
        rate = max(1, r, abs(kl), abs(ku))
        count = int(mp.ceil((right - left) * rate / 8))
        for piece in range(count):
            middle = left + (right - left) * (2 * piece + 1) / (2 * mp.mpf(count))
            width = (right - left) / (2 * mp.mpf(count))
            for node, weight in _rule():
                t = middle + width * node
                low, high = pl[1] + kl * (t - pl[0]), pu[1] + ku * (t - pu[0])
                f = width * weight * mp.exp(-(t - r) * (t + r) / 2)
                flip = 1 if low + high >= 0 else -1
                near, far = (low, high) if flip == 1 else (-high, -low)
                root = mp.sqrt(mp.mpf(1) / 2)
                m0 = mp.sqrt(mp.pi / 2) * (mp.erfc(near * root) - mp.erfc(far * root))
                fn, ff = mp.exp(-near * near / 2), mp.exp(-far * far / 2)
                m1, m2 = flip * (fn - ff), m0 + near * fn - far * ff
                tau = t - r
                for k, term in enumerate((m0, m0 * tau, m1, m0 * tau * tau, m1 * tau, m2)):
                    sums[k] += f * term
    return sums
