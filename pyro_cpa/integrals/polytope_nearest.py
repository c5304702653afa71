# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
r"""The point of an intersection of half-spaces nearest to the origin, for many of them at once.

.. math:: \min_y \tfrac12 |y|^2 \quad \text{subject to} \quad u_f \cdot y \le h_f

The dual active-set method starts from the origin, adds the constraint violated most and lets go of those whose
multiplier would turn negative. The distance only grows on the way, so that it is a lower bound at any time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["nearest_in_half_spaces"]

_PARALLEL = 1e-12  # a normal this close to the span of the active ones does not leave it
_SATISFIED = 1e-13  # violations this small, against what they are the difference of, are rounding


class _State(NamedTuple):
    """P problems: point, active constraints (-1 where a slot is free), multipliers, the constraint at work on."""

    point: Tensor
    active: Tensor
    multiplier: Tensor
    entering: Tensor
    pressure: Tensor


def nearest_in_half_spaces(normals: Tensor, distances: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest points and the constraints that hold them.

    Args:
        normals: (P, F, L) unit normals u, zero where padded.
        distances: (P, F) h, ``+inf`` where padded.

    Returns:
        Points (P, L), the origin where it satisfies all; active constraints (P, L), -1 for none.

    References:
        D. Goldfarb, A. Idnani (1983), "A numerically stable dual method for solving strictly convex quadratic
        programs", Mathematical Programming 27, Section 3.
    """
    P, F, L = normals.shape
    point = normals.new_zeros(P, L)
    active = torch.full((P, L), -1, dtype=torch.long, device=normals.device)
    if F == 0:
        return point, active
    where = (distances.amin(1) < 0).nonzero()[:, 0]
    state = _State(
        point[where],
        active[where],
        point[where],
        torch.full_like(where, -1),
        point[where, 0],
    )
    normals, distances = normals[where], distances[where]
    for _ in range(10 * (F + L)):
        if len(where) == 0:
            break
        state, done = _step(normals, distances, state)
        if bool(done.any()):
            point[where[done]], active[where[done]] = state.point[done], state.active[done]
            left = ~done
            where, normals, distances = where[left], normals[left], distances[left]
            state = _State(*(field[left] for field in state))
    point[where], active[where] = state.point, state.active
    return point, active


def _step(normals: Tensor, distances: Tensor, state: _State) -> tuple[_State, Tensor]:
    """One step of every problem, and which of them were solved before it."""
    point, active, multiplier, entering, pressure = state
    P, _, L = normals.shape
    every = torch.arange(P, device=point.device)
    excess = (normals @ point[..., None])[..., 0] - distances
    size = torch.linalg.vector_norm(point, dim=1, keepdim=True)
    worst = torch.where(excess > _SATISFIED * (size + distances.abs()), excess, -torch.inf).max(1)
    done = (entering < 0) & (worst.values == -torch.inf)
    entering = torch.where(entering < 0, worst.indices, entering)
    normal, excess = normals[every, entering], excess[every, entering]
    held = torch.where((active >= 0)[..., None], normals[every[:, None], active.clamp(min=0)], 0.0)
    along, share = _project(held, normal)
    gain = along.square().sum(1)
    # Until the constraint holds, or the first multiplier vanishes.
    full = torch.where(gain > _PARALLEL**2, excess / gain, torch.inf)
    limits = torch.where((active >= 0) & (share > 0), multiplier / share, torch.inf)
    limit, leaving = limits.min(1)
    step = torch.minimum(full, limit)
    # Nothing to give: without rounding the half-spaces would have no point in common.
    done = done | torch.isinf(step)
    step = torch.where(done, 0.0, step)
    point = point - step[:, None] * along
    multiplier = multiplier - step[:, None] * share
    pressure = pressure + step
    added, dropped = ~done & (full <= limit), ~done & (full > limit)
    free = (active < 0).int().argmax(1)
    slot = torch.where(dropped, leaving, free)
    change = added | dropped
    active = active.clone()
    active[every[change], slot[change]] = torch.where(added, entering, -1)[change]
    multiplier[every[change], slot[change]] = torch.where(added, pressure, 0.0)[change]
    entering = torch.where(dropped, entering, -1)
    return _State(point, active, multiplier, entering, torch.where(dropped, pressure, 0.0)), done


def _project(held: Tensor, normal: Tensor) -> tuple[Tensor, Tensor]:
    """Part of ``normal`` (P, L) orthogonal to the rows of ``held`` (P, L, L), zero where free, and the
    coefficients (P, L) of the rest in terms of these rows."""
    L = normal.shape[1]
    basis: list[Tensor] = []
    for k in range(L):
        row = held[:, k]
        for _ in range(2):
            for q in basis:
                row = row - (q * row).sum(1, keepdim=True) * q
        size = torch.linalg.vector_norm(row, dim=1, keepdim=True)
        basis.append(row / torch.where(size > 0, size, 1.0))
    rest = normal
    for _ in range(2):
        for q in basis:
            rest = rest - (q * rest).sum(1, keepdim=True) * q
    # The rows are a triangular combination of the basis: solve backwards.
    share = torch.zeros_like(normal)
    for k in reversed(range(L)):
        target = (basis[k] * normal).sum(1)
        for j in range(k + 1, L):
            target = target - share[:, j] * (basis[k] * held[:, j]).sum(1)
        diagonal = (basis[k] * held[:, k]).sum(1)
        share[:, k] = torch.where(diagonal > 0, target / torch.where(diagonal > 0, diagonal, 1.0), 0.0)
    return rest, share
