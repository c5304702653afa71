# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Integrals over convex polygons of the plane, bounded or not."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from pyro_cpa.integrals.dispatch import Moments, log_mass, log_mass_bound, moments, sample
from pyro_cpa.integrals.polygon_frame import (
    Edges,
    Frame,
    Sight,
    edge_frame,
    longest,
    nearest_frame,
    sight,
    whiten,
)
from pyro_cpa.integrals.polygon_slices import cut, integrate
from pyro_cpa.partition.cells import Polygons

__all__: list[str] = []

_CHUNK = 8192  # pairs worked on at a time: what a processor's cache holds


def _map_pairs(
    cells: Polygons, loc: Tensor, scale_tril: Tensor, outputs: int, compute: Callable[[Edges, Tensor], Tensor]
) -> Tensor:
    """Applies ``compute(edges, loc)``, (outputs, P) from P pairs, to all pairs in chunks: (outputs, ..., R)."""
    batch = loc.shape[:-1]
    if scale_tril.dim() > 3:
        region = torch.arange(batch[-1], device=loc.device).expand(batch).reshape(-1)
        scale_tril = scale_tril.expand(*batch, 2, 2).reshape(-1, 2, 2)
        cells, loc = cells[region], loc.reshape(1, -1, 2)
    loc = loc.reshape(-1, loc.shape[-2], 2)
    result = loc.new_empty(outputs, loc.shape[0], loc.shape[1])
    width = max(1, min(_CHUNK, loc.shape[1]))
    height = max(1, _CHUNK // width)
    for column in range(0, loc.shape[1], width):
        part = torch.arange(column, min(column + width, loc.shape[1]), device=loc.device)
        edges = whiten(cells[part], scale_tril[part])
        for row in range(0, loc.shape[0], height):
            means = loc[row : row + height, column : column + width]
            pairs = torch.arange(means.shape[1], device=loc.device).repeat(means.shape[0])
            values = compute(edges.at(pairs), means.reshape(-1, 2).T.contiguous())
            result[:, row : row + height, column : column + width] = values.view(outputs, *means.shape[:2])
    return result.reshape(outputs, *batch)


def _columns(fields, index):
    return type(fields)(*(f.index_select(-1, index) for f in fields))


@moments.register
@torch.no_grad()
def _moments(cells: Polygons, loc: Tensor, scale_tril: Tensor) -> Moments:
    lm, mx, my, vxx, vxy, vyy = _map_pairs(cells, loc, scale_tril, 6, _compute)
    cov = torch.stack([vxx, vxy, vxy, vyy], -1).reshape(*loc.shape, 2)
    return Moments(lm, torch.stack([mx, my], -1), cov)


@log_mass.register
@torch.no_grad()
def _log_mass(cells: Polygons, loc: Tensor, scale_tril: Tensor) -> Tensor:
    return _map_pairs(cells, loc, scale_tril, 6, _compute)[0]


def _compute(edges: Edges, loc: Tensor) -> Tensor:
    view = sight(edges, loc)
    at, thin = longest(edges, view)
    out = loc.new_empty(6, loc.shape[1])
    for mask, kind in ((thin, True), (~thin, False)):
        index = torch.nonzero(mask).squeeze(-1)
        if index.numel() == 0:
            continue
        e, v = _columns(edges, index), _columns(view, index)
        frame = edge_frame(e, v, at[index]) if kind else nearest_frame(e, v, loc[:, index])
        out[:, index] = _finish(frame)
    return out


def _finish(frame: Frame):
    m0, t, e, tt, te, ee = integrate(frame, cut(frame))
    lm = torch.log(m0) - 0.5 * (frame.t0**2 + frame.s0**2) - math.log(2 * math.pi)
    t, e = t / m0, e / m0
    tt, te, ee = tt / m0 - t * t, te / m0 - t * e, ee / m0 - e * e
    a, b, c, d = frame.jxx, frame.jxy, frame.jyx, frame.jyy
    mx = frame.zx + a * t + b * e
    my = frame.zy + c * t + d * e
    vxx = a * a * tt + 2 * a * b * te + b * b * ee
    vyy = c * c * tt + 2 * c * d * te + d * d * ee
    vxy = a * c * tt + (a * d + b * c) * te + b * d * ee
    return torch.stack([lm, mx, my, vxx, vxy, vyy])
