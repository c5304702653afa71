# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Integrals over convex polygons of the plane, bounded or not."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from pyro_cpa.compiled import array, in_blocks, runs_compiled
from pyro_cpa.integrals.dispatch import Moments, log_mass, log_mass_bound, moments, moments_where, sample
from pyro_cpa.integrals.normal import HALF_LOG_2PI, at_a_time
from pyro_cpa.integrals.polygon_frame import Edges, sight, slicing_frame, whiten
from pyro_cpa.integrals.polygon_sample import draw_points
from pyro_cpa.integrals.polygon_slices import cut, integrate
from pyro_cpa.partition.cells import Cells, Polygons

__all__ = ["map_pairs"]

_EDGE_COUNTS = (4, 6)  # padding costs time: cells with up to so many edges are treated apart
_CHUNK = 8192  # pairs per thread worked on at a time: what a processor's cache holds


def _by_edge_count(cells: Polygons) -> Iterator[tuple[Tensor, Polygons]]:
    """Groups of cells with few edges and with many, without the padding they do not need."""
    if cells.offsets.shape[1] == 0:
        none = cells.offsets.new_zeros(len(cells), 1)
        cells = Polygons(torch.stack([none, none], dim=-1), none + torch.inf, none, none)
    order = torch.argsort(cells.is_edge.to(torch.int8), dim=1, descending=True, stable=True)
    counts = cells.is_edge.sum(dim=1)
    fewer = -1
    for most in (*_EDGE_COUNTS, cells.offsets.shape[1]):
        index = torch.nonzero((counts > fewer) & (counts <= most)).squeeze(-1)
        fewer = max(most, fewer)
        if index.shape[0] > 0:
            columns = order[index, :most]
            group = cells[index]
            yield (
                index,
                Polygons(
                    normals=group.normals.gather(1, columns.unsqueeze(-1).expand(-1, -1, 2)),
                    offsets=group.offsets.gather(1, columns),
                    starts=group.starts.gather(1, columns),
                    ends=group.ends.gather(1, columns),
                ),
            )


