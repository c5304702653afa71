# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Slices of three-dimensional polytopes across the first axis of their frame: polygons, with mass and moments."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_cpa.compiled import array, in_blocks, runs_compiled
from pyro_cpa.integrals.dispatch import log_mass, moments, sample
from pyro_cpa.integrals.polytope_frame import WINDOW, Frame
from pyro_cpa.partition.cells import Polygons

__all__ = ["slice_log_mass", "slice_moments", "slice_sample"]

_STEEP = 1e-15  # a facet this close to the slicing plane is parallel to it but for rounding
_ROUNDING = 1e-15  # of a line's normal and offset
_BESIDE = 0.1  # a pivot closer to it than this is no good place to measure from


class _Slices(NamedTuple):
    """Q polygons on slicing planes, as seen from (Q, 2) points of these; some may be empty."""

    polygons: Polygons
    origin: Tensor
    empty: Tensor

    def seen(self) -> tuple[Polygons, Tensor, Tensor]:
        """Polygons, means and factors of the standard normal on the slicing planes."""
        eye = torch.eye(2, dtype=self.origin.dtype, device=self.origin.device)
        return self.polygons, -self.origin, eye.expand(len(self.origin), 2, 2)


def _slices(frame: Frame, pair: Tensor, tau: Tensor) -> _Slices:
    """Slices at ``tau`` (Q,) of the cells ``pair`` (Q,) of a frame."""
    if runs_compiled(tau):
        return _compiled(frame, pair, tau)
    every = torch.arange(len(pair), device=pair.device)
    pivot = frame.pivot[pair]
    across, along, slack = frame.across[pair], frame.along[pair], frame.slack[pair]
    # The point on the pivot's line nearest the axis; or the axis, if that line is not in sight.
    beside = across[every, pivot]
    room = slack[every, pivot] - along[every, pivot] * tau
    square = beside.square().sum(1)
    origin = beside * (room / square.clamp(min=_BESIDE**2))[:, None]
    at_pivot = (square > _BESIDE**2) & (origin.square().sum(1) < WINDOW**2)
    origin = torch.where(at_pivot[:, None], origin, 0.0)
    from_pivot = frame.slack_gap[pair] - frame.along_gap[pair] * tau[:, None]
    from_pivot = from_pivot - (frame.across_gap[pair] @ origin[..., None])[..., 0]
    left = torch.where(at_pivot[:, None], from_pivot, slack - along * tau[:, None])

    size = torch.linalg.vector_norm(across, dim=-1)
    line = (size > _STEEP) & torch.isfinite(slack)
    empty = ((left < 0) & ~line).any(1)
    size = torch.where(line, size, 1.0)
    normals, offsets = across / size[..., None], left / size
    # Lines that are farther from the mean than all that counts of the cell bound nothing.
    line = line & (offsets + (normals @ origin[..., None])[..., 0] < WINDOW)
    most = int(line.sum(1).max()) if len(line) else 0
    if most == 0:
        return _Slices(
            Polygons(normals[:, :0], offsets[:, :0], offsets[:, :0], offsets[:, :0]), origin, empty
        )
    order = line.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :most]
    normals = normals.gather(1, order[..., None].expand(-1, -1, 2))
    offsets, line = offsets.gather(1, order), line.gather(1, order)
    polygons = _polygons(normals, offsets, line)
    return _Slices(polygons, origin, empty | (line.any(1) & ~_closed(polygons)))


