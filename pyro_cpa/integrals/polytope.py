# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Integrals over convex polytopes of three dimensions, bounded or not; those of more are estimated."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pyro_cpa.integrals.dispatch import Moments, log_mass, log_mass_bound, moments, sample
from pyro_cpa.integrals.estimated_cells import EstimatedPolytopes
from pyro_cpa.integrals.normal import HALF_LOG_2PI, at_a_time
from pyro_cpa.integrals.polytope_frame import facing, whiten
from pyro_cpa.integrals.polytope_nearest import nearest_in_half_spaces
from pyro_cpa.integrals.polytope_panels import integrate, per_pair
from pyro_cpa.integrals.polytope_sample import draw_points
from pyro_cpa.integrals.polytope_slices import slice_log_mass, slice_moments
from pyro_cpa.partition.cells import Polytopes

__all__ = ["map_pairs", "nearest_white"]


_CHUNK = 256  # pairs per thread worked on at a time; each is cut into some 80 slices
_LIGHT = 8192  # the same where only the nearest point is found


def map_pairs(
    cells: Polytopes,
    loc: Tensor,
    scale_tril: Tensor,
    outputs: int,
    compute: Callable[[Polytopes, Tensor, Tensor], Tensor],
    chunk: int = _CHUNK,
) -> Tensor:
    """Applies ``compute(cells, loc, scale_tril)``, (P, outputs) from P <= chunk pairs: (..., R, outputs)."""
    R, L = loc.shape[-2:]
    regions = torch.arange(R, device=loc.device).expand(loc.shape[:-1]).reshape(-1)
    means = loc.reshape(-1, L)
    shared = scale_tril.dim() == 3
    factors = scale_tril if shared else scale_tril.expand(*loc.shape, L).reshape(-1, L, L)
    found = loc.new_empty(len(regions), outputs)
    for pairs in torch.arange(len(regions), device=loc.device).split(at_a_time(chunk, loc.device)):
        region = regions[pairs]
        if len(region):
            found[pairs] = compute(cells[region], means[pairs], factors[region if shared else pairs])
    return found.reshape(*loc.shape[:-1], outputs)


def _pair_log_mass(cells: Polytopes, loc: Tensor, scale_tril: Tensor) -> Tensor:
    frame = facing(cells, loc, scale_tril)
    panels = integrate(frame, slice_log_mass)
    total = per_pair(panels.pair, panels.log_mass, len(loc))
    return (total - 0.5 * frame.t0 * frame.t0 - HALF_LOG_2PI)[:, None]


def _pair_moments(cells: Polytopes, loc: Tensor, scale_tril: Tensor) -> Tensor:
    """Log-mass, mean (3) and covariance (9) of P pairs, (P, 13)."""
    frame = facing(cells, loc, scale_tril)
    panels = integrate(frame, slice_moments)
    total = per_pair(panels.pair, panels.log_mass, len(loc))
    weights = panels.weights(torch.where(torch.isinf(total), 0.0, total))
    _, x, y, xx, xy, yy = panels.values.unbind(1)
    tau = panels.tau()
    ones = torch.ones_like(tau)
    point = torch.stack([tau, x, y])
    second = point[:, None] * point
    second[1, 1] += xx
    second[1, 2] += xy
    second[2, 1] += xy
    second[2, 2] += yy
    fields = torch.cat([ones[None], point, second.flatten(0, 1)])
    sums = (fields * weights).sum(-1)
    sums = torch.zeros(13, len(loc), dtype=loc.dtype, device=loc.device).index_add(1, panels.pair, sums)
    # A cell without interior keeps its reference point as mean.
    sums = sums / torch.where(sums[0] > 0, sums[0], 1.0)
    mean = sums[1:4].T
    covariance = sums[4:].T.reshape(-1, 3, 3) - mean[..., None] * mean[:, None]
    covariance = frame.image @ covariance @ frame.image.mT
    covariance = 0.5 * (covariance + covariance.mT)
    mean = frame.origin + (frame.image @ mean[..., None])[..., 0]
    log_masses = total - 0.5 * frame.t0 * frame.t0 - HALF_LOG_2PI
    return torch.cat([log_masses[:, None], mean, covariance.flatten(1)], dim=1)


@log_mass.register
@torch.no_grad()
def _log_mass(cells: Polytopes, loc: Tensor, scale_tril: Tensor) -> Tensor:
    if cells.dim > 3:
        return log_mass(EstimatedPolytopes(cells), loc, scale_tril)
    return map_pairs(cells, loc, scale_tril, 1, _pair_log_mass)[..., 0]


@moments.register
@torch.no_grad()
def _moments(cells: Polytopes, loc: Tensor, scale_tril: Tensor) -> Moments:
    if cells.dim > 3:
        return moments(EstimatedPolytopes(cells), loc, scale_tril)
    found = map_pairs(cells, loc, scale_tril, 13, _pair_moments)
    return Moments(found[..., 0], found[..., 1:4], found[..., 4:].unflatten(-1, (3, 3)))


@log_mass_bound.register
@torch.no_grad()
def _log_mass_bound(cells: Polytopes, loc: Tensor, scale_tril: Tensor) -> Tensor:
    return -0.5 * nearest_white(cells, loc, scale_tril).square().sum(-1)


def nearest_white(cells: Polytopes, loc: Tensor, scale_tril: Tensor) -> Tensor:
    """(..., R, L) points of the cells nearest to the means, in whitened coordinates around these."""
    R, L = loc.shape[-2:]
    shared = scale_tril.dim() == 3
    regions = torch.arange(R, device=loc.device).expand(loc.shape[:-1]).reshape(-1)
    means = loc.reshape(-1, L)
    factors = scale_tril if shared else scale_tril.expand(*loc.shape, L).reshape(-1, L, L)
    whitened = whiten(cells.normals, factors) if shared else None
    found = torch.empty_like(means)
    for pairs in torch.arange(len(regions), device=loc.device).split(at_a_time(_LIGHT, loc.device)):
        region = regions[pairs]
        if whitened is None:
            normals, sizes = whiten(cells.normals[region], factors[pairs])
        else:
            normals, sizes = whitened[0][region], whitened[1][region]
        offsets = cells.offsets[region] - (cells.normals[region] @ means[pairs][..., None])[..., 0]
        found[pairs], _ = nearest_in_half_spaces(normals, offsets / sizes)
    return found.reshape(loc.shape)


@sample.register
@torch.no_grad()
def _sample(cells: Polytopes, loc: Tensor, scale_tril: Tensor, sample_shape: tuple[int, ...] = ()) -> Tensor:
    if cells.dim > 3:
        return sample(EstimatedPolytopes(cells), loc, scale_tril, sample_shape)
    count, L = math.prod(sample_shape), loc.shape[-1]

    def draw(cells: Polytopes, loc: Tensor, scale_tril: Tensor) -> Tensor:
        return draw_points(facing(cells, loc, scale_tril), count).transpose(0, 1).flatten(1)

    draws = map_pairs(cells, loc, scale_tril, count * L, draw).unflatten(-1, (count, L))
    return draws.movedim(-2, 0).reshape(*sample_shape, *loc.shape)