def map_pairs(
    cells: Polygons, loc: Tensor, scale_tril: Tensor, outputs: int, compute: Callable[[Edges, Tensor], Tensor]
) -> Tensor:
    """Applies ``compute(edges, loc)``, (outputs, P) from P pairs, chunk by chunk: (outputs, ..., R)."""
    batch = loc.shape[:-1]
    chunk = max(1, min(at_a_time(_CHUNK, loc.device), 2**20 // max(outputs, 1)))
    loc = loc.reshape(-1, loc.shape[-2], 2)
    if scale_tril.dim() > 3:
        every = torch.arange(batch[-1], device=loc.device)
        scale_tril = scale_tril.expand(*batch, 2, 2).reshape(*loc.shape, 2)
        rows = max(1, 8 * chunk // max(1, batch[-1]))
        parts = []
        for means, factors in zip(loc.split(rows), scale_tril.split(rows), strict=True):
            copies = cells[every.repeat(means.shape[0])]
            values = map_pairs(copies, means.reshape(-1, 2), factors.reshape(-1, 2, 2), outputs, compute)
            parts.append(values.view(outputs, *means.shape[:2]))
        return torch.cat(parts, dim=1).reshape(outputs, *batch)
    result = loc.new_empty(outputs, loc.shape[0], loc.shape[1])
    for group, members in _by_edge_count(cells):
        for part in torch.arange(len(members), device=loc.device).split(chunk):
            regions = group[part]
            edges = whiten(members[part], scale_tril[regions])
            rows = max(1, chunk // part.shape[0])
            for row in range(0, loc.shape[0], rows):
                means = loc[row : row + rows, regions]
                pairs = edges.repeat(means.shape[0])
                values = compute(pairs, means.reshape(-1, 2).T.contiguous())
                result[:, row : row + rows, regions] = values.view(outputs, *means.shape[:2])
    return result.reshape(outputs, *batch)


def _pair_moments(edges: Edges, loc: Tensor) -> Tensor:
    """Log-mass, mean (2) and covariance (xx, xy, yy) of P pairs, (6, P)."""
    frame = slicing_frame(edges, sight(edges, loc))
    panels = cut(frame)
    sums = loc.new_zeros(6, loc.shape[1]).index_add_(1, panels.pair, integrate(frame, panels))
    total = sums[0]
    # A cell without interior keeps its reference point as mean.
    _, t, s, tt, ts, ss = sums / torch.where(total > 0.0, total, torch.ones_like(total))
    tt, ts, ss = tt - t * t, ts - t * s, ss - s * s
    xt, xs, yt, ys = frame.jxt, frame.jxs, frame.jyt, frame.jys
    return torch.stack(
        [
            torch.log(total) - 0.5 * (frame.t0 * frame.t0 + frame.s0 * frame.s0) - 2.0 * HALF_LOG_2PI,
            frame.zx + xt * t + xs * s,
            frame.zy + yt * t + ys * s,
            xt * xt * tt + 2.0 * xt * xs * ts + xs * xs * ss,
            xt * yt * tt + (xt * ys + xs * yt) * ts + xs * ys * ss,
            yt * yt * tt + 2.0 * yt * ys * ts + ys * ys * ss,
        ]
    )


def _pair_bound(edges: Edges, loc: Tensor) -> Tensor:
    return -0.5 * sight(edges, loc).distance.square().unsqueeze(0)


def _compiled(
    name: str, cells: Polygons, loc: Tensor, scale_tril: Tensor, *pairwise: np.ndarray, out: np.ndarray
) -> None:
    """Runs a kernel of ``polygon_compiled`` on all pairs, into ``out`` (..., R, K)."""
    from pyro_cpa.integrals import polygon_compiled

    regions = loc.shape[-2]
    shape = [array(field) for field in (cells.normals, cells.offsets, cells.starts, cells.ends)]
    means = array(loc.reshape(-1, regions, 2))
    factors = scale_tril if scale_tril.dim() == 3 else scale_tril.expand(*loc.shape, 2)
    tril = array(factors.reshape(-1, regions, 2, 2))
    pairs = [(part.reshape(-1, regions, *part.shape[loc.dim() - 1 :]), 0) for part in (*pairwise, out)]
    kernel = getattr(polygon_compiled, name)
    work = means.shape[0] * regions
    if means.shape[0] == 1:  # each pair has a cell of its own
        by_region = [(field, 0) for field in shape] + [
            (part, 1) for part in (tril, means, *(p for p, _ in pairs))
        ]
        in_blocks(kernel, [], by_region, work)
    elif tril.shape[0] == 1:
        in_blocks(kernel, [*shape, tril], [(means, 0), *pairs], work)
    else:
        in_blocks(kernel, shape, [(tril, 0), (means, 0), *pairs], work)


def _all_moments(cells: Polygons, loc: Tensor, scale_tril: Tensor, kept: Tensor | None = None) -> Tensor:
    """(6, ..., R): log-mass, mean, covariance (xx, xy, yy)."""
    if not runs_compiled(loc):
        return map_pairs(cells, loc, scale_tril, 6, _pair_moments)
    result = loc.new_zeros(*loc.shape[:-1], 6)
    result[..., 0] = -torch.inf
    wanted = np.ones(loc.shape[:-1], bool) if kept is None else array(kept)
    _compiled("moments", cells, loc, scale_tril, wanted, out=result.numpy())
    return result.movedim(-1, 0)


def _named(values: Tensor) -> Moments:
    log_masses, x, y, xx, xy, yy = values
    covariance = torch.stack([xx, xy, xy, yy], dim=-1).unflatten(-1, (2, 2))
    return Moments(log_masses, torch.stack([x, y], dim=-1), covariance)


@log_mass.register
@torch.no_grad()
def _log_mass(cells: Polygons, loc: Tensor, scale_tril: Tensor) -> Tensor:
    return _all_moments(cells, loc, scale_tril)[0]


@moments.register
@torch.no_grad()
def _moments(cells: Polygons, loc: Tensor, scale_tril: Tensor) -> Moments:
    return _named(_all_moments(cells, loc, scale_tril))


@moments_where.register
@torch.no_grad()
def _moments_where(cells: Polygons, loc: Tensor, scale_tril: Tensor, kept: Tensor) -> Moments:
    if runs_compiled(loc):
        return _named(_all_moments(cells, loc, scale_tril, kept))
    return moments_where.dispatch(Cells)(cells, loc, scale_tril, kept)


@log_mass_bound.register
@torch.no_grad()
def _log_mass_bound(cells: Polygons, loc: Tensor, scale_tril: Tensor) -> Tensor:
    if runs_compiled(loc):
        result = loc.new_empty(loc.shape[:-1])
        _compiled("bounds", cells, loc, scale_tril, out=result.numpy())
        return result
    return map_pairs(cells, loc, scale_tril, 1, _pair_bound)[0]


@sample.register
@torch.no_grad()
def _sample(cells: Polygons, loc: Tensor, scale_tril: Tensor, sample_shape: tuple[int, ...] = ()) -> Tensor:
    count = math.prod(sample_shape)

    def draw(edges: Edges, means: Tensor) -> Tensor:
        return draw_points(slicing_frame(edges, sight(edges, means)), count).reshape(
            2 * count, means.shape[1]
        )

    draws = map_pairs(cells, loc, scale_tril, 2 * count, draw)
    return draws.reshape(2, *sample_shape, *loc.shape[:-1]).movedim(0, -1)
