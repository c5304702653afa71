# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
r"""Ascent of the log-joint of a piecewise-affine decoder from region to region.

In each region the log-joint is one quadratic, whose summit is known. All rows and starts climb at once. The latent is
whitened by its prior, :math:`z = m + C y`, so that y has the prior N(0, I).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..distributions.missing import observed_tril
from ..partition.local import LocalPieces, Piece

__all__ = ["LocalGaussians", "WhitenedProblem", "climb_regions"]

# Walls on which a point is held at once; where more meet, the ascent ends.
MAX_HELD = 8
# A step shorter than this, in prior standard deviations, has not moved.
STILL = 1e-12


class LocalGaussians(NamedTuple):
    """Gaussian posteriors of affine pieces, in whitened coordinates.

    Attributes:
        centre: (P, L) mean.
        precision_tril: (P, L, L) lower Cholesky factor of the precision.
        log_weight: (P,) Laplace's estimate of log p(x) from the joint at the centre; log p(x) itself where the piece is
            the whole decoder.
        pattern: (P, H) of the piece.
    """

    centre: Tensor
    precision_tril: Tensor
    log_weight: Tensor
    pattern: Tensor


class WhitenedProblem:
    """Rows of data under a decoder, noise and prior, detached and in float64.

    Args:
        pieces: of the decoder.
        x: (N, D) data, NaN where missing.
        prior_loc: (L,).
        prior_tril: (L, L).
        noise_scale: (D,) standard deviations or (D, D) Cholesky factor.
    """

    def __init__(
        self, pieces: LocalPieces, x: Tensor, prior_loc: Tensor, prior_tril: Tensor, noise_scale: Tensor
    ) -> None:
        self.pieces, self.loc, self.tril = pieces, prior_loc, prior_tril
        self.present = ~x.isnan()
        self.x = torch.where(self.present, x, 0.0)
        self.scale = noise_scale
        self._trils: Tensor | None = None
        if noise_scale.dim() == 1:
            log_det = torch.where(self.present, noise_scale.log(), 0.0).sum(-1)
        elif bool(self.present.all()):
            log_det = noise_scale.diagonal().log().sum()
        else:
            self._trils = observed_tril(noise_scale @ noise_scale.mT, ~self.present)
            log_det = self._trils.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        self._constant = -log_det - 0.5 * math.log(2 * math.pi) * self.present.sum(-1)

    def _whiten(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Lx^-1 columns (P, D, C), zero where the data are missing."""
        columns = torch.where(self.present[rows, :, None], columns, 0.0)
        if self.scale.dim() == 1:
            return columns / self.scale[:, None]
        tril = self.scale if self._trils is None else self._trils[rows]
        return torch.linalg.solve_triangular(tril, columns, upper=False)

    def log_joint(self, rows: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Log-joint (P,) at y (P, L), but for the constant of the prior, and patterns (P, H)."""
        pattern, mean = self.pieces.locate(self.loc + y @ self.tril.mT)
        white = self._whiten(rows, (self.x[rows] - mean)[..., None])
        square = white.square().sum((-2, -1)) + y.square().sum(-1)
        return self._constant.expand(len(self.x))[rows] - 0.5 * square, pattern

    def solve(self, rows: Tensor, pattern: Tensor) -> tuple[Piece, Tensor, Tensor]:
        """Pieces with slopes in y, their Gaussians' means (P, L) and precisions' Cholesky factors (P, L, L)."""
        piece = self.pieces.pieces(pattern)
        offsets = piece.offsets + piece.slopes @ self.loc
        units = piece.unit_offsets + piece.unit_slopes @ self.loc
        piece = piece._replace(
            slopes=piece.slopes @ self.tril,
            offsets=offsets,
            unit_slopes=piece.unit_slopes @ self.tril,
            unit_offsets=units,
        )
        columns = torch.cat([piece.slopes, (self.x[rows] - offsets)[..., None]], dim=-1)
        white = self._whiten(rows, columns)
        slopes, target = white[..., :-1], white[..., -1:]
        eye = torch.eye(slopes.shape[-1], dtype=slopes.dtype, device=slopes.device)
        precision_tril = torch.linalg.cholesky(eye + slopes.mT @ slopes)
        mean = torch.cholesky_solve(slopes.mT @ target, precision_tril)[..., 0]
        return piece, mean, precision_tril

    def gaussians(self, rows: Tensor, centre: Tensor | None, pattern: Tensor) -> LocalGaussians:
        """The Gaussians of the patterns' pieces, moved to ``centre`` where that is given."""
        _, mean, precision_tril = self.solve(rows, pattern)
        centre = mean if centre is None else centre
        log_det = precision_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        # (2 pi)^(L/2) of Laplace's estimate and of the prior's density cancel.
        log_weight = self.log_joint(rows, centre)[0] - log_det
        return LocalGaussians(centre, precision_tril, log_weight, pattern)


def climb_regions(
    problem: WhitenedProblem, rows: Tensor, start: Tensor, max_steps: int
) -> tuple[Tensor, Tensor]:
    """Climb from ``start`` (P, L), each for its row of the data, to summits of the log-joint.

    A step goes to the summit of the present piece if the log-joint is higher there; else along the same line to the
    first wall, and on in the next region. A point that the regions on both sides of a wall send back to it is held on
    the wall, and climbs along it.

    Returns:
        Points (P, L) and patterns (P, H) of the regions in which they ended; on a wall, of one beside it.
    """
    if not problem.pieces.num_units:
        pattern = problem.pieces.locate(start)[0]
        return problem.solve(rows, pattern)[1], pattern
    height, pattern = problem.log_joint(rows, start)
    state = _Climb(rows, start.clone(), height, pattern)
    left = torch.arange(len(rows), device=start.device)
    for _ in range(max_steps):
        left = left[~_step(problem, state, left)]
        if not len(left):
            break
    return state.y, state.pattern


class _Climb:
    """Where every climber is: in y, on which walls it is held, and which walls it crossed without moving."""

    def __init__(self, rows: Tensor, y: Tensor, height: Tensor, pattern: Tensor) -> None:
        self.rows, self.y, self.height, self.pattern = rows, y, height, pattern
        self.held = torch.zeros_like(pattern, dtype=torch.bool)
        self.crossed = torch.zeros_like(self.held)
        # Walls whose other side was looked at since the last move.
        self.turned = torch.zeros_like(self.held)


def _step(problem: WhitenedProblem, state: _Climb, at: Tensor) -> Tensor:
    """Move the climbers ``at``; which of them are done."""
    rows, y = state.rows[at], state.y[at]
    piece, mean, precision_tril = problem.solve(rows, state.pattern[at])
    free = mean - y
    held = state.held[at]
    direction, push = _along_walls(free, piece.unit_slopes, held, precision_tril)
    length, unit, way = _first_wall(piece, y, direction, held)
    arrived = length >= 1
    # To the summit at once, where the truth agrees with the piece that it is higher.
    summit = y + direction
    height, pattern = problem.log_joint(rows, summit)
    leap = ~arrived & ~held.any(-1) & (height > state.height[at])
    part = length.clamp(max=1)
    moved = leap | (part * direction.norm(dim=-1) > STILL)
    state.y[at] = torch.where((arrived | leap)[:, None], summit, y + part[:, None] * direction)
    state.crossed[at[moved]] = False
    state.turned[at[moved]] = False
    state.pattern[at[leap]], state.height[at[leap]] = pattern[leap], height[leap]
    steady = at[~leap]
    state.height[steady] = problem.log_joint(state.rows[steady], state.y[steady])[0]
    blocked = ~arrived & ~leap
    _meet_wall(state, at[blocked], unit[blocked], way[blocked], moved[blocked])
    done = torch.zeros_like(arrived)
    done[arrived] = _settle(state, at[arrived], Piece(*(field[arrived] for field in piece)), push[arrived])
    return done


def _along_walls(
    free: Tensor, normals: Tensor, held: Tensor, precision_tril: Tensor
) -> tuple[Tensor, Tensor]:
    """Steps (P, L) to the summits on the walls that climbers are held on, and with what force (P, H) these hold them.

    ``free`` is the step to the piece's summit; a positive force is one against a unit's rising input.
    """
    push = torch.zeros_like(held, dtype=free.dtype)
    if not bool(held.any()):
        return free, push
    count = min(MAX_HELD, int(held.sum(-1).max()))
    index = held.to(torch.int8).topk(count, dim=-1).indices
    used = held.gather(1, index)
    rows = normals.gather(1, index[..., None].expand(-1, -1, normals.shape[-1])) * used[..., None]
    spread = torch.cholesky_solve(rows.mT, precision_tril)
    # Walls may be parallel, and unused rows are zero.
    force = torch.linalg.pinv(rows @ spread, hermitian=True, rtol=1e-10) @ (rows @ free[..., None])
    return free - (spread @ force)[..., 0], push.scatter(1, index, force[..., 0] * used)


def _first_wall(piece: Piece, y: Tensor, direction: Tensor, held: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How far (P,), in lengths of ``direction``, the first wall is, whose it is, and to which segment (+1, -1) it leads."""
    value = (piece.unit_slopes @ y[..., None])[..., 0] + piece.unit_offsets
    speed = (piece.unit_slopes @ direction[..., None])[..., 0]
    room = torch.where(speed > 0, piece.upper - value, piece.lower - value)
    length = torch.where((speed == 0) | held, torch.inf, room / speed)
    # Rounding may leave a point a hair beyond the wall that it came through.
    first, unit = length.clamp(min=0).min(dim=-1)
    return first, unit, speed.gather(1, unit[:, None])[:, 0].sign().to(torch.int8)


def _meet_wall(state: _Climb, at: Tensor, unit: Tensor, way: Tensor, moved: Tensor) -> None:
    """Cross a wall; or be held on it, if it was crossed already and there was no way on."""
    back = state.crossed[at, unit] & ~moved
    state.held[at[back], unit[back]] = True
    on, through = at[~back], unit[~back]
    state.crossed[on, through] = True
    state.pattern[on, through] += way[~back]


def _settle(state: _Climb, at: Tensor, piece: Piece, push: Tensor) -> Tensor:
    """Climbers at the summit of what they are held on: let go of walls that hold them back; who has nowhere to go."""
    held = state.held[at]
    value = (piece.unit_slopes @ state.y[at, :, None])[..., 0] + piece.unit_offsets
    upper = piece.upper - value < value - piece.lower
    release = held & torch.where(upper, push < 0, push > 0)
    state.held[at] = held & ~release
    stay = ~release.any(-1)
    # Once, from the other side of each wall too.
    untried = held & ~state.turned[at]
    turn = stay & untried.any(-1)
    unit = untried.to(torch.int8).argmax(-1)
    who, through = at[turn], unit[turn]
    state.turned[who, through] = True
    state.held[who, through] = False
    state.crossed[who, through] = True
    state.pattern[who, through] += torch.where(upper[turn, through], 1, -1).to(torch.int8)
    return stay & ~turn
