# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""An independent enumeration of planar regions in exact rational arithmetic, one cell at a time."""

from __future__ import annotations

from fractions import Fraction

from torch import nn

from pyro_cpa.partition import Abs

__all__ = ["rational_regions"]

Point = tuple[Fraction, Fraction]


def _pieces(module: nn.Module) -> list[tuple[Fraction | None, Fraction, Fraction]]:
    """(upper knot or None, slope, intercept) of each segment, read as the float64 numbers that they are."""
    one, zero = Fraction(1), Fraction(0)
    if isinstance(module, nn.ReLU):
        return [(zero, zero, zero), (None, one, zero)]
    if isinstance(module, nn.LeakyReLU):
        return [(zero, Fraction(module.negative_slope), zero), (None, one, zero)]
    if isinstance(module, Abs):
        return [(zero, -one, zero), (None, one, zero)]
    if isinstance(module, nn.Hardtanh):
        low, high = Fraction(module.min_val), Fraction(module.max_val)
        return [(low, zero, low), (high, one, zero), (None, zero, high)]
    raise NotImplementedError(type(module).__name__)


def _clip(polygon: list[Point], a: Point, c: Fraction, sign: int) -> list[Point]:
    """Part of a polygon where ``sign (a . z + c) <= 0``."""
    values = [sign * (a[0] * x + a[1] * y + c) for x, y in polygon]
    kept: list[Point] = []
    for i, (p, v) in enumerate(zip(polygon, values, strict=True)):
        q, w = polygon[(i + 1) % len(polygon)], values[(i + 1) % len(polygon)]
        if v <= 0:
            kept.append(p)
        if v * w < 0:
            s = v / (v - w)
            kept.append((p[0] + s * (q[0] - p[0]), p[1] + s * (q[1] - p[1])))
    return kept


def rational_regions(decoder: nn.Sequential, box: int) -> list[list[Point]]:
    """Corners of every region of a decoder R^2 -> R^D within ``[-box, box]^2``, exactly.

    A wall cuts a region if it has points strictly inside it.
    """
    b = Fraction(box)
    square = [(-b, -b), (b, -b), (b, b), (-b, b)]
    identity = [((Fraction(1), Fraction(0)), Fraction(0)), ((Fraction(0), Fraction(1)), Fraction(0))]
    regions = [(square, identity)]
    for module in decoder:
        if isinstance(module, nn.Linear):
            weight = [[Fraction(w) for w in row] for row in module.weight.tolist()]
            bias = (
                [Fraction(0)] * len(weight)
                if module.bias is None
                else list(map(Fraction, module.bias.tolist()))
            )
            regions = [(polygon, _affine(weight, bias, maps)) for polygon, maps in regions]
            continue
        pieces = _pieces(module)
        for unit in range(len(regions[0][1])):
            cut = []
            for polygon, maps in regions:
                cut += _bend(polygon, maps, unit, pieces)
            regions = cut
    return [polygon for polygon, _ in regions]


def _affine(weight, bias, maps):
    return [
        (
            tuple(sum((w * a[k] for w, (a, _) in zip(row, maps, strict=True)), Fraction(0)) for k in (0, 1)),
            sum((w * c for w, (_, c) in zip(row, maps, strict=True)), v),
        )
        for row, v in zip(weight, bias, strict=True)
    ]


def _bend(polygon, maps, unit, pieces):
    """Cut one region at the knots of one unit, and apply the unit on each part."""
    a, c = maps[unit]
    parts, rest = [], polygon
    for knot, slope, intercept in pieces:
        part = rest
        if knot is not None:
            values = [a[0] * x + a[1] * y + c - knot for x, y in rest]
            if not rest or min(values) >= 0:
                continue
            part = rest if max(values) <= 0 else _clip(rest, a, c - knot, 1)
            rest = [] if max(values) <= 0 else _clip(rest, a, c - knot, -1)
        if part:
            bent = (tuple(slope * k for k in a), slope * c + intercept)
            parts.append((part, [*maps[:unit], bent, *maps[unit + 1 :]]))
    return parts