def _compiled(frame: Frame, pair: Tensor, tau: Tensor) -> _Slices:
    from pyro_cpa.integrals.polytope_compiled import slices

    fields = (
        frame.pivot,
        frame.along,
        frame.across,
        frame.slack,
        frame.along_gap,
        frame.across_gap,
        frame.slack_gap,
    )
    Q, F = len(tau), frame.slack.shape[1]
    starts, ends, origin = tau.new_zeros(Q, F), tau.new_zeros(Q, F), tau.new_empty(Q, 2)
    normals, offsets = tau.new_zeros(Q, F, 2), tau.new_full((Q, F), torch.inf)
    count, empty = torch.empty_like(pair), torch.empty_like(pair, dtype=torch.bool)
    split = (
        array(pair),
        array(tau),
        *(t.numpy() for t in (normals, offsets, starts, ends, count, origin, empty)),
    )
    shared = *map(array, fields), _STEEP, _ROUNDING, _BESIDE
    in_blocks(slices, shared, [(part, 0) for part in split], Q)
    most = int(count.max()) if Q else 0
    return _Slices(
        Polygons(normals[:, :most], offsets[:, :most], starts[:, :most], ends[:, :most]), origin, empty
    )


def _polygons(normals: Tensor, offsets: Tensor, line: Tensor) -> Polygons:
    """Polygons bounded by lines (Q, E), of which some may not touch them.

    Edges no longer than their rounding error do not count, so that slices as thin as that are empty.
    """
    tangents = torch.stack([-normals[..., 1], normals[..., 0]], dim=-1)
    # On line e the line j is where  s rate = room.
    rate = tangents @ normals.mT
    room = offsets[:, None] - offsets[..., None] * (normals @ normals.mT)
    crossing = (rate.abs() > _STEEP) & line[:, None]
    slope = torch.where(crossing, rate, 1.0)
    meets = room / slope
    blur = (meets.abs() + offsets.abs()[:, None] + offsets.abs()[..., None]) * (_ROUNDING / slope.abs())
    end, last = torch.where(crossing & (rate > 0), meets, torch.inf).min(2)
    start, first = torch.where(crossing & (rate < 0), meets, -torch.inf).max(2)
    unsure = blur.gather(2, torch.stack([first, last], dim=2)).sum(2)
    itself = torch.eye(line.shape[1], dtype=torch.bool, device=line.device)
    beyond = (~crossing & line[:, None] & ~itself & (room < 0)).any(2)
    edge = line & (end - start > unsure) & ~beyond
    return Polygons(
        normals=torch.where(edge[..., None], normals, 0.0),
        offsets=torch.where(edge, offsets, torch.inf),
        starts=torch.where(edge, start, 0.0),
        ends=torch.where(edge, end, 0.0),
    )


def _closed(polygons: Polygons) -> Tensor:
    """(Q,) whether the edges go all around: those of a bounded polygon are three at least, of others one or two."""
    is_edge = polygons.is_edge
    open_ = is_edge & (torch.isinf(polygons.starts) | torch.isinf(polygons.ends))
    lines = torch.isinf(polygons.starts) & torch.isinf(polygons.ends) & is_edge
    enough = torch.where(lines.any(1), 1, torch.where(open_.any(1), 2, 3))
    return is_edge.sum(1) >= enough


def slice_log_mass(frame: Frame, pair: Tensor, tau: Tensor) -> Tensor:
    """Log of the standard normal's mass on each slice: (1, Q)."""
    cut = _slices(frame, pair, tau)
    return torch.where(cut.empty, -torch.inf, log_mass(*cut.seen()))[None]


def slice_moments(frame: Frame, pair: Tensor, tau: Tensor) -> Tensor:
    """Log-mass, mean (2) and covariance (xx, xy, yy) of the standard normal on each slice: (6, Q)."""
    cut = _slices(frame, pair, tau)
    mass, mean, covariance = moments(*cut.seen())
    x, y = (mean + cut.origin).mT
    (xx, xy), (_, yy) = covariance.permute(1, 2, 0)
    return torch.stack([torch.where(cut.empty, -torch.inf, mass), x, y, xx, xy, yy])


def slice_sample(frame: Frame, pair: Tensor, tau: Tensor) -> Tensor:
    """One draw (Q, 2) of the standard normal on each slice."""
    cut = _slices(frame, pair, tau)
    return sample(*cut.seen()) + cut.origin
