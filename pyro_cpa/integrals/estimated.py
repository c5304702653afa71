# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Integrals over polytopes of more than three dimensions: estimates with a standard error, and exact draws."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_cpa.integrals.dispatch import (
    Moments,
    log_mass,
    log_mass_bound,
    log_mass_replicates,
    moments,
    sample,
)
from pyro_cpa.integrals.estimated_cells import EstimatedPolytopes
from pyro_cpa.integrals.polytope import map_pairs, nearest_white
from pyro_cpa.integrals.separation import SCRAMBLES, Weighted, draw, sobol
from pyro_cpa.integrals.separation_frame import SeparationFrame, turned
from pyro_cpa.integrals.separation_sample import draw_points
from pyro_cpa.partition.cells import Polytopes

__all__ = []

_NUMBERS_AT_ONCE = 2**20  # pairs x facets x points: a few temporaries of 8 MiB
_DRAWN_AT_ONCE = 1024


def _chunk(cells: EstimatedPolytopes, points: int) -> int:
    return max(1, _NUMBERS_AT_ONCE // (points * max(1, cells.cells.offsets.shape[1])))


def _points(cells: EstimatedPolytopes, like: Tensor) -> Tensor:
    return sobol(cells.dim - 1, cells.num_points, cells.seed).to(like)


def _weigh(
    cells: Polytopes, loc: Tensor, scale_tril: Tensor, uniform: Tensor
) -> tuple[SeparationFrame, Weighted]:
    frame = turned(cells, loc, scale_tril)
    return frame, draw(frame, uniform)


@log_mass_replicates.register
@torch.no_grad()
def _log_mass_replicates(cells: EstimatedPolytopes, loc: Tensor, scale_tril: Tensor) -> Tensor:
    uniform = _points(cells, loc)

    def compute(cells: Polytopes, loc: Tensor, scale_tril: Tensor) -> Tensor:
        _, found = _weigh(cells, loc, scale_tril, uniform)
        weights = found.log_weight.unflatten(1, (SCRAMBLES, -1))
        return weights.logsumexp(-1) - math.log(weights.shape[-1])

    return map_pairs(cells.cells, loc, scale_tril, SCRAMBLES, compute, _chunk(cells, len(uniform)))


@log_mass.register
@torch.no_grad()
def _log_mass(cells: EstimatedPolytopes, loc: Tensor, scale_tril: Tensor) -> Tensor:
    return log_mass_replicates(cells, loc, scale_tril).logsumexp(-1) - math.log(SCRAMBLES)


@moments.register
@torch.no_grad()
def _moments(cells: EstimatedPolytopes, loc: Tensor, scale_tril: Tensor) -> Moments:
    uniform, L = _points(cells, loc), cells.dim

    def compute(cells: Polytopes, loc: Tensor, scale_tril: Tensor) -> Tensor:
        frame, found = _weigh(cells, loc, scale_tril, uniform)
        total = found.log_weight.logsumexp(1)
        empty = torch.isinf(total)
        weight = (found.log_weight - torch.where(empty, 0.0, total)[:, None]).exp()
        mean = (found.points @ weight[..., None])[..., 0]
        centred = found.points - mean[..., None]
        covariance = (centred * weight[:, None]) @ centred.mT
        covariance[:, -1, -1] += (weight * found.last_variance).sum(1)
        covariance = frame.image @ covariance @ frame.image.mT
        # A cell without interior, or one that no point found, keeps its reference point as mean.
        mean = torch.where(empty[:, None], 0.0, mean)
        covariance = torch.where(empty[:, None, None], 0.0, 0.5 * (covariance + covariance.mT))
        mean = frame.origin + (frame.image @ mean[..., None])[..., 0]
        log_masses = total - math.log(len(uniform))
        return torch.cat([log_masses[:, None], mean, covariance.flatten(1)], dim=1)

    found = map_pairs(cells.cells, loc, scale_tril, 1 + L + L * L, compute, _chunk(cells, len(uniform)))
    return Moments(found[..., 0], found[..., 1 : 1 + L], found[..., 1 + L :].unflatten(-1, (L, L)))


@log_mass_bound.register
@torch.no_grad()
def _log_mass_bound(cells: EstimatedPolytopes, loc: Tensor, scale_tril: Tensor) -> Tensor:
    return -0.5 * nearest_white(cells.cells, loc, scale_tril).square().sum(-1)


@sample.register
@torch.no_grad()
def _sample(
    cells: EstimatedPolytopes, loc: Tensor, scale_tril: Tensor, sample_shape: tuple[int, ...] = ()
) -> Tensor:
    count, L = math.prod(sample_shape), loc.shape[-1]

    def compute(cells: Polytopes, loc: Tensor, scale_tril: Tensor) -> Tensor:
        return draw_points(turned(cells, loc, scale_tril), count).flatten(1)

    draws = map_pairs(cells.cells, loc, scale_tril, count * L, compute, _DRAWN_AT_ONCE)
    draws = draws.unflatten(-1, (count, L))
    return draws.movedim(-2, 0).reshape(*sample_shape, *loc.shape)
