# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
r"""Exact draws from a Gaussian truncated to a polytope of any dimension, by rejection.

With s the slacks of the facets that press on the nearest point with multipliers p, the Gaussian is proportional to

.. math:: e^{-\sum p_i s_i} \; e^{-|v|^2/2}, \qquad s \ge 0.

Slacks of large multipliers are drawn from exponential laws and the coordinates orthogonal to their facets from normal ones,
on intervals that hold the cell. What is left out of the density is at most 1, and is the probability of acceptance.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_cpa.errors import UnsupportedModel
from pyro_cpa.integrals.separation import truncated_draw
from pyro_cpa.integrals.separation_frame import SeparationFrame

__all__ = ["draw_points"]

_STRONG = 1.0  # multipliers below this leave more to the normal law than to the exponential one
_FIRST, _MOST = 16, 2**17  # proposals of one draw in the first round, and in all
_AT_ONCE = 2**20  # proposals times dimensions


def draw_points(frame: SeparationFrame, count: int) -> Tensor:
    """``count`` draws from each of P cells on the original space: (P, count, L).

    Raises:
        UnsupportedModel: a cell that fills so little of the box around it that no draw falls into it.
    """
    P, L = frame.slope.shape
    pair = torch.arange(P, device=frame.slope.device).repeat_interleave(count)
    drawn = torch.zeros(P * count, L, dtype=frame.slope.dtype, device=frame.slope.device)
    strong = _strong(frame)
    pending = torch.arange(P * count, device=pair.device)
    tried, tries = 0, _FIRST
    while len(pending):
        if tried >= _MOST:
            raise UnsupportedModel(
                f"a draw from a cell of {L} dimensions was rejected {tried} times: the cell fills too little of the "
                "box around it. Use fewer latents, or estimate moments (mean, covariance_matrix), which need no draws"
            )
        rest = []
        for part in pending.split(max(1, _AT_ONCE // (tries * L))):
            point, accepted = _propose(frame, strong, pair[part], tries)
            hit, first = accepted.max(1)
            drawn[part[hit]] = point[hit, first[hit]]
            rest.append(part[~hit])
        pending = torch.cat(rest)
        tried, tries = tried + tries, min(4 * tries, 2**16)
    moved = frame.origin[pair] + (frame.image[pair] @ drawn[..., None])[..., 0]
    return moved.reshape(P, count, L)


def _strong(frame: SeparationFrame) -> Tensor:
    """(P,) how many of the first axes come from facets that press hard; the frame puts these first."""
    pressed = torch.where(frame.facet >= 0, frame.pressure.gather(1, frame.facet.clamp(min=0)), 0.0)
    return (pressed > _STRONG).cumprod(1).sum(1)


def _propose(frame: SeparationFrame, strong: Tensor, pair: Tensor, tries: int) -> tuple[Tensor, Tensor]:
    """Proposals (D, tries, L) on the frames' axes, and which are accepted (D, tries)."""
    L = frame.slope.shape[1]
    like = frame.slope
    uniform = torch.rand(len(pair), tries, L + 1, dtype=like.dtype, device=like.device)
    normals, slack, pressure = frame.normals[pair], frame.slack[pair], frame.pressure[pair]
    facet, strong = frame.facet[pair].clamp(min=0), strong[pair]
    points: list[Tensor] = []
    left = torch.zeros_like(uniform[..., 0])  # log of what the proposals leave out
    for k in range(L):
        is_slack = (k < strong)[:, None]
        low, high = frame.low[pair, k, None], frame.high[pair, k, None]
        value = truncated_draw(
            low.expand(-1, tries).contiguous(), high.expand(-1, tries).contiguous(), uniform[..., k]
        )
        if bool(is_slack.any()):
            chosen = facet[:, k]
            every = torch.arange(len(pair), device=pair.device)
            rate = torch.where(is_slack[:, 0], pressure[every, chosen], 1.0)[:, None]
            room = frame.room[pair, chosen][:, None]
            depth = -torch.log1p(uniform[..., k] * torch.expm1(-rate * room)) / rate
            row = normals[every, chosen]
            before = sum(
                (row[:, j, None] * points[j] for j in range(k)), start=torch.zeros_like(uniform[..., 0])
            )
            pivot = torch.where(is_slack[:, 0], row[:, k], 1.0)[:, None]
            from_slack = (-depth - before) / pivot
            value = torch.where(is_slack, from_slack, value)
            left = left - torch.where(is_slack, 0.5 * value * value, 0.0)
        points.append(value)
    point = torch.stack(points, dim=-1)
    along = point @ normals.mT
    inside = (along <= slack[:, None] * (1 + 1e-12) + 1e-300).all(-1)
    # Facets that press too little to have slacks of their own.
    column = torch.arange(L, device=pair.device)
    weak = pressure.scatter_add(1, facet, -pressure.gather(1, facet) * (column < strong[:, None]))
    left = left + (along @ weak[..., None])[..., 0]
    return point, inside & (uniform[..., L].log() <= left)
